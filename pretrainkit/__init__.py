"""pretrainkit: from Parquet files to a language model that people can use.

The pipeline, one function and one command per step; each reads the files the step before it wrote:

    optimize_dataset    Parquet or JSONL files -> tokenised LitData chunks, one folder per node and split
    merge_datasets      the nodes' folders -> one streaming dataset
    inspect_dataset     a dataset -> its facts and decoded samples
    pretrain            a dataset -> sharded checkpoints of a litgpt model
    consolidate_checkpoint, convert_pretrained_checkpoint, export_hf
                        a checkpoint -> one file -> a litgpt folder -> a Hugging Face folder
    write_report        a run's metrics -> a report with pictures

Importing this package loads nothing heavy: each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pretrainkit._version import __version__

if TYPE_CHECKING:
    from pretrainkit.errors import PretrainKitError
    from pretrainkit.export import consolidate_checkpoint, convert_pretrained_checkpoint, export_hf
    from pretrainkit.inspect import inspect_dataset
    from pretrainkit.merge import merge_datasets
    from pretrainkit.metadata import DatasetInfo
    from pretrainkit.optimize import optimize_dataset
    from pretrainkit.report import write_report
    from pretrainkit.stream import PretrainDataset
    from pretrainkit.train import pretrain

_HOMES = {
    "DatasetInfo": "pretrainkit.metadata",
    "PretrainDataset": "pretrainkit.stream",
    "PretrainKitError": "pretrainkit.errors",
    "consolidate_checkpoint": "pretrainkit.export",
    "convert_pretrained_checkpoint": "pretrainkit.export",
    "export_hf": "pretrainkit.export",
    "inspect_dataset": "pretrainkit.inspect",
    "merge_datasets": "pretrainkit.merge",
    "optimize_dataset": "pretrainkit.optimize",
    "pretrain": "pretrainkit.train",
    "write_report": "pretrainkit.report",
}

__all__ = [
    "DatasetInfo",
    "PretrainDataset",
    "PretrainKitError",
    "__version__",
    "consolidate_checkpoint",
    "convert_pretrained_checkpoint",
    "export_hf",
    "inspect_dataset",
    "merge_datasets",
    "optimize_dataset",
    "pretrain",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrainkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
