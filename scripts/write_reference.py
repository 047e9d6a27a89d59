#!/usr/bin/env python3
"""Write docs/reference.md: every command's flags, types, defaults and meanings, from the functions themselves."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a bare clone

from pretrainkit.arguments import describe_flags  # noqa: E402 - after the path is set
from pretrainkit.cli import COMMANDS, POSITIONAL  # noqa: E402

SCRIPTS = {
    "optimize": "optimize_dataset.py",
    "merge": "merge_files.py",
    "pretrain": "distributed_pretrain.py",
    "consolidate": "scripts/consolidate_checkpoint.py",
    "convert": "scripts/convert_pretrained_checkpoint.py",
    "export-hf": "scripts/export_hf.py",
}
INTRODUCTION = """# Reference

Written by `make docs` from the functions' own signatures and docstrings; do not edit. Every command also takes
`--config FILE.yaml` with the same keys (a flag wins over the file), `--debug` for a traceback, and `--help`.
"""


def section(name: str) -> str:
    """One command's part of the page."""
    function = COMMANDS.get(name)
    positional = POSITIONAL.get(name, ())
    usage = f"python {SCRIPTS[name]}" if name in SCRIPTS else f"python -m pretrainkit {name}"
    places = "".join(f" {place.upper()}" for place in positional)
    summary = inspect.getdoc(function) or ""
    lines = [
        f"## {name}",
        "",
        f"`{usage}{places}`, `pretrainkit {name}{places}`, `pretrainkit.{function.__name__}(...)`",
        "",
        re.split(r"\n\s*(?:Args|Returns|Raises|Example):\n", summary)[0].strip(),
        "",
        "| flag | takes | default | meaning |",
        "|---|---|---|---|",
    ]
    for flag in describe_flags(function):
        default = "required" if flag.required else f"`{shown(flag.default)}`"
        lines.append(f"| `--{flag.name}` | {flag.takes} | {default} | {flag.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def shown(default: Any) -> str:
    """A default the way YAML has it."""
    words = {None: "null", True: "true", False: "false"}
    return words[default] if isinstance(default, bool) or default is None else str(default)


def reference() -> str:
    """The whole page."""
    return INTRODUCTION + "".join("\n" + section(name) for name in COMMANDS)


if __name__ == "__main__":
    (ROOT / "docs" / "reference.md").write_text(reference(), encoding="utf-8")
