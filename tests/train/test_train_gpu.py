"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pretrainkit.models.loss import linear_cross_entropy
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


@pytest.mark.parametrize("chunk_tokens", [512, 64])
@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_in_bf16_adds_its_chunks_in_fp32(chunk_tokens, fused):
    torch.manual_seed(0)
    hidden = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(1000, 256, device="cuda") / 16).to(torch.bfloat16).float()
    targets = torch.randint(0, 1000, (512,), device="cuda")
    inputs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    functional.cross_entropy(functional.linear(*inputs), targets, reduction="sum").backward()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, _, _ = linear_cross_entropy(*ours, None, targets, chunk_tokens=chunk_tokens, fused=fused)
    loss.backward()
    for mine, reference in zip(ours, inputs, strict=True):
        assert mine.grad.dtype == mine.dtype
        error = (mine.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < 0.01, error
