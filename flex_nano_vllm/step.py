"""One step as a batch: the chunks of the scheduler as tensors and block masks. Independent of scheduling policy.

The model receives the tokens of all chunks as one sequence `input_ids` [1, T], one chunk directly after another.
Attention needs another layout: a FlexAttention query block reads one list of pages, so a block should not mix
sequences. Therefore the tokens are cut into *tiles*. A tile holds up to `tile_len` consecutive tokens of one chunk. A
chunk goes into the smallest kind of tile that holds it. If no kind holds it, it is cut into tiles of the largest kind.
For FlexAttention, every tile is a batch entry with one query block:

    chunks        a: 1 token   b: 1 token   c: 5 tokens            kinds of tile: 1 and 4 tokens long

    input_ids   [ a0 b7 c0 c1 c2 c3 c4 ]                           T = 7 tokens
    tiles of 1  [ a0 | b7 | ·  | ·  ]                              4 tiles (a bucket), 2 used
    tiles of 4  [ c0 c1 c2 c3 | c4 · · · ]                         2 tiles

FlexAttention is called once per kind of tile. The outputs are then put back into the order of the tokens. Decodes use
small tiles, in which each page is read for few query rows. Prompts use large tiles, at matrix-multiply speed. A padding
query sees nothing. The number of tiles is rounded up to a bucket, so that the compiled kernels get only a few shapes.

Decodes whose sequences share many pages may be packed into common tiles, only in the layers of the widest window: see
`cascade.py`.

Dimensions, here and in every trailing comment of the package: T tokens in the step, C chunks in the step, W tokens
whose logits are computed, H query heads, K kv heads, G = H / K query heads per kv head, D head dim, V vocabulary, P
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
    """Tiles of `tile_len` tokens. Their number is rounded up to one of `buckets` (None: no rounding)."""

    tile_len: int
    buckets: tuple[int, ...] | None

    def num_padded_tiles(self, num_tiles: int) -> int:
        return num_tiles if self.buckets is None else next(bucket for bucket in self.buckets if bucket >= num_tiles)


@dataclass(frozen=True)
class TileLayout:
    """How steps are cut into tiles for attention. Fixed for the lifetime of an engine.

    Args:
        kinds: in ascending order of `tile_len`.
        num_kv_heads: K.
        group_size: G; the heads of a group share their keys, so they become rows of one query block.
        windows: the distinct windows of the layers; None for full attention.
        last_window: the window of the last layer.
        whole_pool: attention always receives the whole pool, so that its shape never changes. If False, it receives
            only the used part, because uncompiled FlexAttention evaluates every slot that it receives.
        cascade: the rule for packing decodes into common tiles; None: they are never packed.
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
        """Return the index of the smallest kind of tile that holds the chunk, or of the largest kind if none does."""
        return next((i for i, kind in enumerate(self.kinds) if chunk_len <= kind.tile_len), len(self.kinds) - 1)


@dataclass(frozen=True)
class Cut:
    """All tiles of one kind in a step, on the host."""

    tokens: np.ndarray  # [tiles, L] index of each token in the step, -1 for padding
    rows: np.ndarray  # [tiles] page-table row of each tile, 0 for padding; [tiles, L] for packed decodes
    packed: PackedDecodes | None = None


@dataclass(frozen=True)
class Tiles:
    """All tiles of one kind in a step, on the device."""

    query_rows: Tensor  # [tiles, K, L * G] int64, token * H + head of each query; token 0 for padding
    block_masks: dict[int | None, BlockMask]  # physical masks, by the window of the layer


@dataclass(frozen=True)
class TiledQueries:
    """Tiles of queries, and the indices of their outputs.

    The queries are those of all T tokens of a step, or of the W tokens whose logits are computed.
    """

    tiles: tuple[Tiles, ...]  # one entry for each kind in use
    output_rows: Tensor  # [T, H] int64, index of each output in the concatenated query rows of all tiles

    @classmethod
    def build(
        cls,
        cuts: list[Cut],
        positions: np.ndarray,
        windows: tuple[int | None, ...],
        kv: KVManager,
        layout: TileLayout,
    ) -> "TiledQueries":
        """Upload tiles, with a mask for each of the windows. `positions` [T] are the positions of the queries."""
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
    """One step as tensors on the device. Complete when built, and never changed."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, 0-based
    slots: dict[int | None, Tensor]  # [T] int64 slot of each token, by the window of the layer
    chunk_ends: Tensor  # [C] int64, index of the last token of each chunk
    logits_indices: Tensor  # [W] int64, tokens whose logits are computed: chunk ends, and more for prompt logprobs
    queries: dict[int | None, TiledQueries]  # by the window of the layer
    end_queries: TiledQueries  # for `logits_indices`, the only queries of the last layer

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @classmethod
    def build(
        cls, chunks: list[Chunk], kv: KVManager, layout: TileLayout, packed: PackedDecodes | None = None
    ) -> "StepBatch":
        """Build the step of chunks whose pages are reserved.

        The host computes with numpy on whole arrays, and uploads them in a few transfers. `packed` decodes share tiles
        in the layers of the widest window.
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
    """Return how the decodes of a step share tiles in the layers of the widest window; None if they should not."""
    if layout.cascade is None or any(chunk.length > 1 for chunk in chunks):
        return None
    rows, positions = np.array([(chunk.sequence.row, chunk.start) for chunk in chunks]).T
    window = layout.widest_window
    return pack(rows, positions, window, kv.table(window), layout.cascade)


