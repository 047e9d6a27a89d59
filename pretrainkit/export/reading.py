"""Weights on disk -> named tensors, each read only when it is needed.

Comes in: a `torch.distributed.checkpoint` (DCP) folder or a file of `torch.save`. Goes out: `{name: LazyTensor}` with
litgpt's own names. Guarantees: only the model's tensors are read, never the optimizer's; one tensor is in memory at a
time; nothing in a file is ever executed: `.metadata` and checkpoints are pickles, and their unpicklers build plain data
and tensors alone.
"""

from __future__ import annotations

import io
import pickle
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pretrainkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DCP_METADATA = ".metadata"

# Where a checkpoint keeps the model: Fabric says "model", Lightning's Trainer "state_dict".
_MODEL_KEYS = ("model", "state_dict")
# What compiling, checkpointing and wrapping put into the middle of a name.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\."
)
_LITGPT_EMBEDDING = "transformer.wte.weight"


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that is still on disk."""

    shape: tuple[int, ...]
    """Its size."""
    dtype: torch.dtype
    """Its type."""
    read: Callable[[], torch.Tensor]
    """Brings it into memory."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize

    def cast(self, dtype: torch.dtype | None) -> LazyTensor:
        """The same tensor in another floating point type; None leaves it."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


Tensors = dict[str, LazyTensor]


def in_memory(tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is here already, or mapped from a file."""
    return LazyTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


def read_weights(path: Path) -> Tensors:
    """The model's tensors in a DCP folder or a torch file, by litgpt's names where it is a litgpt model.

    Raises:
        CheckpointError: Not a checkpoint, damaged, or without a model in it.
    """
    tensors = _read_folder(path) if path.is_dir() else _read_file(path)
    if not tensors:
        raise CheckpointError(f"{path} holds no model weights; give a checkpoint of pretraining")
    return _plain_names(tensors)


def _plain_names(tensors: Tensors) -> Tensors:
    """Take wrappers out of the names, and what stands before litgpt's first module."""
    unwrapped = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    embeddings = [name for name in unwrapped if name.endswith(_LITGPT_EMBEDDING)]
    prefix = min(embeddings, key=len)[: -len(_LITGPT_EMBEDDING)] if embeddings else ""
    return {name[len(prefix) :]: tensor for name, tensor in unwrapped.items() if name.startswith(prefix)}


# --- DCP folders ----------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Tensors:
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    from pretrainkit.train.dcp import PlainReader

    metadata = PlainReader(folder).read_metadata()
    stored: dict[Any, Any] = metadata.storage_data or {}
    entries = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    tensors: Tensors = {}
    for name, short in _model_part(entries).items():
        pieces = []
        for chunk in entries[name].chunks:
            place = stored.get(MetadataIndex(name, chunk.offsets))
            if place is None:
                raise CheckpointError(f"{folder}: {name} has a part without a file; the checkpoint is damaged")
            pieces.append(_Piece(tuple(chunk.offsets), tuple(chunk.sizes), _piece_path(folder, place), place))
        entry = entries[name]
        tensors[short] = _sharded_tensor(name, tuple(entry.size), entry.properties.dtype, pieces)
    return tensors


def _model_part(names: Iterable[str]) -> dict[str, str]:
    """Full name -> name inside the model, for the tensors of the model alone."""
    names = list(names)
    for key in _MODEL_KEYS:
        part = {name: name[len(key) + 1 :] for name in names if name.startswith(f"{key}.")}
        if part:
            return part
    others = ("optimizer", "optimizer_")  # a bare model's names stand at the top
    return {name: name for name in names if not name.split(".")[0].startswith(others)}


@dataclass(frozen=True)
class _Piece:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    stored: Any


def _piece_path(folder: Path, stored: Any) -> Path:
    relative = PurePosixPath(stored.relative_path)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{folder}: its metadata names a file outside of it, {str(relative)!r}; do not trust it")
    if getattr(stored, "transform_descriptors", None):
        raise CheckpointError(f"{folder} is compressed; save it without DCP extensions")
    return folder / relative


def _sharded_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: list[_Piece]) -> LazyTensor:
    elements = sum(_count(piece.sizes) for piece in pieces)
    if elements != _count(shape):
        raise CheckpointError(f"{name}: its parts have {elements} elements of {_count(shape)}; a shard is missing")

    def read() -> torch.Tensor:
        import torch

        if len(pieces) == 1:
            return _read_piece(name, pieces[0], dtype)
        whole = torch.empty(shape, dtype=dtype)
        for piece in pieces:
            place = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))
            whole[place] = _read_piece(name, piece, dtype)
        return whole

    return LazyTensor(shape=shape, dtype=dtype, read=read)


def _count(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _read_piece(name: str, piece: _Piece, dtype: torch.dtype) -> torch.Tensor:
    import torch

    try:
        with open(piece.path, "rb") as file:
            file.seek(piece.stored.offset)
            data = file.read(piece.stored.length)
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{piece.path}: cannot read {name} ({_first_line(error)}); it is damaged") from error
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != piece.sizes or tensor.dtype != dtype:
        raise CheckpointError(f"{piece.path}: {name} is not what .metadata says; a shard of another save is mixed in")
    return tensor.detach()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --- Files of torch.save --------------------------------------------------------------------------------------------


class _Inert:
    """Stands for any object in a checkpoint that is not a tensor or plain data; never the object itself."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Forget whatever the pickle passes."""

    __setstate__ = __setitem__ = append = extend = __init__


_TENSOR_BUILDERS = {
    "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"),
    "torch._tensor": ("_rebuild_from_type_v2",),
    "torch.nn.parameter": ("Parameter",),
    "collections": ("OrderedDict",),
}


def _is_plain_torch_name(name: str) -> bool:
    import torch

    plain = torch.dtype | torch.layout
    return name in ("Size", "Tensor", "device") or isinstance(getattr(torch, name, None), plain)


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors and plain data; any other class becomes `_Inert`, so no file's code runs."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _TENSOR_BUILDERS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and _is_plain_torch_name(name):
            return super().find_class(module, name)
        return _Inert


def _read_file(path: Path) -> Tensors:
    import torch

    if not is_torch_file(path):
        raise CheckpointError(f"{path} is not a checkpoint file of torch.save (version 1.6 or later)")
    try:
        # _TensorUnpickler runs no more code than weights_only does, and reads past what weights_only stops at.
        content = torch.load(
            path,
            map_location="cpu",
            mmap=True,
            weights_only=False,
            pickle_module=types.SimpleNamespace(Unpickler=_TensorUnpickler, __name__="pickle"),
        )
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({_first_line(error)}); the file is damaged") from error
    return {name: in_memory(tensor) for name, tensor in _model_tensors(content).items()}


def is_torch_file(path: Path) -> bool:
    """Whether a file is an archive as `torch.save` writes it."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _model_tensors(content: Any) -> dict[str, torch.Tensor]:
    """The tensors under "model" or "state_dict", or of a flat state dict."""
    import torch

    for key in _MODEL_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value.detach() for name, value in content.items() if isinstance(value, torch.Tensor)}
