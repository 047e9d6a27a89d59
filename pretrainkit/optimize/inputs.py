"""Which files are read: below a folder or URL, or a dataset of the Hugging Face hub; training and validation.

Comes in: what the user gave. Goes out: (split, file) of every shard in the order of the dataset, and the folder each
split's names are relative to. Guarantee: sorted, so that the order is the same on every machine; no file is in
both splits.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pretrainkit.documents import SUFFIXES
from pretrainkit.errors import ConfigError, InputError
from pretrainkit.registry import did_you_mean
from pretrainkit.remote import filesystem, patiently
from pretrainkit.statistics import counted
from pretrainkit.storage import ListedFile, is_remote, list_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Where the text comes from."""

    files: tuple[tuple[str, ListedFile], ...]
    """(split, file): training files, then validation files, each sorted by name."""
    roots: dict[str, str]
    """Split -> folder or URL its files' names are relative to."""


def find_inputs(
    *,
    input_dir: str | None,
    val_dir: str | None,
    val_glob: str | None,
    hf_dataset: str | None,
    hf_config: str,
    split: str,
) -> Inputs:
    """List the inputs.

    Raises:
        ConfigError: No input or two, or two ways to name the validation files.
        InputError: Nothing to read there.
    """
    if (input_dir is None) == (hf_dataset is None):
        raise ConfigError("give either --input_dir (a folder or URL) or --hf_dataset (a name on the Hugging Face hub)")
    if val_dir is not None and val_glob is not None:
        raise ConfigError("--val_dir and --val_glob both name the validation files; give one")
    root = str(input_dir) if hf_dataset is None else hub_folder(hf_dataset, hf_config, split)
    files = _shards(root, "input_dir")
    train, val, val_root = files, list[ListedFile](), root
    if val_glob is not None:
        val = [file for file in files if fnmatch.fnmatchcase(file.name, val_glob)]
        train = [file for file in files if not fnmatch.fnmatchcase(file.name, val_glob)]
        if not val or not train:
            raise InputError(f"val_glob={val_glob!r} matches {len(val)} of {len(files)} files; each split needs some")
    if val_dir is not None:
        val, val_root = _shards(str(val_dir), "val_dir"), str(val_dir)
    twice = {_identity(file) for file in train} & {_identity(file) for file in val} if val else set()
    if twice:
        raise InputError(
            f"{min(twice)} would be in both splits; move it, or choose the validation files with --val_glob"
        )
    return Inputs(
        files=tuple([("train", file) for file in train] + [("val", file) for file in val]),
        roots={"train": root, "val": val_root},
    )


def _shards(root: str, flag: str) -> list[ListedFile]:
    """Every shard below a folder.

    Raises:
        InputError: No such folder, or no shard in it.
    """
    if not is_remote(root) and not Path(root).is_dir():
        if Path(root).exists():
            raise InputError(f"{flag}={root} is a file; give its folder, {Path(root).parent}")
        siblings = [p.name for p in Path(root).parent.iterdir()] if Path(root).parent.is_dir() else []
        near = did_you_mean(Path(root).name, siblings, limit=1)
        hint = f"; did you mean {Path(root).parent / near[0]}?" if near else ""
        raise InputError(f"{flag}={root} does not exist{hint}")
    everything = list_files(root, ("",))
    files = [file for file in everything if file.name.lower().endswith(tuple(SUFFIXES)) and not _is_hidden(file.name)]
    if not files:
        raise InputError(f"{flag}={root} has no file ending in {', '.join(SUFFIXES)} in it or below")
    others = sorted({file.name for file in everything} - {file.name for file in files})
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        logger.info(
            "%s=%s: %s left out, hidden or of another kind: %s", flag, root, counted(len(others), "file"), shown
        )
    return files


def _identity(file: ListedFile) -> str:
    """The same for one file, however a user wrote its folder and whatever link leads there."""
    return file.path if is_remote(file.path) else os.path.realpath(file.path)


def _is_hidden(name: str) -> bool:
    """Whether a file, or a folder it lies in, is one that other programs write for themselves.

    Spark and Hive keep what is not complete in `_temporary`; their partitions, `_key=value`, are none of that.
    """
    return any(part.startswith((".", "_")) and "=" not in part for part in name.split("/"))


def hub_folder(name: str, config: str, split: str) -> str:
    """URL of the folder that holds a hub dataset's split as Parquet.

    The hub keeps a Parquet copy of every dataset, whatever its own format, on the branch `refs/convert/parquet`:
    CONFIG/SPLIT/0000.parquet and so on. Of some large datasets it keeps only the beginning, named partial-SPLIT; that
    is refused, not taken for the whole.

    Raises:
        InputError: No such dataset, configuration or split; names those there are.
    """
    base = f"hf://datasets/{name}@refs/convert/parquet"
    fs, inner = filesystem(base)

    def names(folder: str) -> list[str]:
        paths = patiently(f"hf://{folder}", fs, lambda: fs.ls(folder, detail=False))
        return sorted(path.rsplit("/", 1)[-1] for path in paths)

    try:
        configs = names(inner)
    except FileNotFoundError as error:
        raise InputError(
            f"the hub shows no dataset {name!r}, or no Parquet copy of it ({error}); if it is private, set HF_TOKEN, "
            f"else give its own files by --input_dir=hf://datasets/{name}"
        ) from error
    if config not in configs:
        if config != "default" or len(configs) != 1:
            raise InputError(f"{name} has no configuration {config!r}; it has {', '.join(configs)} (--hf_config)")
        config = configs[0]
    splits = names(f"{inner}/{config}")
    if f"partial-{split}" in splits:
        raise InputError(
            f"the hub's Parquet copy of {name} holds only the beginning of {split!r}; give the dataset's own files by "
            f"--input_dir=hf://datasets/{name}/..."
        )
    if split not in splits:
        raise InputError(f"{name} has no split {split!r}; it has {', '.join(splits)} (--split)")
    return f"{base}/{config}/{split}"
