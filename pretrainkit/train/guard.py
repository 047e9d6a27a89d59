"""Which steps are taken: the device decides, and the host never waits for it.

Comes in: the gradient's norm, a scalar on the device. Goes out: a scalar on the device that is 1 where the optimizer
must leave the parameters alone, because the norm is not finite or is a spike. Guarantee: no host synchronisation; the
norm is the same on every rank, so every rank decides alike.
"""

from __future__ import annotations

from typing import Any

import torch

from pretrainkit.config import GuardConfig

_NORM_DECAY = 0.98  # the running average looks back about 50 steps


class Guard:
    """Judges steps and remembers, on the device, the usual norm and the last `window` verdicts."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.config = config
        self.norm_average = torch.zeros((), device=device)
        self.num_taken = torch.zeros((), device=device)
        self.verdicts = torch.zeros(config.window, device=device)
        self.most_skips = torch.zeros((), device=device)  # within any window that ended since they were last taken

    def judge(self, norm: torch.Tensor, step: int) -> torch.Tensor:
        """1.0 when the step of this gradient norm must be skipped, else 0.0; both scalars on the device."""
        bad = ~torch.isfinite(norm)
        if self.config.spike_factor is not None:
            experienced = self.num_taken >= self.config.warmup_steps
            bad = bad | (experienced & (norm > self.config.spike_factor * self.norm_average))
        average = torch.lerp(norm, self.norm_average, torch.where(self.num_taken > 0, _NORM_DECAY, 0.0))
        self.norm_average = torch.where(bad, self.norm_average, average)
        self.num_taken += ~bad
        skipped = bad.float()
        self.verdicts[step % self.config.window] = skipped
        self.most_skips = torch.maximum(self.most_skips, self.verdicts.sum())
        return skipped

    def take_most_skips(self) -> torch.Tensor:
        """The most steps that were skipped within `window` at any time since this was last called, on the device."""
        taken, self.most_skips = self.most_skips, self.verdicts.sum()
        return taken

    def recent_skips(self) -> int:
        """Steps skipped among the last `window`; waits for the device."""
        return int(self.verdicts.sum())

    def forget(self) -> None:
        """Start counting skips anew, after going back to a checkpoint."""
        self.verdicts.zero_()
        self.most_skips.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; waits for the device."""
        return {
            "norm_average": self.norm_average.item(),
            "num_taken": self.num_taken.item(),
            "most_skips": self.most_skips.item(),
            "verdicts": [index for index, verdict in enumerate(self.verdicts.tolist()) if verdict],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state_dict`; verdicts beyond a window that became smaller are dropped."""
        self.norm_average.fill_(state["norm_average"])
        self.num_taken.fill_(state["num_taken"])
        self.verdicts.zero_()
        for index in state["verdicts"]:
            if index < len(self.verdicts):
                self.verdicts[index] = 1.0
        self.most_skips.fill_(state.get("most_skips", 0.0))
