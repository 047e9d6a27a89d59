#!/usr/bin/env python3
"""Parquet or JSON Lines files -> tokenised LitData chunks: `python optimize_dataset.py --help`."""

from pretrainkit.cli import run_command

if __name__ == "__main__":
    run_command("optimize")
