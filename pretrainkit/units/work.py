"""What workers are told and what they answer: a `Job` goes out once, a `UnitResult` comes back per unit.

Only these travel between processes and nodes; text and tokens never do. The module is light, so that `--help` and
planning load neither NumPy nor an engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrainkit.documents import OnBadInput
from pretrainkit.records import Failure

# Folders in which units are made before they are published; swept when their process is gone.
STAGE_PREFIX = ".stage-"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know; everything else stands in the plan."""

    output_dir: str
    """Folder or URL that holds plan.json."""
    plan_id: str
    """Which plan is meant."""
    train_root: str
    """Folder or URL the training shards' names are relative to."""
    val_root: str
    """The same for explicit validation shards."""
    tokenizer_dir: str
    """Local tokenizer folder."""
    special_ids: tuple[int, ...]
    """Ids that no text may give; found once by the driver, for it takes a parse of the whole vocabulary."""
    on_bad_input: OnBadInput = "fail"
    """"fail": a unit with bad input is not committed; "skip": it is, and counts what it left out."""


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """What became of a unit, small enough to travel."""

    unit: int
    """Number of the unit."""
    text_bytes: int = 0
    """Bytes of text encoded."""
    tokens: int = 0
    """Tokens written, markers included."""
    committed: bool = True
    """Whether its record stands."""
    failures: tuple[Failure, ...] = ()
    """Where bad input stood."""
    disproved: str | None = None
    """The document on which the fast engine was found wrong, or None; such a unit is not committed."""
