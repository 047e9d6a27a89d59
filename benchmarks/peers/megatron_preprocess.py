#!/usr/bin/env python3
r"""How fast Megatron-LM's tools/preprocess_data.py tokenises, as its documentation has it and with gigatoken inside.

It runs in an environment of its own, beside a checkout of Megatron-LM:

    python3.11 -m venv PEERS/megatron
    PEERS/megatron/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    PEERS/megatron/bin/pip install --no-deps megatron-core==0.16.1
    PEERS/megatron/bin/pip install transformers==5.23.0 tokenizers==0.23.3 numpy==2.4.6 packaging nltk==3.10.4 \
        sentencepiece==0.2.3 six triton==3.9.0 gigatoken==0.10.0
    git clone --depth 1 --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM PEERS/Megatron-LM
    PEERS/megatron/bin/python benchmarks/peers/megatron_preprocess.py FILE.jsonl TOKENIZER_DIR NEW_DIR --workers 1

The tool reads JSONL alone; what it takes to make that from Parquet is not charged to it. Engines:

    native            the command of docs/user-guide/data-preparation.md: --tokenizer-type HuggingFaceTokenizer
                      --append-eod --workers N. It goes from text to token strings to ids; --direct_ids takes the
                      tool's undocumented shorter way (--tokenizer-hf-include-special-tokens), which also adds the
                      markers that the tokenizer itself adds.
    gigatoken         the same, where the tokenizer's `tokenize` is gigatoken's `encode`, as the list of Python integers
                      that the tool needs
    gigatoken-arrays  besides, `Encoder.encode` is replaced by one that hands NumPy arrays to the writing process, so
                      that no token becomes a Python object: not Megatron's any more, but as far as its design can go

The last line is {"seconds", "cpu_seconds", "tokens", "documents"}: wall time, and user and system time of all
processes (the workers, and the one that reads lines and writes ids), of reading, tokenising and writing. Left out:
the interpreter, imports, loading the tokenizer (once, before processes are forked; the tool by itself loads it in each)
and whatever else a run on one document takes. Everything together is bound to as many cores as there are workers, and
every process to one thread.
"""

from __future__ import annotations

import functools
import json
import struct
import sys
from pathlib import Path
from typing import Any

from measure import confine, new_folder, parser_of, report


def keep_tokenizer(tool: Any, options: Any) -> None:
    """Let the tool build the engine's tokenizer, once per process tree."""
    build = tool.build_new_tokenizer
    built: list[Any] = []

    def build_once(args: Any) -> Any:
        if not built:
            built.append(build(args))
            if options.engine != "native":
                put_gigatoken_in(tool, built[0], options)
        return built[0]

    tool.build_new_tokenizer = build_once


def put_gigatoken_in(tool: Any, tokenizer: Any, options: Any) -> None:
    """Let the tool's tokenizer, or its whole encoder, call gigatoken."""
    import gigatoken
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType

    backend = gigatoken.Tokenizer(str(options.tokenizer / "tokenizer.json"))
    tokenizer.tokenize = lambda text: backend.encode(text).tolist()
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    eod = np.array([tokenizer.eod], dtype)

    def encode(encoder: Any, json_line: str) -> tuple[dict[str, Any], dict[str, list[int]], int]:
        data = json.loads(json_line)
        ids = {key: backend.encode(data[key]).astype(dtype) for key in encoder.args.json_keys}
        ids = {key: np.concatenate((row, eod)) if len(row) else row for key, row in ids.items()}
        return ids, {key: [len(row)] if len(row) else [] for key, row in ids.items()}, len(json_line)

    if options.engine == "gigatoken-arrays":
        tool.Encoder.encode = encode


def set_arguments(options: Any, source: Path, output: Path) -> None:
    """Write the tool's command line into `sys.argv`, where it looks for it."""
    sys.argv = [
        "preprocess_data.py", f"--input={source}", f"--output-prefix={output}/tokens", f"--workers={options.workers}",
        "--tokenizer-type=HuggingFaceTokenizer", f"--tokenizer-model={options.tokenizer}", "--append-eod",
        "--json-keys", options.text_column,
    ]  # fmt: skip
    if options.direct_ids:
        sys.argv.append("--tokenizer-hf-include-special-tokens")


def preprocess(tool: Any, options: Any, source: Path, output: Path) -> tuple[int, int]:
    """(tokens, documents) that the tool wrote."""
    output.mkdir()
    set_arguments(options, source, output)
    tool.main()
    # Source: megatron/core/datasets/indexed_dataset.py, _IndexWriter - magic, version, dtype, sequences, documents + 1
    prefix = f"{output}/tokens_{options.text_column}_document"
    _, _, code, _, documents = struct.unpack("<9sQBQQ", Path(f"{prefix}.idx").read_bytes()[:34])
    item_bytes = {4: 4, 8: 2}[code]
    return Path(f"{prefix}.bin").stat().st_size // item_bytes, documents - 1


def main() -> None:
    """Measure and print one line of JSON."""
    parser = parser_of(__doc__, "JSONL file")
    beside = Path(sys.prefix).parent / "Megatron-LM"
    parser.add_argument("--source", type=Path, default=beside, help="checkout of Megatron-LM, default %(default)s")
    parser.add_argument("--direct_ids", action="store_true", help="native engine: ids without token strings")
    options = parser.parse_args()
    confine(options.workers)
    if not (options.source / "tools/preprocess_data.py").is_file():
        sys.exit(f"--source={options.source} is no checkout of Megatron-LM: it has no tools/preprocess_data.py")
    output = new_folder(options.output)
    sys.path.insert(0, str(options.source / "tools"))
    import preprocess_data

    keep_tokenizer(preprocess_data, options)
    one_document = output / "input.jsonl"
    one_document.write_text(json.dumps({options.text_column: "one document"}) + "\n")
    # The processes forked later have everything already.
    set_arguments(options, one_document, output)
    preprocess_data.build_new_tokenizer(preprocess_data.get_args()).tokenize("one document")
    report(functools.partial(preprocess, preprocess_data, options), one_document, options.input.resolve(), output)


if __name__ == "__main__":
    main()
