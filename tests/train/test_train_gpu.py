"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from pretrainkit.train import loop, pretrain

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_a_step_that_does_not_log_never_waits_for_the_device(settings, monkeypatch, rows):
    whole = loop._step

    def watched(run, *rest):
        torch.cuda.set_sync_debug_mode("error" if run.state.step > 2 else "default")
        whole(run, *rest)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "_step", watched)
    arguments = settings(train={"log_interval": 6})
    pretrain(**arguments)
    assert [row["step"] for row in rows(arguments["out_dir"])] == [6, 12]
