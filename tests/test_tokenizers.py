"""Engines: the reference's ids for every text, whatever the engine; what a tokenizer folder says."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pytest

from pretrainkit.arrow import concat, string_array, string_buffers
from pretrainkit.errors import ConfigError, TokenizerError
from pretrainkit.metadata import TokenizerInfo
from pretrainkit.tokenizers import ENGINES, EncodedDocuments
from pretrainkit.tokenizers.auto import check_equal, choose_engine, load_engine, reference_engine
from pretrainkit.tokenizers.folder import choose_boundary, choose_dtype, read_tokenizer, special_ids, split_added_tokens
from pretrainkit.tokenizers.sentencepiece import user_defined_symbols
from pretrainkit.tokenizers.torture import torture_texts
from pretrainkit.units.boundaries import Boundaries
from tests.conftest import BOS, EOS, SENTENCES, make_texts


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory):
    """A folder with a SentencePiece BPE model with byte fallback, as Llama 2 has it."""
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tiny-spm")


def train_sentencepiece(folder, **options):
    import sentencepiece

    folder.mkdir()
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(line for text in make_texts(200) for line in text.splitlines() if line.strip()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return folder


@pytest.fixture(scope="session")
def byte_fallback_dir(tmp_path_factory):
    """A tokenizer.json of SentencePiece's type: BPE on whole text, spaces as ▁, unknown characters as bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    specials = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials + [f"<0x{i:02X}>" for i in range(256)],
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator([line for text in SENTENCES for line in text.split(" ")] * 20, trainer)
    folder = tmp_path_factory.mktemp("byte-fallback") / "tiny-llama2"
    folder.mkdir()
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    return folder


@pytest.fixture(params=["byte level", "byte fallback", "tokenizer.model"])
def any_tokenizer_dir(request, tokenizer_dir, byte_fallback_dir, sentencepiece_dir):
    return {
        "byte level": tokenizer_dir,
        "byte fallback": byte_fallback_dir,
        "tokenizer.model": sentencepiece_dir,
    }[request.param]


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_engine_gives_the_reference_ids_or_refuses_the_tokenizer(name, any_tokenizer_dir):
    reference = reference_engine(any_tokenizer_dir)
    if name not in ("gigatoken", reference):
        with pytest.raises(TokenizerError, match="use engine="):
            load_engine(name, any_tokenizer_dir)
        return
    texts = [text for text in torture_texts([BOS, EOS, "<s>", "</s>"]) if len(text) < 500] + make_texts(50)
    got, expected = (load_engine(n, any_tokenizer_dir).encode(pa.array(texts)) for n in (name, reference))
    assert got.offsets.tolist() == expected.offsets.tolist()
    assert got.ids.tolist() == expected.ids.tolist()


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
def test_byte_level_ids_are_equal_on_the_whole_torture_set(name, tokenizer_dir):
    reference = load_engine("tokenizers", tokenizer_dir)
    texts = pa.array(torture_texts([BOS, EOS]), pa.large_string())
    check_equal(load_engine(name, tokenizer_dir), reference, texts)


def test_no_engine_gives_a_special_id_for_text(any_tokenizer_dir):
    info = read_tokenizer(any_tokenizer_dir)
    special = set(special_ids(any_tokenizer_dir, info))
    assert {info.bos_id, info.eos_id} <= special
    texts = pa.array([f"{token} a{token}{token}" for token in (BOS, EOS, "<s>", "</s>", "<unk>")])
    for name in ("gigatoken", reference_engine(any_tokenizer_dir)):
        assert not special & set(load_engine(name, any_tokenizer_dir).encode(texts).ids.tolist())


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
def test_an_engine_reads_slices_and_both_widths(name, tokenizer_dir):
    engine = load_engine(name, tokenizer_dir)
    texts = make_texts(20)
    expected = engine.encode(pa.array(texts[5:15]))
    for kind in (pa.string(), pa.large_string()):
        got = engine.encode(pa.array(texts, kind).slice(5, 10))
        assert got.ids.tolist() == expected.ids.tolist()
        assert got.offsets.tolist() == expected.offsets.tolist()


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_document_and_empty_ones_have_no_ids(name, texts, tokenizer_dir):
    encoded = load_engine(name, tokenizer_dir).encode(pa.array(texts, pa.string()))
    assert encoded.ids.tolist() == []
    assert encoded.offsets.tolist() == [0] * (len(texts) + 1)


def test_the_cache_of_gigatoken_is_bounded(tokenizer_dir, monkeypatch):
    from pretrainkit.tokenizers import gigatoken

    engine = load_engine("gigatoken", tokenizer_dir)
    texts = pa.array(make_texts(50))
    first, backend = engine.encode(texts), engine._backend
    monkeypatch.setattr(gigatoken, "_RELOAD_AFTER_TEXT_BYTES", 1)
    monkeypatch.setattr(gigatoken, "_RELOAD_AFTER_GROWTH_BYTES", -(1 << 40))
    assert engine.encode(texts).ids.tolist() == first.ids.tolist()
    assert engine._backend is not backend


