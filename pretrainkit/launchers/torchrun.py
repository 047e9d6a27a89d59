"""Started by torchrun: everything is in the environment."""

from __future__ import annotations

from pretrainkit.config import PretrainConfig
from pretrainkit.launchers import run_entry


def launch(entry: str, config: PretrainConfig, begun: float) -> None:
    """Run in this process."""
    run_entry(entry, config, begun)
