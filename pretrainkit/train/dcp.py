"""torch.distributed.checkpoint (DCP) without its trust: nothing in a checkpoint is ever executed.

Comes in: nested mappings of tensors, sharded or not. Goes out: a DCP folder, and back. Guarantees: only tensors are
stored, so that no pickled object has to be read back; `.metadata`, itself a pickle, may name DCP's own record types
alone.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pretrainkit.errors import CheckpointError
from pretrainkit.train.parallel import together

_PLAIN_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        )
        if not is_type and name not in _PLAIN_NAMES.get(module, ()):
            raise CheckpointError(
                f".metadata wants to load {module}.{name}, which no checkpoint needs; do not trust it"
            )
        return super().find_class(module, name)


class PlainReader(FileSystemReader):
    """DCP's reader with an unpickler that builds plain records alone."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The folder's `.metadata`.

        Raises:
            CheckpointError: Missing, damaged, or asking for anything but records.
        """
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _PlainUnpickler(file).load()
        except CheckpointError as error:
            raise CheckpointError(f"{path.parent}: {error}") from error
        except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); the checkpoint is damaged") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} holds no checkpoint's records; the checkpoint is damaged")
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def write_tensors(state: dict[str, Any], folder: Path, group: Any) -> None:
    """Write nested tensors, each rank its own shards; returns when every rank's files are on disk."""
    _expect_single_process()
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, overwrite=True)
    save(state, storage_writer=writer, process_group=group, no_dist=group is None)


def read_tensors(state: dict[str, Any], folder: Path, group: Any) -> None:
    """Fill nested tensors in place, each rank its own shards, however the folder's were cut.

    Raises:
        CheckpointError: A tensor is missing or has another shape, or the records cannot be trusted.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    _expect_single_process()
    # DCP would log what is wrong with them as a traceback, and look for other records.
    together(lambda: PlainReader(folder).read_metadata() if _is_first(group) else None, group)
    try:
        load(state, storage_reader=PlainReader(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder} does not fit this model: {_one_line(reason)}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {_one_line(error)}") from error


def _is_first(group: Any) -> bool:
    return group is None or dist.get_rank(group) == 0


def _expect_single_process() -> None:
    """DCP warns at every save and load of a single process, which is what no_dist asks for."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def copy_to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested tensors in this node's memory that training does not change any more; shards stay shards."""
    copied: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            copied[name] = copy_to_cpu(value)
        else:
            tensor = value.detach()
            copied[name] = tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")
    return copied
