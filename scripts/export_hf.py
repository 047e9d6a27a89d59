"""A checkpoint -> a Hugging Face folder: `python scripts/export_hf.py EXPORTED HF_DIR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare clone runs without being installed

from pretrainkit.cli import run_command

if __name__ == "__main__":
    run_command("export-hf")