def test_gigatoken_refuses_what_it_would_get_wrong_also_when_it_is_asked_for_by_name(tokenizer_dir, tmp_path):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "single")
    content = json.loads((folder / "tokenizer.json").read_text())
    alone = {**content["added_tokens"][0], "id": 512, "content": "fox", "special": False, "single_word": True}
    content["added_tokens"].append(alone)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="'fox' is single_word.*use engine=tokenizers"):
        load_engine("gigatoken", folder)


def test_a_truncation_saved_in_tokenizer_json_cuts_nothing(tokenizer_dir, tmp_path):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "truncating")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name in ("gigatoken", "tokenizers"):
        assert len(load_engine(name, folder).encode(pa.array(["one two three four five " * 9])).ids) > 20


def test_a_dropout_saved_in_tokenizer_json_leaves_the_ids_as_they_are(tokenizer_dir, tmp_path):
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    texts = pa.array(SENTENCES)
    check_equal(load_engine("tokenizers", tmp_path), load_engine("tokenizers", tokenizer_dir), texts)
    assert choose_engine(tmp_path, SENTENCES) == "gigatoken"


def test_auto_tries_the_one_added_token_among_many_that_the_fast_engine_finds_otherwise(tokenizer_dir, tmp_path):
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(f"<{i}>", normalized=False) for i in range(100)])
    shutil.copytree(tokenizer_dir, tmp_path / "all-alike")
    tokenizer.save(str(tmp_path / "all-alike/tokenizer.json"))
    assert choose_engine(tmp_path / "all-alike", []) == "gigatoken"
    tokenizer.add_tokens([AddedToken("<word>", single_word=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(f"<{i}>", normalized=False) for i in range(100, 700)])
    shutil.copytree(tokenizer_dir, tmp_path / "one-word")
    tokenizer.save(str(tmp_path / "one-word/tokenizer.json"))
    assert choose_engine(tmp_path / "one-word", []) == "tokenizers"


def test_auto_tries_the_user_defined_symbols_of_a_tokenizer_model(sentencepiece_dir, tmp_path):
    assert choose_engine(sentencepiece_dir, []) == "gigatoken"
    folder = train_sentencepiece(tmp_path / "symbols", user_defined_symbols=["<sep>", "\n"])
    assert {"<sep>", "\n"} <= set(user_defined_symbols(folder / "tokenizer.model"))
    assert choose_engine(folder, []) == "sentencepiece"


def test_a_folder_says_what_its_tokenizer_is(tokenizer_dir, sentencepiece_dir, byte_fallback_dir):
    info = read_tokenizer(tokenizer_dir)
    assert (info.name, info.vocab_size, info.bos_id, info.eos_id) == ("tiny-bpe", 512, 510, 511)
    info = read_tokenizer(sentencepiece_dir)
    assert (info.vocab_size, info.bos_id, info.eos_id) == (600, 1, 2)
    info = read_tokenizer(byte_fallback_dir)
    assert (info.bos_id, info.eos_id) == (1, 2)


def test_markers_are_found_by_number_in_a_models_configuration(tokenizer_dir, tmp_path):
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    assert read_tokenizer(tmp_path).eos_id is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [511, 3], "bos_token_id": 510}')
    assert (read_tokenizer(tmp_path).bos_id, read_tokenizer(tmp_path).eos_id) == (510, 511)


def test_a_folder_without_a_usable_tokenizer_gets_one_clear_line(tokenizer_dir, tmp_path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        read_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"is not a folder; give its folder"):
        read_tokenizer(tokenizer_dir / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="is not JSON"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(TokenizerError, match="has no vocabulary"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(TokenizerError, match="is not JSON"):
        read_tokenizer(tmp_path)
    for vocabulary in ('{"a": "0"}', '{"a": -1}', "[1]", "3"):
        (tmp_path / "tokenizer.json").write_text(f'{{"model": {{"vocab": {vocabulary}}}}}')
        with pytest.raises(TokenizerError, match="has a damaged vocabulary"):
            read_tokenizer(tmp_path)
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nowhere|>"}')
    with pytest.raises(TokenizerError, match=r"eos_token '<\|nowhere\|>' is not in the vocabulary"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["</s>"]}')
    with pytest.raises(TokenizerError, match=r"eos_token \['</s>'\] is not in the vocabulary"):
        read_tokenizer(tmp_path)


def info_with(bos=None, eos=None, vocab_size=10):
    return TokenizerInfo(name="t", sha256="", vocab_size=vocab_size, bos_id=bos, eos_id=eos)


def test_the_boundary_defaults_to_eos_then_bos_and_must_exist():
    assert choose_boundary(None, info_with(bos=1, eos=2)) == "eos"
    assert choose_boundary(None, info_with(bos=1)) == "bos"
    with pytest.raises(ConfigError, match="names neither a bos_token nor an eos_token"):
        choose_boundary(None, info_with())
    with pytest.raises(ConfigError, match="boundary=both, but the tokenizer t names no bos_token"):
        choose_boundary("both", info_with(eos=2))
    with pytest.raises(ConfigError, match="has one id, 2, for both ends"):
        choose_boundary("both", info_with(bos=2, eos=2))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "int32")])
