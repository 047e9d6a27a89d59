"""What the user points at -> the weights, the model's configuration and the tokenizer files of one checkpoint.

Comes in: a path as any earlier stage left it: a run, a checkpoint folder, a sharded folder, one file. Guarantees:
a checkpoint with a manifest is checked byte by byte before it is used; of a run, the final or else the newest whole
checkpoint is taken and a damaged one is named and passed over.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pretrainkit.errors import CheckpointError, ModelError
from pretrainkit.export.reading import DCP_METADATA, Tensors, read_weights
from pretrainkit.export.tokenizer import find_tokenizer
from pretrainkit.registry import did_you_mean
from pretrainkit.train.manifest import MANIFEST_FILENAME, read_manifest, verify_files
from pretrainkit.train.state import STATE_FILENAME

if TYPE_CHECKING:
    from litgpt import Config

_log = logging.getLogger(__name__)

WEIGHTS_NAME = "lit_model.pth"
CONSOLIDATED_SUFFIX = ".consolidated"
MODEL_CONFIG = "model_config.yaml"


ExportDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint on disk."""

    weights: Path
    """A DCP folder or a file of torch.save."""
    folder: Path
    """Where its model_config.yaml and tokenizer files lie."""


def locate_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that `path` stands for, checked against its manifest when it has one.

    Raises:
        CheckpointError: Nothing there, no checkpoint in it, or a damaged one.
    """
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, siblings, limit=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise CheckpointError(f"{path}: no such file or folder{hint}")
    if (checkpoint := _checkpoint_at(path)) is not None:
        _verify(checkpoint)
        return checkpoint
    return _newest_of_run(path)


def _checkpoint_at(path: Path) -> Checkpoint | None:
    if path.is_file():
        return Checkpoint(weights=path, folder=path.parent)
    if (path / DCP_METADATA).is_file():
        beside = (path.parent / MODEL_CONFIG).is_file() or not (path / MODEL_CONFIG).is_file()
        return Checkpoint(weights=path, folder=path.parent if beside else path)
    for name in (WEIGHTS_NAME, WEIGHTS_NAME + CONSOLIDATED_SUFFIX):
        if (path / name).is_file() or (path / name / DCP_METADATA).is_file():
            return Checkpoint(weights=path / name, folder=path)
    if (path / WEIGHTS_NAME).is_dir():
        raise CheckpointError(
            f"{path / WEIGHTS_NAME} has no {DCP_METADATA}: its save was not finished; use another one"
        )
    return None


def _newest_of_run(run: Path) -> Checkpoint:
    damaged = []
    for folder in _checkpoints_of_run(run):
        try:
            checkpoint = _checkpoint_at(folder)
            if checkpoint is None:
                continue
            _verify(checkpoint)
        except CheckpointError as error:
            _log.warning("passed over a damaged checkpoint: %s", error)
            damaged.append(folder.name)
            continue
        _log.info("taking %s", folder)
        return checkpoint
    if damaged:
        raise CheckpointError(f"{run}: none of its checkpoints is whole ({', '.join(damaged)} are damaged)")
    raise CheckpointError(
        f"{run} holds no checkpoint; give a run, its final/ or step-*/ folder, a sharded {WEIGHTS_NAME} folder, "
        "or a checkpoint file"
    )


def _checkpoints_of_run(run: Path) -> list[Path]:
    """Our finished checkpoints, newest first, then what litgpt lays out the same way without a manifest."""
    from pretrainkit.train.run_folder import complete_checkpoints

    finished = complete_checkpoints(run)
    others = [run / "final", *sorted(run.glob("step-*"), key=_step_number, reverse=True)]
    return finished + [folder for folder in others if folder.is_dir() and folder not in finished]


def _step_number(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _verify(checkpoint: Checkpoint) -> None:
    folder = checkpoint.folder
    if not (folder / MANIFEST_FILENAME).is_file():
        if (folder / STATE_FILENAME).is_file():  # training writes the manifest after everything else
            raise CheckpointError(f"{folder} has no {MANIFEST_FILENAME}: its save was not finished; use another one")
        return
    _, files = read_manifest(folder)
    used = {name: entry for name, entry in files.items() if _is_used(checkpoint, name)}
    for wrong in verify_files(folder, used):
        own = STATE_FILENAME in files  # nobody changes a training checkpoint on purpose; an export's settings, perhaps
        hint = "use another checkpoint" if own else f"make it again, or remove {MANIFEST_FILENAME} if that is meant"
        raise CheckpointError(f"{folder}: {wrong}; {hint}")


def _is_used(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a file of the folder belongs to these weights, and not to another form of them."""
    path = checkpoint.folder / name
    return checkpoint.weights in (path, *path.parents) or not name.startswith(WEIGHTS_NAME)


