"""From a checkpoint to files that other programs read: one file, a litgpt folder, a Hugging Face folder.

Each function takes what any earlier stage wrote, as it lies. Importing this loads no torch.
"""

from __future__ import annotations

from pretrainkit.export.consolidate import consolidate_checkpoint
from pretrainkit.export.huggingface import export_hf
from pretrainkit.export.litgpt import convert_pretrained_checkpoint

__all__ = ["consolidate_checkpoint", "convert_pretrained_checkpoint", "export_hf"]
