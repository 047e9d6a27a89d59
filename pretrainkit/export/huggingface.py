"""A checkpoint -> a Hugging Face folder: what `AutoModelForCausalLM`, `AutoTokenizer` and `lm_eval` read."""

from __future__ import annotations

import logging
from pathlib import Path

from pretrainkit.errors import ModelError
from pretrainkit.export.mapping import huggingface_tensors
from pretrainkit.export.modelcard import CARD_FILENAME, write_model_card
from pretrainkit.export.sources import ExportDtype, TrainedModel, open_model
from pretrainkit.export.tokenizer import copy_tokenizer, generation_config, tell_transformers
from pretrainkit.export.writing import check_replaceable, publish_folder, write_safetensors
from pretrainkit.models.huggingface import family_of, transformers_config
from pretrainkit.storage import write_json

_log = logging.getLogger(__name__)

_LOGIT_TOLERANCE = 1e-4
_VERIFY_TOKENS = 64


def export_hf(
    checkpoint_dir: Path,
    output_dir: Path,
    dtype: ExportDtype = "auto",
    verify: bool = False,
    max_shard_bytes: int = 4 * 1024**3,
    model_name: str | None = None,
    tokenizer_dir: Path | None = None,
) -> Path:
    """A Hugging Face folder from a checkpoint in any form: config.json, safetensors, tokenizer, model card.

    Args:
        checkpoint_dir: A litgpt folder, a run's folder (its final or newest whole checkpoint), a checkpoint's folder, a
            sharded `lit_model.pth` folder, or a checkpoint file, consolidated or not.
        output_dir: Folder to make, or an earlier output of this command to replace.
        dtype: Type of the weights; "auto" leaves them as they are.
        verify: Load the result with transformers and compare its fp32 logits with litgpt's before publishing it; takes
            memory for two fp32 models.
        max_shard_bytes: Largest weights file; also what is in memory at once.
        model_name: litgpt's name of the model, when the checkpoint has no model_config.yaml.
        tokenizer_dir: Folder with the tokenizer, when the checkpoint has none beside it.

    Returns:
        The folder's path.

    Raises:
        CheckpointError: There is no whole checkpoint.
        ModelError: No transformers architecture computes this model, or the weights or the tokenizer do not fit it.
        StorageError: `output_dir` holds other files, or cannot be written.

    Example:
        >>> export_hf("EXPORTED", "HF_DIR", verify=True)
        PosixPath('HF_DIR')
    """
    output_dir = Path(output_dir)
    check_replaceable(output_dir, CARD_FILENAME)  # before anything slow
    model = open_model(Path(checkpoint_dir), dtype=dtype, model_name=model_name, tokenizer_dir=tokenizer_dir)
    with publish_folder(output_dir, CARD_FILENAME) as stage:
        family = family_of(model.config)
        tied = model.is_tied()
        ids = copy_tokenizer(model.tokenizer, stage, model.config.padded_vocab_size)
        tell_transformers(stage, model.config.block_size)
        config = transformers_config(model.config, dtype=model.dtype, tied=tied, bos_id=ids.bos_id, eos_id=ids.eos_id)
        write_json(stage / "config.json", config)
        write_json(stage / "generation_config.json", generation_config(ids))
        write_model_card(stage / CARD_FILENAME, model, family, tied=tied)
        write_safetensors(stage, huggingface_tensors(model, tied=tied), max_shard_bytes)
        if verify:
            difference = logit_difference(model, stage)
            if not difference <= _LOGIT_TOLERANCE:
                raise ModelError(
                    f"transformers' logits differ from litgpt's by {difference:.1e} (at most {_LOGIT_TOLERANCE:.0e} is "
                    f"rounding); please report this with the model's model_config.yaml; nothing was written"
                )
            _log.info("verified: fp32 logits of litgpt and transformers differ by at most %.1e", difference)
    _log.info("wrote %s (%s)", output_dir, family.architecture)
    return output_dir


def logit_difference(model: TrainedModel, folder: Path) -> float:
    """Largest difference of fp32 logits between litgpt's model and transformers' on random tokens.

    Args:
        model: The model in litgpt's form.
        folder: The same model in Hugging Face form.
    """
    import torch
    from litgpt import GPT
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    length = min(_VERIFY_TOKENS, model.config.block_size)
    tokens = torch.randint(model.config.padded_vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reference = GPT(model.config)
        reference.load_state_dict({name: tensor.read() for name, tensor in model.tensors.items()})
        expected = reference.eval()(tokens)
        del reference
        transformers_logging.disable_progress_bar()
        # eager: the one implementation of attention that has every architecture's soft caps.
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        found = loaded.eval()(tokens).logits
    return float((found - expected).abs().max())
