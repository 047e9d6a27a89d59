"""What happened since the last log line. Sums stay on the device until the line is written: its one synchronisation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from pretrainkit.train.state import TrainState


class Window:
    """Sums and times from one log line to the next.

    Args:
        device: Where the sums are.
        world_size: Ranks.
        state: Its `train_seconds` grows with the time counted here.
    """

    def __init__(self, device: torch.device, world_size: int, state: TrainState) -> None:
        self._device = device
        self._world_size = world_size
        self._state = state
        self._norm = torch.zeros((), device=device)
        self.learning_rate = 0.0
        self.seconds_per_step = 0.0
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._seconds = self._wait_seconds = 0.0
        # cross entropy, squared log-partition, targets, skipped steps
        self._sums = torch.zeros(4, dtype=torch.float64, device=self._device)
        self._started = time.perf_counter()

    def next_batch(self, loader: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The next micro batch on the device, (micro_batch, block_size + 1); the time it took counts as waiting."""
        start = time.perf_counter()
        tokens = next(loader)["tokens"]
        self._wait_seconds += time.perf_counter() - start
        return tokens.to(self._device, non_blocking=True)

    def add_batch(self, output: Any) -> None:
        """Count one micro batch's `LossOutput`."""
        self._sums[:3] += torch.stack([output.cross_entropy, output.z_square, output.num_targets]).double()

    def add_step(self, norm: torch.Tensor, skip: torch.Tensor, learning_rate: float) -> None:
        """Count one step."""
        self._steps += 1
        self._norm = norm
        self._sums[3] += skip / self._world_size  # every rank decides alike, and the sum is over ranks
        self.learning_rate = learning_rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the window."""
        self._bank()
        yield
        self._started = time.perf_counter()

    def _bank(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._started
        self._state.train_seconds += now - self._started
        self._started = now
        if self._steps:
            self.seconds_per_step = self._seconds / self._steps

    def state(self) -> list[float]:
        """The sums over all ranks, for a checkpoint. Waits for the device; call on every rank."""
        sums = self._sums.clone()
        if self._world_size > 1:
            dist.all_reduce(sums)
        result: list[float] = sums.tolist()
        return result

    def go_on(self, sums: list[float], rank: int) -> None:
        """Go on with a checkpoint's sums, so that the next line is of all its steps; one rank takes them."""
        if rank == 0:
            self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def read(self, most_skips: torch.Tensor) -> dict[str, float]:
        """The window's numbers over all ranks; begins the next window. Call on every rank.

        Args:
            most_skips: Scalar on the device; comes back with the rest, so that one synchronisation serves both.
        """
        waited = torch.tensor([self._wait_seconds], dtype=torch.float64).to(self._device)
        sums = torch.cat([self._sums, waited])
        if self._world_size > 1:
            dist.all_reduce(sums)
        numbers = torch.cat([sums, torch.stack([self._norm, most_skips]).double()]).tolist()
        cross_entropy, z_square, targets, skipped, waited_s, norm, skips = numbers
        self._bank()
        result = {
            "loss": cross_entropy / max(targets, 1.0),
            "log_partition_square": z_square / max(targets, 1.0),
            "grad_norm": norm,
            "learning_rate": self.learning_rate,
            "skipped": round(skipped),
            "most_skips": round(skips),
            "step_s": self.seconds_per_step,
            "data_wait": waited_s / self._world_size / self._seconds,
        }
        self._begin()
        return result
