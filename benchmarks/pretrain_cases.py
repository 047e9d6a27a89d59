"""What benchmarks/pretrain.py measures: sizes, contenders, and presets of both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size to train at."""

    model_name: str
    """litgpt's name."""
    changes: dict[str, Any] = field(default_factory=dict)
    """litgpt Config keys that differ from the named model's."""
    block_size: int = 2048
    """Context."""
    micro_batch_size: int
    """Blocks per forward pass."""
    global_batch_size: int
    """Blocks per step."""
    steps: int
    """Steps in all."""
    warmup: int
    """Steps left out of the timing: compilation happens in the first."""
    precision: str = "bf16-mixed"
    """litgpt's and ours."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender."""

    contender: str = "ours"
    """ours or litgpt."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Flags of ours that differ from the defaults."""
    patches: tuple[str, ...] = ()
    """Techniques to take out that have no flag; see pretrain_row.py."""
    eager: bool = False
    """litgpt without its compilation."""
    workers: int = 8
    """litgpt's loader processes; 8 is its default."""


ROWS: dict[str, Row] = {
    "litgpt": Row(contender="litgpt"),  # the command as it is: compiles the whole model
    "litgpt-eager": Row(contender="litgpt", eager=True, workers=0),
    "ours": Row(),
    "ours-compile": Row(flags={"compute.compile": "true"}),
    "ours-no-compile": Row(flags={"compute.compile": "false"}),
    "ours-autograd-loss": Row(patches=("autograd_loss",)),
    "ours-one-loss-chunk": Row(flags={"loss.chunk_tokens": 1 << 30}),
    "ours-foreach-adamw": Row(patches=("foreach_adamw",)),
    "ours-fp32-between-blocks": Row(patches=("fp32_between_blocks",)),
    "ours-no-masters": Row(patches=("no_masters",)),
    "ours-repeated-keys": Row(patches=("repeated_keys",)),
    "ours-document-mask": Row(flags={"data.document_mask": "true"}),
    "ours-checkpoint-attention": Row(flags={"compute.activation_checkpointing": "attention"}),
    "ours-checkpoint-mlp": Row(flags={"compute.activation_checkpointing": "mlp"}),
    "ours-checkpoint-block": Row(flags={"compute.activation_checkpointing": "block"}),
    "ours-bf16-true": Row(flags={"precision": "bf16-true"}),
    "ours-float8": Row(flags={"compute.float8": "true"}),
    "ours-muon": Row(flags={"optimizer.class_path": "Muon"}),
    "ours-no-loader-threads": Row(flags={"data.num_workers": 0}),
    "ours-log-rarely": Row(flags={"train.log_interval": 4}),
    "ours-no-clipping": Row(flags={"train.max_norm": "null"}),
    "ours-collector": Row(patches=("collector",)),
}

TOY = Case(
    model_name="pythia-14m", changes={"n_layer": 4}, block_size=128, micro_batch_size=4, global_batch_size=8, steps=12,
    warmup=4, precision="32-true",
)  # fmt: skip
SMOKE = replace(TOY, changes={"n_layer": 2, "padded_vocab_size": 1024, "vocab_size": 1024}, steps=4, warmup=2)
H100_160M = Case(model_name="pythia-160m", micro_batch_size=16, global_batch_size=64, steps=24, warmup=8)
H100_1B = Case(model_name="tiny-llama-1.1b", micro_batch_size=8, global_batch_size=32, steps=14, warmup=5)
H100_8B = Case(
    model_name="Meta-Llama-3-8B", changes={"n_layer": 4}, micro_batch_size=4, global_batch_size=32, steps=14, warmup=5
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What one command measures."""

    cases: list[Case]
    """Sizes."""
    rows: tuple[str, ...] = ("litgpt", "ours")
    """Measured for every case first; the first is the reference."""
    ablations: tuple[str, ...] = ()
    """Measured after that, while the budget lasts, case by case."""
    budget_s: float | None = None
    """Seconds for everything."""


_ABLATIONS = (
    "ours-no-compile", "ours-autograd-loss", "ours-no-masters", "ours-fp32-between-blocks", "ours-repeated-keys",
    "ours-foreach-adamw", "ours-document-mask", "ours-bf16-true", "ours-checkpoint-block", "ours-log-rarely",
    "ours-float8", "litgpt-eager", "ours-muon",
)  # fmt: skip
PRESETS = {
    # On a CPU litgpt's compilation of the whole model takes longer than the run: the reference is litgpt without it.
    "cpu": Preset(cases=[TOY], rows=("litgpt-eager", "ours")),
    # Everything the h100 preset does, at a size for a CPU, with a row that must fail there.
    "smoke": Preset(
        cases=[SMOKE, replace(SMOKE, changes={**SMOKE.changes, "n_layer": 3})], rows=("litgpt-eager", "ours"),
        ablations=("ours-float8", "ours-autograd-loss", "ours-no-masters", "ours-fp32-between-blocks",
                   "ours-repeated-keys", "ours-foreach-adamw"),
        budget_s=400,
    ),
    # The one with the most layers, which litgpt compiles as a whole, comes last: it may be the one that does not fit.
    "h100": Preset(cases=[H100_160M, H100_8B, H100_1B], ablations=_ABLATIONS, budget_s=450),
    "h100-160m": Preset(cases=[H100_160M], ablations=_ABLATIONS, budget_s=450),
    "h100-1b": Preset(cases=[H100_1B], ablations=_ABLATIONS, budget_s=450),
    "h100-8b": Preset(cases=[H100_8B], ablations=_ABLATIONS, budget_s=450),
}  # fmt: skip
