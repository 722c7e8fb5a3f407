"""One step, packed: the chunks of the scheduler as tensors and block masks. Does not know why these chunks.

The model sees the tokens of all chunks in one row, `input_ids` [1, T], with nothing between them. Attention cannot: a
FlexAttention query block walks one list of pages, so a block should not mix sequences. Hence *tiles*: a tile is up
to `tile_len` consecutive tokens of one chunk, and a chunk goes into the smallest kind of tile that holds it, or is
cut into tiles of the largest kind. To FlexAttention every tile is a batch entry of one query block:

    chunks        a: 1 token   b: 1 token   c: 5 tokens            kinds of tile: 1 and 4 tokens long

    input_ids   [ a0 b7 c0 c1 c2 c3 c4 ]                           T = 7 tokens
    tiles of 1  [ a0 | b7 | ·  | ·  ]                              4 tiles (a bucket), 2 used
    tiles of 4  [ c0 c1 c2 c3 | c4 · · · ]                         2 tiles

One call of FlexAttention per kind of tile, then every token picks up its output again. Tokens that decode ride in
small tiles and read each page once for few rows; prompts ride in large ones, at matrix-multiply speed. Padding
costs a row that sees nothing. The number of tiles is rounded up to a bucket, so that the compiled kernels meet a
handful of shapes and never another.

Decodes whose sequences share many pages may be packed into tiles together, in the layers of the widest window only: see
`cascade.py`.

Dimensions, here and in every trailing comment of the package: T tokens in the step, C chunks in the step, W tokens
whose logits are wanted, H query heads, K kv heads, G = H / K query heads per kv head, D head dim, V vocabulary, P
physical pages, N logical pages of a row, L tile_len.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flex_nano_vllm.cascade import CascadeRule, PackedDecodes, pack, packed_block_mask
from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.masks import layer_mask, of_queries
from flex_nano_vllm.page_table import visible_pages
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.transfer import upload


@dataclass(frozen=True)
class TileKind:
    """Tiles of `tile_len` tokens, whose number is rounded up to one of `buckets` (None: not rounded)."""

    tile_len: int
    buckets: tuple[int, ...] | None

    def num_padded_tiles(self, num_tiles: int) -> int:
        return num_tiles if self.buckets is None else next(bucket for bucket in self.buckets if bucket >= num_tiles)


@dataclass(frozen=True)
class TileLayout:
    """How steps are cut for attention: fixed for the life of an engine.

    Args:
        kinds: by ascending `tile_len`.
        num_kv_heads: K.
        group_size: G; the heads of a group share their keys, so they are folded into the rows of a query block.
        windows: of the layers, each once; None for full attention.
        last_window: of the last layer.
        whole_pool: attention is always handed the whole pool, so that its shape never changes; otherwise only the
            part in use (the uncompiled FlexAttention looks at every slot it is handed).
        cascade: when decodes share tiles, None: never.
    """

    kinds: tuple[TileKind, ...]
    num_kv_heads: int
    group_size: int
    windows: tuple[int | None, ...]
    last_window: int | None
    whole_pool: bool
    cascade: CascadeRule | None = None

    @property
    def widest_window(self) -> int | None:
        return max(self.windows, key=lambda window: window or math.inf)

    def kind_index(self, chunk_len: int) -> int:
        """The smallest kind of tile that holds the chunk, or the largest kind there is."""
        return next((i for i, kind in enumerate(self.kinds) if chunk_len <= kind.tile_len), len(self.kinds) - 1)


@dataclass(frozen=True)
class Cut:
    """All tiles of one kind in a step, on the host."""

    tokens: np.ndarray  # [tiles, L] of the step, -1 where padded
    rows: np.ndarray  # [tiles] of the page table, 0 where padded; or [tiles, L], of packed decodes
    packed: PackedDecodes | None = None


@dataclass(frozen=True)
class Tiles:
    """The same on the device."""

    query_rows: Tensor  # [tiles, K, L * G] int64, token * H + head of each query; token 0 where padded
    block_masks: dict[int | None, BlockMask]  # physical, by the window of the layer


@dataclass(frozen=True)
class TiledQueries:
    """Queries on their way into FlexAttention and back: of all T tokens of a step, or the W whose logits are wanted."""

    tiles: tuple[Tiles, ...]  # of each kind in use
    output_rows: Tensor  # [T, H] int64, where each head's output stands in the concatenated rows of the tiles

    @classmethod
    def build(
        cls,
        cuts: list[Cut],
        positions: np.ndarray,
        windows: tuple[int | None, ...],
        kv: KVManager,
        layout: TileLayout,
    ) -> "TiledQueries":
        """Bring tiles to the device, with a mask for each of the windows. `positions` [T] are those of the queries."""
        query_rows, output_rows = _rows([cut.tokens for cut in cuts], len(positions), layout)
        output_rows, *uploaded = upload([output_rows, *query_rows, *(cut.rows for cut in cuts)], kv.device)
        tiles = []
        for cut, rows_of_queries, rows in zip(cuts, uploaded[: len(cuts)], uploaded[len(cuts) :]):
            q_pos, masks = np.where(cut.tokens < 0, -1, positions[cut.tokens]), {}
            for window in windows:
                table = kv.table(window)
                kv_len = (table.n_pages if layout.whole_pool else table.num_live_pages) * table.page_size
                if cut.packed is not None:
                    packed = cut.packed
                    mask = packed_block_mask(packed, rows.int(), q_pos, window, layout.group_size, table, kv_len)
                else:
                    logical = logical_block_mask(q_pos, window, layout.group_size, kv)
                    mask = table.convert_logical_block_mask(logical, rows.int(), kv_len)
                masks[window] = mask
            tiles.append(Tiles(rows_of_queries, masks))
        return cls(tuple(tiles), output_rows)


@dataclass(frozen=True)
class StepBatch:
    """One step as tensors on the device, complete when built, and never changed."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, 0-based
    slots: dict[int | None, Tensor]  # [T] int64 by the window of the layer, where each token's keys and values go
    chunk_ends: Tensor  # [C] int64, the last token of each chunk
    logits_indices: Tensor  # [W] int64, tokens whose logits are wanted: the ends, and in some chunks tokens before it
    queries: dict[int | None, TiledQueries]  # by the window of the layer
    end_queries: TiledQueries  # of `logits_indices`, all that the last layer attends with

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @classmethod
    def build(
        cls, chunks: list[Chunk], kv: KVManager, layout: TileLayout, packed: PackedDecodes | None = None
    ) -> "StepBatch":
        """Pack chunks whose pages are reserved. Host work is numpy over whole arrays, uploaded in a few transfers.

        `packed` decodes share their tiles in the layers of the widest window.
        """
        kv.sync()
        starts, lengths = np.array([(chunk.start, chunk.length) for chunk in chunks]).T
        rows = np.array([chunk.sequence.row for chunk in chunks])
        ends = np.cumsum(lengths) - 1
        positions = np.arange(lengths.sum()) + np.repeat(starts - (ends + 1 - lengths), lengths)
        input_ids = [i for chunk in chunks for i in chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]]
        slots = [kv.table(window).slots(np.repeat(rows, lengths), positions) for window in layout.windows]
        num_logits = np.array([chunk.num_logits for chunk in chunks])
        logits_indices = np.arange(num_logits.sum()) + np.repeat(ends + 1 - np.cumsum(num_logits), num_logits)
        arrays = [np.array(input_ids), positions, ends, logits_indices, *slots]
        input_ids, position_ids, chunk_ends, wanted_tokens, *slots = upload(arrays, kv.device)
        queries = {}
        if packed is not None:
            window = layout.widest_window
            cut = cut_packed(rows, packed, layout)
            queries[window] = TiledQueries.build([cut], positions, (window,), kv, layout)
        others = tuple(window for window in layout.windows if window not in queries)
        if others:
            cuts = cut_into_tiles(rows, lengths, layout)
            queries |= dict.fromkeys(others, TiledQueries.build(cuts, positions, others, kv, layout))
        end_queries = queries[layout.last_window]
        if len(positions) > len(logits_indices):
            cuts = cut_into_tiles(rows, num_logits, layout)
            end_queries = TiledQueries.build(cuts, positions[logits_indices], (layout.last_window,), kv, layout)
        slots = dict(zip(layout.windows, slots))
        return cls(input_ids[None], position_ids[None], slots, chunk_ends, wanted_tokens, queries, end_queries)


