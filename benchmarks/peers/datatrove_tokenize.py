#!/usr/bin/env python3
r"""How fast datatrove tokenises, as its documentation has it and with gigatoken inside.

It runs in an environment of its own, because datatrove's huggingface_hub and litgpt's cannot live together:

    python3.11 -m venv PEERS/datatrove
    PEERS/datatrove/bin/pip install "datatrove[io,processing]==0.10.1" orjson==3.13.0 gigatoken==0.10.0 \
        tokenizers==0.23.3 pyarrow==26.0.1 numpy==2.4.6
    PEERS/datatrove/bin/python benchmarks/peers/datatrove_tokenize.py PARQUET_DIR TOKENIZER_DIR NEW_DIR --workers 1

Engines:

    native            ParquetReader -> DocumentTokenizer under LocalPipelineExecutor, end-of-document token appended.
                      Three of its options differ from the default, each because it is faster: only the text column is
                      read, documents are not shuffled, and workers are forked. As its README advises, there are as many
                      tasks as files, and a worker takes one task at a time.
    gigatoken         the same, where the tokenizer's `encode_batch` is gigatoken's, which makes the lists of Python
                      integers that DocumentTokenizer writes
    gigatoken-arrays  besides, their `TokenizedFile.write` is replaced by one that writes a NumPy array's bytes, so that
                      no token becomes a Python object: not datatrove any more, but as far as its design can be taken

The last line is {"seconds", "cpu_seconds", "tokens", "documents"}: wall time, and user and system time of all
processes, of reading, tokenising and writing. Left out: the interpreter, imports, loading the tokenizer (once, before
the workers are forked; datatrove by itself loads it in every task) and whatever else a run on one document takes.
Everything together is bound to as many cores as there are workers, and every process to one thread.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

from measure import confine, eos_token, new_folder, parser_of, report


class Row(NamedTuple):
    """The part of a `tokenizers.Encoding` that DocumentTokenizer reads."""

    ids: Any


class GigatokenTokenizer:
    """What DocumentTokenizer asks of a tokenizer, with gigatoken's `encode_batch`."""

    def __init__(self, path: str, eos: str) -> None:
        import gigatoken
        import tokenizers

        reference = tokenizers.Tokenizer.from_file(path)
        self.get_vocab_size, self.token_to_id = reference.get_vocab_size, reference.token_to_id
        self.post_processor: Any = None  # datatrove sets one that appends the token we append ourselves
        self._eos = reference.token_to_id(eos)
        self._backend = gigatoken.Tokenizer(path)

    def encode_batch(self, texts: list[str]) -> list[Row]:
        """Ids of every text and the end-of-document token, as lists."""
        rows = self._backend.encode_batch_list(texts, parallel=False)
        for row in rows:
            row.append(self._eos)
        return [Row(row) for row in rows]


class GigatokenArrays(GigatokenTokenizer):
    """The same with views of one array instead of lists."""

    def encode_batch(self, texts: list[str]) -> list[Row]:
        """Ids of every text and the end-of-document token, in the type they are written in."""
        import numpy as np

        layout = self._backend.encode_batch(texts, parallel=False).layout
        ends = np.asarray(layout.offsets.data)[1:].astype(np.int64)
        dtype = np.uint32 if self.get_vocab_size() > 65536 else np.uint16
        ids = np.insert(np.asarray(layout.content.data).astype(dtype), ends, self._eos)
        cuts = [0, *(ends + np.arange(1, len(ends) + 1)).tolist()]
        return [Row(ids[start:end]) for start, end in itertools.pairwise(cuts)]


def write_array(file: Any, tokens: Any, loss_values: None) -> None:
    """`TokenizedFile.write` for arrays; nobody asks for loss values here."""
    del loss_values
    file.write_bytes(tokens.tobytes())


def keep_tokenizer(engine: str, eos: str) -> None:
    """Let datatrove load the engine's tokenizer, once per process tree."""
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile
    from datatrove.utils import tokenization

    load = tokenization.load_tokenizer
    if engine != "native":
        load = functools.partial(GigatokenTokenizer if engine == "gigatoken" else GigatokenArrays, eos=eos)
    if engine == "gigatoken-arrays":
        TokenizedFile.write = write_array
    tokenization.load_tokenizer = functools.cache(load)


def tokenize(options: Any, workers: int, source: Path, output: Path) -> tuple[int, int]:
    """(tokens, documents) that the pipeline wrote."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    LocalPipelineExecutor(
        pipeline=[
            ParquetReader(str(source), text_key=options.text_column, read_metadata=False),
            DocumentTokenizer(
                str(output / "tokens"),
                str(options.tokenizer / "tokenizer.json"),
                eos_token=eos_token(options.tokenizer),
                shuffle_documents=False,
            ),
        ],
        tasks=len(list(source.rglob("*.parquet"))),
        workers=workers,
        logging_dir=str(output / "logs"),
        start_method="fork",
    ).run()
    counts = [int(path.read_text().split("\n")[1]) for path in (output / "tokens").glob("*.metadata")]
    return sum(counts), sum(path.stat().st_size // 8 for path in (output / "tokens").glob("*.index"))


def main() -> None:
    """Measure and print one line of JSON."""
    options = parser_of(__doc__, "folder of Parquet files").parse_args()
    confine(options.workers)
    output = new_folder(options.output)
    import pyarrow as pa
    import pyarrow.parquet as pq

    keep_tokenizer(options.engine, eos_token(options.tokenizer))
    one_document = output / "input"
    one_document.mkdir()
    pq.write_table(pa.table({options.text_column: ["one document"]}), one_document / "one.parquet")
    # One worker is this process: the workers forked later have everything already.
    tokenize(options, 1, one_document, output / "loading")
    run = functools.partial(tokenize, options, options.workers)
    report(run, one_document, options.input.resolve(), output)


if __name__ == "__main__":
    main()
