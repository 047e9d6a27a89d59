"""What only a GPU can show. Run `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pretrainkit import models
from pretrainkit.config import ComputeConfig, DataConfig, LossConfig, OptimizerArgs, OptimizerConfig
from pretrainkit.models import gpt
from pretrainkit.models.documents import DocumentBoundary
from pretrainkit.models.loss import linear_cross_entropy
from pretrainkit.models.masters import keep_masters, stored
from pretrainkit.train import loop, pretrain

# The compiler and its kernels warn of much that is theirs.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

WIDER = {"block_size": 256, "n_embd": 128, "n_head": 2, "n_query_groups": 1, "intermediate_size": 256}
WINDOWS = {"sliding_window_size": 64, "sliding_window_indices": [1, 0]}
RUNS = {
    "plain": {},
    "documents": {"data": DataConfig(document_mask=True)},
    "windows": {"model": WINDOWS},
    "soft cap": {"model": WINDOWS | {"attention_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}},
    "muon": {"optimizer": OptimizerConfig(class_path="Muon", init_args=OptimizerArgs(lr=1e-2))},
    "eager": {"compute": ComputeConfig(compile=False, hang_timeout_s=None)},
    "bf16-true": {"precision": "bf16-true"},
} | {
    what: {"compute": ComputeConfig(activation_checkpointing=what, hang_timeout_s=None)}
    for what in ("attention", "mlp", "block")
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Else the models of all tests share the eight versions that the compiler makes of a block at most."""
    import torch._dynamo

    torch._dynamo.reset()


@pytest.fixture
def arguments(settings):
    """Those of a run that a GPU's kernels like."""

    def make(*, model=None, **changes):
        made = settings(**changes)
        made["model_config"] |= WIDER | (model or {})
        return made

    return make


@pytest.mark.parametrize("kind", RUNS)
def test_a_step_that_does_not_log_never_waits_for_the_device(kind, arguments, monkeypatch, rows):
    whole = loop._step

    def watched(run, *rest):
        torch.cuda.set_sync_debug_mode("error" if run.state.step > 2 else "default")
        whole(run, *rest)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "_step", watched)
    made = arguments(train={"log_interval": 6}, **RUNS[kind])
    pretrain(**made)
    logged = rows(made["out_dir"])
    assert [row["step"] for row in logged] == [6, 12]
    assert logged[1]["loss"] < logged[0]["loss"]
    assert logged[1]["skipped"] == 0


@pytest.mark.parametrize("kind", ["plain", "documents", "muon"])
def test_going_on_equals_the_uninterrupted_run(kind, arguments, rows, tmp_path):
    whole = arguments(out_dir=tmp_path / "whole", **RUNS[kind])
    pretrain(**whole)
    parts = arguments(out_dir=tmp_path / "parts", **RUNS[kind])
    # Only the first half: the learning rate's course must be that of the whole.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_is_last", lambda run: run.state.step >= 4)
        pretrain(**parts)
    pretrain(**parts, resume="auto")
    losses = {row["step"]: row["loss"] for row in rows(parts["out_dir"])}
    for row in rows(whole["out_dir"]):
        assert losses[row["step"]] == pytest.approx(row["loss"], rel=2e-3)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (100, None), (100, 5.0)])
def test_documents_and_windows_are_those_of_the_plain_mask(window, cap, monkeypatch):
    keys = WIDER | {"block_size": 500, "n_layer": 2, "padded_vocab_size": 96, "vocab_size": 96, "bias": False}
    if window is not None:
        keys |= {"sliding_window_size": window, "sliding_window_indices": [1, 0]}
    keys |= {"attention_logit_softcapping": cap}
    config = models.resolve_config(None, keys)
    with torch.device("cuda"):
        model = models.build_model(
            config, loss=LossConfig(), document_boundary=DocumentBoundary(rule="eos", eos_id=0), compile_loss=True
        )
    models.initialize_parameters(model, seed=1)
    for block in model.transformer.h:
        block.compile()
    for seed in range(3):  # other documents are no reason to compile again
        tokens = torch.randint(0, 96, (3, 501), generator=torch.Generator().manual_seed(seed)).cuda()
        found = []
        for flex in (True, False):
            monkeypatch.setattr(gpt, "_has_flex_kernels", lambda _device, flex=flex: flex)
            model.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(tokens).loss
            (loss / 1500).backward()
            found.append((loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
        (sparse, gradient), (plain, expected) = found
        assert sparse == pytest.approx(plain, rel=1e-3)
        assert (gradient - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("micro_batch_size", [2, 16])  # below and above 3,072 positions PyTorch sums rows differently
def test_masters_gather_the_gradients_of_autocast(micro_batch_size):
    keys = WIDER | {"n_layer": 2, "padded_vocab_size": 8192, "vocab_size": 8192, "bias": False}
    found = []
    for with_masters in (False, True):
        with torch.device("cuda"):
            model = models.build_model(models.resolve_config(None, keys), loss=LossConfig(), compile_loss=True)
        models.initialize_parameters(model, seed=1)
        for block in model.transformer.h:
            block.compile()
        if with_masters:
            keep_masters(model, torch.bfloat16)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(0, 8192, (micro_batch_size, 257), generator=generator).square() // 8192
            tokens = tokens.cuda()
            torch.cuda.set_sync_debug_mode("error" if seed else "default")  # the first compiles
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(tokens).loss
            loss.backward()
            torch.cuda.set_sync_debug_mode("default")
        found.append({name: stored(weight).grad for name, weight in model.named_parameters()})
    for name, expected in found[0].items():
        assert found[1][name].dtype == torch.float32
        assert (found[1][name] - expected).norm() < 0.01 * expected.norm(), name


@pytest.mark.parametrize("chunk_tokens", [512, 64])
@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_in_bf16_adds_its_chunks_in_fp32(chunk_tokens, fused):
    torch.manual_seed(0)
    hidden = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(1000, 256, device="cuda") / 16).to(torch.bfloat16).float()
    bias = torch.zeros(1000, device="cuda")
    targets = torch.randint(0, 1000, (512,), device="cuda")
    inputs = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    functional.cross_entropy(functional.linear(*inputs), targets, reduction="sum").backward()
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, _, _ = linear_cross_entropy(*ours, targets, chunk_tokens=chunk_tokens, fused=fused)
    loss.backward()
    for mine, reference in zip(ours, inputs, strict=True):
        assert mine.grad.dtype == mine.dtype
        error = (mine.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < 0.01, error
