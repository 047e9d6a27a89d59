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
        ConfigError: `tokenizer_dir` is given and holds no files, or the tokenizer does not fit the model.
    """

    def __init__(self, config: PretrainConfig, model_config: Any, dataset_folder: str, *, speak: bool) -> None:
        # Source: litgpt/utils.py save_config.
        self._model_config = yaml.dump(dataclasses.asdict(model_config))
        self._files = _tokenizer_files(config.tokenizer_dir, dataset_folder)
        if config.tokenizer_dir is not None or config.eval.prompts:
            _check_tokenizer(self.tokenizer, config, model_config.padded_vocab_size)
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


def _check_tokenizer(content: bytes | None, config: PretrainConfig, padded_vocab_size: int) -> None:
    """Refuse now what would end the run at its first sample, or its export: on a GPU an assertion without words."""
    from tokenizers import Tokenizer

    if content is None:
        if config.eval.prompts:
            raise ConfigError("eval.prompts needs a tokenizer.json; give a folder with one by --tokenizer_dir")
        return
    try:
        largest = max(Tokenizer.from_buffer(content).get_vocab().values(), default=0)
    except ValueError as error:
        raise ConfigError(f"the run's tokenizer.json cannot be read ({error}); give another --tokenizer_dir") from error
    if largest >= padded_vocab_size:
        raise ConfigError(
            f"the run's tokenizer.json gives ids up to {largest}, but the model has embeddings for "
            f"{padded_vocab_size}; give the tokenizer that the dataset was made with"
        )


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
