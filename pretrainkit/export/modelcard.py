"""README.md of a Hugging Face folder: what the model is, how it was trained, how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrainkit._version import __version__
from pretrainkit.models import num_parameters
from pretrainkit.storage import write_atomic

if TYPE_CHECKING:
    from pretrainkit.export.sources import TrainedModel
    from pretrainkit.models.huggingface import Family

CARD_FILENAME = "README.md"  # what the hub shows

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- pretrainkit
- {model_type}
---

# {name}

A language model pretrained with pretrainkit {version} and exported from litgpt's format. It continues text; it was not
tuned to follow instructions.

| | |
|---|---|
{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}"{options})
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


def write_model_card(path: Path, model: TrainedModel, family: Family, *, tied: bool) -> None:
    """Write the card; what training left beside the checkpoint is told, what is unknown is left out."""
    config = model.config
    facts: dict[str, Any] = {
        "Architecture": family.architecture,
        "Parameters": f"{num_parameters(config, tie_embeddings=tied):,}",
        "Layers, width, heads": f"{config.n_layer}, {config.n_embd}, {config.n_head}",
        "Context length": f"{config.block_size:,} tokens",
        "Vocabulary": f"{config.padded_vocab_size:,} rows",
        "Weights": model.dtype,
        **_training_facts(model.checkpoint.folder / "state.json"),
    }
    softcap = config.attention_logit_softcapping is not None
    card = _CARD.format(
        model_type=family.model_type,
        name=config.name or "Language model",
        version=__version__,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        folder="PATH_OR_REPOSITORY",
        options=', attn_implementation="eager"' if softcap else "",  # other implementations leave the soft cap out
    )
    write_atomic(path, card)


def _training_facts(state_file: Path) -> dict[str, str]:
    """Steps and tokens of training, from the state that a checkpoint keeps beside its weights."""
    if not state_file.is_file():
        return {}
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))["state"]
    except (ValueError, KeyError, TypeError):
        return {}  # another program's state.json
    named = {"Training steps": "step", "Training tokens": "tokens"}
    return {title: f"{state[key]:,}" for title, key in named.items() if isinstance(state.get(key), int)}
