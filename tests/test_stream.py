"""The stream: every block once per epoch, the same order on any topology, and honest refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil

import fsspec
import numpy as np
import pytest
import torch

from pretrainkit.errors import ConfigError, DatasetError
from pretrainkit.formats.litdata import ChunkEntry, write_chunk, write_index
from pretrainkit.metadata import DatasetInfo, TokenizerInfo
from pretrainkit.models.documents import DocumentBoundary
from pretrainkit.stream import (
    BlockLoader,
    BlockSource,
    Cursor,
    Mixture,
    PretrainDataset,
    SourceOrder,
    build_validation_loader,
    document_boundary,
    open_sources,
)
from pretrainkit.stream import order as order_module
from pretrainkit.stream import source as source_module
from pretrainkit.stream.cursor import differences

BLOCK = 8  # tokens per block, so block_size is 7


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Segments of two blocks and windows of three segments, so that small data shows what large data does."""
    monkeypatch.setattr(source_module, "SEGMENT_BLOCKS", 2)
    monkeypatch.setattr(order_module, "WINDOW_SEGMENTS", 3)


def write_dataset(folder, blocks_per_chunk=(5, 4, 7), dtype="uint16", first_token=0, tail=3, info=True, **changes):
    """Chunks whose tokens count up, so that a block's number can be read off its first token."""
    folder.mkdir(parents=True)
    entries, token = [], first_token
    for index, blocks in enumerate(blocks_per_chunk):
        whole = np.arange(token, token + blocks * BLOCK)
        token += blocks * BLOCK
        tokens = np.concatenate([whole, np.full(tail, 60_000)]).astype(dtype)
        path = folder / f"chunk-0-{index}.bin"
        write_chunk(path, tokens, np.array([1, len(tokens)]))
        entries.append(ChunkEntry(path.name, path.stat().st_size, 2, len(tokens)))
    write_index(folder, entries, dtype, 1 << 20, fingerprint=str(first_token))
    if info:
        tokenizer = TokenizerInfo(
            name="tiny", sha256=changes.pop("sha256", "a" * 64), vocab_size=60_001, bos_id=1, eos_id=2
        )
        facts = {"split": "train", "tokenizer": tokenizer, "token_dtype": dtype, "boundary": "eos", **changes}
        (folder / "metadata.json").write_text(DatasetInfo(**facts).to_json())
    return folder


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data" / "train")


