"""Every bad input gives the right tokens or a counted, located failure; never a hang, a crash or silence."""

from __future__ import annotations

import gzip
import json
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrainkit.documents import DocumentBatch, joined, read_range, unusable
from pretrainkit.errors import InputError
from pretrainkit.optimize import optimize_dataset
from pretrainkit.records import Failure, SourceRange
from pretrainkit.units import runner
from tests.conftest import make_texts, write_parquet
from tests.test_optimize import documents_of, expected_ids

ROOT = Path(__file__).parent.parent


def run(tmp_path, tokenizer_dir, **flags):
    flags = {"num_workers": 0, "engine": "tokenizers", **flags}
    return optimize_dataset(tokenizer_dir, tmp_path / "out", str(tmp_path / "in"), **flags)


def check_texts(tmp_path, tokenizer_dir, texts, **flags):
    """The dataset holds just these documents."""
    summary = run(tmp_path, tokenizer_dir, **flags)
    assert [ids[:-1] for ids in documents_of(tmp_path / "out")] == expected_ids(texts, tokenizer_dir)
    assert summary.documents == {"train": len(texts)}
    assert summary.documents_in == len(texts) + sum(summary.dropped.values())
    return summary


def check_located(tmp_path, tokenizer_dir, texts, dropped, *, before_work=False, **flags):
    """Input that is refused, and skipped when that is asked for: these documents, these drops; the failures listed.

    Args:
        before_work: Whether it is seen when the plan is made.
    """
    words = "1 input file cannot be used: " if before_work else "piece.* of input cannot be used, listed in "
    with pytest.raises(InputError, match=words):
        run(tmp_path, tokenizer_dir, **flags)
    assert before_work != (tmp_path / "out").exists()
    summary = check_texts(tmp_path, tokenizer_dir, texts, on_bad_input="skip", **flags)
    assert summary.dropped == dropped
    return failures_of(tmp_path)


def failures_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]


