"""Packed decodes see the same slots as alone, their tile reads each page once, and they are packed only if it pays."""

import copy
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import (
    SIZES,
    TIGHT,
    build_step,
    greedy,
    layer_mask,
    layout_of,
    make_sequence,
    num_cases,
    own_model,
    prompt_of,
    tokens_of,
    visible_slots,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import hf_generate, tiny_model

from flex_nano_vllm import Inference, cascade
from flex_nano_vllm.cascade import CascadeRule, PackedDecodes, cascade_rule, pack
from flex_nano_vllm.device import TileKind, decode_buckets
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.scheduler import Chunk

ALWAYS = CascadeRule(3, 4, 1, 0.0, 0.0, 1.0)  # packed tiles cost nothing


class Scene:
    """Sequences with one row each, in one pool. Some of them begin with pages of earlier sequences."""

    def __init__(
        self, page_size: int, windows: tuple[int | None, ...], lengths: list[int], shared: list[tuple[int, int]]
    ):
        """`shared` has for each sequence the index of an earlier one and how many of its pages are shared."""
        longest = 12 * page_size
        geometry = Geometry(1 + 12 * len(lengths), page_size, len(lengths), longest, 8, windows, window_release=False)
        self.kv, self.windows, self.chunks = KVManager(geometry, prefix_caching=False), windows, []
        self.pages: list[list[int]] = []  # pages of each sequence, in logical order
        table, rows = self.kv.primary, []
        for length, (other, num_shared) in zip(lengths, shared):
            row = self.kv.allocate([])
            num_pages = -(-length // page_size)
            # The last page is never shared, because the sequence writes to it.
            common = self.pages[other % len(rows)][: min(num_shared, num_pages - 1)] if rows else []
            table.share(row, common)
            self.kv.reserve(row, length)
            rows.append(row)
            self.pages.append([table.page(row, logical) for logical in range(num_pages)])
            self.chunks.append(Chunk(make_sequence([0] * length, row, row=row), length - 1, 1))

    def packed(self, window: int | None, rule: CascadeRule) -> PackedDecodes | None:
        rows, positions = np.array([(chunk.sequence.row, chunk.start) for chunk in self.chunks]).T
        return pack(rows, positions, layer_mask(window), self.kv.primary, rule)

    def seen_slots(self, index: int, window: int | None) -> list[int]:
        """The definition: return the slots that the last token of a sequence sees."""
        page_size, position = self.kv.geometry.page_size, self.chunks[index].start
        first = 0 if window is None else max(0, position - window + 1)
        return sorted(self.pages[index][p // page_size] * page_size + p % page_size for p in range(first, position + 1))

    def seen_pages(self, index: int, window: int | None) -> dict[int, bool]:
        """The definition: return the pages that the last token of a sequence sees, and whether it sees them fully."""
        page_size, position = self.kv.geometry.page_size, self.chunks[index].start
        first = 0 if window is None else max(0, position - window + 1)
        seen = range(first, position + 1)
        counts = {page: sum(p // page_size == i for p in seen) for i, page in enumerate(self.pages[index])}
        return {page: count == page_size for page, count in counts.items() if count}


@st.composite
def scenes(draw):
    page_size = draw(st.sampled_from([1, 2, 4]))
    windows = draw(st.sampled_from([(None,), (None, 3), (7, None), (9, 2), (5,)]))
    lengths = draw(st.lists(st.integers(1, 9 * page_size), min_size=2, max_size=12))
    shared = [(draw(st.integers(0, 11)), draw(st.integers(0, 9))) for _ in lengths]
    return Scene(page_size, windows, lengths, shared)


@settings(max_examples=num_cases(200))
@given(scene=scenes(), whole_pool=st.booleans(), num_padding=st.integers(0, 3))
def test_a_packed_query_sees_the_same_slots_as_alone_and_its_tile_reads_each_page_once(scene, whole_pool, num_padding):
    kinds = (TileKind(1, 16),)
    layout = layout_of(kinds, 1, 1, scene.windows, scene.windows[-1], whole_pool, ALWAYS)
    window = layout.masks[layout.packed_mask].window
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cascade, "LEAST_SAVING", 0)
        packed = scene.packed(window, ALWAYS)
    chunks = scene.chunks + [Chunk(make_sequence([0], row=0), 0, 1)] * num_padding
    alone, together = (build_step(chunks, scene.kv, layout, how) for how in (None, packed))
    for number, of_layer in enumerate(scene.windows):
        seen = visible_slots(together, number)[: len(scene.chunks)]
        for index, slots in enumerate(seen):  # with repetition, because a page read twice counts twice in the softmax
            assert sorted(slots) == scene.seen_slots(index, of_layer)
    assert together.queries[layout.packed_mask] is not alone.queries[layout.packed_mask]

    (tiles,) = together.queries[layout.packed_mask].tiles
    mask = tiles.block_mask
    assert tiles.query_rows.shape == (4, 1, 3)
    members = [[i for i in tile if i >= 0] for tile in packed.members.tolist()]
    assert sorted(itertools.chain(*members)) == list(range(len(scene.chunks)))
    for tile, sequences in enumerate(members):
        seen = [scene.seen_pages(index, window) for index in sequences]
        pages = {page for of_one in seen for page in of_one}
        whole = {page for page in pages if all(of_one.get(page) for of_one in seen)}
        for counts, lists, expected in (
            (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
            (mask.kv_num_blocks, mask.kv_indices, pages - whole),
        ):
            listed = lists[tile, 0, 0, : counts[tile, 0, 0]].tolist()
            assert sorted(listed) == sorted(expected)
            assert lists.dtype == counts.dtype == torch.int32
            assert lists.shape[-1] >= mask.seq_lengths[1] // scene.kv.geometry.page_size


def test_the_drawing_in_the_docstring_of_cascade_holds(any_saving):
    scene = Scene(4, (None,), [12, 16, 12], [(0, 0), (0, 2), (0, 2)])
    packed = scene.packed(None, ALWAYS)
    assert sorted(packed.members[packed.members >= 0].tolist()) == [0, 1, 2]
    common = scene.pages[0][:2]
    assert sorted(packed.pages[packed.full].tolist()) == sorted(common)
    own = {page for pages in scene.pages for page in pages} - set(common)
    assert len(own) == 4 and sorted(packed.pages[packed.partial].tolist()) == sorted(own)


def test_sequences_with_a_common_prefix_are_packed_side_by_side(any_saving):
    """Sequences with two common prefixes alternate, and one of the prefixes has two continuations."""
    scene = Scene(1, (None,), [9] * 9, [(0, 0), (0, 0), (0, 4), (1, 4), (2, 6), (1, 4), (2, 7), (1, 4), (4, 7)])
    order = scene.packed(None, ALWAYS).members.ravel().tolist()
    for common in ({1, 3, 5, 7}, {0, 2, 4, 6, 8}, {4, 6, 8}):
        places = sorted(order.index(i) for i in common)
        assert places == list(range(places[0], places[0] + len(common)))


# ---- when decodes are packed ----

RULE = CascadeRule(4, 8, 17, 2.0, 2.5, heads_per_processor=4.0)


def test_decodes_without_shared_pages_are_not_packed():
    assert Scene(4, (None,), [48] * 32, [(0, 0)] * 32).packed(None, RULE) is None


@pytest.mark.parametrize(
    ("num_decodes", "num_shared", "is_packed"), [(32, 11, True), (32, 4, False), (16, 11, False), (17, 11, True)]
)
def test_decodes_are_packed_exactly_if_they_are_many_and_share_a_long_prefix(num_decodes, num_shared, is_packed):
    """32 decodes that share 11 of 12 pages visit 32 * 12 pages alone, and 8 * 11 full and 32 partial pages if packed.

    If they share only 4 pages, packing costs more on the other pages than it saves.
    """
    scene = Scene(4, (None,), [48] * num_decodes, [(0, num_shared)] * num_decodes)
    assert (scene.packed(None, RULE) is not None) == is_packed


def test_shared_pages_out_of_the_window_save_nothing():
    scene = Scene(4, (9,), [48] * 32, [(0, 11)] * 32)
    assert scene.packed(None, RULE) is not None and scene.packed(9, RULE) is None


def test_decodes_are_not_packed_if_each_head_of_each_decode_has_a_processor():
    rule = replace(RULE, full_cost=1.0, partial_cost=1.0)
    scene = Scene(4, (None,), [48] * 32, [(0, 11)] * 32)
    assert scene.packed(None, rule) is not None
    assert scene.packed(None, replace(rule, heads_per_processor=4 / 128)) is None


def test_an_engine_with_too_short_or_too_few_sequences_has_no_cascade_rule():
    def rule(max_batch_size, max_seq_length):
        geometry = Geometry(10_000, 64, max_batch_size, max_seq_length, 1024)
        return cascade_rule(8, 2, geometry, torch.device("cpu"))

    assert rule(32, 4096) is not None
    assert rule(1, 4096) is None and rule(32, 64) is None
    for max_batch_size in (16, 32, 33):  # packed decodes have a graph for the largest bucket only
        assert rule(max_batch_size, 4096).least_decodes == decode_buckets(max_batch_size, "cuda")[-2] + 1
    assert rule(32, 4096).num_tiles * rule(32, 4096).tile_len >= 32


# ---- packing changes no tokens ----


@pytest.mark.parametrize("architecture", ["gemma2", "mistral", "qwen3"])
@pytest.mark.parametrize("release", [True, False])
def test_tokens_equal_hugging_face_with_packed_decodes_and_preemption(num_packed, architecture, release):
    rng = random.Random(0)
    model = tiny_model(architecture)
    options = dict(TIGHT, n_pages=12, max_num_batched_tokens=24, enable_window_release=release)
    with Inference(copy.deepcopy(model), None, **options) as engine:
        for seed in range(4):
            common = [prompt_of(rng.randint(4, 17), seed) for _ in range(2)]
            prompts = [rng.choice(common) + prompt_of(rng.randint(1, 5), rng.randrange(9)) for _ in range(7)]
            outputs = engine.generate(prompts, greedy(8), use_tqdm=False)
            assert tokens_of(outputs) == [hf_generate(model, prompt, 8, ignore_eos=True) for prompt in prompts]
            engine.check_invariants()
        assert engine.stats().num_preemptions > 0
    assert num_packed[0] > 10


def test_samples_of_one_prompt_are_packed_and_keep_their_tokens(num_packed):
    params = SamplingParams(n=5, seed=3, max_tokens=8, ignore_eos=True)
    texts = []
    for cascade_on in (True, False):
        with Inference(
            own_model("cascade"), None, **dict(SIZES, max_batch_size=5), enable_cascade=cascade_on
        ) as engine:
            (output,) = engine.generate(prompt_of(14), params, use_tqdm=False)
            texts.append([completion.token_ids for completion in output.outputs])
        assert num_packed[0] > 3, "too few steps were packed"
        num_packed[0] = 10 if cascade_on else 0
    assert texts[0] == texts[1]
    assert num_packed[0] == 0
