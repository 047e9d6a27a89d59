"""Rules that no text can use are left out of a tokenizer, and nothing else changes."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import textwrap

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pretrainkit.tokenizers.merges import used_merges, with_used_merges
from pretrainkit.tokenizers.torture import torture_texts
from tests.conftest import BOS, EOS, make_texts


def source_text() -> list[str]:
    """Real text that every installation has: modules of the Python library."""
    return [inspect.getsource(module) for module in (argparse, ast, inspect, textwrap)]


@pytest.fixture(scope="module")
def definition():
    """A tokenizer as it is made of tiktoken's files, every way to split a token in two a rule; and those learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        source_text(), trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    )
    content = json.loads(tokenizer.to_str())
    vocabulary, learned = content["model"]["vocab"], content["model"]["merges"]
    rules = []
    for token in (left + right for left, right in learned):
        ways = [[token[:i], token[i:]] for i in range(1, len(token))]
        rules += [way for way in ways if way[0] in vocabulary and way[1] in vocabulary]
    content["model"]["merges"] = rules
    assert len(rules) > 1.5 * len(learned), "many rules are to be dead"
    return json.dumps(content), learned


def test_the_learned_rules_are_what_remains(definition):
    text, learned = definition
    assert json.loads(with_used_merges(text))["model"]["merges"] == learned


def test_every_text_keeps_its_ids(definition):
    text, _ = definition
    before, after = Tokenizer.from_str(text), Tokenizer.from_str(with_used_merges(text))
    texts = [*source_text(), *make_texts(100), *torture_texts([BOS, EOS]), *before.get_vocab()]
    for a, b in zip(before.encode_batch(texts), after.encode_batch(texts), strict=True):
        assert a.ids == b.ids


def test_a_token_made_by_a_later_rule_keeps_the_rule_that_makes_it():
    # "abc" has a lower rank than "ab": it is made from "ab" all the same, as soon as that is there.
    merges = [["ab", "c"], ["a", "bc"], ["a", "b"], ["x", "yz"], ["xy", "z"]]
    # "bc", "xy" and "yz" cannot be made: rules with them are dead, and those of "xyz", which BPE never makes, are kept.
    assert used_merges(merges) == [["ab", "c"], ["a", "b"], ["x", "yz"], ["xy", "z"]]


@pytest.mark.parametrize(
    "model",
    [
        {"byte_fallback": True},
        {"end_of_word_suffix": "</w>"},
        {"continuing_subword_prefix": "##"},
    ],
)
def test_where_bpe_begins_with_other_pieces_nothing_is_left_out(definition, model):
    content = json.loads(definition[0])
    content["model"] = {**content["model"], **model}
    content["model"]["merges"] = content["model"].pop("merges")  # last, as it is saved
    for text in (json.dumps(content), json.dumps(content, indent=1)):
        assert with_used_merges(text) is text


@pytest.mark.parametrize(
    "text", ['{"model": {"vocab": {"\\"merges\\": [": 0}}}', '{"model": {"merges": ["a b", "a c"]}}']
)
def test_text_without_such_rules_is_left_as_it_is(text):
    assert with_used_merges(text) is text