def block_numbers(tokens):
    return (tokens[..., 0] // BLOCK).tolist()


def global_order(sources, steps, *, world_size=1, micro_batch=2, global_batch=8, **options):
    """Block numbers of every step, in global order, and the digests summed over ranks."""
    order = [[None] * world_size for _ in range(steps)]
    digest = 0
    start = options.get("start_sample", 0)
    for rank in range(world_size):
        loader = BlockLoader(
            sources,
            micro_batch_size=micro_batch,
            global_batch_size=global_batch,
            rank=rank,
            world_size=world_size,
            **options,
        )
        for step in range(steps):
            batches = [next(loader)["tokens"] for _ in range(loader.micro_batches_per_step)]
            order[step][rank] = [n for batch in batches for n in batch[:, 0].tolist()]
            assert loader.next_sample == start + (step + 1) * global_batch
        digest = (digest + loader.digest()) % 2**63
        loader.close()
    return [[n for part in step for n in part] for step in order], digest


def flat(order):
    return [token for step in order for token in step]


def test_blocks_are_the_chunks_cut_without_overlap(dataset):
    source = BlockSource(dataset, block_size=BLOCK - 1)
    assert source.num_blocks == 16
    assert source.unreachable_tokens == 3 * 3
    assert source.blocks(range(16)).tolist() == np.arange(16 * BLOCK).reshape(16, BLOCK).tolist()
    assert source.blocks([15, 0]).dtype == np.int64


def test_every_block_comes_once_per_epoch_in_another_order_each_time(dataset):
    source = BlockSource(dataset, block_size=BLOCK - 1)
    order = SourceOrder(source.segment_starts, seed=7, source=0, shuffle=True)
    epochs = [order.blocks(np.arange(16) + 16 * epoch).tolist() for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(16))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order.blocks(np.arange(64)).reshape(4, 16).tolist() == epochs


def test_order_is_the_same_by_random_access():
    starts = np.arange(0, 1001, 2)
    order = SourceOrder(starts, seed=3, source=1, shuffle=True)
    walk = order.blocks(np.arange(2500))
    places = np.random.default_rng(0).permutation(2500)[:300]
    assert SourceOrder(starts, seed=3, source=1, shuffle=True).blocks(places).tolist() == walk[places].tolist()
    assert SourceOrder(starts, seed=4, source=1, shuffle=True).blocks(places).tolist() != walk[places].tolist()
    assert SourceOrder(starts, seed=3, source=0, shuffle=True).blocks(places).tolist() != walk[places].tolist()


def test_order_does_not_move_between_versions():
    order = SourceOrder(np.array([0, 2, 4, 6, 8]), seed=42, source=0, shuffle=True)
    assert order.blocks(np.arange(8)).tolist() == [1, 3, 6, 7, 2, 0, 4, 5]


def test_a_window_needs_its_own_segments_only(dataset):
    source = BlockSource(dataset, block_size=BLOCK - 1)
    order = SourceOrder(source.segment_starts, seed=7, source=0, shuffle=True)
    position = 0
    while position < 40:
        window = order.window_number(position)
        segments = order.window_segments(position)
        allowed = {b for s in segments for b in range(source.segment_starts[s], source.segment_starts[s + 1])}
        inside = [p for p in range(position, position + 20) if order.window_number(p) == window]
        assert set(order.blocks(np.array(inside)).tolist()) == allowed
        position = inside[-1] + 1
        assert order.window_segments(position).tolist() == order.window_segments(inside[0], ahead=1).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_global_order_is_the_same_on_any_topology(dataset, shuffle):
    sources = [BlockSource(dataset, block_size=BLOCK - 1)]
    options = {"shuffle": shuffle, "seed": 5}
    expected, digest = global_order(sources, 7, **options)  # 56 samples of 16 blocks: three and a half epochs
    assert len(expected) == 7
    for world_size in (2, 4):
        for workers in (0, 8):
            assert global_order(sources, 7, world_size=world_size, num_workers=workers, **options) == (expected, digest)
    assert global_order(sources, 7, micro_batch=1, num_workers=0, **options) == (expected, digest)
    assert global_order(sources, 7, micro_batch=8, prefetch_batches=50, **options) == (expected, digest)


def test_64_ranks_share_the_order_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(order_module, "WINDOW_SEGMENTS", 300)
    sources = [BlockSource(write_dataset(tmp_path / "data", (700, 900)), block_size=BLOCK - 1)]
    one = global_order(sources, 2, micro_batch=2, global_batch=128, num_workers=0)
    assert global_order(sources, 2, micro_batch=2, global_batch=128, num_workers=0, world_size=64) == one


def test_restart_continues_the_order(dataset):
    sources = [BlockSource(dataset, block_size=BLOCK - 1)]
    whole, digest = global_order(sources, 9)
    first, first_digest = global_order(sources, 4)
    rest, rest_digest = global_order(sources, 5, start_sample=32, world_size=2)
    assert first + rest == whole
    assert (first_digest + rest_digest) % 2**63 == digest


def test_another_batch_size_goes_on_with_the_next_sample(dataset):
    sources = [BlockSource(dataset, block_size=BLOCK - 1)]
    whole, digest = global_order(sources, 9)
    first, first_digest = global_order(sources, 3, micro_batch=1, global_batch=5)
    second, second_digest = global_order(sources, 4, start_sample=15, global_batch=12, world_size=3)
    third, third_digest = global_order(sources, 1, start_sample=63, micro_batch=9, global_batch=9)
    assert flat(first + second + third) == flat(whole)
    assert (first_digest + second_digest + third_digest) % 2**63 == digest


def test_digest_depends_on_tokens_and_their_order(dataset, tmp_path):
    sources = [BlockSource(dataset, block_size=BLOCK - 1)]
    _, digest = global_order(sources, 2)
    assert global_order(sources, 2, seed=43)[1] != digest
    path = dataset / "chunk-0-1.bin"
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    assert global_order([BlockSource(dataset, block_size=BLOCK - 1)], 2)[1] != digest


def test_mixture_keeps_its_weights_in_every_prefix():
    mixture = Mixture([0.7, 0.2, 0.1])
    assert mixture.period == 10
    sources, positions = mixture.split(np.arange(1000))
    for length in (1, 7, 64, 999, 1000):
        counts = np.bincount(sources[:length], minlength=3)
        assert np.abs(counts - np.array([0.7, 0.2, 0.1]) * length).max() <= 1
        assert mixture.samples_per_source(length) == counts.tolist()
    for source in range(3):  # each source's samples come in its own order, none left out
        assert positions[sources == source].tolist() == list(range((sources == source).sum()))


def test_mixture_of_odd_weights_is_right_to_one_in_a_million():
    weights = [3.14159, 1.0, 1e-9]
    mixture = Mixture(weights)
    shares = np.array(mixture.samples_per_source(10**9)) / 10**9
    assert shares == pytest.approx(np.array(weights) / sum(weights), abs=1e-6)
    assert shares[2] > 0


def test_mixture_of_datasets_is_the_same_on_any_topology_and_counts_its_tokens(tmp_path):
    folders = [write_dataset(tmp_path / name / "train", first_token=start) for name, start in (("a", 0), ("b", 1000))]
    sources = open_sources({str(folder.parent): 1.0 for folder in folders}, "train", BLOCK - 1)
    cursor = Cursor.begin(sources, [3, 1])
    expected, digest = global_order(sources, 6, cursor=cursor)
    assert global_order(sources, 6, cursor=cursor, world_size=4, num_workers=8) == (expected, digest)
    assert sum(token >= 1000 for token in flat(expected)) == 12
    loader = BlockLoader(sources, cursor=cursor, micro_batch_size=8, global_batch_size=8, num_workers=0)
    assert set(loader.tokens_per_source().values()) == {0}
    for _ in range(6):
        next(loader)
    assert loader.tokens_per_source() == {str(folders[0]): 36 * 7, str(folders[1]): 12 * 7}
    assert loader.num_blocks == 32


@pytest.fixture
def three_sources(tmp_path):
    """Sources of 16 blocks whose tokens begin at 0, 1000 and 2000."""
    for index, name in enumerate("abc"):
        write_dataset(tmp_path / name / "train", first_token=1000 * index)
    return open_sources({str(tmp_path / name): 1.0 for name in "abc"}, "train", BLOCK - 1)


def taken(order, first_token):
    """Of one of the three sources: its blocks' first tokens, in the order taken."""
    return [token for token in flat(order) if first_token <= token < first_token + 1000]


def test_a_changed_mixture_goes_on_in_every_source_where_it_was(three_sources):
    a, b, c = three_sources
    single = [flat(global_order([source], 8, cursor=alone(source, order))[0]) for order, source in enumerate((a, b, c))]

    first = Cursor.begin([a, b], [3, 1])
    order, _ = global_order([a, b], 3, cursor=first)  # 24 samples: 18 of a, 6 of b
    second = first.go_on(24, [c, b], [1, 1])  # a goes, c comes, b has another weight and another place
    order += global_order([c, b], 2, cursor=second, start_sample=24, global_batch=6)[0]
    third = second.go_on(36, [a, b], [1, 2])  # a comes back, c goes
    order += global_order([a, b], 3, cursor=third, start_sample=36)[0]

    assert [len(taken(order, first_token)) for first_token in (0, 1000, 2000)] == [18 + 8, 6 + 6 + 16, 6]
    for blocks, first_token in zip(single, (0, 1000, 2000), strict=True):
        mine = taken(order, first_token)
        assert mine == blocks[: len(mine)]
    assert [(s.folder, s.order, s.samples, s.tokens, s.weight) for s in third.after(60)] == [
        (a.folder, 0, 26, 26 * 7, 1), (b.folder, 1, 28, 28 * 7, 2), (c.folder, 2, 6, 6 * 7, 0),
    ]  # fmt: skip
    assert Cursor.from_dict(json.loads(json.dumps(dataclasses.asdict(third)))) == third


def alone(source, order):
    """The cursor of one source that keeps its order in the mixture."""
    cursor = Cursor.begin([source], [1.0])
    return dataclasses.replace(cursor, sources=(dataclasses.replace(cursor.sources[0], order=order),))


def test_a_mixture_that_stays_keeps_its_pattern(three_sources):
    cursor = Cursor.begin(three_sources, [3, 2, 1])
    assert cursor.go_on(17, three_sources, [3, 2, 1]) == cursor
    assert cursor.go_on(17, three_sources, [6, 4, 2]).since == 0  # the same shares
    assert cursor.go_on(17, three_sources, [3, 1, 1]).since == 17
    assert differences(cursor, cursor.go_on(17, three_sources, [3, 2, 1])) == []


def test_what_is_different_in_the_data_is_said(three_sources):
    a, b, c = three_sources
    before = Cursor.begin([a, b], [3, 1])
    assert differences(before, before.go_on(24, [b, c], [1, 1])) == [
        f"{b.folder} has a share of 0.5 instead of 0.25, going on after 6 blocks of it",
        f"{c.folder} is read too, beginning after 0 blocks of it",
        f"{a.folder} is not read any more, after 18 blocks of it",
    ]
    longer = open_sources({a.folder: 1.0, b.folder: 1.0}, "train", 2 * BLOCK - 1)
    assert differences(before, before.go_on(24, longer, [3, 1])) == [
        (
            "blocks have 15 tokens instead of 7; cut and ordered anew, what is left of this pass repeats some text and "
            "leaves out other"
        )
    ]


def test_a_dataset_that_was_moved_goes_on_and_one_given_twice_is_two(dataset, tmp_path):
    source = BlockSource(dataset, BLOCK - 1)
    before = Cursor.begin([source, source], [1, 3])
    assert [place.order for place in before.sources] == [0, 1]
    shutil.copytree(dataset, tmp_path / "moved")
    moved = BlockSource(tmp_path / "moved", BLOCK - 1)
    after = before.go_on(8, [moved, moved], [1, 3])
    assert [(place.folder, place.order) for place in after.sources] == [(moved.folder, 0), (moved.folder, 1)]
    assert [place.samples for place in after.after(8)] == [2, 6]
    assert after.since == 0


def test_batch_arithmetic_that_does_not_divide_is_refused(dataset):
    with pytest.raises(
        ConfigError, match="global_batch_size=12 is not a multiple of micro_batch_size x world_size = 2 x 4"
    ):
        BlockLoader([BlockSource(dataset, 7)], micro_batch_size=2, global_batch_size=12, world_size=4)


def test_reader_threads_report_their_errors(dataset):
    (dataset / "chunk-0-2.bin").unlink()
    loader = BlockLoader([BlockSource(dataset, 7)], micro_batch_size=8, global_batch_size=8, num_workers=2)
    with pytest.raises(DatasetError, match="chunk-0-2.bin is missing"):
        next(loader)
    loader.close()


def test_chunk_that_differs_from_its_index_is_named(dataset):
    write_chunk(dataset / "chunk-0-0.bin", np.arange(16, dtype="uint16"), np.array([16]))
    with pytest.raises(DatasetError, match=r"chunk-0-0.bin holds 16 tokens, its index says 43"):
        BlockSource(dataset, 7).blocks([0])


def test_block_longer_than_every_chunk_is_refused(dataset):
    with pytest.raises(DatasetError, match="137 tokens in 3 chunks of at most 59: not one block of 101 tokens"):
        BlockSource(dataset, block_size=100)


def test_folder_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="neither train/index.json nor index.json"):
        open_sources({str(tmp_path): 1.0}, "train", 7)
    with pytest.raises(DatasetError, match=r"has no index.json"):
        BlockSource(tmp_path / "nowhere", 7)


