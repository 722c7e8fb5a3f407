"""One step, packed: the chunks of the scheduler as tensors and block masks. Does not know why these chunks.

The model sees the tokens of all chunks in one row, `input_ids` [1, T], with nothing between them. Attention cannot: a
FlexAttention query block walks one list of pages, so a block must not mix sequences. Hence *tiles*: a tile is up
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

Dimensions, here and in every trailing comment of the package: T tokens in the step, C chunks in the step, H query
heads, K kv heads, G = H / K query heads per kv head, D head dim, V vocabulary, P physical pages, N logical pages of
a row, L tile_len.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flex_nano_vllm.masks import layer_mask
from flex_nano_vllm.page_table import PageTable, cdiv, upload
from flex_nano_vllm.scheduler import Chunk


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
        windows: the sliding window of each layer, None for full attention.
        whole_pool: attention is always handed the whole pool, so that its shape never changes; otherwise only the
            part in use (the uncompiled FlexAttention looks at every slot it is handed).
    """

    kinds: tuple[TileKind, ...]
    num_kv_heads: int
    group_size: int
    windows: tuple[int | None, ...]
    whole_pool: bool

    def kind_index(self, chunk_len: int) -> int:
        """The smallest kind of tile that holds the chunk, or the largest kind there is."""
        return next((i for i, kind in enumerate(self.kinds) if chunk_len <= kind.tile_len), len(self.kinds) - 1)


@dataclass(frozen=True)
class Tiles:
    """All tiles of one kind in a step."""

    query_rows: Tensor  # [tiles, K, L * G] int64, token * H + head of each query; token 0 where padded
    block_masks: dict[int | None, BlockMask]  # physical, by the sliding window of the layer


@dataclass(frozen=True)
class TiledQueries:
    """Queries on their way into FlexAttention and back: T of them, all tokens of a step or the C ends of its chunks."""

    tiles: tuple[Tiles, ...]  # of each kind in use
    output_rows: Tensor  # [T, H] int64, where each head's output stands in the concatenated rows of the tiles

    @classmethod
    def build(
        cls,
        chunk_rows: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        windows: tuple[int | None, ...],
        page_table: PageTable,
        layout: TileLayout,
    ) -> "TiledQueries":
        """Cut the queries of chunks into tiles, with a mask for each of the windows.

        Args:
            chunk_rows: [C], the page-table row of each chunk.
            positions: [T], of the chunks' tokens, one chunk after the other.
            lengths: [C], of the chunks.
        """
        firsts = np.cumsum(lengths) - lengths  # each chunk's first token
        kind_of_chunk = np.array([layout.kind_index(length) for length in lengths])
        cuts = []
        for kind in np.unique(kind_of_chunk):
            mine = kind_of_chunk == kind
            cuts.append(_cut_into_tiles(layout.kinds[kind], chunk_rows[mine], firsts[mine], lengths[mine]))
        query_rows, output_rows = _rows([tokens for tokens, _ in cuts], len(positions), layout)
        tile_rows = [rows for _, rows in cuts]
        output_rows, *uploaded = _upload([output_rows, *query_rows, *tile_rows], page_table.table.device)
        query_rows, tile_rows = uploaded[: len(cuts)], uploaded[len(cuts) :]

        kv_len = (page_table.n_pages if layout.whole_pool else page_table.num_live_pages) * page_table.page_size
        effective = {window: effective_window(window, page_table) for window in windows}
        tiles = []
        for (tokens, _), rows_of_queries, rows_of_tiles in zip(cuts, query_rows, tile_rows):
            q_pos, masks = np.where(tokens < 0, -1, positions[tokens]), {}
            for window in set(effective.values()):
                logical = logical_block_mask(q_pos, window, layout.group_size, page_table)
                masks[window] = page_table.convert_logical_block_mask(logical, rows_of_tiles.int(), kv_len)
            tiles.append(Tiles(rows_of_queries, {window: masks[effective[window]] for window in effective}))
        return cls(tuple(tiles), output_rows)


