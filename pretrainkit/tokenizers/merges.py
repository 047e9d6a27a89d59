"""The merge rules of a byte-level BPE that text can ever use.

Comes in: the text of a tokenizer.json. Goes out: the same without rules that never apply. Guarantee: the ids of every
text stay the same.

A vocabulary that was made from tiktoken's files (Llama 3, Mistral-Nemo) lists every way to split a token in two: more
than twice as many rules as tokens. But where BPE makes a token, what happens within it is what happens to the token's
own characters by themselves: merges are chosen by rank, then from the left, and no merge crossed its ends. So its last
step is always the same rule, the last one when the token is encoded by itself; all others for it are dead. The table of
rules, which the engine looks into some twenty times for every new word, then fits into the processor's cache.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

# In JSON a quote inside a string is escaped, so this is a key and its list.
_MERGES = re.compile(r'(?<!\\)"merges"\s*:\s*(?=\[)')
# Where BPE does not begin with the characters of a word themselves.
_OTHER_BEGINNING = re.compile(
    r'(?<!\\)"(?:byte_fallback"\s*:\s*true|(?:continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"[^"])'
)
_NO_RULE = np.iinfo(np.int32).max
_Numbers = np.ndarray[Any, np.dtype[Any]]


def with_used_merges(definition: str) -> str:
    """A tokenizer.json, or the end of one, with those of its merges that text can use."""
    found = _MERGES.search(definition)
    if found is None or _OTHER_BEGINNING.search(definition):
        return definition
    merges, end = json.JSONDecoder().raw_decode(definition, found.end())
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in merges):
        return definition  # the older form, "left right": such files list each token once
    return definition[: found.end()] + json.dumps(used_merges(merges)) + definition[end:]


def used_merges(merges: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """The rules that text can use, in the order they came in.

    Args:
        merges: Pairs of tokens in order of rank; BPE begins with single characters.
    """
    tokens = [left + right for left, right in merges]
    ways = Counter(tokens)
    if len(ways) == len(tokens):
        return merges
    rules = _Rules(merges, tokens)
    by_length: dict[int, list[str]] = {}
    for token, count in ways.items():
        if count > 1:
            by_length.setdefault(len(token), []).append(token)
    last: dict[str, int] = {}
    for length, group in by_length.items():
        last.update(zip(group, rules.last_steps(group, length).tolist(), strict=True))
    return [
        pair
        for rank, (pair, token) in enumerate(zip(merges, tokens, strict=True))
        if last.get(token, rank) in (rank, _NO_RULE)  # a token that BPE cannot make keeps its rules: they hurt nobody
    ]


class _Rules:
    """Ranks of pairs of tokens, and BPE of many tokens of one length at a time."""

    def __init__(self, merges: Sequence[Sequence[str]], tokens: Sequence[str]) -> None:
        sides = [tokens, [left for left, _ in merges], [right for _, right in merges]]
        alphabet = set("".join(tokens))
        number = {token: index for index, token in enumerate(alphabet.union(*sides))}
        self._merged, left, right = (np.fromiter(map(number.__getitem__, side), np.int64, len(side)) for side in sides)
        self._of_character = np.zeros(max(map(ord, alphabet)) + 1, dtype=np.int64)
        for character in alphabet:
            self._of_character[ord(character)] = number[character]
        self._stuck = len(number)  # no token's number
        keys = left * (self._stuck + 1) + right
        self._order = np.argsort(keys)
        self._keys = keys[self._order]

    def _ranks(self, left: _Numbers, right: _Numbers) -> _Numbers:
        """Rank of the rule for each pair, or _NO_RULE."""
        keys = left * (self._stuck + 1) + right
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[places] == keys, self._order[places], _NO_RULE)

    def last_steps(self, tokens: Sequence[str], length: int) -> _Numbers:
        """(tokens,) rank of the rule that makes each token of its own characters, or _NO_RULE when none does."""
        codes = np.frombuffer("".join(tokens).encode("utf-32-le"), dtype="<u4")
        symbols = self._of_character[codes].reshape(len(tokens), length)
        ranks = self._ranks(symbols[:, :-1], symbols[:, 1:])
        rows = np.arange(len(tokens))
        while symbols.shape[1] > 2:  # one step of every row, so that all stay equally long
            at = ranks.argmin(axis=1)
            rank = ranks[rows, at]
            applies = rank != _NO_RULE
            symbols[rows, at] = np.where(applies, self._merged[np.where(applies, rank, 0)], self._stuck)
            symbols, ranks = _without(symbols, at + 1), _without(ranks, at)
            for place in (at - 1, at):  # the pairs with the new symbol
                inside = (place >= 0) & (place < ranks.shape[1])
                row, column = rows[inside], place[inside]
                ranks[row, column] = self._ranks(symbols[row, column], symbols[row, column + 1])
        return ranks[:, 0]


def _without(matrix: _Numbers, columns: _Numbers) -> _Numbers:
    """A matrix less one element of each row."""
    keep = np.ones(matrix.shape, dtype=bool)
    keep[np.arange(len(matrix)), columns] = False
    return matrix[keep].reshape(len(matrix), -1)
