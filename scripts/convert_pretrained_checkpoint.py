"""A checkpoint -> a litgpt folder: `python scripts/convert_pretrained_checkpoint.py RUN/final EXPORTED`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare clone runs without being installed

from pretrainkit.cli import run_command

if __name__ == "__main__":
    run_command("convert")
