#!/usr/bin/env python3
"""The nodes' folders that optimize wrote -> one dataset: `python merge_files.py --help`."""

from pretrainkit.cli import run_command

if __name__ == "__main__":
    run_command("merge")