def test_sources_of_different_tokenizers_are_refused(tmp_path):
    write_dataset(tmp_path / "a" / "train")
    write_dataset(tmp_path / "b" / "train", sha256="b" * 64)
    with pytest.raises(DatasetError, match="their ids mean different text"):
        open_sources({str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0}, "train", 7)


def test_sources_of_different_boundary_rules_cannot_share_a_mask(tmp_path):
    write_dataset(tmp_path / "a" / "train")
    write_dataset(tmp_path / "b" / "train", boundary="bos")
    write_dataset(tmp_path / "c" / "train", info=False)
    sources = open_sources({str(tmp_path / name): 1.0 for name in "abc"}, "train", 7)
    assert document_boundary(sources[:1]) == DocumentBoundary(rule="eos", bos_id=1, eos_id=2)
    with pytest.raises(DatasetError, match="b/train marks documents by bos, .*a/train by eos"):
        document_boundary(sources[:2])
    with pytest.raises(DatasetError, match=r"c/train has no metadata.json"):
        document_boundary(sources[2:])


def test_ids_beyond_the_vocabulary_are_found_without_metadata(tmp_path):
    folder = write_dataset(tmp_path / "plain", info=False)
    assert BlockSource(folder, 7, vocabulary=128).blocks([15])[0, -1] == 127
    with pytest.raises(DatasetError, match="holds the token id 127, and the model has embeddings for 127"):
        BlockSource(folder, 7, vocabulary=127).blocks([15])


