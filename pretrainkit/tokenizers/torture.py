"""Text on which tokenizers disagree, fixed for ever: the same strings on every machine and Python version."""

# ruff: noqa: RUF001 - ambiguous characters are the point

from __future__ import annotations

import random

_HAND_PICKED = [
    "",
    " ",
    "a",
    "\x00",
    "nul\x00inside",
    "\ufeffbyte order mark",
    "\r\n\r\n  \r\r\n\n \t\v\f\x85\u2028\u2029 end",
    "  leading",
    "trailing  ",
    "   \n   \n\n   x",
    "\u00a0\u1680\u2000\u2003\u2009\u200a\u202f\u205f\u3000 spaces",
    "don't DON'T I'm I'LL we'Re they've it's's 'sup ''ll \u2019s can\u2019t",
    "1234567890 3.14159 1,000,000 0x1F ١٢٣ ४५६ ①②③ Ⅷ ½ ²",
    "e\u0301 é a\u030a å \u1e9b\u0323 ﬁ ﬂ Ⅳ \u212b \u2126 ｆｕｌｌ",  # NFC, NFD, NFKC differ
    "각 가\u11a8 \u1100\u1161\u11a8",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 1️⃣ ❤️ 🏴\U000e0067\U000e0062\U000e007f",
    "ﷺ العَرَبِيَّة עִבְרִית हिन्दी தமிழ் ไทย ខ្មែរ မြန်မာ 日本語 中文 한국어 ქართული ԱԲԳ",
    "\u202eright to left\u202c \u200b\u200c\u200d\u2060 zero width",
    "\ufffd\ufffe\uffff\ue000\U000f0000\U0010ffff\u0378",
    "İstanbul ıI ß ẞ ǅ Σς ŉ",
    "def f(x):\n\treturn {'a': [1, 2], **x}  # comment\n\n\n\nif __name__ == '__main__':\n    f(())\n",
    "<html><body class=\"x\">&amp;&nbsp;</body></html>\n\n```json\n{\"a\": null}\n```",
    "https://example.org/path?q=1&r=%20#frag user@example.org C:\\Users\\x",
    "snake_case camelCase SCREAMING_CASE kebab-case __dunder__ ALLCAPSword wordALLCAPS",
    "!!!???...---___***===~~~ ... … — – “quotes” «guillemets» ‘single’",
    "▁ ▁▁ ▁a Ġ Ċ ĉ <0x0A> <0xFF> </w> ##piece @@",
    "a" * 3000,
    " " * 3000,
    "\n" * 1000,
    "=-" * 1500,
    "0" * 1000,
    "の" * 500,
    "ab " * 1000,
]  # fmt: skip

# Scripts and corners whose characters fall into different classes of the split expressions.
_RANGES = [
    (0x20, 0x7F), (0x00, 0x20), (0x80, 0x250), (0x250, 0x3A0), (0x370, 0x530), (0x590, 0x780), (0x900, 0xE00),
    (0xE00, 0x1100), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3200),
    (0x4E00, 0x5200), (0xA000, 0xA4D0), (0xAC00, 0xB000), (0xFB00, 0xFE00), (0xFF00, 0xFFF0), (0x10000, 0x10400),
    (0x1D400, 0x1D800), (0x1F300, 0x1FA00), (0x20000, 0x20400),
]  # fmt: skip


def torture_texts(added_tokens: list[str]) -> list[str]:
    """Some 500 strings, 30,000 characters in all; `added_tokens` are mixed in as text."""
    generator = random.Random(20_260_101)  # noqa: S311 - reproducible, not secret
    texts = list(_HAND_PICKED)
    for token in added_tokens:
        texts += [token, f"a{token}b", f" {token} {token}\n", token[:-1], token.upper()]
    for first, stop in _RANGES:
        for length in (5, 20, 80, 200):
            texts.append("".join(_pick(generator, first, stop) for _ in range(length)))
    for _ in range(120):  # everything next to everything
        parts = [generator.choice(["ascii", "range", "space", "picked"]) for _ in range(generator.randrange(1, 12))]
        texts.append("".join(_part(generator, part) for part in parts))
    return texts


def _part(generator: random.Random, kind: str) -> str:
    if kind == "space":
        return "".join(generator.choice(" \n\t\r\u00a0\u3000") for _ in range(generator.randrange(1, 5)))
    if kind == "picked":
        return generator.choice(_HAND_PICKED)[: generator.randrange(1, 40)]
    first, stop = (0x20, 0x7F) if kind == "ascii" else generator.choice(_RANGES)
    return "".join(_pick(generator, first, stop) for _ in range(generator.randrange(1, 12)))


def _pick(generator: random.Random, first: int, stop: int) -> str:
    return chr(generator.randrange(first, stop))
