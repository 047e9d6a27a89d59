#!/usr/bin/env bash
# Usage: check_wheel.sh BIN. The installed commands, with nothing but the wheel's base dependencies, outside the checkout.
set -euo pipefail
bin=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

"$bin/python" - <<'PY'
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

assert "site-packages" in __import__("pretrainkit").__file__, "the checkout was imported instead of the wheel"
texts = [f"document {i}: " + "some words to count " * (i % 7 + 1) for i in range(300)]
pathlib.Path("tokenizer").mkdir()
tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
tokenizer.train_from_iterator(texts, trainer)
tokenizer.save("tokenizer/tokenizer.json")
pathlib.Path("tokenizer/tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
pathlib.Path("input").mkdir()
pq.write_table(pa.table({"text": texts}), "input/a.parquet")
PY

"$bin/pretrainkit" --version
"$bin/pretrainkit" optimize --input_dir=input --tokenizer_dir=tokenizer --output_dir=out --val_fraction=0.1
"$bin/pretrainkit" merge --source_dir=out/train --target_dir=data/train
"$bin/python" -m pretrainkit merge --source_dir=out/val --target_dir=data/val
"$bin/pretrainkit" inspect data/train
test -s data/train/index.json -a -s data/val/index.json
echo "the wheel works"