def pack_decodes(chunks: list[Chunk], kv: KVManager, layout: TileLayout) -> PackedDecodes | None:
    """The way in which a step's decodes should share tiles in the layers of the widest window, if they should."""
    if layout.cascade is None or any(chunk.length > 1 for chunk in chunks):
        return None
    rows, positions = np.array([(chunk.sequence.row, chunk.start) for chunk in chunks]).T
    window = layout.widest_window
    return pack(rows, positions, window, kv.table(window), layout.cascade)


def cut_into_tiles(rows: np.ndarray, lengths: np.ndarray, layout: TileLayout) -> list[Cut]:
    """Cut chunks, in the order of their tokens in the step, given their page-table rows and lengths (both [C])."""
    firsts = np.cumsum(lengths) - lengths  # each chunk's first token
    kind_of_chunk = np.array([layout.kind_index(length) for length in lengths])
    cuts = []
    for index in np.unique(kind_of_chunk):
        mine = kind_of_chunk == index
        cuts.append(_cut(layout.kinds[index], rows[mine], firsts[mine], lengths[mine]))
    return cuts


def cut_packed(rows: np.ndarray, packed: PackedDecodes, layout: TileLayout) -> Cut:
    """Packed decodes of a step, [C], in tiles. Chunks in none of them are padding: their output is anybody's."""
    packed = packed.padded(layout.cascade.num_tiles)
    return Cut(packed.members, np.where(packed.members < 0, 0, rows[packed.members]), packed)


