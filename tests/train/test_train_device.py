"""A step on a device waits for nothing: shown on PyTorch's meta device, whose tensors have no values to wait for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrainkit import models
from pretrainkit.config import GuardConfig, LossConfig, OptimizerConfig
from pretrainkit.models.documents import DocumentBoundary
from pretrainkit.models.masters import cast_masters, keep_masters
from pretrainkit.train.guard import Guard
from pretrainkit.train.optimizer import build_optimizer, gradient_norm, take_step
from pretrainkit.train.parallel import checkpoint_activations
from pretrainkit.train.state import TrainState
from pretrainkit.train.window import Window

KEYS = {
    "block_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 2, "padded_vocab_size": 512,
    "vocab_size": 512, "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "intermediate_size": 48,
    "parallel_residual": False, "bias": False,
}  # fmt: skip
WINDOWS = {"sliding_window_size": 16, "sliding_window_indices": [1, 0], "scale_embeddings": True}
KINDS = {
    "llama": {},
    "pythia": {"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True, "parallel_residual": True},
    "windows": WINDOWS,
    "soft cap": WINDOWS | {"attention_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}


class OnDevice(TorchDispatchMode):
    """Refuses every tensor of the host but single numbers, which kernels take as arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                assert tensor.dim() == 0, f"{func} works on the host"
        return result


@pytest.mark.parametrize("what", ["none", "block"])
@pytest.mark.parametrize("rule", [None, "eos", "bos"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_neither_reads_from_the_device_nor_copies_to_it(kind, rule, what, monkeypatch):
    # Two questions that the meta device has no answer to.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)
    monkeypatch.setattr(torch.nn.utils.clip_grad, "_device_has_foreach_support", lambda _device: True)
    device = torch.device("meta")
    with device:
        model = models.build_model(
            models.resolve_config(None, KEYS | KINDS[kind]),
            loss=LossConfig(chunk_tokens=64),
            document_boundary=None if rule is None else DocumentBoundary(rule=rule, bos_id=1, eos_id=0),
        )
    checkpoint_activations(model, what)
    keep_masters(model, torch.float32)
    optimizers = build_optimizer(model, OptimizerConfig(class_path="Muon"))
    guard, window = Guard(GuardConfig(spike_factor=3.0), device), Window(device, 1, TrainState())
    with OnDevice():
        for step in range(2):
            for _micro_batch in range(2):
                output = model(torch.zeros((4, 65), dtype=torch.int64, device=device))
                output.loss.backward()
                window.add_batch(output)
            norm = gradient_norm(optimizers)
            skip = guard.judge(norm, step)
            take_step(optimizers, learning_rate=1e-3, grad_scale=norm.clamp(max=1.0), skip=skip)
            cast_masters(model)
            window.add_step(norm, skip, 1e-3)
    with pytest.raises((RuntimeError, NotImplementedError)):  # what a log line does waits
        window.read(guard.take_most_skips())
