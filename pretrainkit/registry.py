"""Names -> classes, imported only when asked for.

A registry line is the only edit, besides one new file, that adds an engine, a format, a launcher or an executor.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from pretrainkit.errors import ConfigError


def did_you_mean(wrong: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The names closest to a misspelt one, best first; at most `limit`, ignoring case; [] when nothing is near."""
    by_folded: dict[str, str] = {}
    for name in known:
        by_folded.setdefault(name.casefold(), name)
    for cutoff in (0.7, 0.4):  # far names only when there is no near one
        matches = difflib.get_close_matches(wrong.casefold(), by_folded, n=limit, cutoff=cutoff)
        if matches:
            return [by_folded[match] for match in matches]
    return []


class Registry:
    """A table of `name -> "module:attribute"` that imports an entry on first use.

    Example:
        >>> ENGINES = Registry(
        ...     "tokenizer engine", {"tokenizers": "pretrainkit.tokenizers.huggingface:HuggingFaceEngine"}
        ... )
        >>> engine_class = ENGINES.get("tokenizers")
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def get(self, name: str) -> Any:
        """The class or function registered under `name`.

        Raises:
            ConfigError: No such name; the message lists the nearest ones.
        """
        if name not in self._entries:
            near = did_you_mean(name, self._entries) or sorted(self._entries)
            raise ConfigError(f"unknown {self.kind} {name!r}; did you mean {' or '.join(near)}?")
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