def write_column(path, column, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": column}), path, **options)
    return path


def as_strings(values):
    """Raw bytes as an Arrow string column, valid or not."""
    return pa.array(values, pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_every_kind_of_text_column_gives_the_same_tokens(tmp_path, tokenizer_dir, kind):
    texts = [*make_texts(50), "", "NUL \x00 inside", "x" * 100_000]
    values = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts).cast(kind)
    write_column(tmp_path / "in/a.parquet", values)
    summary = run(tmp_path, tokenizer_dir)
    assert [ids[:-1] for ids in documents_of(tmp_path / "out")] == expected_ids(filter(None, texts), tokenizer_dir)
    assert (summary.documents_in, summary.dropped) == (53, {"empty": 1})


def test_nulls_and_empty_texts_are_counted_and_no_failure(tmp_path, tokenizer_dir):
    write_parquet(tmp_path / "in/a.parquet", ["a", None, "", "b", None])
    summary = run(tmp_path, tokenizer_dir)
    assert (summary.documents, summary.dropped) == ({"train": 2}, {"null": 2, "empty": 1})
    assert not (tmp_path / "out/failures.jsonl").exists()


def test_a_column_without_any_text_is_counted_as_nulls(tmp_path, tokenizer_dir):
    write_column(tmp_path / "in/a.parquet", pa.nulls(3))
    write_parquet(tmp_path / "in/b.parquet", ["b"])
    assert check_texts(tmp_path, tokenizer_dir, ["b"]).dropped == {"null": 3}


@pytest.mark.parametrize("on_bad_input", ["fail", "skip"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("words", ["has changed", "is gone"])
def test_an_input_that_changes_while_the_job_runs_ends_it(
    tmp_path, tokenizer_dir, monkeypatch, on_bad_input, name, words
):
    path = tmp_path / "in" / name

    def write(texts):
        if name.endswith("jsonl"):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            write_parquet(path, texts)

    def change_and_read(*arguments):
        write(make_texts(20, seed=1)) if words == "has changed" else path.unlink()
        return read_range(*arguments)

    path.parent.mkdir()
    write(make_texts(20))
    read_range = runner.read_range
    with monkeypatch.context() as patch:
        patch.setattr(runner, "read_range", change_and_read)
        with pytest.raises(InputError, match=rf"^{name} {words} since the job began; bring the old file back and run"):
            run(tmp_path, tokenizer_dir, on_bad_input=on_bad_input)
    assert not list(tmp_path.glob("out/train/*/index.json"))
    write(make_texts(20))
    check_texts(tmp_path, tokenizer_dir, make_texts(20), on_bad_input=on_bad_input)


def test_a_name_that_is_not_utf8_is_refused_or_counted(tmp_path, tokenizer_dir):
    write_parquet(tmp_path / "in/a.parquet", ["a"])
    (tmp_path / "in" / os.fsdecode(b"b\xff.parquet")).write_bytes((tmp_path / "in/a.parquet").read_bytes())
    (failure,) = check_located(tmp_path, tokenizer_dir, ["a"], {"bad_file": 1}, before_work=True)
    assert (failure["shard"], failure["detail"]) == ("b\\xff.parquet", "its name is not UTF-8; rename it")


def test_invalid_utf8_is_located_by_row_group_and_row(tmp_path, tokenizer_dir):
    column = as_strings([b"fine", b"\xff\xfe", b"fine too", b"\xed\xa0\x80 lone surrogate", b"end"])
    write_column(tmp_path / "in/a.parquet", column, row_group_size=2)
    with pytest.raises(InputError, match=r"2 pieces of input cannot be used.*a\.parquet, row group 0, row 1: not UTF"):
        run(tmp_path, tokenizer_dir)
    summary = run(tmp_path, tokenizer_dir, on_bad_input="skip")
    assert (summary.documents, summary.dropped) == ({"train": 3}, {"bad_row": 2})
    assert [(f["shard"], f["row_group"], f["row"], f["reason"]) for f in failures_of(tmp_path)] == [
        ("a.parquet", 0, 1, "bad_row"),
        ("a.parquet", 1, 1, "bad_row"),
    ]


def corrupt_page(path):
    """Flip bytes of text in the middle of the file, where only the page's checksum can tell."""
    texts = [f"needle {i} " * 30 for i in range(90)]
    write_column(
        path, pa.array(texts), row_group_size=30, compression="none", write_page_checksum=True, use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    place = data.index(b"needle 45 ")
    data[place : place + 6] = b"NEEDLE"
    path.write_bytes(data)


def test_a_page_that_changed_is_found_by_its_checksum(tmp_path, tokenizer_dir):
    (tmp_path / "in").mkdir()
    corrupt_page(tmp_path / "in/a.parquet")
    summary = run(tmp_path, tokenizer_dir, on_bad_input="skip")
    assert (summary.documents, summary.dropped) == ({"train": 60}, {"bad_file": 30})
    (failure,) = failures_of(tmp_path)
    assert (failure["row_group"], failure["row"]) == (1, 0)
    assert "30 rows from here" in failure["detail"]


def truncated(path):
    data = write_parquet(path, make_texts(20)).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def no_magic(path):
    path.write_bytes(b"this is a text file\n" * 100)


def footer_only_magic(path):
    path.write_bytes(b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1")


def encrypted(path):
    path.write_bytes(b"PARE" + b"\x00" * 100 + struct.pack("<I", 50) + b"PARE")


def encrypted_column(path):
    """The footer is plain, so everything can be seen but the text's place in the file."""
    from pyarrow.parquet import encryption

    class OneKey(encryption.KmsClient):
        def __init__(self, _):
            encryption.KmsClient.__init__(self)

        def wrap_key(self, key, _):
            return key.hex()

        def unwrap_key(self, key, _):
            return bytes.fromhex(key)

    settings = encryption.EncryptionConfiguration("key", column_keys={"key": ["text"]}, plaintext_footer=True)
    properties = encryption.CryptoFactory(OneKey).file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    table = pa.table({"text": ["x"]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


def change_footer(path, old, new):
    data = write_parquet(path, make_texts(10)).read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def contradicting(path):
    """Change one byte of the footer, so that the file's rows are not its row groups'."""
    write_parquet(path, make_texts(10))
    data = path.read_bytes()
    for position in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data) - 8):
        changed = data[:position] + bytes([data[position] ^ 2]) + data[position + 1 :]
        try:
            metadata = pq.ParquetFile(pa.BufferReader(changed)).metadata
        except (pa.ArrowException, OSError):
            continue
        if (metadata.num_row_groups, metadata.num_rows) == (1, 11) and metadata.row_group(0).num_rows == 10:
            path.write_bytes(changed)
            return
    raise AssertionError("no byte of the footer holds the number of rows")


BAD_FILES = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "wrong magic": no_magic,
    "absurd footer length": footer_only_magic,
    "encrypted": encrypted,
    "encrypted column": encrypted_column,
    # The column's name in the schema; before it, whether it is optional.
    "size statistics that contradict the schema": lambda path: change_footer(
        path, b"\x25\x02\x18\x04text", b"\x25\x00\x18\x04text"
    ),
    "a column name that is not UTF-8": lambda path: change_footer(path, b"\x02\x18\x04text", b"\x02\x18\x04te\xf8t"),
    "missing column": lambda path: pq.write_table(pa.table({"body": ["x"], "url": ["y"]}), path),
    "duplicate column": lambda path: pq.write_table(pa.table([pa.array(["x"])] * 2, names=["text", "text"]), path),
    "a column whose name is another's with a dot": lambda path: pq.write_table(
        pa.table({"text": ["x"], "text.raw": ["y"]}), path
    ),
    "a footer that contradicts itself": contradicting,
    "numbers": lambda path: write_column(path, pa.array([1, 2])),
    "nested": lambda path: write_column(path, pa.array([["x"], ["y"]])),
    "FIFO": os.mkfifo,
    "dangling link": lambda path: path.symlink_to(path.parent / "nowhere"),
}


@pytest.mark.parametrize("make", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_before_any_work_or_counted(tmp_path, tokenizer_dir, make):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in/bad.parquet")
    write_parquet(tmp_path / "in/good.parquet", make_texts(10))
    with pytest.raises(InputError, match=r"1 input file cannot be used: bad\.parquet: "):
        run(tmp_path, tokenizer_dir)
    assert not (tmp_path / "out").exists()
    summary = run(tmp_path, tokenizer_dir, on_bad_input="skip")
    assert (summary.documents, summary.dropped) == ({"train": 10}, {"bad_file": 1})
    assert failures_of(tmp_path)[0]["shard"] == "bad.parquet"


@pytest.mark.parametrize(("name", "kind"), [("a.parquet", "row_group"), ("a.jsonl", "byte")])
def test_a_shard_that_has_become_a_fifo_makes_nobody_wait(tmp_path, name, kind):
    os.mkfifo(tmp_path / name)
    source = SourceRange(shard=name, kind=kind, start=0, stop=1)
    (batch,) = read_range(str(tmp_path / name), source, "text", "fingerprint")
    assert (batch.dropped, batch.failures[0].detail.split(" (")[0]) == ({"bad_file": 1}, "not a regular file")


def test_a_missing_column_names_the_columns_there_are(tmp_path, tokenizer_dir):
    (tmp_path / "in").mkdir()
    BAD_FILES["missing column"](tmp_path / "in/a.parquet")
    with pytest.raises(InputError, match=r"has no column 'text'; it has body, url \(--text_column\)"):
        run(tmp_path, tokenizer_dir)
    assert run(tmp_path, tokenizer_dir, text_column="body").documents == {"train": 1}


def test_a_folder_named_like_a_shard_is_looked_into(tmp_path, tokenizer_dir):
    write_parquet(tmp_path / "in/data.parquet/part-0.parquet", make_texts(5))
    assert run(tmp_path, tokenizer_dir).documents == {"train": 5}


def test_a_link_to_a_folder_is_followed_and_a_loop_ends(tmp_path, tokenizer_dir):
    write_parquet(tmp_path / "elsewhere/a.parquet", make_texts(5))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    assert run(tmp_path, tokenizer_dir).documents == {"train": 5}


def test_a_file_without_rows_is_fine_beside_others_and_refused_alone(tmp_path, tokenizer_dir):
    write_parquet(tmp_path / "in/a.parquet", [])
    with pytest.raises(InputError, match="there are no rows in the 1 input file;"):
        run(tmp_path, tokenizer_dir)
    write_parquet(tmp_path / "in/b.parquet", ["x"])
    assert run(tmp_path, tokenizer_dir).documents == {"train": 1}


@pytest.mark.slow
def test_a_large_document_passes_whole(tmp_path, tokenizer_dir):
    texts = ["small", "word and word " * 100_000, "small too"]
    write_parquet(tmp_path / "in/a.parquet", texts)
    run(tmp_path, tokenizer_dir, engine="gigatoken", chunk_bytes=1 << 17)
    documents = documents_of(tmp_path / "out")
    assert [ids[:-1] for ids in documents[::2]] == expected_ids(texts[::2], tokenizer_dir)
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).decode(documents[1][:-1])
    assert text == texts[1]


def jsonl_lines(texts):
    return "".join(json.dumps({"id": i, "text": text, "more": {"a": [1]}}) + "\n" for i, text in enumerate(texts))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_give_the_tokens_of_the_same_texts(tmp_path, tokenizer_dir, suffix):
    texts = make_texts(300)
    (tmp_path / "in").mkdir()
    data = jsonl_lines(texts).encode().removesuffix(b"\n")
    compress = {
        ".jsonl": bytes,
        ".jsonl.gz": gzip.compress,
        ".jsonl.zst": lambda d: pa.compress(d, "zstd", asbytes=True),
    }
    (tmp_path / f"in/a{suffix}").write_bytes(compress[suffix](data))
    summary = run(tmp_path, tokenizer_dir)
    assert [ids[:-1] for ids in documents_of(tmp_path / "out")] == expected_ids(texts, tokenizer_dir)
    assert summary.documents_in == 300


def test_bad_lines_are_located_and_the_others_kept(tmp_path, tokenizer_dir):
    (tmp_path / "in").mkdir()
    lines = [
        b'{"text": "good"}',
        b'{"text": 5}',
        b'{"text": "cut',
        b"",
        b'{"text": null}',
        b"[1, 2]",
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"other": 1}',
        b'{"text": "last"}',
    ]
    (tmp_path / "in/a.jsonl").write_bytes(b"\n".join(lines))
    summary = run(tmp_path, tokenizer_dir, on_bad_input="skip")
    assert summary.documents == {"train": 2}
    assert summary.dropped == {"null": 2, "bad_row": 4, "not_text": 1}
    assert summary.documents_in == 9
    places = {failure["detail"].split("line at byte ")[1].rstrip(")") for failure in failures_of(tmp_path)}
    assert places == {str(sum(len(line) + 1 for line in lines[:i])) for i in (1, 2, 5, 6, 7)}


def test_a_compressed_file_cut_short_is_located(tmp_path, tokenizer_dir):
    (tmp_path / "in").mkdir()
    data = gzip.compress(jsonl_lines(make_texts(2000)).encode())
    (tmp_path / "in/a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz"):
        run(tmp_path, tokenizer_dir)


def test_byte_ranges_of_a_json_lines_file_lose_and_double_no_line(tmp_path, monkeypatch):
    from pretrainkit.documents import jsonl, read_range
    from pretrainkit.records import SourceRange

    monkeypatch.setattr(jsonl, "BATCH_BYTES", 64)
    monkeypatch.setattr(jsonl, "_READ_BYTES", 32)
    texts = [str(i) * (1 + i * 7 % 40) for i in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl_lines(texts))
    size = path.stat().st_size
    for step in (1, 13, 64, 100, 999, size):
        read = []
        for start in range(0, size, step):
            source = SourceRange(shard="a.jsonl", kind="byte", start=start, stop=min(start + step, size))
            for batch in read_range(str(path), source, "text"):
                read += batch.texts.to_pylist()
        assert read == texts, step


def test_row_numbers_and_types_survive_slices_and_nulls(tmp_path, tokenizer_dir):
    texts = [None if i % 7 == 0 else f"document {i}" for i in range(500)]
    write_parquet(tmp_path / "in/a.parquet", texts, row_group_size=333)
    summary = run(tmp_path, tokenizer_dir, val_fraction=0.3)
    assert summary.dropped == {"null": 72}
    lengths = np.array([len(ids) for ids in documents_of(tmp_path / "out")])
    assert summary.tokens["train"] == lengths.sum()


def test_the_list_of_failures_holds_those_of_every_rank(tmp_path, tokenizer_dir, monkeypatch):
    for name in "ab":
        write_column(tmp_path / f"in/{name}.parquet", as_strings([b"good", b"\xff", b"good too"]))

    def run_rank(rank, **flags):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        return run(tmp_path, tokenizer_dir, unit_bytes=1, **flags)

    for rank, name in enumerate("ab"):
        with pytest.raises(InputError, match=rf"1 piece of input cannot be used.*{name}\.parquet"):
            run_rank(rank)
    assert [failure["shard"] for failure in failures_of(tmp_path)] == ["a.parquet", "b.parquet"]
    run_rank(0, on_bad_input="skip")
    assert [failure["shard"] for failure in failures_of(tmp_path)] == ["a.parquet", "b.parquet"]
    assert run_rank(1, on_bad_input="skip").dropped == {"bad_row": 2}
    assert [failure["shard"] for failure in failures_of(tmp_path)] == ["a.parquet", "b.parquet"]


def test_what_was_unreadable_for_a_while_is_no_failure_any_more(tmp_path, tokenizer_dir, monkeypatch):
    write_parquet(tmp_path / "in/a.parquet", make_texts(10))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "read_range", lambda path, source, *_: [unusable(source, "gone for a while")])
        with pytest.raises(InputError, match="gone for a while"):
            run(tmp_path, tokenizer_dir)
    assert len(failures_of(tmp_path)) == 1
    assert run(tmp_path, tokenizer_dir).documents == {"train": 10}
    assert not (tmp_path / "out/failures.jsonl").exists()


def test_small_batches_are_joined_with_their_counts_and_failures(monkeypatch):
    failure = Failure(shard="a", row_group=0, row=1, reason="bad_row", detail="")
    batches = [
        DocumentBatch(texts=pa.array(["aa"]), rows=2, dropped={"bad_row": 1}, failures=(failure,)),
        DocumentBatch(texts=pa.array([], pa.string()), rows=1, dropped={"null": 1}),
        DocumentBatch(texts=pa.array(["b", "c"], pa.large_string()), rows=4, dropped={"bad_row": 1, "null": 1}),
        DocumentBatch(texts=pa.array(["d"]), rows=1),
    ]
    monkeypatch.setattr("pretrainkit.documents.BATCH_BYTES", 24)
    first, last = joined(batches)
    assert (first.texts.to_pylist(), first.rows) == (["aa", "b", "c"], 7)
    assert (first.dropped, first.failures) == ({"bad_row": 2, "null": 2}, (failure,))
    assert (last.texts.to_pylist(), last.rows, last.dropped) == (["d"], 1, {})
