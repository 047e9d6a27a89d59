"""What comes into a checkpoint beside the weights: the tokenizer of whatever folder it lies in, and nothing else."""

from __future__ import annotations

import pytest
import yaml

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import TokenizerError
from pretrainkit.models import resolve_config
from pretrainkit.train import pretrain
from pretrainkit.train.side_files import SideFiles
from tests.conftest import make_tokenizer
from tests.train.conftest import TINY_MODEL

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


def test_of_a_model_folder_only_the_tokenizer_comes_into_checkpoints(settings, tmp_path):
    """litgpt's folders hold a tokenizer beside weights, whose names are those of our own files."""
    folder = tmp_path / "checkpoints" / "pythia"
    folder.mkdir(parents=True)
    make_tokenizer(folder, vocab_size=512)
    for name in ("lit_model.pth", "model_config.yaml", "model.safetensors", "config.json", "state.json", "notes.txt"):
        (folder / name).write_text("theirs")
    (folder / "generation_config.json").write_text("{}")
    arguments = settings(tokenizer_dir=folder, train={"max_steps": 1})
    arguments["model_config"] |= {"vocab_size": 512}
    pretrain(**arguments)
    final = arguments["out_dir"] / "final"
    assert sorted(path.name for path in final.iterdir()) == [
        "generation_config.json", "lit_model.pth", "manifest.json", "model_config.yaml", "state.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert yaml.safe_load((final / "model_config.yaml").read_text())["name"] == "tiny"
    assert (final / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_without_a_tokenizer_is_refused(settings, tmp_path, dry_run):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "shadow").write_text("secret")
    for folder, message in (
        (tmp_path / "etc", "no tokenizer.json and no tokenizer.model"),
        (tmp_path / "no", "is not a"),
    ):
        with pytest.raises(TokenizerError, match=f"tokenizer_dir={folder}.*{message}"):
            pretrain(**settings(tokenizer_dir=folder, dry_run=dry_run))


def test_only_the_rank_that_writes_reads_what_is_written(settings, tokenizer_dir):
    config = PretrainConfig(**settings(tokenizer_dir=tokenizer_dir))
    model_config = resolve_config(None, TINY_MODEL | {"vocab_size": 512})
    read = [SideFiles(config, model_config, "nowhere", speak=speaks)._files.keys() for speaks in (True, False)]
    assert read == [{"tokenizer.json", "tokenizer_config.json"}, {"tokenizer.json"}]
