"""What lies beside the weights in a checkpoint: the model's configuration and the tokenizer.

Guarantee: with them a checkpoint is all that litgpt and the export need; nothing has to be copied by hand.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import yaml

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import ConfigError
from pretrainkit.storage import is_remote, join, list_files, read_bytes, write_atomic

logger = logging.getLogger(__name__)

TOKENIZER_FOLDER = "tokenizer"
MODEL_CONFIG_FILENAME = "model_config.yaml"


class SideFiles:
    """The files of one run, found once.

    Raises:
        ConfigError: `tokenizer_dir` is given and holds no files.
    """

    def __init__(self, config: PretrainConfig, model_config: Any, dataset_folder: str, *, speak: bool) -> None:
        # Source: litgpt/utils.py save_config.
        self._model_config = yaml.dump(dataclasses.asdict(model_config))
        self._files = _tokenizer_files(config.tokenizer_dir, dataset_folder)
        if speak and not self._files:
            logger.warning(
                "%s has no %s folder: checkpoints will have no tokenizer; add --tokenizer_dir",
                dataset_folder, TOKENIZER_FOLDER,
            )  # fmt: skip

    def write(self, folder: Path) -> None:
        """Put them into a checkpoint folder."""
        write_atomic(folder / MODEL_CONFIG_FILENAME, self._model_config)
        for name, content in self._files.items():
            write_atomic(folder / name, content)

    @property
    def tokenizer(self) -> bytes | None:
        """Content of tokenizer.json, when there is one."""
        return self._files.get("tokenizer.json")


def _tokenizer_files(tokenizer_dir: Path | None, dataset_folder: str) -> dict[str, bytes]:
    """Name -> content of every file of the tokenizer folder."""
    folder = join(dataset_folder, TOKENIZER_FOLDER) if tokenizer_dir is None else str(tokenizer_dir)
    if not is_remote(folder):
        paths = sorted(path for path in Path(folder).glob("*") if path.is_file() and not path.name.startswith("."))
        files = {path.name: path.read_bytes() for path in paths}
    else:
        files = {file.path.rpartition("/")[2]: read_bytes(file.path) for file in list_files(folder, ("",))}
    if not files and tokenizer_dir is not None:
        raise ConfigError(f"tokenizer_dir={tokenizer_dir} holds no files; give a folder with tokenizer.json")
    return files
