#!/usr/bin/env python3
"""Pretrain a language model on a merged dataset; see --help and config_hub/."""

from pretrainkit.cli import run_command

if __name__ == "__main__":
    run_command("pretrain")