def cut_into_tiles(rows: np.ndarray, lengths: np.ndarray, layout: TileLayout) -> list[Cut]:
    """Cut chunks into tiles, given their page-table rows and lengths (both [C], in the order of the step)."""
    firsts = np.cumsum(lengths) - lengths  # [C] index of the first token of each chunk
    kind_of_chunk = np.array([layout.kind_index(length) for length in lengths])
    cuts = []
    for index in np.unique(kind_of_chunk):
        mine = kind_of_chunk == index
        cuts.append(_cut(layout.kinds[index], rows[mine], firsts[mine], lengths[mine]))
    return cuts


def cut_packed(rows: np.ndarray, packed: PackedDecodes, layout: TileLayout) -> Cut:
    """Return the tiles of packed decodes, given the page-table rows [C] of the chunks.

    Chunks in none of the tiles are padding. Their output is undefined.
    """
    packed = packed.padded(layout.cascade.num_tiles)
    return Cut(packed.members, np.where(packed.members < 0, 0, rows[packed.members]), packed)


def _rows(tiles: list[np.ndarray], num_tokens: int, layout: TileLayout) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the indices that put queries into tiles, and those that put outputs back into the order of the tokens.

    Args:
        tiles: for each kind, the tokens of its tiles, [tiles, L] with -1 for padding.
    Returns:
        `query_rows` for each kind, [tiles, K, L * G]: indices into the queries of the step, viewed as [T * H, D].
        `output_rows` [T, H]: indices into the concatenated outputs of all tiles. The outputs of each kind,
        [tiles, K, L * G, D], are viewed as [tiles * K * L * G, D].
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
    """Cut chunks, given by page-table row, index of the first token and length, into tiles of one kind."""
    tiles_per_chunk = cdiv(lengths, kind.tile_len)
    num_tiles = tiles_per_chunk.sum()
    chunk = np.repeat(np.arange(len(lengths)), tiles_per_chunk)  # [tiles] chunk of each tile
    number = np.arange(num_tiles) - np.repeat(np.cumsum(tiles_per_chunk) - tiles_per_chunk, tiles_per_chunk)
    offset = number[:, None] * kind.tile_len + np.arange(kind.tile_len)  # [tiles, L] within the chunk
    num_padded = kind.num_padded_tiles(num_tiles)
    tokens = np.full((num_padded, kind.tile_len), -1)
    tokens[:num_tiles] = np.where(offset < lengths[chunk, None], firsts[chunk, None] + offset, -1)
    rows_of_tiles = np.zeros(num_padded, dtype=np.int64)
    rows_of_tiles[:num_tiles] = rows[chunk]
    return Cut(tokens, rows_of_tiles)


def logical_block_mask(q_pos: np.ndarray, window: int | None, group_size: int, kv: KVManager) -> BlockMask:
    """Return the mask of a step in logical positions: the logical pages of each tile, and the mask_mod of the layer.

    The host builds the lists of pages from the first and last position of each tile. The lists are as wide as the
    longest one of the step, so that this work does not grow with the context that is allowed. `create_block_mask` would
    evaluate the mask for every query and every slot of the pool.

    Args:
        q_pos: [tiles, L], position of each query in its sequence; -1 for padding, which sees nothing.
        window: the sliding window of the layer, None for full attention.
        group_size: G; a tile has L * G query rows, G consecutive ones for each token.
        kv: gives the page size and N.
    """
    page_size, max_pages = kv.geometry.page_size, kv.geometry.max_pages_per_row
    tile_len = q_pos.shape[1]
    first, last = q_pos[:, :1], q_pos.max(axis=1, keepdims=True)  # [tiles, 1]; -1 for padding, which needs no pages
    first_page, end_page, first_full, end_full = visible_pages(first, last, window, page_size)
    num_pages = end_page - first_page
    # Full pages, on which the kernel does not evaluate mask_mod
    num_full = np.maximum(end_full - first_full, 0)
    steps = np.arange(max(1, (num_pages - num_full).max(), num_full.max()))
    partial_pages = first_page + steps
    partial_pages += np.where(partial_pages >= first_full, num_full, 0)
    full_pages = first_full + steps
    last_page = max_pages - 1  # entries past the end of a list are never visited, but are translated
    arrays = [num_pages - num_full, partial_pages.clip(max=last_page), num_full, full_pages.clip(max=last_page)]
    uploaded = upload([*arrays, q_pos], kv.device, np.int32)
    num_partial, partial_pages, num_full, full_pages, q_pos = uploaded
    return BlockMask.from_kv_blocks(
        num_partial[:, None],  # [tiles, 1, 1]: for all heads, one query block
        partial_pages[:, None, None],  # [tiles, 1, 1, <= N]
        num_full[:, None],
        full_pages[:, None, None],
        BLOCK_SIZE=(tile_len * group_size, page_size),
        mask_mod=of_queries(layer_mask(window), q_pos, group_size),
        seq_lengths=(tile_len * group_size, max_pages * page_size),
        compute_q_blocks=False,
    )
