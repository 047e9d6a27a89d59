"""The README's commands work as they are written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pretrainkit.arguments import parse
from pretrainkit.cli import COMMANDS, POSITIONAL
from pretrainkit.errors import ConfigError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    "optimize_dataset.py": "optimize",
    "merge_files.py": "merge",
    "distributed_pretrain.py": "pretrain",
    "scripts/consolidate_checkpoint.py": "consolidate",
    "scripts/convert_pretrained_checkpoint.py": "convert",
    "scripts/export_hf.py": "export-hf",
}
DESIGNED = """
python optimize_dataset.py --input_dir=DIR --tokenizer_dir=DIR --output_dir=OUT
python optimize_dataset.py --input_dir DIR --tokenizer_dir DIR --output_dir OUT
python merge_files.py --source_dir=OUT/train --target_dir=DATA/train
python merge_files.py --source_dir OUT/train --target_dir DATA/train
python distributed_pretrain.py --config config_hub/llama3-8b.yaml
python distributed_pretrain.py --model_name Meta-Llama-3-8B --dataset_path=DATA --num_nodes=4 --out_dir=RUN
python scripts/consolidate_checkpoint.py RUN/final
python scripts/convert_pretrained_checkpoint.py RUN/final EXPORTED
python scripts/export_hf.py EXPORTED HF_DIR
"""


def commands(language: str) -> list[str]:
    """Every command line of the README's code blocks in `language`."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def parsed(line: str) -> dict[str, object] | None:
    """What a line's command would be called with; None when it is not one of ours."""
    words = [word for word in shlex.split(line.partition(" #")[0]) if word != "..."]
    words = words[next((i for i, word in enumerate(words) if word in SCRIPTS or word == "-m"), len(words)) :]
    if not words:
        return None
    name, arguments = (words[2], words[3:]) if words[0] == "-m" else (SCRIPTS[words[0]], words[1:])
    return parse(COMMANDS.get(name), arguments, positional=POSITIONAL.get(name, ()))


def is_ours(line: str) -> bool:
    """Whether a line is a command of this project's, not of pip, litgpt or lm_eval."""
    return any(script in line for script in (*SCRIPTS, "-m pretrainkit")) or line.startswith("make ")


@pytest.mark.parametrize("line", list(filter(is_ours, [*commands("sh"), *commands("bash"), *DESIGNED.splitlines()])))
def test_every_flag_exists(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    if line.startswith("make "):
        assert f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    elif "..." in line:
        with pytest.raises(ConfigError, match="is missing"):
            parsed(line)
    else:
        parsed(line)


def test_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 250


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pipeline_runs_as_written(tmp_path, parquet_dir, tokenizer_dir):
    for name in (
        "optimize_dataset.py",
        "merge_files.py",
        "distributed_pretrain.py",
        "scripts",
        "config_hub",
        "pretrainkit",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "corpus").symlink_to(parquet_dir)
    (tmp_path / "quickstart" / "tokenizer").symlink_to(tokenizer_dir)
    for line in commands("bash"):
        words = [sys.executable if word == "python" else word for word in shlex.split(line)]
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    assert (tmp_path / "my" / "huggingface" / "config.json").is_file()


def test_the_reference_page_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from write_reference import reference

    written = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert written == reference(), "run `make docs` and commit docs/reference.md"
