"""The models: litgpt's numbers and keys, our loss, document masks, initialisation, and costs."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from litgpt.model import GPT, apply_rope, apply_rope_interleave
from torch.nn import functional

from pretrainkit import models
from pretrainkit.config import LossConfig
from pretrainkit.errors import DatasetError, ModelError
from pretrainkit.metadata import DatasetInfo, TokenizerInfo
from pretrainkit.models import loss
from pretrainkit.models.documents import IGNORED_TARGET, DocumentBoundary
from pretrainkit.models.loss import linear_cross_entropy

TINY = {
    "block_size": 32, "n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 96, "vocab_size": 96,
}  # fmt: skip
LLAMA = {**TINY, "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "intermediate_size": 48, "bias": False,
         "parallel_residual": False, "n_query_groups": 2, "rotary_percentage": 1.0}  # fmt: skip
# Soft capping of both kinds, scaled embeddings, a window on every other layer: what Gemma-2 does.
GEMMA = {**LLAMA, "mlp_class_name": "GemmaMLP", "sliding_window_size": 5, "sliding_window_indices": [1, 0],
         "final_logit_softcapping": 3.0, "attention_logit_softcapping": 5.0, "scale_embeddings": True}  # fmt: skip
# A window without soft capping, norms on queries and keys, two rotary bases: what Gemma-3 does.
GEMMA3 = {**GEMMA, "final_logit_softcapping": None, "attention_logit_softcapping": None, "norm_qk": True,
          "rope_local_base_freq": 100.0, "rope_indices": [1, 0]}  # fmt: skip
MIXTURE = {**LLAMA, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2}
LATENT = {**LLAMA, "n_query_groups": 4, "latent_attention": {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}}  # fmt: skip
KINDS = {"pythia": TINY, "llama": LLAMA, "gemma2": GEMMA, "gemma3": GEMMA3, "mixture": MIXTURE, "latent": LATENT}


def build(keys, **options):
    config = models.resolve_config(None, keys)
    model = models.build_model(config, loss=options.pop("loss", LossConfig()), **options)
    models.initialize_parameters(model, seed=1)
    return model


def litgpt_twin(model):
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def random_tokens(batch=2, length=33, seed=0):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_litgpt(kind):
    model = build(KINDS[kind], loss=LossConfig(chunk_tokens=7))
    twin = litgpt_twin(model)
    tokens = random_tokens()

    output = model(tokens)
    output.loss.backward()
    logits = twin(tokens[:, :-1])
    expected = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    expected.backward()

    assert output.num_targets.item() == 64
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    ours = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_are_litgpts_bit_for_bit_and_stay_in_the_order_of_the_projection(share, interleave, dtype):
    model = build({**TINY, "n_embd": 64, "rotary_percentage": share, "rope_interleave": interleave})
    attention, width = model.transformer.h[0].attn, model.config.rope_n_elem
    projected = torch.randn(2, 32, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    twin = projected.detach().clone().requires_grad_()
    cos, sin = model.cos.unsqueeze(0), model.sin.unsqueeze(0)

    found = attention._rotate(projected.transpose(1, 2), cos, sin)
    heads_first = twin.transpose(1, 2)
    turned = (apply_rope_interleave if interleave else apply_rope)(heads_first[..., :width], cos, sin)
    expected = torch.cat((turned, heads_first[..., width:]), dim=-1)

    assert torch.equal(found, expected)
    assert interleave or found.stride() == projected.transpose(1, 2).stride()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(projected.grad, twin.grad)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_grouped_queries_in_bf16_meet_keys_that_are_not_repeated(kind, monkeypatch):
    model = build({**KINDS[kind], "sliding_window_size": 64})  # longer than the block: no mask
    config = model.config
    assert config.n_query_groups < config.n_head
    sdpa, heads = functional.scaled_dot_product_attention, []

    def watched(q, k, v, **options):
        heads.append((q.shape[1], k.shape[1], v.shape[1]))
        return sdpa(q, k, v, **options)

    twin = litgpt_twin(model)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    tokens = random_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens).loss.backward()
        assert set(heads) == {(config.n_head, config.n_query_groups, config.n_query_groups)}
        logits = twin(tokens[:, :-1]).float()
    functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    for ours, theirs in zip(model.transformer.h, twin.transformer.h, strict=True):
        mine, expected = ours.attn.qkv.weight.grad, theirs.attn.qkv.weight.grad
        assert (mine - expected).norm() < 0.05 * expected.norm()


def test_next_token_logits_are_those_of_litgpt():
    model = build(GEMMA)
    tokens = random_tokens(length=20)
    torch.testing.assert_close(model(tokens, predict=True), litgpt_twin(model)(tokens)[:, -1])


def test_z_loss_adds_the_squared_log_partition():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(10, 8), torch.randn(24, 8), torch.randn(24)
    targets = torch.randint(0, 24, (10,))
    targets[3] = IGNORED_TARGET
    inputs = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = 2.0 * torch.tanh(functional.linear(*inputs) / 2.0)
    square = logits.logsumexp(-1)[targets != IGNORED_TARGET].square().sum()
    expected = functional.cross_entropy(logits, targets, reduction="sum") + 0.1 * square
    expected.mul(0.5).backward()

    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    loss, cross_entropy, z_square = linear_cross_entropy(*ours, targets, z_loss=0.1, softcap=2.0, chunk_tokens=4)
    loss.mul(0.5).backward()

    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(z_square.double(), square)
    torch.testing.assert_close(cross_entropy + 0.1 * z_square, loss.detach())
    for mine, reference in zip(ours, inputs, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


def test_loss_without_gradients_equals_loss_with():
    model = build(LLAMA)
    tokens = random_tokens()
    with torch.no_grad():
        evaluated = model(tokens)
    assert torch.equal(evaluated.loss, model(tokens).loss.detach())
    assert not evaluated.loss.requires_grad


@pytest.mark.parametrize(("chunk_tokens", "lengths"), [(16, [16, 16]), (14, [8, 8, 8, 8]), (31, [16, 16]), (40, [32])])
def test_chunks_of_the_loss_are_of_one_length(chunk_tokens, lengths, monkeypatch):
    """Else the compiler makes one version for each."""
    step, seen = loss.loss_and_logit_gradient, []

    def watched(logits, *rest):
        seen.append(len(logits))
        return step(logits, *rest)

    monkeypatch.setattr(loss, "loss_and_logit_gradient", watched)
    targets = torch.arange(32) % 24
    linear_cross_entropy(torch.randn(32, 8), torch.randn(24, 8), None, targets, chunk_tokens=chunk_tokens)
    assert seen == lengths


def test_blocks_hand_on_bf16_under_autocast():
    model = build(LLAMA)
    seen = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda _block, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_tokens()).loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert model.transformer.wte.weight.grad.dtype == torch.float32


def test_loss_under_autocast_computes_in_bf16_and_keeps_fp32_gradients():
    model = build(LLAMA)
    tokens = random_tokens()
    exact = model(tokens).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(tokens).loss
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0)
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_rotary_tables_stay_fp32_when_the_model_is_cast():
    model = build(LLAMA)
    before = model.cos.clone()
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.cos, before)


BOS, EOS = 1, 2
BOUNDARIES = {
    "bos": (DocumentBoundary(rule="bos", bos_id=BOS), [[BOS, 5, 6, 7], [BOS, 8, 9], [BOS, 10, 11, 12, 13]]),
    "eos": (DocumentBoundary(rule="eos", eos_id=EOS), [[5, 6, 7, EOS], [8, 9, EOS], [10, 11, 12, 13, EOS]]),
    "both": (
        DocumentBoundary(rule="both", bos_id=BOS, eos_id=EOS),
        [[BOS, 5, 6, EOS], [BOS, 8, EOS], [BOS, 10, 11, EOS]],
    ),
    "both, one id": (
        DocumentBoundary(rule="both", bos_id=EOS, eos_id=EOS),
        [[EOS, 5, 6, EOS], [EOS, 8, EOS], [EOS, 10, 11, EOS]],
    ),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_document_ids_follow_the_boundary_rule(name):
    boundary, documents = BOUNDARIES[name]
    tokens = torch.tensor([token for document in documents for token in document])
    expected = [index for index, document in enumerate(documents) for _ in document]
    assert boundary.document_ids(tokens).tolist() == expected
    # A block that begins inside the first document counts from there.
    assert boundary.document_ids(tokens[1:]).tolist() == expected[1:]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "latent"])
@pytest.mark.parametrize("name", BOUNDARIES)
def test_document_mask_equals_each_document_alone(kind, name):
    boundary, documents = BOUNDARIES[name]
    model = build(KINDS[kind], document_boundary=boundary)
    together = model(torch.tensor([[token for document in documents for token in document]]))
    alone = [litgpt_twin(model)(torch.tensor([document[:-1]])) for document in documents]
    expected = sum(
        functional.cross_entropy(logits[0], torch.tensor(document[1:]), reduction="sum")
        for logits, document in zip(alone, documents, strict=True)
    )
    targets = sum(len(document) - 1 for document in documents)
    if name == "bos":  # the next document's marker is how a document ends
        ends = [litgpt_twin(model)(torch.tensor([document]))[0, -1:] for document in documents[:-1]]
        expected = expected + sum(functional.cross_entropy(end, torch.tensor([BOS]), reduction="sum") for end in ends)
        targets += 2
    assert together.num_targets.item() == targets
    torch.testing.assert_close(together.loss, expected, rtol=2e-6, atol=0)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow, but the same numbers
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "latent"])
def test_flex_attention_sees_what_the_plain_mask_allows(kind, monkeypatch):
    from torch.nn.attention import flex_attention

    from pretrainkit.models import attention, gpt

    model = build({**KINDS[kind], "block_size": 200}, document_boundary=BOUNDARIES["eos"][0])
    tokens = random_tokens(batch=3, length=200)
    tokens[:, [40, 41, 150]] = EOS
    with torch.no_grad():
        plain = model(tokens)
        monkeypatch.setattr(gpt, "_has_flex_kernels", lambda device: True)
        monkeypatch.setattr(gpt, "flex", vars(flex_attention))
        monkeypatch.setattr(attention, "flex", vars(flex_attention))
        sparse = model(tokens)
    torch.testing.assert_close(sparse.loss, plain.loss, rtol=1e-6, atol=0)
    assert sparse.num_targets == plain.num_targets == 3 * (199 - 3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_caps_scores_without_any_mask_too(monkeypatch):
    from torch.nn.attention import flex_attention

    from pretrainkit.models import attention, gpt

    model = build({**GEMMA, "sliding_window_size": 200, "block_size": 200})
    tokens, seen = random_tokens(batch=2, length=129), []

    def watched(*inputs, **options):
        seen.append(options["score_mod"](torch.tensor(7.0)))
        return flex_attention.flex_attention(*inputs, **options)

    with torch.no_grad():
        plain = model(tokens)
        monkeypatch.setattr(gpt, "_has_flex_kernels", lambda device: True)
        monkeypatch.setattr(gpt, "flex", vars(flex_attention))
        monkeypatch.setattr(attention, "flex", {"flex_attention": watched})
        sparse = model(tokens)
    assert seen == [5.0 * torch.tanh(torch.tensor(7.0 / 5.0))] * 2
    torch.testing.assert_close(sparse.loss, plain.loss, rtol=1e-6, atol=0)


def test_boundary_without_its_marker_is_refused():
    with pytest.raises(DatasetError, match="boundary rule is 'both'.*bos None and eos 2"):
        DocumentBoundary(rule="both", eos_id=2)


YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_seq_len": 1024}


# Every kind of rotary table: plain, Llama 3's and YaRN's adjustments, two bases in one.
@pytest.mark.parametrize(
    ("name", "keys"),
    [("pythia-160m", {}), ("Llama-3.2-1B", {}), ("Gemma-3-1b-it", {}), ("pythia-14m", {"rope_adjustments": YARN})],
)
def test_a_sketch_on_the_meta_device_has_litgpts_shapes_and_types(name, keys):
    config = models.resolve_config(name, {"n_layer": 1, "padded_vocab_size": 64, **keys})
    with torch.device("meta"):
        expected = GPT(config)
        sketch = models.build_model(config, loss=LossConfig(), max_seq_length=None)

    def described(module):
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {key: (tensor.shape, tensor.dtype, tensor.device.type) for key, tensor in tensors.items()}

    assert described(sketch) == described(expected)
    sketch.max_seq_length = 16
    assert sketch.cos.shape[0] == 16
    assert sketch.max_seq_length == 16


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_a_pure_function_of_seed_and_name(kind):
    first, second = build(KINDS[kind]), build({**KINDS[kind], "n_layer": 2})
    torch.manual_seed(99)
    for (name, one), two in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    models.initialize_parameters(second, seed=2)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_parameters_have_the_distributions_of_litgpt():
    model = build({**TINY, "n_embd": 256, "padded_vocab_size": 4096})
    assert model.lm_head.weight.std().item() == pytest.approx((2 / 5 / 256) ** 0.5, rel=0.01)
    assert model.transformer.h[1].mlp.fc.weight.std().item() == pytest.approx((2 / 5 / 256) ** 0.5, rel=0.01)
    assert model.transformer.h[1].attn.proj.weight.std().item() == pytest.approx(1 / 256**0.5 / 2, rel=0.02)
    assert model.transformer.h[0].attn.qkv.bias.eq(0).all()
    assert model.transformer.h[0].norm_1.weight.eq(1).all()
    assert not torch.equal(model.transformer.h[0].mlp.fc.weight, model.transformer.h[1].mlp.fc.weight)


def test_a_shard_draws_what_the_whole_would(monkeypatch):
    from pretrainkit.models import initialize

    monkeypatch.setattr(initialize, "_GROUP_ELEMENTS", 100)
    whole = initialize._draw(7, "w", (37, 9), (37, 9), (0, 0))
    for shape, offset in [
        ((10, 9), (0, 0)),
        ((10, 9), (11, 0)),
        ((5, 9), (32, 0)),
        ((37, 4), (0, 5)),
        ((1, 1), (36, 8)),
    ]:
        rows, columns = (slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        assert torch.equal(initialize._draw(7, "w", (37, 9), shape, offset), whole[rows, columns])


def test_meta_model_is_filled_after_it_is_materialised():
    config = models.resolve_config(None, LLAMA)
    with torch.device("meta"):
        model = models.build_model(config, loss=LossConfig(), tie_embeddings=True)
    model.to_empty(device="cpu")
    models.initialize_parameters(model, seed=1)
    plain = build(LLAMA, tie_embeddings=True)
    assert model.transformer.wte.weight is model.lm_head.weight
    assert torch.equal(model.cos, plain.cos)
    for (name, one), two in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_named_model_can_have_keys_replaced():
    config = models.resolve_config("pythia-160m", {"n_layer": 4})
    assert (config.n_layer, config.n_embd, config.name) == (4, 768, "pythia-160m")
    assert models.resolve_config("meta-llama/Llama-3.2-1B").n_layer == 16


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (None, None, "no model is named"),
        ("pythia-161m", None, "unknown model 'pythia-161m'; did you mean pythia-160m, "),
        (None, {**TINY, "n_layers": 2}, "unknown key model_config.n_layers; did you mean n_layer"),
        (None, {**TINY, "n_layer": 0}, "model_config.n_layer=0 is not positive"),
        (None, {**TINY, "n_layer": "two"}, "model_config.n_layer='two' is of the wrong type; expected int"),
        (None, {**TINY, "bias": 1}, "model_config.bias=1 is of the wrong type"),
        (None, {**TINY, "n_layer": None}, "model_config.n_layer is empty"),
        (None, {**TINY, "n_head": 5}, "n_embd=32 must be a multiple of n_head=5"),
        (None, {**TINY, "mlp_class_name": "LlamaMLP"}, "did you mean LLaMAMLP"),
        (None, {**TINY, "mlp_class_name": "LLaMAMLP"}, "needs to set the `intermediate_size`"),
        (None, {**TINY, "rotary_percentage": 2}, "model_config.rotary_percentage=2 must be between 0 and 1"),
        (None, {**TINY, "norm_eps": -1}, "model_config.norm_eps=-1 must be above 0"),
        (None, {**TINY, "final_logit_softcapping": 0}, "model_config.final_logit_softcapping=0 must be above 0"),
        (None, {**TINY, "name": 3}, "model_config.name=3 is of the wrong type; expected str"),
        (None, {**TINY, "rope_adjustments": 3}, "model_config.rope_adjustments=3 is of the wrong type; expected dict"),
        (None, {**MIXTURE, "n_expert_per_token": 5}, "n_expert_per_token=5 is not between 1 and n_expert=4"),
    ],
)
def test_wrong_model_is_refused_in_one_line(name, keys, message):
    with pytest.raises(ModelError, match=message):
        models.resolve_config(name, keys)


def test_context_beyond_the_models_is_refused():
    with pytest.raises(ModelError, match="max_seq_length=64 is longer than the context of the model, 32"):
        models.build_model(models.resolve_config(None, TINY), loss=LossConfig(), max_seq_length=64)


def test_keys_that_only_the_model_looks_at_are_refused_in_one_line():
    config = models.resolve_config(None, {**TINY, "rope_adjustments": {"low_freq_factor": 1.0}})
    with pytest.raises(ModelError, match="model_config cannot be built: .* missing in rope_adjustments"):
        models.build_model(config, loss=LossConfig())


def dataset_info(**changes):
    tokenizer = TokenizerInfo(name="tiny", sha256="0" * 64, vocab_size=changes.pop("vocab_size", 96))
    return DatasetInfo(split="train", tokenizer=tokenizer, token_dtype="uint16", boundary="eos", **changes)


def test_dataset_beyond_the_vocabulary_is_refused():
    config = models.resolve_config(None, TINY)
    models.check_vocabulary(config, dataset_info(max_token_id=95), "data/train")
    for info in (dataset_info(max_token_id=96), dataset_info(vocab_size=97)):
        with pytest.raises(ModelError, match="data/train was made with tokenizer 'tiny', whose ids reach 96"):
            models.check_vocabulary(config, info, "data/train")


def test_costs_of_known_models():
    pythia = models.resolve_config("pythia-160m")
    assert models.num_parameters(pythia) == 162_322_944
    assert models.num_parameters(pythia, tie_embeddings=True) == 162_322_944 - 50304 * 768
    # 6 per weight of every matrix but the embedding, plus 12 L H T for attention over everything.
    matrices = 12 * 12 * 768 * 768 + 50304 * 768
    full, causal = models.flops_per_token(pythia, 2048)
    assert full == 6 * matrices + 12 * 12 * 768 * 2048
    assert causal == 6 * matrices + 12 * 12 * 768 * 2049 / 2


def test_costs_count_chosen_experts_and_windows_only():
    llama, mixture = (models.resolve_config(None, keys) for keys in (LLAMA, MIXTURE))
    one_expert = 3 * 32 * 48
    router = 32 * 4
    extra = models.flops_per_token(mixture, 32)[0] - models.flops_per_token(llama, 32)[0]
    assert extra == 6 * 2 * (one_expert + router)  # two layers: two experts and a router instead of one MLP
    windowed = models.resolve_config(None, {**LLAMA, "sliding_window_size": 8})
    widths = 2 * 32
    assert models.flops_per_token(llama, 32)[0] - models.flops_per_token(windowed, 32)[0] == 2 * 6 * widths * (32 - 8)


def test_checkpointing_a_block_keeps_its_input_and_one_block_at_a_time_is_computed_again():
    config = models.resolve_config("pythia-160m")
    facts = {
        level: models.memory_facts(config, block_size=2048, micro_batch_size=2, checkpointing=level)
        for level in ("none", "mlp", "attention", "block")
    }
    assert facts["block"].activation_bytes == 2 * 2048 * 2 * (12 * 768 + 18 * 768 + 4 * 768)
    assert facts["none"].activation_bytes > facts["mlp"].activation_bytes > facts["block"].activation_bytes
    assert facts["none"].activation_bytes > facts["attention"].activation_bytes
    assert dataclasses.asdict(facts["none"])["parameters"] == 162_322_944


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_embd": 10**12}, "model_config.n_embd=1000000000000 is beyond what can be built; give at most 1000000"),
        ({"padded_vocab_size": 10**11}, "padded_vocab_size=100000000000 is beyond what can be built; give at most"),
        ({"n_layer": 100_000}, "n_layer=100000 is beyond what can be built; give at most 4096"),
        ({"n_expert": 2}, "n_expert=2 does nothing with mlp_class_name=LLaMAMLP, which has no experts; add mlp_class_"),
        ({"n_expert_per_token": 2}, "n_expert_per_token=2 does nothing with mlp_class_name=LLaMAMLP"),
    ],
)
def test_sizes_beyond_any_model_and_experts_of_a_model_without_are_refused(keys, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        models.resolve_config(None, {**LLAMA, **keys})
    assert models.resolve_config(None, {**LLAMA, "n_expert": 0}).n_expert == 0
