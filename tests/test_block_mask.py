"""Isolation of requests: compares the masks of a step with their definition, slot by slot.

    A query at position p of a sequence sees exactly the slots of positions max(0, p - window + 1) .. p of that
    sequence, each of them once. A padding query sees nothing.

The oracle computes this definition in plain loops, over lists of pages that the tests keep themselves. The masks are
checked in both ways in which FlexAttention uses them. The uncompiled function uses only `mask_mod`, at every (query,
slot). The kernels visit the pages that are listed for each tile, and use `mask_mod` on the partial pages.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import build_step, layout_of, make_sequence, num_cases, windows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from flex_nano_vllm import gather, page_table, step
from flex_nano_vllm.device import TileKind
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.sequence import Sequence
from flex_nano_vllm.step import StepBatch, TiledQueries, TileLayout, Tiles

N_PAGES = 13


def token_id(row: int, position: int) -> int:
    """Return a token id that encodes row and position."""
    return 1000 * row + position


def sequence_of(row: int, num_tokens: int) -> Sequence:
    return make_sequence([token_id(row, position) for position in range(num_tokens)], row, row=row)


class Scene:
    """A fragmented page table and some chunks. The pages of each row are also kept in plain lists."""

    def __init__(self, page_size: int, max_pages_per_row: int = 5, max_batch_size: int = 4):
        self.page_size = page_size
        geometry = Geometry(N_PAGES, page_size, max_batch_size, max_pages_per_row * page_size, 64, window_release=False)
        self.kv = KVManager(geometry, prefix_caching=False)
        self.pages: dict[int, list[int]] = {}  # row -> pages in logical order
        self.chunks: list[Chunk] = []

    def grow(self, row: int) -> bool:
        """Reserve one more page for `row`. Returns False if that is not possible.

        The number of the page is known, because the lowest free page is reserved first.
        """
        self.pages.setdefault(row, [])
        taken = {page for pages in self.pages.values() for page in pages}
        free = [page for page in range(1, N_PAGES) if page not in taken]
        if not free or len(self.pages[row]) == self.kv.geometry.max_pages_per_row:
            return False
        assert self.kv.reserve(row, (len(self.pages[row]) + 1) * self.page_size)
        self.pages[row].append(free[0])
        return True

    def erase(self, row: int) -> None:
        self.kv.erase(row)
        del self.pages[row]

    def slot(self, row: int, position: int) -> int:
        return self.pages[row][position // self.page_size] * self.page_size + position % self.page_size

    def visible(self, row: int, position: int, window: int | None) -> list[int]:
        """Return the slots that a query sees, by the definition at the top of this file."""
        first = 0 if window is None else max(0, position - window + 1)
        return sorted(self.slot(row, seen) for seen in range(first, position + 1))

    def tokens(self) -> list[tuple[int, int]]:
        """Return (row, position) of each token of the step, in order."""
        return [
            (chunk.sequence.row, position)
            for chunk in self.chunks
            for position in range(chunk.start, chunk.start + chunk.length)
        ]


@st.composite
def scenes(draw, page_size: int) -> Scene:
    scene = Scene(page_size)
    rows = [scene.kv.allocate([]) for _ in range(scene.kv.geometry.max_batch_size)]
    synced = draw(st.booleans())
    # Rows grow in turns and are erased in between, so that their pages are neither adjacent nor in order.
    turns = st.tuples(st.sampled_from(rows), st.sampled_from(["grow", "grow", "erase and grow"]))
    for row, turn in draw(st.lists(turns, min_size=8, max_size=30)):
        if turn != "grow" and scene.pages.get(row):
            scene.erase(row)
            assert scene.kv.allocate([]) == row
        scene.grow(row)
        if synced:  # the device tables may be outdated when the step is built
            scene.kv.sync()
    holders = draw(st.permutations([row for row in rows if scene.pages.get(row)]))
    for row in holders[draw(st.integers(0, len(holders) - 1)) :]:
        # The last page may be partly filled, and the sequence may have tokens without pages yet.
        end = len(scene.pages[row]) * page_size - draw(st.integers(0, page_size - 1))
        decodes = draw(st.booleans())
        start = end - 1 if decodes else draw(st.integers(0, end - 1))
        sequence = sequence_of(row, end + draw(st.integers(0, 2)))
        scene.chunks.append(Chunk(sequence, start, end - start))
    return scene


@st.composite
def layouts(draw, tile_lens: tuple[int, ...], group_size: int) -> TileLayout:
    windows = draw(st.sampled_from([(None,), (1,), (None, 2), (3, None), (2, 7), (5, 100)]))
    num_tiles, whole_pool = draw(st.sampled_from([None, 1, 3, 64])), draw(st.booleans())
    kinds = [TileKind(tile_len, num_tiles, draw(st.integers(1, 2))) for tile_len in tile_lens]
    if whole_pool:  # a row has at most five pages
        kinds[-1] = replace(kinds[-1], page_buckets=draw(st.sampled_from([(), (5,), (2, 5), (1, 4, 9)])))
    return layout_of(tuple(kinds), 1, group_size, windows, windows[-1], whole_pool)


def queries_of(batch: StepBatch) -> TiledQueries:
    """Return the queries of the first mask. Those of other masks have the same tiles, because no decodes are packed."""
    queries, *others = batch.queries
    for other in others:
        assert torch.equal(other.output_rows, queries.output_rows)
        for tiles, expected in zip(other.tiles, queries.tiles, strict=True):
            assert torch.equal(tiles.query_rows, expected.query_rows)
    return queries


def tiles_of(batch: StepBatch, layout: TileLayout):
    """Yield (tiles of each layer mask, tile length, token of each query or None for padding) for each call.

    For one kv head.
    """
    token_at = {
        row // layout.group_size: token for token, (row, *_) in enumerate(queries_of(batch).output_rows.tolist())
    }
    lengths = {kind.tile_len for kind in layout.kinds}
    before = 0
    for call, tiles in enumerate(queries_of(batch).tiles):
        q_block = tiles.block_mask.BLOCK_SIZE[0]
        assert q_block % layout.group_size == 0
        tile_len = q_block // layout.group_size
        assert tile_len in lengths
        queries = len(tiles.query_rows) * tile_len
        of_masks = [queries_of_mask.tiles[call] for queries_of_mask in batch.queries]
        yield of_masks, tile_len, [token_at.get(before + query) for query in range(queries)]
        before += queries


def kv_len(batch: StepBatch) -> int:
    """Return how many slots of the pool attention receives."""
    return queries_of(batch).tiles[0].block_mask.seq_lengths[1]


def pages_of(tiles: Tiles) -> list[int]:
    """Return the page of the pool behind each page that attention receives."""
    page_size = tiles.block_mask.BLOCK_SIZE[1]
    return list(range(tiles.block_mask.seq_lengths[1] // page_size)) if tiles.pages is None else tiles.pages.tolist()


def evaluate(block_mask) -> np.ndarray:
    """Evaluate mask_mod at every (query row, slot). The query rows of all tiles are concatenated."""
    num_tiles, (rows_per_tile, kv_len) = block_mask.kv_num_blocks.shape[0], block_mask.seq_lengths
    zero = torch.zeros((), dtype=torch.int32)
    tile = torch.arange(num_tiles, dtype=torch.int32)[:, None, None]
    q_idx = torch.arange(rows_per_tile, dtype=torch.int32)[None, :, None]
    slot = torch.arange(kv_len, dtype=torch.int32)[None, None]
    allowed = block_mask.mask_mod(tile, zero, q_idx, slot).broadcast_to(num_tiles, rows_per_tile, kv_len)
    return allowed.reshape(-1, kv_len).numpy()


def listed(counts: torch.Tensor, lists: torch.Tensor) -> list[list[int]]:
    """Return the pages that a kernel visits for each tile, in order."""
    return [pages[:count] for count, pages in zip(counts[:, 0, 0].tolist(), lists[:, 0, 0].tolist())]


def assert_isolated(scene: Scene, batch: StepBatch, layout: TileLayout) -> None:
    tokens, page_size = scene.tokens(), scene.page_size
    seen_tokens = []
    for of_masks, tile_len, token_of_query in tiles_of(batch, layout):
        rows_per_tile = tile_len * layout.group_size
        num_q_rows = len(token_of_query) * layout.group_size
        seen_tokens += [token for token in token_of_query if token is not None]
        for window, tiles in zip(windows_of(layout), of_masks, strict=True):
            block_mask, page_at = tiles.block_mask, pages_of(tiles)
            assert tuple(block_mask.BLOCK_SIZE) == (rows_per_tile, page_size)
            highest = max(page for pages in scene.pages.values() for page in pages)
            received = N_PAGES if layout.whole_pool else highest + 1
            kind = next(kind for kind in layout.kinds if kind.tile_len == tile_len)
            if kind.page_buckets:
                assert len(page_at) in kind.page_buckets
                received = len(page_at)
            assert tuple(block_mask.seq_lengths) == (rows_per_tile, received * page_size)
            slot_at = [page * page_size + offset for page in page_at for offset in range(page_size)]
            allowed = evaluate(block_mask)
            partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices)
            whole = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
            assert len(partial) == len(whole) == num_q_rows // rows_per_tile
            needed: list[set[int]] = [set() for _ in partial]
            for q_row in range(num_q_rows):
                tile, token = q_row // rows_per_tile, token_of_query[q_row // layout.group_size]
                expected = [] if token is None else scene.visible(*tokens[token], window)
                assert sorted(slot_at[slot] for slot in np.flatnonzero(allowed[q_row])) == expected
                visited = [  # with repetition, because a page listed twice counts twice in the softmax
                    slot_at[slot]
                    for pages, is_masked in ((partial[tile], True), (whole[tile], False))
                    for page in pages
                    for slot in range(page * page_size, page * page_size + page_size)
                    if allowed[q_row, slot] or not is_masked
                ]
                # Padding queries also read the full pages of their tile, but their output is not used.
                assert token is None or sorted(visited) == expected
                needed[tile].update(slot // page_size for slot in expected)
            for tile, pages in enumerate(needed):
                visited = sorted(page_at[page] for page in partial[tile] + whole[tile])
                assert visited == sorted(pages), "listed pages are not those needed"
    assert sorted(seen_tokens) == list(range(len(tokens))), "a token has no query, or two"


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("tile_lens", [(1,), (4,), (1, 4)], ids=str)
@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_a_query_sees_exactly_the_tokens_in_its_window_of_its_own_sequence(page_size, tile_lens, group_size):
    @settings(max_examples=num_cases(40))
    @given(scene=scenes(page_size), layout=layouts(tile_lens, group_size))
    def holds(scene, layout):
        batch = build_step(scene.chunks, scene.kv, layout)
        assert_isolated(scene, batch, layout)

    holds()


@settings(max_examples=num_cases(60))
@given(data=st.data())
def test_a_step_has_the_id_the_position_and_the_slots_of_each_token(data):
    scene = data.draw(st.sampled_from([1, 2, 4]).flatmap(scenes))
    layout = data.draw(st.sampled_from([(1,), (4,), (1, 4), (2, 3)]).flatmap(lambda lens: layouts(lens, 2)))
    batch = build_step(scene.chunks, scene.kv, layout)
    tokens = scene.tokens()
    assert batch.vectors.input_ids.tolist() == [token_id(row, position) for row, position in tokens]
    assert batch.vectors.positions.tolist() == [position for _, position in tokens]
    assert batch.vectors.rows.tolist() == [row for row, _ in tokens]
    assert len(batch.slots) == len(layout.masks)
    for slots in batch.slots:
        assert slots.tolist() == [scene.slot(row, position) for row, position in tokens]
    last_tokens = [(chunk.sequence.row, chunk.start + chunk.length - 1) for chunk in scene.chunks]
    assert [tokens[i] for i in batch.vectors.chunk_ends.tolist()] == last_tokens
    for ints in (
        batch.vectors.input_ids,
        batch.vectors.positions,
        *batch.slots,
        batch.vectors.chunk_ends,
        queries_of(batch).output_rows,
    ):
        assert ints.dtype == torch.int64


@settings(max_examples=num_cases(60))
@given(data=st.data())
def test_output_rows_are_the_inverse_of_query_rows_for_all_tokens_and_heads(data):
    scene = data.draw(st.sampled_from([1, 2, 4]).flatmap(scenes))
    num_kv_heads, group_size = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]))
    layout = data.draw(st.sampled_from([(1,), (4,), (1, 4), (2, 3)]).flatmap(lambda lens: layouts(lens, group_size)))
    layout = replace(layout, num_kv_heads=num_kv_heads)
    batch = build_step(scene.chunks, scene.kv, layout)
    values = torch.randn(len(scene.tokens()), num_kv_heads * group_size)
    in_tiles = [values.flatten()[tiles.query_rows] for tiles in queries_of(batch).tiles]
    assert torch.equal(torch.cat([part.flatten() for part in in_tiles])[queries_of(batch).output_rows], values)
    assert queries_of(batch).output_rows.unique().numel() == values.numel()
    # In a tile, each kv head has the queries of its own group of heads, token by token.
    for tiles in queries_of(batch).tiles:
        head = tiles.query_rows % values.shape[1]
        assert torch.equal(head // group_size, torch.arange(num_kv_heads)[:, None].expand_as(head[0]).expand_as(head))
        rows_of_tokens = (tiles.query_rows // values.shape[1]).unflatten(-1, (-1, group_size))
        assert (rows_of_tokens == rows_of_tokens[:, :1, :, :1]).all()


@settings(max_examples=num_cases(60))
@given(data=st.data())
def test_end_queries_equal_the_queries_of_a_step_with_only_the_last_tokens_of_chunks(data):
    scene = data.draw(st.sampled_from([1, 2, 4]).flatmap(scenes))
    layout = data.draw(st.sampled_from([(1,), (4,), (1, 4), (2, 3)]).flatmap(lambda lens: layouts(lens, 2)))
    batch = build_step(scene.chunks, scene.kv, layout)
    last_tokens = [Chunk(chunk.sequence, chunk.start + chunk.length - 1, 1) for chunk in scene.chunks]
    alone = build_step(last_tokens, scene.kv, layout)
    assert torch.equal(batch.end_queries.output_rows, queries_of(alone).output_rows)
    alone = alone.queries[layout.last_mask]
    for tiles, tiles_alone in zip(batch.end_queries.tiles, alone.tiles, strict=True):
        assert torch.equal(tiles.query_rows, tiles_alone.query_rows)
        mask, expected = tiles.block_mask, tiles_alone.block_mask
        assert mask.seq_lengths == expected.seq_lengths and mask.BLOCK_SIZE == expected.BLOCK_SIZE
        for counts, lists in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
            ours = listed(getattr(mask, counts), getattr(mask, lists))
            assert ours == listed(getattr(expected, counts), getattr(expected, lists))
        assert np.array_equal(evaluate(mask), evaluate(expected))


@settings(max_examples=num_cases(60))
@given(data=st.data())
def test_a_chunk_uses_the_smallest_tile_that_holds_it_and_calls_have_a_fixed_number_of_tiles(data):
    scene = data.draw(st.sampled_from([1, 2, 4]).flatmap(scenes))
    layout = data.draw(st.sampled_from([(1,), (4,), (1, 4), (2, 3)]).flatmap(lambda lens: layouts(lens, 1)))
    batch = build_step(scene.chunks, scene.kv, layout)
    num_tiles: dict[int, int] = {}  # tile length -> tiles
    for chunk in scene.chunks:
        fitting = [kind.tile_len for kind in layout.kinds if kind.tile_len >= chunk.length]
        tile_len = min(fitting) if fitting else max(kind.tile_len for kind in layout.kinds)
        full, rest = divmod(chunk.length, tile_len)
        num_tiles[tile_len] = num_tiles.get(tile_len, 0) + full + (rest > 0)
    for kind in layout.kinds:
        calls = [tiles.query_rows for tiles in queries_of(batch).tiles if tiles.query_rows.shape[2] == kind.tile_len]
        used = num_tiles.get(kind.tile_len, 0)
        if kind.page_buckets:
            assert sum(map(len, calls)) >= used and bool(calls) == bool(used)
        else:
            assert len(calls) == (-(-used // kind.num_tiles) if kind.num_tiles else bool(used))
        for query_rows in calls:
            assert query_rows.shape == (kind.num_tiles or len(query_rows), 1, kind.tile_len)
            assert query_rows.min() >= 0, "padding must read an existing token"
        assert kind.num_tiles or sum(map(len, calls)) == used


@settings(max_examples=num_cases(100))
@given(
    pages=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    num_tiles=st.sampled_from([None, 1, 2, 5]),
    page_buckets=st.sampled_from([(), (9,), (4, 9), (1, 3, 9)]),
    data=st.data(),
)
def test_a_call_has_no_more_tiles_and_pages_than_its_buckets(pages, num_tiles, page_buckets, data):
    """`pages`: those of each chunk. No two adjacent calls could have been one."""
    chunks = [data.draw(st.integers(1, 7)) for _ in pages]  # tiles of each chunk
    chunk = np.repeat(np.arange(len(pages)), chunks)
    is_first = np.concatenate([np.arange(number) == 0 for number in chunks])
    firsts = gather.calls_of(TileKind(1, num_tiles, 1, page_buckets), np.array(pages)[chunk], is_first)
    calls = [call.tolist() for call in np.split(chunk, firsts)]

    def fits(call: list[int]) -> bool:
        in_call = set(call)
        few_pages = not page_buckets or sum(pages[i] for i in in_call) <= page_buckets[:2][-1] or len(in_call) == 1
        return len(call) <= (num_tiles or math.inf) and few_pages

    assert all(calls) and all(map(fits, calls))
    for call, following in itertools.pairwise(calls):
        assert not fits([*call, following[0]])


@pytest.mark.parametrize("whole_pool", [True, False])
@settings(max_examples=num_cases(30))
@given(data=st.data())
def test_attention_gets_the_whole_or_the_used_pool_and_lists_as_wide_as_the_cpu_kernel_needs(whole_pool, data):
    scene = data.draw(st.sampled_from([1, 2, 4]).flatmap(scenes))
    kinds = (TileKind(1, 64), TileKind(4, 64))
    batch = build_step(scene.chunks, scene.kv, layout_of(kinds, 1, 2, (None, 3), 3, whole_pool))
    highest = max(page for pages in scene.pages.values() for page in pages)
    assert kv_len(batch) == (N_PAGES if whole_pool else highest + 1) * scene.page_size
    for queries in batch.queries:
        for block_mask in (tiles.block_mask for tiles in queries.tiles):
            for pages in (block_mask.kv_indices, block_mask.full_kv_indices):
                assert pages.shape[-1] >= kv_len(batch) // scene.page_size
                assert pages.dtype == block_mask.kv_num_blocks.dtype == torch.int32


def test_the_uploads_of_a_step_do_not_grow_with_max_seq_length(monkeypatch):
    """The page lists of a step were once as wide as the longest row allowed, so long contexts made all steps slow."""
    original, uploads = page_table.upload, {}
    for max_seq_length in (64, 65_536):
        kv = KVManager(Geometry(1 + max_seq_length // 4, 4, 3, max_seq_length, 64, (None, 6)), prefix_caching=False)
        assert kv.primary.max_pages_per_row == max_seq_length // 4
        sizes = uploads[max_seq_length] = []

        def noted_upload(arrays, *args, sizes=sizes):
            sizes += [array.shape for array in arrays]
            return original(arrays, *args)

        for module in (page_table, step):
            monkeypatch.setattr(module, "upload", noted_upload)
        chunks = []
        for start, length in ((19, 1), (0, 7), (9, 1)):
            row = kv.allocate([])
            assert kv.reserve(row, start + length)
            chunks.append(Chunk(sequence_of(row, start + length), start, length))
        kinds = (TileKind(1, 4), TileKind(4, 2))
        build_step(chunks, kv, layout_of(kinds, 1, 1, (None, 6), 6, whole_pool=True))
    assert uploads[64] == uploads[65_536] and len(uploads[64]) > 10


def test_the_drawing_in_the_docstring_of_step_holds():
    scene = Scene(page_size=4)
    a, b, c = (scene.kv.allocate([]) for _ in range(3))
    for row in (a, b, b, c, c):
        scene.grow(row)
    scene.chunks = [
        Chunk(sequence_of(a, 1), 0, 1),
        Chunk(sequence_of(b, 8), 7, 1),
        Chunk(sequence_of(c, 6), 0, 5),  # the last prompt token of c is not in this step
    ]
    layout = layout_of(
        (TileKind(1, 4), TileKind(4, 2)),
        num_kv_heads=1,
        group_size=2,
        windows=(None,),
        last_window=None,
        whole_pool=True,
    )
    batch = build_step(scene.chunks, scene.kv, layout)
    c_ids = [token_id(c, position) for position in range(5)]
    assert batch.vectors.input_ids.tolist() == [token_id(a, 0), token_id(b, 7), *c_ids]
    assert batch.vectors.chunk_ends.tolist() == [0, 1, 6]
    small, large = queries_of(batch).tiles
    # Two heads, so two query rows for each token
    assert small.query_rows.flatten().tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert large.query_rows.flatten().tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 1, 0, 1, 0, 1]
    assert queries_of(batch).output_rows.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11], [12, 13], [14, 15], [16, 17]]
    # The token of a sees a quarter of its page. The token of b sees both of its pages completely. Token c4 sees the
    # first page of c completely, but tokens c0 to c2 do not.
    assert small.block_mask.kv_num_blocks.flatten().tolist() == [1, 0, 0, 0]
    assert small.block_mask.full_kv_num_blocks.flatten().tolist() == [0, 2, 0, 0]
    assert large.block_mask.kv_num_blocks.flatten().tolist() == [1, 1]
    assert large.block_mask.full_kv_num_blocks.flatten().tolist() == [0, 1]
    assert_isolated(scene, batch, layout)


def test_padding_in_row_0_sees_nothing_and_writes_to_page_0():
    """`ModelRunner.warmup` runs such steps, which contain only padding sequences without pages."""
    scene = Scene(page_size=2)
    row = scene.kv.allocate([])
    for _ in range(4):
        scene.grow(row)  # pages of another row, which padding must not see
    layout = layout_of(
        (TileKind(1, 4), TileKind(4, 4)),
        num_kv_heads=1,
        group_size=2,
        windows=(None, 2),
        last_window=2,
        whole_pool=True,
    )
    chunks = [Chunk(sequence_of(0, 3), 0, 3), Chunk(sequence_of(0, 1), 0, 1)]
    batch = build_step(chunks, scene.kv, layout)
    assert all(0 <= slot < scene.page_size for slots in batch.slots for slot in slots.tolist())
    for queries in batch.queries:
        for block_mask in (tiles.block_mask for tiles in queries.tiles):
            assert not evaluate(block_mask).any()


def test_a_row_sees_no_tokens_of_the_sequence_that_used_its_pages_before():
    scene = Scene(page_size=2)
    old, new = scene.kv.allocate([]), scene.kv.allocate([])
    layout = layout_of(
        (TileKind(1, None),), num_kv_heads=1, group_size=1, windows=(None, 3), last_window=3, whole_pool=False
    )
    for row in (old, new, old, old, new):
        scene.grow(row)
    scene.chunks = [Chunk(sequence_of(old, 6), 0, 6), Chunk(sequence_of(new, 4), 0, 4)]
    assert_isolated(scene, build_step(scene.chunks, scene.kv, layout), layout)
    scene.erase(old)
    for _ in range(3):
        scene.grow(new)
    scene.chunks = [Chunk(sequence_of(new, 10), 3, 7)]
    assert_isolated(scene, build_step(scene.chunks, scene.kv, layout), layout)


def test_tiles_are_dealt_to_the_threads():
    """Each of two threads computes one half of the tiles. Five tiles of a prompt are padded to eight."""
    layout = layout_of((TileKind(2, 8, num_hands=2),), 1, 1, (None,), None, whole_pool=True)
    layout = replace(layout, tables=(PageTable(2, 64, 1, 1),))
    (tiles,) = step.cut_into_tiles(np.array([9]), np.arange(9), layout)
    assert tiles[:4].tolist() == [[0, 1], [4, 5], [8, -1], [-1, -1]]
    assert tiles[4:].tolist() == [[2, 3], [6, 7], [-1, -1], [-1, -1]]
    places, *_ = step.in_tiles([tiles], np.arange(9), np.zeros(9, dtype=int))
    assert tiles.ravel()[places].tolist() == list(range(9))
