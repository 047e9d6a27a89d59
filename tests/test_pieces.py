"""A long document has the same ids whether it is encoded at once or in pieces."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from pretrainkit.tokenizers import gigatoken
from pretrainkit.tokenizers.auto import load_engine
from pretrainkit.tokenizers.pieces import encode_in_pieces
from tests.conftest import SENTENCES, make_texts

PIECE, LENGTH = 5_000, 60_000


def letters(alphabet: str) -> str:
    return "".join(random.Random(0).choices(alphabet, k=LENGTH))


DOCUMENTS = {
    "prose": " ".join(make_texts(500))[:LENGTH],
    "one letter": "a" * LENGTH,
    "one word": letters("etaoinshrdlu"),
    "one word in capitals": letters("ETAOINSHRDLU"),
    "spaces": " " * LENGTH,
    "spaces before a word": " " * LENGTH + "end of it",
    "a ruler": "=" * LENGTH + "\n",
    "a word after spaces": "begin" + " " * 20_000 + letters("abc") + " and more of " + "-" * 20_000 + "'s end",
    "digits": letters("0123456789"),
    "letters and digits": letters("abcdefABCDEF0123456789+/"),
    "other scripts": "".join(SENTENCES[2:5]) * 400,
}


@pytest.fixture(scope="module")
def engine(tokenizer_dir):
    return load_engine("gigatoken", tokenizer_dir)


@pytest.mark.parametrize("name", list(DOCUMENTS))
def test_pieces_give_the_ids_of_the_whole(engine, monkeypatch, name):
    text = DOCUMENTS[name]
    expected = engine.encode(pa.array([text])).ids.tolist()
    monkeypatch.setattr(gigatoken, "_LONG_DOCUMENT_BYTES", 2 * PIECE)
    monkeypatch.setattr(gigatoken, "_PIECE_BYTES", PIECE)
    got = engine.encode(pa.array(["first", text, "", "between", text, text, "last"]))
    assert got.ids[got.offsets[1] : got.offsets[2]].tolist() == expected
    shorts = [got.ids[got.offsets[i] : got.offsets[i + 1]].tolist() for i in (0, 2, 3, 6)]
    assert shorts == [engine.encode(pa.array([short])).ids.tolist() for short in ("first", "", "between", "last")]
    assert [got.ids[got.offsets[i] : got.offsets[i + 1]].tolist() for i in (4, 5)] == [expected, expected]


@pytest.mark.parametrize("name", ["prose", "one letter", "one word", "spaces", "a ruler", "a word after spaces"])
def test_no_piece_is_much_longer_than_asked(engine, name):
    seen = []

    def encode(document):
        seen.append(document.size)
        return engine.encode(pa.array([document.tobytes().decode()])).ids

    document = np.frombuffer(DOCUMENTS[name].encode(), np.uint8)
    encode_in_pieces(document, encode, lambda: engine._vocabulary, PIECE)
    assert max(seen) <= 2 * PIECE + 4096


def test_a_joint_that_does_not_hold_gives_the_whole_again():
    # Not BPE: a pair of letters by itself is one token, so no two neighbours come back as they are.
    def encode(document):
        return document[::2].astype(np.uint32) if document.size == 2 else document.astype(np.uint32)

    document = np.full(LENGTH, ord("a"), dtype=np.uint8)
    ids = encode_in_pieces(document, encode, lambda: {ord("a"): b"a"}, PIECE)
    assert ids.tolist() == [ord("a")] * LENGTH
