"""litgpt's model and the exported transformers model compute the same, for every architecture we write."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT, Config
from litgpt.config import name_to_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrainkit.errors import ModelError
from pretrainkit.export import export_hf
from pretrainkit.models.huggingface import family_of, plan_weights, transformers_config

LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8}
SIZES = {
    "n_query_groups": None,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "block_size": 32,
    "padded_vocab_size": 64,
    "vocab_size": 64,
}
GROUPED = {"n_query_groups": 2, "intermediate_size": 48, "head_size": 8}
MOE = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24}
GEMMA_WINDOW = {"sliding_window_size": 4, "sliding_window_indices": [1, 0], "rope_indices": [1, 0]}

# name of a litgpt model, changes to it, architecture it must become
MODELS = [
    ("Llama-3.2-1B", {**GROUPED, "rope_adjustments": LLAMA3_ROPE}, "LlamaForCausalLM"),
    ("tiny-llama-1.1b", GROUPED, "LlamaForCausalLM"),
    ("LLaMA-2-7B-32K", {"intermediate_size": 48, "head_size": 8, "rope_condense_ratio": 8}, "LlamaForCausalLM"),
    ("Llama-2-7b-hf", {**GROUPED, "bias": True}, "LlamaForCausalLM"),
    ("Llama-2-7b-hf", {**GROUPED, "head_size": 16}, "LlamaForCausalLM"),
    ("Mistral-7B-v0.1", {**GROUPED, "sliding_window_size": 4}, "MistralForCausalLM"),
    ("Mistral-7B-v0.3", GROUPED, "MistralForCausalLM"),
    ("Qwen2.5-0.5B", GROUPED, "Qwen2ForCausalLM"),
    ("Qwen3-0.6B", GROUPED, "Qwen3ForCausalLM"),
    ("Qwen3-0.6B", {**GROUPED, "sliding_window_size": 4, "sliding_window_indices": [0, 1]}, "Qwen3ForCausalLM"),
    ("Phi-3-mini-4k-instruct", {**GROUPED, "sliding_window_size": 4}, "Phi3ForCausalLM"),
    ("Phi-4-mini-instruct", GROUPED, "Phi3ForCausalLM"),
    ("stablelm-3b-4e1t", {"intermediate_size": 48, "head_size": 8}, "StableLmForCausalLM"),
    ("OLMo-1B-hf", {"intermediate_size": 48, "head_size": 8}, "OlmoForCausalLM"),
    ("OLMo-2-1124-7B", {"intermediate_size": 48, "head_size": 8}, "Olmo2ForCausalLM"),
    ("Gemma-2b", {"n_query_groups": 1, "intermediate_size": 48, "head_size": 16}, "GemmaForCausalLM"),
    (
        "Gemma-2-2b",
        {**GROUPED, "sliding_window_size": 4, "sliding_window_indices": [1, 0], "attention_scores_scalar": 5},
        "Gemma2ForCausalLM",
    ),
    ("Gemma-3-1b-it", {**GROUPED, **GEMMA_WINDOW}, "Gemma3ForCausalLM"),
    ("Gemma-3-4b-it", {**GROUPED, **GEMMA_WINDOW}, "Gemma3ForCausalLM"),
    ("Mixtral-8x7B-v0.1", {**GROUPED, **MOE, "moe_intermediate_size": None}, "MixtralForCausalLM"),
    ("Qwen3-30B-A3B", {**GROUPED, **MOE}, "Qwen3MoeForCausalLM"),
    ("pythia-160m", {"intermediate_size": 48, "head_size": 8}, "GPTNeoXForCausalLM"),
    ("pythia-160m", {"intermediate_size": 48, "head_size": 8, "parallel_residual": False}, "GPTNeoXForCausalLM"),
    ("phi-2", {"intermediate_size": 48, "head_size": 8, "rotary_percentage": 0.5}, "PhiForCausalLM"),
    ("falcon-7b", {"n_query_groups": 1, "intermediate_size": 48, "head_size": 8}, "FalconForCausalLM"),
    ("falcon-40b", {"n_query_groups": 2, "intermediate_size": 48, "head_size": 8}, "FalconForCausalLM"),
]


def make_config(name: str, changes: dict[str, object]) -> Config:
    return Config.from_name(name, **{**SIZES, **changes})


def save_litgpt_folder(folder: Path, config: Config, *, tied: bool = False, seed: int = 0) -> GPT:
    """A litgpt folder with random weights (no parameter is 0 or 1, so that a lost one shows)."""

    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
        if tied:
            model.lm_head.weight.copy_(model.transformer.wte.weight)
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.dump(asdict(config)))
    return model


def largest_difference(model: GPT, folder: Path) -> float:
    tokens = torch.randint(model.config.padded_vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return float((loaded(tokens).logits - model(tokens)).abs().max())


@pytest.mark.parametrize(("name", "changes", "architecture"), MODELS, ids=[f"{m[0]}-{i}" for i, m in enumerate(MODELS)])
def test_exported_model_gives_litgpts_logits(
    name: str, changes: dict[str, object], architecture: str, tmp_path: Path
) -> None:
    config = make_config(name, changes)
    model = save_litgpt_folder(tmp_path / "lit", config)
    export_hf(tmp_path / "lit", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [architecture]
    assert largest_difference(model, tmp_path / "hf") <= 1e-4


def test_every_weight_of_every_litgpt_model_has_one_place() -> None:
    for name in ("Llama-3.2-1B", "pythia-160m", "Gemma-2b", "OLMo-2-1124-7B", "Qwen3-30B-A3B", "falcon-40b"):
        config = Config.from_name(name, n_layer=1)
        with torch.device("meta"):
            names = list(GPT(config).state_dict())
        targets = plan_weights(config, names, tied=False)
        assert sorted({source for target in targets for source in target.sources}) == sorted(names)
        assert len({target.name for target in targets}) == len(targets)


def test_every_model_litgpt_knows_has_an_architecture() -> None:
    architectures = {family_of(Config.from_name(name)).architecture for name in name_to_config}
    assert len(architectures) == 16


def test_a_name_does_not_choose_the_architecture() -> None:
    llama = make_config("Llama-3.2-1B", GROUPED)
    llama.name = "falcon-of-my-own"
    assert family_of(llama).model_type == "llama"
    pythia = make_config("pythia-160m", {"intermediate_size": 48, "head_size": 8})
    pythia.name = "qwen3-like"
    assert family_of(pythia).model_type == "gpt_neox"


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({**GROUPED, "parallel_residual": True}, "residual='parallel'"),
        ({**GROUPED, "rotary_percentage": 0.375}, "rotary='an odd part'"),
        ({**GROUPED, "attention_scores_scalar": 5}, "attention_scale='own'"),
        (
            {
                **GROUPED,
                "rope_adjustments": {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 8},
            },
            "rope_scaling='yarn'",
        ),
    ],
)
def test_a_model_that_transformers_cannot_compute_is_refused_with_the_reason(
    changes: dict[str, object], obstacle: str
) -> None:
    with pytest.raises(ModelError, match=rf"no transformers architecture computes .* has no {obstacle}; .*litgpt"):
        family_of(make_config("Llama-3.2-1B", changes))


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    config = make_config("Llama-3.2-1B", GROUPED)
    model = save_litgpt_folder(tmp_path / "lit", config, tied=True)
    export_hf(tmp_path / "lit", tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a mapping
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is True
    assert largest_difference(model, tmp_path / "hf") <= 1e-4


def test_large_models_are_written_as_several_files_with_an_index(tmp_path: Path) -> None:
    config = make_config("pythia-160m", {"intermediate_size": 48, "head_size": 8})
    model = save_litgpt_folder(tmp_path / "lit", config)
    export_hf(tmp_path / "lit", tmp_path / "hf", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 1
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert len(modes) == 1, "safetensors' own mode lets nobody else read"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert largest_difference(model, tmp_path / "hf") <= 1e-4


def test_dtype_is_what_was_asked_for(tmp_path: Path) -> None:
    config = make_config("Llama-3.2-1B", GROUPED)
    save_litgpt_folder(tmp_path / "lit", config)
    export_hf(tmp_path / "lit", tmp_path / "hf", dtype="bfloat16", verify=True)
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "hf").parameters()} == {torch.bfloat16}


def test_verify_finds_a_wrong_export_and_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrainkit.export import huggingface

    def wrong_rope(config: Config, **options: object) -> dict[str, object]:
        return {**transformers_config(config, **options), "rope_theta": 7.0, "rope_parameters": None}

    monkeypatch.setattr(huggingface, "transformers_config", wrong_rope)
    save_litgpt_folder(tmp_path / "lit", make_config("Llama-3.2-1B", GROUPED))
    with pytest.raises(ModelError, match=r"transformers' logits differ from litgpt's by \d"):
        export_hf(tmp_path / "lit", tmp_path / "hf", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["lit"]


def test_config_json_is_readable_by_transformers_4_and_5() -> None:
    config = transformers_config(make_config("Llama-3.2-1B", GROUPED), dtype="float32", tied=False, bos_id=1, eos_id=2)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)


@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer"])
def test_exported_tokenizer_gives_the_ids_of_training(
    tokenizer_class: str | None, tokenizer_dir: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    save_litgpt_folder(tmp_path / "lit", make_config("Llama-3.2-1B", {**GROUPED, "padded_vocab_size": 512}))
    shutil.copyfile(tokenizer_dir / "tokenizer.json", tmp_path / "lit" / "tokenizer.json")
    if tokenizer_class:
        settings = {"tokenizer_class": tokenizer_class, "bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
        (tmp_path / "lit" / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    export_hf(tmp_path / "lit", tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    reference = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    for text in ("The quick brown fox.", "def f():\n    return  1\n", "👩‍👩‍👧‍👦 é Два\tТри", "数字は 1234"):
        assert exported(text)["input_ids"] == reference.encode(text).ids
    assert exported.model_max_length == 32
    if tokenizer_class:
        generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 510, "eos_token_id": 511}


def test_a_sentencepiece_model_that_transformers_reads_differently_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from litgpt.tokenizer import Tokenizer
    from sentencepiece import SentencePieceTrainer

    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog.\n" * 50)
    (tmp_path / "spm").mkdir()
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm" / "tokenizer"), vocab_size=300, minloglevel=2,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
    )  # fmt: skip
    save_litgpt_folder(tmp_path / "lit", make_config("Llama-3.2-1B", {**GROUPED, "padded_vocab_size": 512}))
    export_hf(tmp_path / "lit", tmp_path / "hf", tokenizer_dir=tmp_path / "spm")
    assert Tokenizer(tmp_path / "hf").eos_id == 2
    assert "other ids than sentencepiece for 'two  spaces'" in caplog.text


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    save_litgpt_folder(tmp_path / "lit", make_config("Llama-3.2-1B", GROUPED))
    with pytest.raises(ModelError, match="ids up to 511, but the model has padded_vocab_size=64"):
        export_hf(tmp_path / "lit", tmp_path / "hf", tokenizer_dir=tokenizer_dir)
    assert not (tmp_path / "hf").exists()


def test_model_card_says_what_the_model_is(tmp_path: Path) -> None:
    save_litgpt_folder(tmp_path / "lit", make_config("Gemma-2-2b", GROUPED))
    export_hf(tmp_path / "lit", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| Architecture | Gemma2ForCausalLM |" in card
    assert 'attn_implementation="eager"' in card
