"""What the compiler is given in training, and what is kept from it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from pretrainkit import models
from pretrainkit.config import LossConfig
from pretrainkit.train import parallel
from pretrainkit.train.evaluation import generate

KEYS = {
    "block_size": 32, "n_layer": 2, "n_embd": 32, "n_head": 2, "padded_vocab_size": 512, "vocab_size": 512,
    "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "intermediate_size": 48, "parallel_residual": False,
    "bias": False,
}  # fmt: skip


def build(**changes):
    return models.build_model(models.resolve_config(None, KEYS | changes), loss=LossConfig())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # what the compiler says about itself
@pytest.mark.parametrize("norm_class_name", ["RMSNorm", "LayerNorm"])
def test_samples_of_text_compile_nothing(norm_class_name, tokenizer_dir):
    compiled = []

    def count(graph, _inputs):
        compiled.append(graph)
        return graph

    model = build(norm_class_name=norm_class_name)
    for part in (*model.transformer.h, model.transformer.ln_f):
        part.compile(backend=count)
    model(torch.arange(33)[None]).loss.backward()
    assert len(compiled) == 2  # a block, and the last norm
    tokenizer = (tokenizer_dir / "tokenizer.json").read_bytes()
    texts = generate(model, tokenizer, ["The quick"], max_new_tokens=3, block_size=32, device=torch.device("cpu"))
    assert len(texts["The quick"]) > len("The quick")
    assert len(compiled) == 2
    model(torch.arange(33)[None])
    assert len(compiled) == 2


def test_float8_is_for_dense_layers_of_the_blocks(monkeypatch):
    """An expert's number of tokens need not be a multiple of 16, and a router chooses by small differences."""
    torchao = ModuleType("torchao.float8")

    def convert(model, *, module_filter_fn):
        named = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        chosen.extend(name for name, module in named if module_filter_fn(module, name))

    torchao.convert_to_float8_training = convert
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", torchao)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    chosen: list[str] = []
    parallel._use_float8(build(n_layer=1))
    assert chosen == [
        f"transformer.h.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj")
    ]
    chosen.clear()
    parallel._use_float8(build(n_layer=1, intermediate_size=40))
    assert chosen == ["transformer.h.0.attn.qkv", "transformer.h.0.attn.proj"]
    chosen.clear()
    parallel._use_float8(build(n_layer=1, mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2))
    assert chosen == ["transformer.h.0.attn.qkv", "transformer.h.0.attn.proj"]
