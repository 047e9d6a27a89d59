"""A litgpt model in transformers' words: which architecture it is, its `config.json`, and where each weight goes.

Comes in: a `litgpt.Config`. Goes out: plain data; nothing here loads transformers. Guarantee: the architecture is
chosen by what the model computes, not by what it is called; a name only decides between architectures that compute the
same. A model that no transformers architecture computes is refused with the facts that stand in the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrainkit.models.huggingface.families import FAMILIES, Family, family_of
from pretrainkit.models.huggingface.weights import Target, apply_operation, plan_weights

if TYPE_CHECKING:
    from litgpt import Config

__all__ = ["FAMILIES", "Family", "Target", "apply_operation", "family_of", "plan_weights", "transformers_config"]


def transformers_config(
    config: Config, *, dtype: str, tied: bool, bos_id: int | None = None, eos_id: int | None = None
) -> dict[str, Any]:
    """What `config.json` holds, readable by transformers 4 and 5.

    Args:
        config: The litgpt model.
        dtype: Type of the weights, such as "float32".
        tied: Whether the output layer is the embedding.
        bos_id: Id that begins a text; None when there is none.
        eos_id: Id that ends a text; None when there is none.

    Raises:
        ModelError: No transformers architecture computes this model.
    """
    family = family_of(config)
    # Ids that are None are written, because the classes' own defaults are other models' ids.
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.settings(config),
        "tie_word_embeddings": tied,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers 4's name for it
    }