def load_model_config(checkpoint: Checkpoint, model_name: str | None = None) -> Config:
    """The model's configuration: `model_config.yaml`, or a model that litgpt knows by name.

    Raises:
        ModelError: Neither is there, the file is not a configuration, or the name is unknown.
    """
    if model_name is not None:
        from pretrainkit.models import resolve_config

        return resolve_config(model_name, None)
    from litgpt import Config

    path = checkpoint.folder / MODEL_CONFIG
    if not path.is_file():
        raise ModelError(f"{checkpoint.folder} has no {MODEL_CONFIG}; put it there, or say --model_name NAME")
    try:
        return Config.from_file(path)
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ModelError(f"{path} is not a litgpt model configuration ({error})") from error


def check_fit(config: Config, tensors: Tensors, source: Path) -> None:
    """Refuse weights that are not exactly the model's.

    Raises:
        ModelError: A tensor is missing, left over or of another shape; names the first.
    """
    import torch
    from litgpt import GPT

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    name = config.name or "the model"
    if missing := sorted(set(expected) - set(found)):
        raise ModelError(f"{source} lacks {missing[0]} and {len(missing) - 1} more weights of {name}")
    if unknown := sorted(set(found) - set(expected)):
        raise ModelError(
            f"{source} has {unknown[0]} and {len(unknown) - 1} more weights that {name} has not; "
            "merge adapters into the model first, or give the right model"
        )
    for weight, shape in expected.items():
        if found[weight] != shape:
            raise ModelError(
                f"{source}: {weight} is {found[weight]}, but {name} has it as {shape}; give the right model"
            )


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A checkpoint, opened: all that an export is made from."""

    checkpoint: Checkpoint
    """Where it lies."""
    config: Config
    """What it is."""
    tensors: Tensors
    """Its weights by litgpt's names, in the type they will have."""
    tokenizer: Path | None
    """Folder with its tokenizer; None when there is none."""

    @property
    def dtype(self) -> str:
        """Type of the weights as transformers writes it; of several the commonest by size."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            name = str(tensor.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + tensor.num_bytes
        return max(sizes, key=lambda name: sizes[name])

    def is_tied(self) -> bool:
        """Whether the output layer is the embedding: the same numbers and no bias."""
        import torch

        if self.config.lm_head_bias:
            return False
        embedding, head = (self.tensors[name].read() for name in ("transformer.wte.weight", "lm_head.weight"))
        return torch.equal(embedding, head)


def open_model(
    path: Path, *, dtype: ExportDtype = "auto", model_name: str | None = None, tokenizer_dir: Path | None = None
) -> TrainedModel:
    """The model at `path`, its weights checked against its configuration, nothing read into memory yet.

    Args:
        path: What `locate_checkpoint` takes.
        dtype: Type to give the weights; "auto" leaves them.
        model_name: litgpt's name, for a checkpoint without model_config.yaml.
        tokenizer_dir: Folder with the tokenizer; None takes the checkpoint's own.

    Raises:
        CheckpointError: There is no whole checkpoint.
        ModelError: The weights are not the model's.
        TokenizerError: `tokenizer_dir` holds no tokenizer.
    """
    import torch

    checkpoint = locate_checkpoint(path)
    tokenizer = find_tokenizer(checkpoint.folder, tokenizer_dir)
    config = load_model_config(checkpoint, model_name)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    tensors = {name: tensor.cast(wanted) for name, tensor in read_weights(checkpoint.weights).items()}
    check_fit(config, tensors, checkpoint.weights)
    return TrainedModel(checkpoint=checkpoint, config=config, tensors=tensors, tokenizer=tokenizer)
