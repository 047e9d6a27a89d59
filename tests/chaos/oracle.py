"""What must be true of a dataset, whoever died while it was made; reads the documented bytes with no code of ours."""

from __future__ import annotations

import json
import struct
from array import array
from pathlib import Path


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file but the locks, whose text names the process that holds them."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """What differs between two trees, one line per file."""
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [f"other bytes in {name}" for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return sorted(problems)


def read_tokens(path: Path) -> array[int]:
    """Tokens of one chunk of a uint16 dataset."""
    data = path.read_bytes()
    (items,) = struct.unpack_from("<I", data)
    offsets = struct.unpack_from(f"<{items + 1}I", data, 4)
    assert offsets[0] == 4 * (items + 2), f"{path} does not begin where its table ends"
    assert offsets[-1] == len(data), f"{path} does not end where its table says"
    tokens = array("H")
    tokens.frombytes(data[offsets[0] :])
    return tokens


def check_visible(folder: Path) -> list[str]:
    """What is wrong with a dataset that shows itself by its index: a chunk missing, short, or of other counts."""
    problems = []
    for chunk in json.loads((folder / "index.json").read_text())["chunks"]:
        path = folder / chunk["filename"]
        if not path.is_file() or path.stat().st_size != chunk["chunk_bytes"]:
            problems.append(f"{path} is in the index but not whole")
        elif len(read_tokens(path)) != chunk["dim"]:
            problems.append(f"{path} has other tokens than the index says")
    return problems


def count_documents(split_folder: Path, marker: int) -> int:
    """Boundary markers in the chunks of all node folders of a split; a unit that two nodes made counts once."""
    chunks = {path.name: path for path in split_folder.glob("*/chunk-*.bin")}
    return sum(read_tokens(path).count(marker) for path in chunks.values())
