"""Named tensors -> files, and folders that appear whole or not at all.

Guarantees: one tensor (for safetensors, one file's worth) is in memory at a time; what other processes see is the old
output or the new one; an output is replaced only when our own manifest names everything in it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pickle
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pretrainkit.errors import CheckpointError, StorageError
from pretrainkit.export.reading import LazyTensor
from pretrainkit.storage import fsync_folder, storage_errors, write_json
from pretrainkit.train.manifest import MANIFEST_FILENAME, hash_files, read_manifest, write_manifest

if TYPE_CHECKING:
    import torch

_UNFINISHED, _REPLACED = ".tmp", ".old"
_STORAGE_ALIGNMENT = 64  # what torch.save uses


def _private(path: Path, suffix: str) -> Path:
    """A name beside `path` that tells which process of which machine works there."""
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}{suffix}")


def _sweep(path: Path, suffix: str) -> None:
    """Remove what processes of this machine that are dead left beside `path`."""
    mark = f".{path.name}.{os.uname().nodename}-"
    for left in path.parent.glob(f"{glob.escape(mark)}*{suffix}"):
        pid = left.name[len(mark) : -len(suffix)]
        if not pid.isdigit() or Path(f"/proc/{pid}").exists():
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


# --- One file of torch.save -----------------------------------------------------------------------------------------


def write_torch_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write what `torch.save(content, path)` writes, tensor by tensor, atomically.

    Args:
        path: File to make or replace.
        content: Plain data whose tensors are `LazyTensor`.

    Raises:
        StorageError: The file cannot be written.
    """
    _sweep(path, _UNFINISHED)
    temporary = _private(path, _UNFINISHED)
    try:
        with storage_errors(f"write {path}"), open(temporary, "wb") as file:
            _write_archive(file, content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_archive(file: BinaryIO, content: Mapping[str, Any]) -> None:
    import io

    import torch

    pickled = io.BytesIO()
    pickler = _LazyPickler(pickled, protocol=2)
    pickler.dump(content)
    # Source: torch serialization.py _save - the records of a checkpoint, in this order.
    archive = torch._C.PyTorchFileWriter(file, True, _STORAGE_ALIGNMENT)
    records = {
        "data.pkl": pickled.getvalue(),
        ".format_version": b"1",
        ".storage_alignment": str(_STORAGE_ALIGNMENT).encode(),
        "byteorder": sys.byteorder.encode(),
    }
    for name, data in records.items():
        archive.write_record(name, data, len(data))
    for key, tensor in enumerate(pickler.tensors):
        values = tensor.read().contiguous()
        if values.untyped_storage().nbytes() != tensor.num_bytes:
            values = values.clone()  # a view: write its own elements, not the storage it looks into
        storage: Any = values.untyped_storage()  # torch's stub knows only the older class
        archive.write_record(f"data/{key}", storage, tensor.num_bytes)
    archive.write_end_of_file()


class _Storage:
    """Place of a tensor's bytes in the archive; the pickler turns it into torch's persistent id."""

    def __init__(self, key: int, tensor: LazyTensor) -> None:
        self.key = key
        self.tensor = tensor


class _LazyPickler(pickle.Pickler):
    """Pickles a LazyTensor as the tensor that it will be, and remembers it for writing."""

    def __init__(self, file: BinaryIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[LazyTensor] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return NotImplemented
        import torch

        storage = _Storage(len(self.tensors), value)
        self.tensors.append(value)
        strides = torch.empty(value.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = _storage_class(value.tensor.dtype)
        return ("storage", kind, str(value.key), "cpu", value.tensor.num_bytes // value.tensor.dtype.itemsize)


def _storage_class(dtype: torch.dtype) -> type:
    import torch

    names = {
        torch.float32: "FloatStorage",
        torch.float64: "DoubleStorage",
        torch.bfloat16: "BFloat16Storage",
        torch.float16: "HalfStorage",
        torch.int64: "LongStorage",
        torch.int32: "IntStorage",
        torch.uint8: "ByteStorage",
        torch.bool: "BoolStorage",
    }
    if dtype not in names:
        raise CheckpointError(f"weights of type {dtype} cannot be written; convert them to bfloat16 or float32 first")
    kind: type = getattr(torch, names[dtype])
    return kind


# --- Safetensors ----------------------------------------------------------------------------------------------------


def write_safetensors(folder: Path, tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or several with an index when they do not fit one file of `max_shard_bytes`."""
    from safetensors.torch import save_file

    shards = _split_shards(tensors, max_shard_bytes)
    width = len(shards)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        filename = "model.safetensors" if width == 1 else f"model-{number:05d}-of-{width:05d}.safetensors"
        # clone: save_file refuses views into one storage, which the parts of a fused projection are.
        shard = {name: tensors[name].read().clone(memory_format=_contiguous()) for name in names}
        with storage_errors(f"write {folder / filename}"):
            _save_readable(save_file, shard, folder / filename)
        weight_map.update(dict.fromkeys(names, filename))
    if width > 1:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _save_readable(save_file: Any, shard: dict[str, Any], path: Path) -> None:
    """Safetensors makes files that only their owner can read; give this one the usual mode."""
    path.touch()
    mode = path.stat().st_mode
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(mode)


def _contiguous() -> torch.memory_format:
    import torch

    return torch.contiguous_format


def _split_shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a file would exceed the limit; a larger tensor gets a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.num_bytes
    return shards


# --- Folders --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def publish_folder(output_dir: Path, kind: str) -> Iterator[Path]:
    """A private folder to fill, which becomes `output_dir` when the block ends well, and vanishes when it does not.

    Args:
        output_dir: Folder to make, or an earlier output of the same kind to replace.
        kind: File that every output of this command holds, and no other command's.

    Raises:
        StorageError: `output_dir` holds anything that an earlier run of this command did not write.
    """
    output_dir = output_dir.absolute()
    check_replaceable(output_dir, kind)
    _sweep(output_dir, _UNFINISHED)
    stage = _private(output_dir, _UNFINISHED)
    with storage_errors(f"write {output_dir}"):
        stage.mkdir(parents=True)
        try:
            yield stage
            _seal(stage)
            check_replaceable(output_dir, kind)  # a slow export: the folder may have changed
            _swap(stage, output_dir)
            _sweep(output_dir, _REPLACED)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def _seal(stage: Path) -> None:
    """Bring every file to the disk, and list it with its hash, so that the next stage finds any damage."""
    names = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file())
    for name in names:
        with open(stage / name, "rb") as file:
            os.fsync(file.fileno())
    write_manifest(stage, 0, hash_files(stage, names))


def _swap(stage: Path, output_dir: Path) -> None:
    if not output_dir.exists():
        os.rename(stage, output_dir)
    elif not any(output_dir.iterdir()):
        output_dir.rmdir()
        os.rename(stage, output_dir)
    else:
        old = _private(output_dir, _REPLACED)
        os.rename(output_dir, old)
        os.rename(stage, output_dir)
        shutil.rmtree(old)
    fsync_folder(output_dir.parent)


def check_replaceable(output_dir: Path, kind: str) -> None:
    """Refuse a folder that holds anything else than an earlier output of this command.

    Raises:
        StorageError: It does; names the first such file.
    """
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise StorageError(f"{output_dir} is a file; give a folder that does not exist yet")
    names = {path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if not path.is_dir()}
    known = _earlier_output(output_dir, kind)
    if foreign := sorted(names - known):
        others = f" and {len(foreign) - 1} more files" if len(foreign) > 1 else ""
        raise StorageError(
            f"{output_dir} holds {foreign[0]}{others}, which this command did not write; "
            "give a folder that does not exist yet, or move them away"
        )


def _earlier_output(output_dir: Path, kind: str) -> set[str]:
    """Names of the files that this command wrote into the folder."""
    try:
        _, files = read_manifest(output_dir)
    except CheckpointError:
        return set()
    return {*files, MANIFEST_FILENAME} if kind in files else set()
