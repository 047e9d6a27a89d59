"""JSON Lines of every kind: the right tokens, or a counted failure with its place; in a plain file and compressed."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from pretrainkit.documents import jsonl
from pretrainkit.errors import InputError
from pretrainkit.formats.litdata import read_chunk
from pretrainkit.metadata import DatasetInfo
from tests.conftest import SENTENCES, make_texts, write_parquet
from tests.test_bad_input import ROOT, check_located, check_texts, failures_of, run

COMPRESS = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
# The fast run sees what lines do, the slow one that compression changes nothing of it.
SUFFIXES = [".jsonl", *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in (".jsonl.gz", ".jsonl.zst"))]


def write_lines(tmp_path, data, suffix=".jsonl", name="a"):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / f"in/{name}{suffix}").write_bytes(COMPRESS[suffix](data))


def lines_of(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


GOOD_LINES = {
    "CRLF": (b'{"text": "a"}\r\n{"text": "b"}\r\n\r\n{"text": "c\\r\\n"}\r\n', ["a", "b", "c\r\n"]),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
    "no newline at the end": (b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
    "empty lines": (b'\n\n{"text": "a"}\n \t\n\n{"text": "b"}\n\n', ["a", "b"]),
    "escapes": (b'{"t\\u0065xt": "\\u00e9\\n\\"\\\\ \\ud83d\\ude00"}\n', ['é\n"\\ 😀']),
    "NUL": (b'{"text": "a\\u0000b"}\n', ["a\x00b"]),
    "other keys of any type": (
        b'{"n": 1, "text": "a", "x": {"text": 1}}\n{"n": "s", "text": "b", "x": [NaN, 1e999]}\n{"text": "c"}\n',
        ["a", "b", "c"],
    ),
    "text that looks like dates": (b'{"text": "2020-01-01"}\n{"text": "2020-01-01T00:00:00"}\n', None),
    "deep nesting beside it": (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ["a"]),
    "bytes that are no text under another key": (b'{"text": "a", "x": "\xff"}\n{"text": "b"}\n', ["a", "b"]),
    "text that looks like special tokens": (b'{"text": "<|endoftext|> <|begin|>"}\n', ["<|endoftext|> <|begin|>"]),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("data", "texts"), GOOD_LINES.values(), ids=GOOD_LINES.keys())
def test_lines_of_every_kind_give_their_texts(tmp_path, tokenizer_dir, data, texts, suffix):
    write_lines(tmp_path, data, suffix)
    texts = [json.loads(line)["text"] for line in data.splitlines()] if texts is None else texts
    check_texts(tmp_path, tokenizer_dir, texts)


# Between good lines, so that the parser for good lines meets it, too: (line, reason, words).
BAD_LINES = {
    "invalid JSON": (b'{"text": "cut', "bad_row", "Unterminated string"),
    "no JSON at all": (b"some words", "bad_row", "Expecting value"),
    "an array": (b'["text"]', "bad_row", "a list, not an object"),
    "a string": (b'"text"', "bad_row", "a str, not an object"),
    "junk behind it": (b'{"text": "x"} junk', "bad_row", "Extra data"),
    "two keys": (b'{"text": "x", "text": "y"}', "bad_row", "has 2 keys 'text'"),
    "a number": (b'{"text": 5}', "not_text", "'text' holds int, not text"),
    "a list": (b'{"text": ["x"]}', "not_text", "'text' holds list, not text"),
    "an object": (b'{"text": {"x": "y"}}', "not_text", "'text' holds object, not text"),
    "true": (b'{"text": true}', "not_text", "'text' holds bool, not text"),
    "a lone surrogate": (b'{"text": "a\\ud800"}', "bad_row", "surrogates not allowed"),
    "surrogates the wrong way round": (b'{"text": "\\ude00\\ud83d"}', "bad_row", "surrogates not allowed"),
    "invalid UTF-8": (b'{"text": "a\xffb"}', "bad_row", ""),
    "a raw control character": (b'{"text": "a\x00b"}', "bad_row", "Invalid control character"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "bad_row", "Expecting"),
    "nested deeply as the text": (
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "bad_row",
        "nested too deeply",
    ),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("line", "reason", "words"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_located_and_its_neighbours_kept(tmp_path, tokenizer_dir, line, reason, words, suffix):
    write_lines(tmp_path, b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n', suffix)
    (failure,) = check_located(tmp_path, tokenizer_dir, ["before", "after"], {reason: 1})
    assert (failure["shard"], failure["reason"]) == (f"a{suffix}", reason)
    assert words in failure["detail"]
    # The row is told by a number in a block of good JSON, by its place elsewhere.
    assert "(line at byte 19)" in failure["detail"] or "(row 1 of the lines from byte 0)" in failure["detail"]


def test_nulls_missing_keys_and_empty_texts_are_counted_and_no_failure(tmp_path, tokenizer_dir):
    write_lines(tmp_path, b'{"text": "a"}\n{"other": "x"}\n{"text": null}\n{"text": ""}\n{"text": "b"}\n')
    assert check_texts(tmp_path, tokenizer_dir, ["a", "b"]).dropped == {"null": 2, "empty": 1}
    assert not (tmp_path / "out/failures.jsonl").exists()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_key_that_the_first_line_lacks_is_asked_for_before_any_work(tmp_path, tokenizer_dir, suffix):
    write_lines(tmp_path, b'{"body": "x", "url": "y"}\n', suffix)
    with pytest.raises(InputError, match=r"has no key 'text'; its first line has body, url \(--text_column\)"):
        run(tmp_path, tokenizer_dir)
    assert run(tmp_path, tokenizer_dir, text_column="body").documents == {"train": 1}


def test_a_first_line_without_the_key_is_one_null_among_others_that_have_it(tmp_path, tokenizer_dir):
    write_lines(tmp_path, b'{"made": "today"}\n{"text": "a"}\n{"text": "b"}\n')
    assert check_texts(tmp_path, tokenizer_dir, ["a", "b"]).dropped == {"null": 1}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("data", [b"", b" \n\n\t\n"], ids=["empty", "white space"])
def test_a_file_without_lines_is_fine_beside_others(tmp_path, tokenizer_dir, data, suffix):
    write_lines(tmp_path, data, suffix, name="none")
    write_lines(tmp_path, b'{"text": "a"}\n', name="some")
    check_texts(tmp_path, tokenizer_dir, ["a"])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("name", ["cut short", "cut at its very end"])
def test_a_compressed_file_that_was_cut_short_gives_its_whole_lines_and_a_failure(
    tmp_path, tokenizer_dir, suffix, name
):
    texts = [f"{i} {text}" for i, text in enumerate(make_texts(1000, seed=5))]
    data = bytearray(COMPRESS[suffix](lines_of(texts)))
    del data[len(data) // 2 if name == "cut short" else len(data) - 3 :]
    (tmp_path / "in").mkdir()
    (tmp_path / f"in/a{suffix}").write_bytes(data)
    with pytest.raises(
        InputError, match=rf"1 piece of input cannot be used.*first: a\{suffix}: .* \(after byte \d+ of"
    ):
        run(tmp_path, tokenizer_dir)
    summary = run(tmp_path, tokenizer_dir, on_bad_input="skip")
    kept = summary.documents["train"]
    assert 300 < kept < 1000
    assert (summary.documents_in, summary.dropped) == (kept + 1, {"bad_file": 1})
    check_texts(tmp_path, tokenizer_dir, texts[:kept], on_bad_input="skip")
    (failure,) = failures_of(tmp_path)
    assert f"(after byte {len(lines_of(texts[:kept]))} of the text)" in failure["detail"]


@pytest.mark.parametrize("place", [0.5, -6], ids=["in the middle", "in the checksum"])
def test_nothing_is_used_of_a_compressed_file_whose_checksum_is_wrong(tmp_path, tokenizer_dir, place):
    """Text in front of the checksum may be garbled and look right."""
    lines = lines_of(f"{i} {text}" for i, text in enumerate(make_texts(4000, seed=5)))
    data = bytearray(gzip.compress(lines))
    data[int(place * len(data)) if place > 0 else place] ^= 0xFF
    (tmp_path / "in").mkdir()
    (tmp_path / "in/b.jsonl.gz").write_bytes(data)
    write_lines(tmp_path, lines_of(["a"]), name="a")
    write_lines(tmp_path, lines_of(["c"]), name="c")
    (failure,) = check_located(tmp_path, tokenizer_dir, ["a", "c"], {"bad_file": 1}, engine="gigatoken")
    assert failure["shard"] == "b.jsonl.gz"
    assert failure["detail"].endswith(" of the text); nothing of it is used")


def test_a_compressed_file_damaged_before_its_first_text_does_not_stop_the_proof_of_the_engine(tmp_path, tokenizer_dir):
    data = bytearray(gzip.compress(lines_of([" ".join(make_texts(8000, seed=5))])))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "in").mkdir()
    (tmp_path / "in/b.jsonl.gz").write_bytes(data)
    write_lines(tmp_path, lines_of(["a"]), name="a")
    (failure,) = check_located(tmp_path, tokenizer_dir, ["a"], {"bad_file": 1}, engine="auto")
    assert failure["detail"].endswith(" of the text); nothing of it is used")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_several_compressed_members_in_one_file_are_all_read(tmp_path, tokenizer_dir, suffix):
    parts = [COMPRESS[suffix](lines_of([text])) for text in ("a", "b", "c")]
    (tmp_path / "in").mkdir()
    (tmp_path / f"in/a{suffix}").write_bytes(b"".join(parts))
    check_texts(tmp_path, tokenizer_dir, ["a", "b", "c"])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_that_is_not_compressed_as_it_says_is_refused_before_any_work(tmp_path, tokenizer_dir, suffix):
    (tmp_path / "in").mkdir()
    (tmp_path / f"in/a{suffix}").write_bytes(b'{"text": "plain"}\n')
    write_lines(tmp_path, b'{"text": "a"}\n', name="good")
    check_located(tmp_path, tokenizer_dir, ["a"], {"bad_file": 1}, before_work=True)


def test_a_json_array_is_no_line_of_a_document(tmp_path, tokenizer_dir):
    write_lines(tmp_path, json.dumps([{"text": "a"}, {"text": "b"}]).encode())
    (failure,) = check_located(tmp_path, tokenizer_dir, [], {"bad_row": 1})
    assert "a list, not an object" in failure["detail"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_without_end_is_located_and_neither_held_nor_read_again_and_again(
    tmp_path, tokenizer_dir, monkeypatch, suffix
):
    monkeypatch.setattr(jsonl, "_LONGEST_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(jsonl, "_PIECE_BYTES", 1 << 16)
    size, reads = 8 << 20, []
    read = jsonl._Reader.read
    monkeypatch.setattr(jsonl._Reader, "read", lambda self, n: reads.append(n) or read(self, n))
    write_lines(tmp_path, b'{"text": "' + b"a" * size + b'"}\n' + lines_of(["the last"]), suffix)
    with pytest.raises(InputError, match="the line at byte 0 is longer than 1,048,576 bytes: is it JSON Lines?"):
        run(tmp_path, tokenizer_dir)
    # The first line once, and each piece at most itself, for plan and work.
    assert len(reads) * jsonl._READ_BYTES < 3 * size
    summary = run(tmp_path, tokenizer_dir, on_bad_input="skip")
    # A plain file is entered again behind the line, a compressed one cannot be.
    assert summary.dropped == {"bad_file": 1}
    assert summary.documents == {"train": 1 if suffix == ".jsonl" else 0}


def test_parquet_and_lines_in_one_folder_come_in_the_order_of_their_names(tmp_path, tokenizer_dir):
    write_parquet(tmp_path / "in/b.parquet", ["b0", None, "b1"])
    write_lines(tmp_path, lines_of(["a0", "a1"]), ".jsonl.gz", name="a")
    write_lines(tmp_path, b'{"text": "c0"}\n{"text": 1}\n{"text": "c1"}', name="c")
    (tmp_path / "in/d.parquet").write_bytes(b"no Parquet")
    (tmp_path / "in/readme.txt").write_text("of another kind")
    with pytest.raises(InputError, match=r"1 input file cannot be used: d\.parquet"):
        run(tmp_path, tokenizer_dir)
    summary = check_texts(tmp_path, tokenizer_dir, ["a0", "a1", "b0", "b1", "c0", "c1"], on_bad_input="skip")
    assert (summary.documents_in, summary.dropped) == (9, {"bad_file": 1, "not_text": 1, "null": 1})
    assert [failure["shard"] for failure in failures_of(tmp_path)] == ["c.jsonl", "d.parquet"]


# Runs a command and prints the largest memory, in KB, of it and its children.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_line_of_fifty_megabytes_passes_whole_in_less_than_a_gigabyte(tmp_path, tokenizer_dir, suffix):
    text = f"{SENTENCES[0]} " * (50_000_000 // (len(SENTENCES[0]) + 1))
    write_lines(tmp_path, lines_of(["before", text, "after"]), suffix)
    flags = {"input_dir": tmp_path / "in", "output_dir": tmp_path / "out", "tokenizer_dir": tokenizer_dir}
    command = [sys.executable, "optimize_dataset.py", *[f"--{key}={value}" for key, value in flags.items()]]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1_000_000
    (folder,) = (tmp_path / "out/train").iterdir()
    assert DatasetInfo.load(folder).documents == 3
    tokens, ends = read_chunk(folder / "chunk-0-0.bin", "uint16")
    middle = tokens[ends[0] : ends[1] - 1]
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    step = 1 << 20
    decoded = [tokenizer.decode(middle[start : start + step].tolist()) for start in range(0, len(middle), step)]
    assert "".join(decoded) == text