@dataclass(frozen=True)
class StepBatch:
    """One step as tensors on the device, complete when built, and never changed."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, 0-based
    slots: Tensor  # [T] int64, where each token's keys and values go
    chunk_ends: Tensor  # [C] int64, the last token of each chunk: its logits are wanted
    queries: TiledQueries
    end_queries: TiledQueries  # those of the chunks' ends, all that the last layer attends with

    @classmethod
    def build(cls, chunks: list[Chunk], page_table: PageTable, layout: TileLayout) -> "StepBatch":
        """Pack chunks whose pages are reserved. Host work is numpy over whole arrays, uploaded in a few transfers."""
        page_table.sync()
        starts, lengths = np.array([(chunk.start, chunk.length) for chunk in chunks]).T
        rows = np.array([chunk.sequence.row for chunk in chunks])
        ends = np.cumsum(lengths) - 1
        positions = np.arange(lengths.sum()) + np.repeat(starts - (ends + 1 - lengths), lengths)
        input_ids = [i for chunk in chunks for i in chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]]
        slots = page_table.slots(np.repeat(rows, lengths), positions)
        arrays = [np.array(input_ids), positions, slots, ends]
        input_ids, position_ids, slots, chunk_ends = _upload(arrays, page_table.table.device)
        queries = end_queries = TiledQueries.build(rows, positions, lengths, layout.windows, page_table, layout)
        if len(positions) > len(chunks):
            one = np.ones_like(lengths)
            end_queries = TiledQueries.build(rows, positions[ends], one, layout.windows[-1:], page_table, layout)
        return cls(input_ids[None], position_ids[None], slots, chunk_ends, queries, end_queries)


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


def _cut_into_tiles(
    kind: TileKind, rows: np.ndarray, firsts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cut chunks (page-table row, first token in the step, length) into tiles of one kind.

    Returns the tokens of each tile, [tiles, L] with -1 where padded, and its row, [tiles] with 0 where padded.
    """
    tiles_per_chunk = cdiv(lengths, kind.tile_len)
    num_tiles = tiles_per_chunk.sum()
    chunk = np.repeat(np.arange(len(lengths)), tiles_per_chunk)  # [tiles] the chunk of each tile
    number = np.arange(num_tiles) - np.repeat(np.cumsum(tiles_per_chunk) - tiles_per_chunk, tiles_per_chunk)
    offset = number[:, None] * kind.tile_len + np.arange(kind.tile_len)  # [tiles, L] within the chunk
    tokens = np.where(offset < lengths[chunk, None], firsts[chunk, None] + offset, -1)
    num_padded = kind.num_padded_tiles(num_tiles)
    padded_tokens = np.full((num_padded, kind.tile_len), -1)
    padded_tokens[:num_tiles] = tokens
    padded_rows = np.zeros(num_padded, dtype=np.int64)
    padded_rows[:num_tiles] = rows[chunk]
    return padded_tokens, padded_rows


def logical_block_mask(q_pos: np.ndarray, window: int | None, group_size: int, page_table: PageTable) -> BlockMask:
    """The mask of a step in logical positions: which logical pages each tile needs, and the layer's mask_mod.

    Built from first and last position of each tile, on the host, and uploaded: O(tiles x N) small integers, where
    `create_block_mask` would evaluate the mask for every query and every slot of the pool.

    Args:
        q_pos: [tiles, L], position of each query in its sequence; -1 where padded, which sees nothing.
        window: the layer's sliding window, None for full attention.
        group_size: G; a tile has L * G rows, G consecutive ones for each token.
        page_table: for the page size and N.
    """
    page_size, max_pages = page_table.page_size, page_table.max_pages_per_row
    tile_len = q_pos.shape[1]
    first, last = q_pos[:, :1], q_pos.max(axis=1, keepdims=True)  # [tiles, 1]; -1 for padding: no page is needed
    if window is None:
        first_page = first_whole = np.zeros_like(first)
    else:
        first_page = np.maximum(first - window + 1, 0) // page_size
        first_whole = cdiv(np.maximum(last - window + 1, 0), page_size)  # all of it is in every query's window
    num_pages = last // page_size + 1 - first_page
    # Pages that all queries of a tile see whole: there the kernel need not evaluate mask_mod for every single score.
    num_whole = np.maximum((first + 1) // page_size - first_whole, 0)
    steps = np.arange(max_pages)
    partial_pages = first_page + steps
    partial_pages += np.where(partial_pages >= first_whole, num_whole, 0)
    whole_pages = first_whole + steps
    last_page = max_pages - 1  # past its end a list is never visited, but translated
    arrays = [num_pages - num_whole, partial_pages.clip(max=last_page), num_whole, whole_pages.clip(max=last_page)]
    uploaded = _upload([*arrays, q_pos], page_table.table.device, np.int32)
    num_partial, partial_pages, num_whole, whole_pages, q_pos = uploaded
    mask = layer_mask(window)

    def mask_of_queries(tile: Tensor, h: Tensor, q_idx: Tensor, kv_pos: Tensor) -> Tensor:
        return mask(tile, h, q_pos[tile, q_idx // group_size], kv_pos)

    return BlockMask.from_kv_blocks(
        num_partial[:, None],  # [tiles, 1, 1]: of all heads, one block of queries
        partial_pages[:, None, None],  # [tiles, 1, 1, N]
        num_whole[:, None],
        whole_pages[:, None, None],
        BLOCK_SIZE=(tile_len * group_size, page_size),
        mask_mod=mask_of_queries,
        seq_lengths=(tile_len * group_size, max_pages * page_size),
        compute_q_blocks=False,
    )


def effective_window(window: int | None, page_table: PageTable) -> int | None:
    """The window, or None if no sequence can be long enough to notice it: its layers then share the causal mask, and
    its compiled kernel."""
    longest = page_table.max_pages_per_row * page_table.page_size
    return None if window is not None and window >= longest else window


def _upload(arrays: list[np.ndarray], device: torch.device, dtype: type = np.int64) -> list[Tensor]:
    """Copy integer arrays of any shapes to the device in one transfer.

    The parts are copied once more: a compiled region takes no two tensors that share memory."""
    packed = np.concatenate([array.ravel() for array in arrays], dtype=dtype, casting="same_kind")
    parts = upload(packed, device).split([array.size for array in arrays])
    return [part.view(array.shape).clone() for part, array in zip(parts, arrays)]
