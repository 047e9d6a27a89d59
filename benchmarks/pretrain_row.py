"""One contender of benchmarks/pretrain.py, in this process: the real command, with a watch on its log lines.

Comes in: a JSON file with the row's name and the case. Goes out: a line of stamps.jsonl per logged step (time, CPU
seconds, peak memory so far), written at once, so that a row that dies or is stopped keeps what it measured. After the
last step the process ends where it stands: the checkpoint that either command would write now is no part of the speed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a bare clone


def main() -> None:
    """Run the row named in the file given."""
    job = json.loads(Path(sys.argv[1]).read_text())
    stamp = _stamper(Path(job["out"]), job["case"]["steps"])
    if job["row"]["contender"] == "probe":
        _probe(Path(job["out"]))
    elif job["row"]["contender"] == "litgpt":
        _litgpt(job, stamp)
    else:
        _ours(job, stamp)


def _stamper(out: Path, last_step: int) -> Callable[[int], None]:
    file = open(out / "stamps.jsonl", "w", encoding="utf-8")  # noqa: SIM115 - open to the end

    def stamp(step: int) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = usage.ru_utime + usage.ru_stime
        peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * usage.ru_maxrss
        row = {"step": step, "time": time.time(), "cpu": cpu_s, "memory": peak}
        file.write(json.dumps(row) + "\n")
        file.flush()
        if step >= last_step:
            os._exit(0)

    return stamp


def _litgpt(job: dict[str, Any], stamp: Callable[[int], None]) -> None:
    """`litgpt pretrain`, watched at its own log calls, which follow its own synchronisation with the device."""
    import lightning
    import torch

    case, row = job["case"], job["row"]
    if row["eager"]:
        torch.compile = lambda model, **_: model  # type: ignore[assignment]
    log_dict = lightning.Fabric.log_dict

    def watched(self: Any, metrics: dict[str, Any], step: int | None = None) -> None:
        log_dict(self, metrics, step)
        if "iter_time" in metrics:
            stamp(metrics["step"])

    lightning.Fabric.log_dict = watched  # type: ignore[method-assign]
    flags: dict[str, Any] = {
        "model_config": job["model_config"],
        "data": {
            "class_path": "litgpt.data.LitData",
            "init_args": {"data_path": job["data"], "split_names": ["train", "val"], "num_workers": row["workers"]},
        },
        "out_dir": f"{job['out']}/run",
        "precision": case["precision"],
        "train": {
            "global_batch_size": case["global_batch_size"], "micro_batch_size": case["micro_batch_size"],
            "max_tokens": case["steps"] * case["global_batch_size"] * case["block_size"],
            "max_seq_length": case["block_size"], "lr_warmup_steps": 2, "log_interval": 1, "save_interval": None,
            "max_norm": 1.0, "min_lr": 4e-5, "tie_embeddings": False,
        },
        "eval": {"interval": 1_000_000, "max_iters": 1, "final_validation": False},
        "optimizer": {
            "class_path": "torch.optim.AdamW", "init_args": {"lr": 4e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]},
        },
        "devices": 1,
        "logger_name": "csv",
    }  # fmt: skip
    config = Path(job["out"]) / "litgpt.yaml"
    config.write_text(json.dumps(flags))  # JSON is YAML
    sys.argv = ["litgpt", "pretrain", case["model_name"], "--config", str(config)]
    from litgpt.__main__ import main as litgpt

    litgpt()


def _ours(job: dict[str, Any], stamp: Callable[[int], None]) -> None:
    """`pretrainkit pretrain`, watched at its rows of metrics.jsonl."""
    from pretrainkit.cli import run_command
    from pretrainkit.train.metrics import MetricsWriter

    case, row = job["case"], job["row"]
    write = MetricsWriter.write

    def watched(self: Any, event: str, state: Any, **values: Any) -> None:
        write(self, event, state, **values)
        if event == "train":
            stamp(state.step)

    MetricsWriter.write = watched  # type: ignore[method-assign]
    for patch in row["patches"]:
        globals()[f"_patch_{patch}"]()
    flags = {
        "model_name": case["model_name"], "dataset_path": job["data"], "out_dir": f"{job['out']}/run",
        "precision": case["precision"], "devices": 1, "launcher": "local", "train.max_steps": case["steps"],
        "train.global_batch_size": case["global_batch_size"], "train.micro_batch_size": case["micro_batch_size"],
        "train.max_seq_length": case["block_size"], "train.lr_warmup_steps": 2, "train.save_interval": "null",
        "eval.interval": "null", "eval.final_validation": "false",
    } | row["flags"]  # fmt: skip
    if case["changes"]:
        flags["model_config"] = json.dumps(case["changes"])
    run_command("pretrain", [f"--{name}={value}" for name, value in flags.items()])


# --- techniques without a switch of their own -----------------------------------------------------------------------


def _patch_autograd_loss() -> None:
    """Output head and cross entropy as PyTorch does them, with all logits kept for the backward pass."""
    import torch
    from torch.nn import functional

    from pretrainkit.models import gpt

    def plain(hidden: Any, weight: Any, bias: Any, targets: Any, **_: Any) -> tuple[Any, Any, Any]:
        logits = functional.linear(hidden, weight, bias)
        loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
        return loss, loss.detach(), torch.zeros_like(loss.detach())

    gpt.linear_cross_entropy = plain  # type: ignore[assignment]


def _patch_foreach_adamw() -> None:
    """Gradients scaled in a pass of their own, then AdamW without its fused kernel."""
    import torch

    from pretrainkit.train import loop

    def take_step(optimizers: Any, *, learning_rate: float, grad_scale: Any, **_: Any) -> None:
        for optimizer in optimizers:
            parameters = []
            for group in optimizer.param_groups:
                # Capturable: else its bias corrections would be read from the device, one wait per parameter.
                group.update(lr=learning_rate, fused=False, foreach=True, capturable=torch.cuda.is_available())
                parameters += group["params"]
            torch._foreach_div_([parameter.grad for parameter in parameters], grad_scale)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    loop.take_step = take_step


def _patch_fp32_between_blocks() -> None:
    """Embeddings, and so the sums that blocks hand on, in fp32: as litgpt under autocast."""
    from pretrainkit.models.gpt import PretrainGPT

    PretrainGPT._embed = lambda self, inputs: self.transformer.wte(inputs)  # type: ignore[method-assign]


def _patch_no_masters() -> None:
    """Weights cast, and gradients cast and added by autograd, in every micro batch: as litgpt under autocast."""
    from pretrainkit.train import parallel

    parallel.keep_masters = lambda _model, _compute_dtype: None


def _patch_repeated_keys() -> None:
    """Keys and values repeated for every query of a group: as litgpt."""
    from pretrainkit.models import attention
    from pretrainkit.models.architectures import CausalSelfAttention

    attention._SelfAttention.forward = CausalSelfAttention.forward  # type: ignore[method-assign]


def _patch_collector() -> None:
    """Python's garbage collector looks at everything again and again."""
    import gc

    gc.freeze = lambda: None


# --- the machine ----------------------------------------------------------------------------------------------------


def _probe(out: Path) -> None:
    """What runs here, and how fast its largest matrix products are: what MFU can be at most."""
    import torch

    on_gpu = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1536, torch.float32)
    device = torch.device("cuda" if on_gpu else "cpu")
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    # Of a CPU that others use too, the seconds that were ours.
    clock = time.perf_counter if on_gpu else time.process_time
    seconds = []
    for _ in range(20 if on_gpu else 7):
        start = clock()
        torch.mm(left, right)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    threads = f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else threads,
        "on_gpu": on_gpu,
        "torch": torch.__version__,
        "matmul_flops": 2 * size**3 / sorted(seconds)[len(seconds) // 3],
    }
    (out / "probe.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
