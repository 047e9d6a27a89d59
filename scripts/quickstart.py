#!/usr/bin/env python3
"""The whole pipeline on this machine's CPUs: the text of the Python library -> a small model that answers.

Comes in: nothing but the installed packages. Goes out: quickstart/, laid out the way a real job's folders are, and a
line with the time of each stage. Every step prints the command that does the same by hand. Training runs twice: it is
stopped by Ctrl+C's signal in the middle and goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a bare clone

HOME = Path("quickstart")
CORPUS, TOKENIZER, NODES, DATA, RUN = (HOME / name for name in ("corpus", "tokenizer", "nodes", "data", "run"))
EXPORTED, HF = HOME / "litgpt", HOME / "huggingface"
CORPUS_BYTES = 8_000_000
VOCAB_SIZE = 4096
STOP_AT_STEP = 60
PROMPT = "The class statement defines"
# Public function -> how it is called by hand, and the command's name.
SCRIPTS = {
    "optimize_dataset": ("optimize_dataset.py", "optimize"),
    "merge_datasets": ("merge_files.py", "merge"),
    "inspect_dataset": ("-m pretrainkit inspect", "inspect"),
    "consolidate_checkpoint": ("scripts/consolidate_checkpoint.py", "consolidate"),
    "convert_pretrained_checkpoint": ("scripts/convert_pretrained_checkpoint.py", "convert"),
    "export_hf": ("scripts/export_hf.py", "export-hf"),
    "write_report": ("-m pretrainkit report", "report"),
}
stage_seconds: dict[str, float] = {}


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    """Announce a stage and take its time."""
    say(f"\n=== {title}")
    start = time.perf_counter()
    yield
    stage_seconds[title] = time.perf_counter() - start


def call(name: str, **arguments: Any) -> Any:
    """Call a public function in this process, after printing the command that does the same."""
    import pretrainkit
    from pretrainkit.cli import POSITIONAL

    script, command = SCRIPTS[name]
    words: list[str] = []
    for key, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        words += [str(v) if key in POSITIONAL.get(command, ()) else f"--{key}={v}" for v in values]
    say(f"$ python {script} {shlex.join(words)}")
    return getattr(pretrainkit, name)(**arguments)


def write_corpus() -> None:
    """Parquet shards of text that every Python installation has: the language reference and the library's source."""
    from pydoc_data.topics import topics

    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = [(f"pydoc/{name}", text) for name, text in sorted(topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "idlelib", "encodings", "pydoc_data", "lib2to3"}
    size = sum(len(text) for _, text in documents)
    for path in sorted(library.rglob("*.py")):
        if size > CORPUS_BYTES:
            break
        if skipped.isdisjoint(path.relative_to(library).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            documents.append((str(path.relative_to(library)), text))
            size += len(text)
    CORPUS.mkdir(parents=True)
    for index in range(4):
        shard = documents[index::4]
        table = pa.table({"text": [text for _, text in shard], "id": [name for name, _ in shard]})
        pq.write_table(table, CORPUS / f"part-{index:03d}.parquet", row_group_size=100, write_page_checksum=True)
    say(f"{len(documents)} documents, {size / 1e6:.1f} MB of text in {CORPUS}/")


def train_tokenizer() -> None:
    """A byte-level BPE of VOCAB_SIZE ids in a folder laid out like a Hugging Face tokenizer."""
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for path in sorted(CORPUS.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist())
    tokenizer.train_from_iterator(texts, trainer)
    TOKENIZER.mkdir()
    tokenizer.save(str(TOKENIZER / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": 256,
    }
    (TOKENIZER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    say(f"byte-level BPE with {tokenizer.get_vocab_size()} ids in {TOKENIZER}/")


def pretrain(stop_at_step: int | None) -> None:
    """Run the training command; with `stop_at_step`, send it Ctrl+C's signal once that step is logged."""
    flags = ["--config=config_hub/quickstart.yaml", f"--dataset_path={DATA}", f"--out_dir={RUN}", "--resume=auto"]
    say(f"$ python distributed_pretrain.py {' '.join(flags)}")
    with subprocess.Popen([sys.executable, "distributed_pretrain.py", *flags]) as process:
        try:
            while process.poll() is None:
                if stop_at_step is not None and last_step() >= stop_at_step:
                    say(f"--- step {stop_at_step} reached: now what Ctrl+C does")
                    process.send_signal(signal.SIGINT)
                    stop_at_step = None
                time.sleep(0.2)
        finally:
            process.terminate()  # where this script is stopped; an ended process does not mind
    if process.returncode not in (0, 128 + signal.SIGINT):
        sys.exit(f"training ended with exit code {process.returncode}")


def last_step() -> int:
    """Last step in the run's metrics; -1 before the first."""
    return max((row["step"] for row in metrics() if "loss" in row), default=-1)


def metrics() -> list[dict[str, Any]]:
    """The rows of the run's metrics file that are written whole."""
    path = RUN / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def generate_from_both() -> None:
    """The same prompt through litgpt and through transformers; their logits must be equal."""
    import torch
    from litgpt import LLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = LLM.load(str(EXPORTED), distribute=None)
    llm.distribute(accelerator="cpu", devices=1, precision="32-true")
    say(f"litgpt:       {llm.generate(PROMPT, max_new_tokens=40, temperature=0.0)!r}")
    tokenizer = AutoTokenizer.from_pretrained(HF)
    model = AutoModelForCausalLM.from_pretrained(HF, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=40, do_sample=False)
    say(f"transformers: {tokenizer.decode(generated[0], skip_special_tokens=True)!r}")
    with torch.no_grad():
        difference = (llm.model(ids["input_ids"]) - model(**ids).logits).abs().max().item()
    say(f"largest difference of their logits: {difference:.1e}")
    if difference > 1e-4:
        sys.exit("the exported models disagree")


def main() -> None:
    """Run every stage, then print what each took."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through `finally`, as Ctrl+C goes
    shutil.rmtree(HOME, ignore_errors=True)
    with stage("corpus: the text every Python installation has -> Parquet"):
        write_corpus()
    with stage("tokenizer"):
        train_tokenizer()
    with stage("optimize: Parquet -> LitData chunks, on all CPUs"):
        call("optimize_dataset", input_dir=CORPUS, tokenizer_dir=TOKENIZER, output_dir=NODES, val_fraction=0.02)
    with stage("merge: the nodes' folders -> one dataset"):
        call("merge_datasets", source_dir=NODES / "train", target_dir=DATA / "train")
        call("merge_datasets", source_dir=NODES / "val", target_dir=DATA / "val")
    with stage("inspect"):
        call("inspect_dataset", dataset_dir=DATA / "train")
    with stage("pretrain, until it is stopped"):
        pretrain(stop_at_step=STOP_AT_STEP)
    with stage("pretrain, resumed"):
        pretrain(stop_at_step=None)
    with stage("consolidate: sharded checkpoint -> one file"):
        call("consolidate_checkpoint", checkpoint_dir=RUN / "final")
    with stage("convert: -> litgpt folder"):
        call("convert_pretrained_checkpoint", checkpoint_dir=RUN / "final", output_dir=EXPORTED)
    with stage("export: -> Hugging Face folder"):
        call("export_hf", checkpoint_dir=EXPORTED, output_dir=HF)
    with stage("generate from both"):
        generate_from_both()
    with stage("report"):
        call("write_report", run_dirs=[RUN])
    losses = [row["loss"] for row in metrics() if "loss" in row]
    say("\n" + "\n".join(f"{seconds:7.1f} s  {title}" for title, seconds in stage_seconds.items()))
    say(
        f"{sum(stage_seconds.values()):7.1f} s  in all; loss {losses[0]:.2f} -> {losses[-1]:.2f}; see {RUN}/report.html"
    )
    if losses[-1] > 0.8 * losses[0]:
        sys.exit("the loss did not fall")


if __name__ == "__main__":
    main()