@pytest.mark.parametrize(("dtype", "wrong"), [("int32", -5), ("int32", 1 << 20), ("uint16", 40_000)])
def test_ids_that_damage_makes_are_named_before_a_model_sees_them(tmp_path, dtype, wrong):
    folder = write_dataset(tmp_path / "damaged", dtype=dtype, max_token_id=127)
    with open(folder / "chunk-0-2.bin", "rb+") as file:
        file.seek(-4 * np.dtype(dtype).itemsize, os.SEEK_END)  # the last token of a block
        file.write(np.array([wrong], dtype).tobytes())
    source = BlockSource(folder, 7, vocabulary=128)
    assert source.blocks([14])[0].tolist() == list(range(112, 120))
    with pytest.raises(DatasetError, match=rf"holds the token id {wrong}, "):
        source.blocks([15])


def test_validation_gives_every_rank_as_many_batches(dataset):
    source = BlockSource(dataset, block_size=BLOCK - 1)
    ranks = [build_validation_loader(source, micro_batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    assert [len(loader) for loader in ranks] == [2, 2, 2]
    seen = [n for loader in ranks for batch in loader for n in block_numbers(batch["tokens"])]
    assert len(seen) == len(set(seen)) == 12
    alone = build_validation_loader(source, micro_batch_size=2, max_iters=6)
    assert sorted(n for batch in alone for n in block_numbers(batch["tokens"])) == sorted(seen)
    assert [batch["tokens"].tolist() for batch in alone] == [batch["tokens"].tolist() for batch in alone]


def test_validation_split_too_small_for_whole_batches_gives_smaller_ones(dataset):
    source = BlockSource(dataset, block_size=BLOCK - 1)
    ranks = [build_validation_loader(source, micro_batch_size=4, rank=rank, world_size=6) for rank in range(6)]
    batches = [[block_numbers(batch["tokens"]) for batch in loader] for loader in ranks]
    assert [[len(numbers) for numbers in loader] for loader in batches] == [[2]] * 6
    assert len({number for loader in batches for numbers in loader for number in numbers}) == 12


def test_validation_split_without_a_block_for_every_rank_is_refused(dataset):
    source = BlockSource(dataset, block_size=BLOCK - 1)
    with pytest.raises(DatasetError, match="holds 16 blocks of 8 tokens, fewer than the 17 ranks"):
        build_validation_loader(source, micro_batch_size=4, world_size=17)


def test_dataset_without_validation_split_gives_none(dataset):
    assert open_sources({str(dataset.parent): 1.0}, "val", 7) == []
    assert open_sources({str(dataset): 1.0}, "val", 7) == []
    assert len(open_sources({str(dataset): 1.0}, "train", 7)) == 1


def test_map_style_items_tell_documents_apart(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    tokens = np.array([5, 6, 2, 7, 2, 8, 9, 10, 11, 12, 2, 13, 14, 15, 16, 17], dtype="uint16")
    write_chunk(folder / "chunk-0-0.bin", tokens, np.array([16]))
    write_index(folder, [ChunkEntry("chunk-0-0.bin", 44, 1, 16)], "uint16", 1 << 20)
    data = PretrainDataset(folder, BLOCK - 1, boundary=DocumentBoundary(rule="eos", eos_id=2))
    assert len(data) == 2
    assert data[0]["token_ids"].tolist() == tokens[:8].tolist()
    assert data[0]["document_ids"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert data[-1]["document_ids"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    mask = data[0]["document_mask"]
    assert mask.shape == (8, 8)
    assert mask[4].tolist() == [False, False, False, True, True, False, False, False]
    assert not mask.triu(1).any()
    copy = pickle.loads(pickle.dumps(data))  # as a DataLoader's workers get it
    assert copy[1]["document_ids"].tolist() == data[1]["document_ids"].tolist()
    with pytest.raises(IndexError, match="block 2 of a dataset of 2 blocks"):
        data[2]
    with pytest.raises(DatasetError, match=r"no metadata.json to say how documents are told apart"):
        PretrainDataset(folder, BLOCK - 1)


def test_boundary_comes_from_the_metadata(dataset):
    assert PretrainDataset(dataset, 7).boundary == DocumentBoundary(rule="eos", bos_id=1, eos_id=2)


@pytest.fixture
def remote(dataset):
    """The dataset at a URL: fsspec's in-memory file system, which serves byte ranges."""
    fs = fsspec.filesystem("memory")
    for path in sorted(dataset.iterdir()):
        fs.pipe(f"/bucket/data/train/{path.name}", path.read_bytes())
    yield "memory://bucket/data"
    fs.rm("/bucket", recursive=True)


def test_remote_dataset_gives_the_same_order_through_a_bounded_cache(dataset, remote, tmp_path):
    local = [BlockSource(dataset, BLOCK - 1)]
    cache, limit = tmp_path / "cache", 250  # of 256 bytes in all: two windows, not three
    sources = open_sources({remote: 1.0}, "train", BLOCK - 1, cache_dir=cache, max_cache_bytes=limit)
    assert sources[0].fingerprint == local[0].fingerprint
    expected = global_order(local, 12)
    for workers in (0, 4):
        sources = open_sources({remote: 1.0}, "train", BLOCK - 1, cache_dir=cache, max_cache_bytes=limit)
        assert global_order(sources, 12, num_workers=workers) == expected
    kept = sum(path.stat().st_size for path in cache.rglob("segment-*.bin"))
    assert 0 < kept <= limit


def test_remote_segment_is_fetched_once_while_it_stays(remote, tmp_path, monkeypatch):
    from pretrainkit.stream.remote import RemoteSegments

    fetched = []
    download = RemoteSegments._download
    monkeypatch.setattr(
        RemoteSegments, "_download", lambda self, segment: fetched.append(segment) or download(self, segment)
    )
    for _ in range(2):  # a second run, or a second rank of the node, finds what the first fetched
        sources = open_sources({remote: 1.0}, "train", BLOCK - 1, cache_dir=tmp_path / "cache")
        global_order(sources, 4)
    assert sorted(fetched) == list(range(9))


def test_segment_cut_short_in_the_cache_is_fetched_again(remote, dataset, tmp_path):
    for _ in range(2):
        source = BlockSource(f"{remote}/train", BLOCK - 1, cache_dir=tmp_path / "cache")
        assert source.blocks(range(16)).tolist() == BlockSource(dataset, BLOCK - 1).blocks(range(16)).tolist()
        for path in (tmp_path / "cache").rglob("segment-*.bin"):
            path.write_bytes(path.read_bytes()[:-1])


def test_remote_chunk_of_the_wrong_size_is_named(remote, tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/data/train/chunk-0-0.bin", b"short")
    source = BlockSource(f"{remote}/train", BLOCK - 1, cache_dir=tmp_path)
    with pytest.raises(DatasetError, match="chunk-0-0.bin has 5 bytes, its index says 102"):
        source.blocks([0])


def test_remote_chunk_that_is_missing_is_named(remote, tmp_path):
    fsspec.filesystem("memory").rm("/bucket/data/train/chunk-0-0.bin")
    source = BlockSource(f"{remote}/train", BLOCK - 1, cache_dir=tmp_path)
    with pytest.raises(DatasetError, match="chunk-0-0.bin is missing; make the dataset again"):
        source.blocks([0])


def test_cache_smaller_than_its_shuffle_needs_is_refused(remote, tmp_path):
    with pytest.raises(ConfigError, match=r"data.max_cache_bytes=100 is too small .* give it at least 219"):
        BlockSource(f"{remote}/train", BLOCK - 1, cache_dir=tmp_path, max_cache_bytes=100)


def test_batches_are_int64_tensors_of_whole_blocks(dataset):
    loader = BlockLoader([BlockSource(dataset, 7)], micro_batch_size=3, global_batch_size=6)
    batch = next(iter(loader))
    assert batch["tokens"].shape == (3, 8)
    assert batch["tokens"].dtype == torch.int64
    loader.close()


def test_crafted_index_reaches_nothing(dataset):
    index = json.loads((dataset / "index.json").read_text())
    index["chunks"][0]["filename"] = "../../secret.bin"
    (dataset / "index.json").write_text(json.dumps(index))
    with pytest.raises(DatasetError, match="no plain chunk name"):
        BlockSource(dataset, 7)


@pytest.fixture
def stock_dataset(tmp_path, monkeypatch):
    """A dataset that litdata itself wrote: documents of 1 to 30 tokens, int32, several chunks, no metadata.json."""
    monkeypatch.setenv("LITDATA_POSIX_FAST", "0")
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    folder = tmp_path / "stock"
    writer = BinaryWriter(str(folder), chunk_bytes=500, item_loader=TokensLoader())
    token = 0
    for index in range(40):
        length = index * 7 % 30 + 1
        writer.add_item(index, torch.arange(token, token + length, dtype=torch.int32))
        token += length
    writer.done()
    writer.merge(1)
    return folder


def test_stock_dataset_gives_the_blocks_that_litdata_gives(stock_dataset):
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    stock = StreamingDataset(str(stock_dataset), item_loader=TokensLoader(block_size=BLOCK), shuffle=False)
    source = BlockSource(stock_dataset, BLOCK - 1)
    assert source.info is None
    assert source.blocks(range(source.num_blocks)).tolist() == [block.tolist() for block in stock]
    assert global_order([source], 5)[0] == global_order([source], 5, world_size=4)[0]


def test_stock_dataset_can_be_read_by_segments(stock_dataset, tmp_path):
    fs = fsspec.filesystem("memory")
    for path in stock_dataset.iterdir():
        fs.pipe(f"/stock/{path.name}", path.read_bytes())
    try:
        remote = BlockSource("memory://stock", BLOCK - 1, cache_dir=tmp_path / "cache")
        local = BlockSource(stock_dataset, BLOCK - 1)
        assert remote.blocks(range(remote.num_blocks)).tolist() == local.blocks(range(local.num_blocks)).tolist()
    finally:
        fs.rm("/stock", recursive=True)