def _rows(tiles: list[np.ndarray], num_tokens: int, layout: TileLayout) -> tuple[list[np.ndarray], np.ndarray]:
    """The way of queries into tiles and of outputs back.

    Args:
        tiles: for each kind, the tokens of its tiles, [tiles, L] with -1 where padded.
    Returns:
        For each kind `query_rows` [tiles, K, L * G], rows of the step's queries seen as [T * H, D]; and `output_rows`
        [T, H], rows of the outputs of all tiles, each kind's [tiles, K, L * G, D] seen as [tiles * K * L * G, D].
    """
    heads = np.arange(layout.num_kv_heads * layout.group_size).reshape(layout.num_kv_heads, 1, layout.group_size)
    query_rows, output_rows, num_rows = [], np.zeros((num_tokens, heads.size), dtype=np.int64), 0
    for tokens in tiles:
        rows = tokens.clip(min=0)[:, None, :, None] * heads.size + heads  # [tiles, K, L, G]
        query_rows.append(rows.reshape(len(tokens), len(heads), -1))
        by_token = (num_rows + np.arange(rows.size)).reshape(rows.shape).transpose(0, 2, 1, 3).reshape(-1, heads.size)
        used = tokens.ravel() >= 0
        output_rows[tokens.ravel()[used]] = by_token[used]
        num_rows += rows.size
    return query_rows, output_rows


def _cut(kind: TileKind, rows: np.ndarray, firsts: np.ndarray, lengths: np.ndarray) -> Cut:
    """Cut chunks (page-table row, first token in the step, length) into tiles of one kind."""
    tiles_per_chunk = cdiv(lengths, kind.tile_len)
    num_tiles = tiles_per_chunk.sum()
    chunk = np.repeat(np.arange(len(lengths)), tiles_per_chunk)  # [tiles] the chunk of each tile
    number = np.arange(num_tiles) - np.repeat(np.cumsum(tiles_per_chunk) - tiles_per_chunk, tiles_per_chunk)
    offset = number[:, None] * kind.tile_len + np.arange(kind.tile_len)  # [tiles, L] within the chunk
    num_padded = kind.num_padded_tiles(num_tiles)
    tokens = np.full((num_padded, kind.tile_len), -1)
    tokens[:num_tiles] = np.where(offset < lengths[chunk, None], firsts[chunk, None] + offset, -1)
    rows_of_tiles = np.zeros(num_padded, dtype=np.int64)
    rows_of_tiles[:num_tiles] = rows[chunk]
    return Cut(tokens, rows_of_tiles)


def logical_block_mask(q_pos: np.ndarray, window: int | None, group_size: int, kv: KVManager) -> BlockMask:
    """The mask of a step in logical positions: which logical pages each tile needs, and the layer's mask_mod.

    Built from first and last position of each tile, on the host, and uploaded: O(tiles x N) small integers, where
    `create_block_mask` would evaluate the mask for every query and every slot of the pool.

    Args:
        q_pos: [tiles, L], position of each query in its sequence; -1 where padded, which sees nothing.
        window: the layer's sliding window, None for full attention.
        group_size: G; a tile has L * G rows, G consecutive ones for each token.
        kv: for the page size and N.
    """
    page_size, max_pages = kv.geometry.page_size, kv.geometry.max_pages_per_row
    tile_len = q_pos.shape[1]
    first, last = q_pos[:, :1], q_pos.max(axis=1, keepdims=True)  # [tiles, 1]; -1 for padding: no page is needed
    first_page, end_page, first_full, end_full = visible_pages(first, last, window, page_size)
    num_pages = end_page - first_page
    # Pages that all queries of a tile see whole: there the kernel need not evaluate mask_mod for every single score.
    num_full = np.maximum(end_full - first_full, 0)
    steps = np.arange(max_pages)
    partial_pages = first_page + steps
    partial_pages += np.where(partial_pages >= first_full, num_full, 0)
    full_pages = first_full + steps
    last_page = max_pages - 1  # past its end a list is never visited, but translated
    arrays = [num_pages - num_full, partial_pages.clip(max=last_page), num_full, full_pages.clip(max=last_page)]
    uploaded = upload([*arrays, q_pos], kv.device, np.int32)
    num_partial, partial_pages, num_full, full_pages, q_pos = uploaded
    return BlockMask.from_kv_blocks(
        num_partial[:, None],  # [tiles, 1, 1]: of all heads, one block of queries
        partial_pages[:, None, None],  # [tiles, 1, 1, N]
        num_full[:, None],
        full_pages[:, None, None],
        BLOCK_SIZE=(tile_len * group_size, page_size),
        mask_mod=of_queries(layer_mask(window), q_pos, group_size),
        seq_lengths=(tile_len * group_size, max_pages * page_size),
        compute_q_blocks=False,
    )