def test_the_type_on_disk_is_the_smallest_that_holds_every_id(vocab_size, dtype):
    assert choose_dtype(info_with(vocab_size=vocab_size)) == dtype


@pytest.mark.parametrize(
    ("boundary", "expected", "lengths"),
    [
        ("bos", [8, 1, 2, 8, 8, 3], [3, 1, 2]),
        ("eos", [1, 2, 9, 9, 3, 9], [3, 1, 2]),
        ("both", [8, 1, 2, 9, 8, 9, 8, 3, 9], [4, 2, 3]),
    ],
)
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_markers_stand_at_the_ends_of_each_document(boundary, expected, lengths, dtype):
    encoded = EncodedDocuments(np.array([1, 2, 3], np.uint32), np.array([0, 2, 2, 3]))
    tokens, counts = Boundaries(boundary, info_with(bos=8, eos=9), dtype).insert(encoded)
    assert (tokens.tolist(), counts.tolist(), tokens.dtype.name) == (expected, lengths, dtype)


@pytest.mark.parametrize("forbidden", [(0, 1), (8, 9), (4,), (0, 5, 9)])
def test_documents_with_a_forbidden_id_are_found(forbidden):
    boundaries = Boundaries("eos", info_with(eos=9), "uint16", forbidden)
    ids = np.arange(10, dtype=np.uint32)
    found = boundaries.forged(EncodedDocuments(ids, np.arange(11)))
    assert found.tolist() == list(forbidden)
    allowed = np.setdiff1d(ids, forbidden).astype(np.uint32)
    assert boundaries.forged(EncodedDocuments(allowed, np.array([0, len(allowed)]))).tolist() == []


@pytest.mark.parametrize("order", ["as saved", "vocabulary first", "no added tokens"])
def test_added_tokens_are_found_wherever_they_stand(order, tokenizer_dir, tmp_path):
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    # A vocabulary may say anything, and what stands deeper is not meant.
    content["model"]["vocab"]['"added_tokens": [1]'] = 4000
    content["model"]["added_tokens"] = [1, 2]
    expected = content["added_tokens"]
    if order == "vocabulary first":
        content = {"model": content.pop("model"), **content}
    if order == "no added tokens":
        expected = content.pop("added_tokens") and []
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    before, tokens, after = split_added_tokens(path)
    assert tokens == expected
    assert json.loads(before + json.dumps(["x"]) + after) == {**content, "added_tokens": ["x"]}
    path.write_text('{"added_tokens": [}')
    with pytest.raises(TokenizerError, match="is not JSON"):
        split_added_tokens(path)


def test_string_buffers_of_empty_and_sliced_arrays():
    offsets, characters = string_buffers(pa.array(["", ""]))
    assert (offsets.tolist(), characters.tolist()) == ([0, 0, 0], [])
    offsets, characters = string_buffers(pa.array(["xx", "ab", "c"]).slice(1))
    assert (offsets.tolist(), bytes(characters)) == ([0, 2, 3], b"abc")


def test_string_arrays_are_those_of_pyarrow():
    texts = ["", "a", "\0", "\u3042\U0001f600", ""]
    assert string_array(texts).equals(pa.array(texts, pa.large_string()))
    assert string_array([]).equals(pa.array([], pa.large_string()))
    with pytest.raises(UnicodeEncodeError):
        string_array(["\ud800"])
    small, large = pa.array(["a", "b"]).slice(1), pa.array(["c"], pa.large_string())
    assert concat([small, small]).to_pylist() == ["b", "b"]
    assert concat([small, large]).equals(string_array(["b", "c"]))


def test_gigatoken_leaves_awkward_to_others(tokenizer_dir):
    import awkward

    engine = load_engine("gigatoken", tokenizer_dir)
    before = engine.encode(pa.array(["one text"])).ids.tolist()
    assert sys.modules["awkward"] is awkward
    assert awkward.Array([[1], [2, 3]]).tolist() == [[1], [2, 3]]
    del sys.modules["awkward"]
    assert engine.encode(pa.array(["one text"])).ids.tolist() == before
    assert "awkward" not in sys.modules
    sys.modules["awkward"] = awkward
