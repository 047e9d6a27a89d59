"""Time, peak memory and size of consolidation: ours and Lightning's, on the same sharded checkpoint, in one run.

    python benchmarks/export.py --model_name pythia-410m

Makes a checkpoint of random weights with Adam state (three times the weights) in a temporary folder, then runs each
tool in a process of its own. Peak memory is of the whole process, imports included.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_checkpoint(folder: Path, model_name: str) -> int:
    """A sharded checkpoint as training saves it; returns the number of parameters."""
    import torch
    import torch.distributed.checkpoint as dcp
    from litgpt import GPT, Config

    with torch.device("meta"):
        model = GPT(Config.from_name(model_name))
    weights = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    moments = {f"{name}.{key}": torch.ones_like(w) for name, w in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group: that is meant
        dcp.save({"model": weights, "optimizer": {"state": moments}}, checkpoint_id=folder, no_dist=True)
    torch.save({"step": 0}, folder / "meta.pt")  # Lightning's tool asks for it
    return sum(tensor.numel() for tensor in weights.values())


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds, peak GB) of one process."""
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status != 0:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return time.perf_counter() - start, _peak_gb(usage)


def _peak_gb(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="pythia-160m", help="a model that litgpt knows")
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary files go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        sharded = Path(name) / "lit_model.pth"
        maker = [sys.executable, __file__, "--make", str(sharded), arguments.model_name]
        subprocess.run(maker, check=True)
        total = sum(path.stat().st_size for path in sharded.iterdir())
        print(f"{arguments.model_name}: {total / 1e9:.2f} GB sharded, Adam state included\n")
        print(f"| {'tool':24} | {'seconds':>8} | {'peak GB':>8} | {'file GB':>8} |")
        print(f"|{'-' * 26}|{'-' * 10}|{'-' * 10}|{'-' * 10}|")
        tools = {
            "importing torch alone": [sys.executable, "-c", "import torch"],
            "pretrainkit consolidate": [
                sys.executable,
                str(ROOT / "scripts" / "consolidate_checkpoint.py"),
                str(sharded),
            ],
            "Lightning": [sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(sharded)],
        }
        for tool, command in tools.items():
            target = Path(name) / "one-file.pth"
            extra = [] if "-c" in command else ["--output_file", str(target)]
            seconds, peak = measure([*command, *extra])
            size = f"{target.stat().st_size / 1e9:8.2f}" if target.exists() else f"{'':8}"
            print(f"| {tool:24} | {seconds:8.1f} | {peak:8.2f} | {size} |", flush=True)
            target.unlink(missing_ok=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_checkpoint(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
