"""A checkpoint in many files -> one file that `torch.load` reads anywhere."""

from __future__ import annotations

import logging
from pathlib import Path

from pretrainkit.errors import StorageError
from pretrainkit.export.reading import is_torch_file, read_weights
from pretrainkit.export.sources import CONSOLIDATED_SUFFIX, locate_checkpoint

_log = logging.getLogger(__name__)


def consolidate_checkpoint(checkpoint_dir: Path, output_file: Path | None = None) -> Path:
    """One file with the model's weights, `{"model": state_dict}`, from a checkpoint in any form.

    The optimizer's state is neither read nor written, and one tensor at a time is in memory. A file that is there
    already is replaced, whole.

    Args:
        checkpoint_dir: A run's folder (its final or newest whole checkpoint), a checkpoint's folder, a sharded
            `lit_model.pth` folder, or a checkpoint file of litgpt or Lightning.
        output_file: File to write; None puts it beside the weights, with `.consolidated` at the end of their name.

    Returns:
        The file's path.

    Raises:
        CheckpointError: There is no whole checkpoint.
        StorageError: The file cannot be written, or is something else.

    Example:
        >>> consolidate_checkpoint("RUN/final")
        PosixPath('RUN/final/lit_model.pth.consolidated')
    """
    from pretrainkit.export.writing import write_torch_file

    checkpoint = locate_checkpoint(Path(checkpoint_dir))
    source = checkpoint.weights
    if output_file is None and source.name.endswith(CONSOLIDATED_SUFFIX):
        _log.info("%s is one file already", source)
        return source
    target = Path(output_file) if output_file is not None else source.with_name(source.name + CONSOLIDATED_SUFFIX)
    if target.is_dir():
        raise StorageError(f"--output_file={target} is a folder; give a file's name in it")
    if target.exists() and target.samefile(source):
        raise StorageError(f"--output_file={target} is the checkpoint itself; give another name")
    if target.exists() and not is_torch_file(target):
        raise StorageError(f"--output_file={target} is there and is no checkpoint; give another name")
    tensors = read_weights(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_torch_file(target, {"model": tensors})
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    _log.info("wrote %s: %d tensors, %.2f GB", target, len(tensors), num_bytes / 1e9)
    return target
