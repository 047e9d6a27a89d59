"""A checkpoint -> a litgpt folder, for `litgpt generate`, `chat`, `evaluate`, `finetune`, `serve` and `LLM.load`."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path

from pretrainkit.errors import ModelError
from pretrainkit.export.sources import MODEL_CONFIG, WEIGHTS_NAME, ExportDtype, TrainedModel, open_model
from pretrainkit.export.tokenizer import SpecialIds, copy_tokenizer, generation_config
from pretrainkit.export.writing import check_replaceable, publish_folder, write_torch_file
from pretrainkit.models.huggingface import transformers_config
from pretrainkit.storage import write_json

_log = logging.getLogger(__name__)

_PROMPT_STYLE = "prompt_style.yaml"


def convert_pretrained_checkpoint(
    checkpoint_dir: Path,
    output_dir: Path,
    dtype: ExportDtype = "auto",
    model_name: str | None = None,
    tokenizer_dir: Path | None = None,
) -> Path:
    """A litgpt folder from a checkpoint in any form: flat weights, model_config.yaml, tokenizer, config.json.

    Args:
        checkpoint_dir: A run's folder (its final or newest whole checkpoint), a checkpoint's folder, a sharded
            `lit_model.pth` folder, or a checkpoint file, consolidated or not.
        output_dir: Folder to make, or an earlier output of this command to replace.
        dtype: Type of the weights; "auto" leaves them as they are.
        model_name: litgpt's name of the model, when the checkpoint has no model_config.yaml.
        tokenizer_dir: Folder with the tokenizer, when the checkpoint has none beside it.

    Returns:
        The folder's path.

    Raises:
        CheckpointError: There is no whole checkpoint.
        ModelError: The weights do not fit the model, or the tokenizer does not.
        StorageError: `output_dir` holds other files, or cannot be written.

    Example:
        >>> convert_pretrained_checkpoint("RUN/final", "EXPORTED")
        PosixPath('EXPORTED')
    """
    import yaml

    output_dir = Path(output_dir)
    check_replaceable(output_dir, WEIGHTS_NAME)  # before anything slow
    model = open_model(Path(checkpoint_dir), dtype=dtype, model_name=model_name, tokenizer_dir=tokenizer_dir)
    with publish_folder(output_dir, WEIGHTS_NAME) as stage:
        ids = copy_tokenizer(model.tokenizer, stage, model.config.padded_vocab_size)
        (stage / MODEL_CONFIG).write_text(yaml.dump(asdict(model.config)), encoding="utf-8")
        write_json(stage / "generation_config.json", generation_config(ids))
        _write_prompt_style(model, stage)
        _write_transformers_config(model, ids, stage)
        write_torch_file(stage / WEIGHTS_NAME, model.tensors)
    _log.info("wrote %s; try: litgpt chat %s", output_dir, output_dir)
    return output_dir


def _write_prompt_style(model: TrainedModel, stage: Path) -> None:
    """A model fresh from pretraining continues plain text.

    Without this file litgpt guesses a chat style from the model's name, and asks the tokenizer for that style's tokens.
    """
    own = model.checkpoint.folder / _PROMPT_STYLE
    if own.is_file():
        shutil.copyfile(own, stage / _PROMPT_STYLE)
    else:
        (stage / _PROMPT_STYLE).write_text("class_path: litgpt.prompts.Default\n", encoding="utf-8")


def _write_transformers_config(model: TrainedModel, ids: SpecialIds, stage: Path) -> None:
    """config.json, which `litgpt evaluate` hands to transformers."""
    try:
        config = transformers_config(
            model.config, dtype=model.dtype, tied=model.is_tied(), bos_id=ids.bos_id, eos_id=ids.eos_id
        )
    except ModelError as error:
        _log.warning("`litgpt evaluate` will not work on this model: %s", error)
        return
    write_json(stage / "config.json", config)
