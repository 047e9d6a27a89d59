"""What lies beside the weights in a checkpoint: the model's configuration and the tokenizer.

Guarantee: with them a checkpoint is all that litgpt and the export need; nothing has to be copied by hand, and nothing
else that lies in the tokenizer's folder, which may be a whole model's, comes along.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import yaml

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import ConfigError
from pretrainkit.storage import is_remote, join, list_files, read_bytes, storage_errors, write_atomic
from pretrainkit.tokenizers.folder import MODEL_CONFIG_JSON, TOKENIZER_FILES, tokenizer_file

logger = logging.getLogger(__name__)

TOKENIZER_FOLDER = "tokenizer"
MODEL_CONFIG_FILENAME = "model_config.yaml"
_VOCABULARY = "tokenizer.json"
_NAMES = frozenset(TOKENIZER_FILES) - {MODEL_CONFIG_JSON}


class SideFiles:
    """The files of one run, found once.

    Args:
        config: Says where the tokenizer lies.
        model_config: litgpt's.
        dataset_folder: The training split, beside whose chunks a tokenizer lies.
        speak: On the one rank that writes, and says what is missing; the others read no more than they need.

    Raises:
        TokenizerError: `tokenizer_dir` is given and holds no tokenizer.
        ConfigError: The tokenizer does not fit the model.
    """

    def __init__(self, config: PretrainConfig, model_config: Any, dataset_folder: str, *, speak: bool) -> None:
        # Source: litgpt/utils.py save_config.
        self._model_config = yaml.dump(dataclasses.asdict(model_config))
        if config.tokenizer_dir is not None:
            tokenizer_file(config.tokenizer_dir)
        paths = _tokenizer_paths(config.tokenizer_dir, dataset_folder)
        self._files: dict[str, bytes] = {}
        with storage_errors("read the tokenizer"):
            for name, path in paths.items():
                if speak or name == _VOCABULARY:
                    self._files[name] = read_bytes(path)
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
        return self._files.get(_VOCABULARY)


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


def _tokenizer_paths(tokenizer_dir: Path | None, dataset_folder: str) -> dict[str, str]:
    """Name -> path of every file of the tokenizer folder that belongs to a tokenizer."""
    folder = join(dataset_folder, TOKENIZER_FOLDER) if tokenizer_dir is None else str(tokenizer_dir)
    if is_remote(folder):
        return {file.name: file.path for file in list_files(folder, ("",)) if file.name in _NAMES}
    return {name: join(folder, name) for name in sorted(_NAMES) if Path(folder, name).is_file()}
