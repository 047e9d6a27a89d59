"""Master weights: what they save moves no value."""

from __future__ import annotations

import pytest
import torch

from pretrainkit.config import LossConfig, OptimizerConfig
from pretrainkit.models.masters import cast_masters, embed, keep_masters, stored, stored_state
from pretrainkit.train.optimizer import build_optimizer, gradient_norm, take_step
from tests.test_models import KINDS, build, random_tokens


def train(model, *, bf16, steps=3, micro_batches=2):
    """Losses of a few steps, and the weights after them."""
    optimizers = build_optimizer(model, OptimizerConfig())
    losses = []
    for step in range(steps):
        for micro_batch in range(micro_batches):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = model(random_tokens(seed=2 * step + micro_batch)).loss
            loss.backward()
            losses.append(loss.item())
        assert torch.isfinite(gradient_norm(optimizers))
        take_step(optimizers, learning_rate=0.01, grad_scale=torch.tensor(64.0), skip=torch.zeros(()))
        cast_masters(model)
    return losses, stored_state(model)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_masters_in_bf16_are_the_weights_of_autocast_bit_for_bit(kind, tie_embeddings):
    keys = KINDS[kind] | {"padded_vocab_size": 160}  # more than a micro batch has positions
    expected, weights = train(build(keys, tie_embeddings=tie_embeddings), bf16=True)
    model = build(keys, tie_embeddings=tie_embeddings)
    keep_masters(model, torch.bfloat16)
    losses, masters = train(model, bf16=True)
    assert losses == expected
    assert masters.keys() == weights.keys()
    for name, value in weights.items():
        assert masters[name].dtype == torch.float32
        assert torch.equal(masters[name], value), name


@pytest.mark.parametrize("vocabulary", [96, 32])
@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_head_and_embedding_in_fp32_gather_the_gradients_of_autograd(vocabulary, chunk_tokens):
    """Below and above as many ids as a micro batch has positions, and the head in one chunk and in several."""
    keys = KINDS["llama"] | {"padded_vocab_size": vocabulary, "vocab_size": vocabulary}
    gradients = []
    for with_masters in (False, True):
        model = build(keys, loss=LossConfig(chunk_tokens=chunk_tokens))
        if with_masters:
            keep_masters(model, torch.float32)
        for seed in range(3):
            model(random_tokens(seed=seed) % vocabulary).loss.backward()
        gradients.append({name: stored(weight).grad for name, weight in model.named_parameters()})
    expected, found = gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-5, msg=name)
        if name != "lm_head.weight":
            assert torch.equal(found[name], gradient), name


def test_copies_follow_their_masters_and_norms_have_none():
    model = build(KINDS["llama"])
    keep_masters(model, torch.bfloat16)
    block, head, embedding = model.transformer.h[0], model.lm_head.weight, model.transformer.wte.weight
    assert [weight.dtype for weight in (block.attn.qkv.weight, head)] == [torch.bfloat16] * 2
    assert embedding.dtype == block.norm_1.weight.dtype == torch.float32
    assert stored(block.norm_1.weight) is block.norm_1.weight
    for value in stored_state(model).values():
        value.fill_(1.0 + 2**-10)
    cast_masters(model)
    assert torch.equal(head, torch.ones_like(head))
    assert torch.equal(embedding, torch.full_like(embedding, 1.0 + 2**-10))  # one memory with its master


def test_rows_named_often_are_summed_and_the_rest_stays():
    model = build(KINDS["llama"])
    keep_masters(model, torch.float32)
    weight = model.transformer.wte.weight
    weight.master.grad = torch.full_like(weight, 0.5)
    tokens = torch.tensor([[7, 95, 7], [7, 0, 95]])
    hidden = embed(tokens, weight)
    assert torch.equal(hidden, weight[tokens])
    hidden.backward(torch.arange(6.0).view(2, 3, 1).expand(2, 3, 32))
    expected = torch.full((96, 32), 0.5)
    expected[7] += 0 + 2 + 3
    expected[95] += 1 + 5
    expected[0] += 4
    assert torch.equal(weight.master.grad, expected)
    assert weight.grad is None
