"""One step as a batch: the chunks of the scheduler as tensors and block masks. Independent of scheduling policy.

The model receives the tokens of all chunks as one sequence `input_ids` [1, T], one chunk directly after another.
Attention needs another layout: a FlexAttention query block reads one list of pages, so a block should not mix
sequences. Therefore the tokens are cut into *tiles*. A tile holds up to `tile_len` consecutive tokens of one chunk. A
chunk goes into the smallest kind of tile that holds it. If no kind holds it, it is cut into tiles of the largest kind.
For FlexAttention, every tile is a batch entry with one query block:

    chunks        a: 1 token   b: 1 token   c: 5 tokens            kinds of tile: 1 and 4 tokens long

    input_ids   [ a0 b7 c0 c1 c2 c3 c4 ]                           T = 7 tokens
    tiles of 1  [ a0 | b7 | ·  | ·  ]                              4 tiles in a call, 2 used
    tiles of 4  [ c0 c1 c2 c3 | c4 · · · ]                         2 tiles in a call

FlexAttention is called once for the small tiles. Large tiles are divided among calls. The outputs are then put back
into the order of the tokens. Decodes use small tiles, in which each page is read for few query rows. Prompts use large
tiles, at matrix-multiply speed. All calls for a kind have the same number of tiles, so that compiled kernels get only a
few shapes. A padding query sees nothing.

On CPUs that multiply bfloat16, the pages of large tiles are gathered: see `gather.py`.

Decodes whose sequences share many pages may be packed into common tiles, only in the layers of the widest window: see
`cascade.py`.

Dimensions, here and in every trailing comment of the package: T tokens in the step, C chunks in the step, W tokens
whose logits are computed, H query heads, K kv heads, G = H / K query heads per kv head, D head dim, V vocabulary, P
physical pages, N logical pages of a row, L tile_len.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flex_nano_vllm.cascade import CascadeRule, PackedDecodes, pack, packed_block_mask
from flex_nano_vllm.device import TileKind, upload
from flex_nano_vllm.gather import calls_of, gather
from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.masks import LayerMask, Pages, ScoreMod, of_queries
from flex_nano_vllm.page_table import PageList, PageTable, RowOf, mask_of_tiles
from flex_nano_vllm.scheduler import Chunk


@dataclass(frozen=True)
class TileLayout:
    """How steps are cut into tiles for attention. Fixed for the lifetime of an engine.

    Args:
        kinds: in ascending order of `tile_len`.
        num_kv_heads: K.
        group_size: G; the heads of a group share their keys, so they become rows of one query block.
        masks: the distinct masks of the layers. Their indices identify them in a step.
        tables: the page table of each mask.
        last_mask: index of the mask of the last layer, if it is pruned (`pruning.py`).
        whole_pool: attention always receives the whole pool, so that its shape never changes. If False, it receives
            only the used part, because uncompiled FlexAttention evaluates every slot that it receives.
        cascade: the rule for packing decodes into common tiles; None: they are never packed.
        kernel_options: options of FlexAttention's kernel, by the query rows of a tile (`device.kernel_options`).
        sinks: every query sees slot 0 of the pool, see `masks.with_sinks`.
    """

    kinds: tuple[TileKind, ...]
    num_kv_heads: int
    group_size: int
    masks: tuple[LayerMask, ...]
    tables: tuple[PageTable, ...]
    last_mask: int | None
    whole_pool: bool
    cascade: CascadeRule | None = None
    kernel_options: dict[int, dict[str, object]] = field(default_factory=dict)
    sinks: bool = False

    @property
    def packed_mask(self) -> int:
        """Index of the mask with the widest window, whose layers use packed tiles."""
        widths = [mask.window or math.inf for mask in self.masks]
        return widths.index(max(widths))  # compiled code: torch 2.11 does not compile `max` with a key

    def kind_index(self, chunk_len: int) -> int:
        """Return the index of the smallest kind of tile that holds the chunk, or of the largest kind if none does."""
        return next((i for i, kind in enumerate(self.kinds) if chunk_len <= kind.tile_len), len(self.kinds) - 1)


@dataclass(frozen=True)
class Cut:
    """Tokens in tiles of one kind, for one call of FlexAttention."""

    tokens: Tensor  # [tiles, L] int64, index of each token in the step; -1 for padding
    q_pos: Tensor  # [tiles, L] int32, position of each token; -1 for padding, which sees nothing
    rows: Tensor  # [tiles] int32, page-table row of each tile; 0 for padding. [tiles, L] for packed decodes


@dataclass(frozen=True)
class InTiles:
    """Tokens in tiles, and the way back."""

    cuts: tuple[Cut, ...]  # one for each call
    places: Tensor  # [T] int64, index of each token in the tiles of `cuts`, concatenated

    @classmethod
    def of(cls, places: Tensor, *cuts: Tensor) -> "InTiles":
        """Take the uploaded arrays of `in_tiles`."""
        return cls(tuple(Cut(*cuts[i : i + 3]) for i in range(0, len(cuts), 3)), places)


@dataclass(frozen=True)
class StepVectors:
    """One step as the host uploads it: token, position and row of each query, in order and in tiles.

    Everything else that attention needs is computed on the device from these vectors and the page tables. Only packed
    decodes have another upload (`TiledQueries.of_packed`).
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, 0-based
    rows: Tensor  # [T] int64, page-table row of each token
    chunk_ends: Tensor  # [C] int64, index of the last token of each chunk
    logits_indices: Tensor  # [W] int64, tokens whose logits are computed: chunk ends, and more for prompt logprobs
    queries: InTiles
    end_queries: InTiles | None  # only the logits indices; None if they are all tokens, or no layer is pruned

    @classmethod
    def build(cls, chunks: list[Chunk], layout: TileLayout, device: torch.device) -> "StepVectors":
        """Describe chunks whose pages are reserved, with numpy on whole arrays and one upload."""
        starts, lengths = np.array([(chunk.start, chunk.length) for chunk in chunks]).T
        ends = np.cumsum(lengths) - 1
        positions = np.arange(lengths.sum()) + np.repeat(starts - (ends + 1 - lengths), lengths)
        rows = np.repeat([chunk.sequence.row for chunk in chunks], lengths)
        input_ids = [i for chunk in chunks for i in chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]]
        num_logits = np.array([chunk.num_logits for chunk in chunks])
        indices = np.arange(num_logits.sum()) + np.repeat(ends + 1 - np.cumsum(num_logits), num_logits)
        vectors, last = [np.array(input_ids), positions, rows, ends, indices], []
        queries = in_tiles(cut_into_tiles(lengths, positions, layout), positions, rows)
        if layout.last_mask is not None and len(positions) > len(indices):
            last = in_tiles(cut_into_tiles(num_logits, positions[indices], layout), positions[indices], rows[indices])
        uploaded = iter(upload([*vectors, *queries, *last], device))
        vectors, queries, last = ([next(uploaded) for _ in part] for part in (vectors, queries, last))
        return cls(*vectors, InTiles.of(*queries), InTiles.of(*last) if last else None)


@dataclass(frozen=True)
class Tiles:
    """Tiles of one kind for a call of FlexAttention, for the layers of one mask."""

    query_rows: Tensor  # [tiles, K, L * G] int64, token * H + head of each query; token 0 for padding
    block_mask: BlockMask  # physical
    score_mod: ScoreMod | None
    kernel_options: dict[str, object] | None
    pages: Tensor | None  # [N] int32, the pages of the pool that attention receives; None: all of `block_mask`

    def of_pool(self, pool: Tensor) -> Tensor:
        """Return the keys or values of a pool [1, K, slots, D] that attention receives."""
        if self.pages is None:
            return pool[:, :, : self.block_mask.seq_lengths[1]]
        return pool.unflatten(2, (-1, self.block_mask.BLOCK_SIZE[1]))[:, :, self.pages].flatten(2, 3)


@dataclass(frozen=True)
class TiledQueries:
    """Tiles of queries, and the indices of their outputs."""

    tiles: tuple[Tiles, ...]  # one entry for each call
    output_rows: Tensor  # [T, H] int64, index of each output in the concatenated query rows of all tiles

    @classmethod
    def build(
        cls, queries: InTiles, index: int, width: int, layout: TileLayout, packed: PackedDecodes | None = None
    ) -> "TiledQueries":
        """Build the tiles of the layers with mask `index` of the layout.

        `width`: logical pages up to the last position, or more. `packed`: the pages of packed tiles.
        """
        mask, table, group_size = layout.masks[index], layout.tables[index], layout.group_size
        num_heads, device, largest = layout.num_kv_heads * group_size, queries.places.device, layout.kinds[-1]
        heads = torch.arange(num_heads, device=device).view(layout.num_kv_heads, 1, group_size)
        tiles, output_rows, num_rows = [], [], 0
        for cut in queries.cuts:
            row_of, score_mod, keys, pages = _row_of(cut.rows, group_size), None, table, None
            if packed is None and largest.page_buckets and cut.tokens.shape[1] == largest.tile_len:
                keys, pages = gather(table, mask, cut.q_pos, cut.rows, largest.page_buckets)
            kv_len = (keys.n_pages if layout.whole_pool else table.num_live_pages) * table.page_size
            if packed is None:
                logical = logical_block_mask(cut.q_pos, mask, group_size, table.page_size, width)
                block_mask = keys.convert_logical_block_mask(logical, cut.rows, kv_len, layout.sinks)
            else:
                block_mask = packed_block_mask(packed, row_of, cut.q_pos, mask, group_size, table, kv_len)
            if mask.score_mod is not None:
                score_mod = keys.physical_score(of_queries(mask.score_mod, cut.q_pos, group_size), row_of)
            query_rows = cut.tokens.clamp(min=0)[:, None, :, None] * num_heads + heads  # [tiles, K, L, G]
            numbers = num_rows + torch.arange(query_rows.numel(), device=device).view(query_rows.shape)
            output_rows.append(numbers.transpose(1, 2).reshape(-1, num_heads))
            num_rows += query_rows.numel()
            options = layout.kernel_options.get(block_mask.BLOCK_SIZE[0])
            tiles.append(Tiles(query_rows.flatten(2), block_mask, score_mod, options, pages))
        return cls(tuple(tiles), torch.cat(output_rows)[queries.places])

    @classmethod
    def of_packed(cls, packed: PackedDecodes, chunks: list[Chunk], layout: TileLayout) -> "TiledQueries":
        """Build the tiles of packed decodes. Chunks in none of the tiles are padding. Their output is undefined."""
        positions, rows = np.array([(chunk.start, chunk.sequence.row) for chunk in chunks]).T
        *arrays, _ = in_tiles([packed.members], positions, rows)
        arrays.append(np.where(packed.members < 0, 0, rows[packed.members]).astype(np.int32))  # a row for each query
        queries = InTiles.of(*upload(arrays, layout.tables[0].table.device))
        return cls.build(queries, layout.packed_mask, 0, layout, packed)


@dataclass(frozen=True)
class StepBatch:
    """One step as the model and its attention layers receive it. Complete when built, and never changed."""

    vectors: StepVectors
    slots: tuple[Tensor, ...]  # [T] int64 slot of each token, by the index of the mask
    queries: tuple[TiledQueries, ...]  # by the index of the mask
    end_queries: TiledQueries | None  # for the logits indices, the only queries of a pruned last layer

    @classmethod
    def build(
        cls, vectors: StepVectors, width: int, layout: TileLayout, packed: TiledQueries | None = None
    ) -> "StepBatch":
        """Build the step from its vectors, with torch operations only, so that a compiled graph can contain them.

        `width`: logical pages up to the last position, or more. `packed`: the queries of decodes in packed tiles.
        """
        # Padding writes to slot 0, or to slot 1 if sinks need slot 0 for a value of zeros.
        slots = tuple(table.slots(vectors.rows, vectors.positions).clamp(min=layout.sinks) for table in layout.tables)
        given = {} if packed is None else {layout.packed_mask: packed}
        all_masks = range(len(layout.masks))
        queries = [given.get(i) or TiledQueries.build(vectors.queries, i, width, layout) for i in all_masks]
        end_queries = None if layout.last_mask is None else queries[layout.last_mask]
        if vectors.end_queries is not None:
            end_queries = TiledQueries.build(vectors.end_queries, layout.last_mask, width, layout)
        return cls(vectors, slots, tuple(queries), end_queries)


def num_pages(chunks: list[Chunk], page_size: int) -> int:
    """Return the number of logical pages up to the last position of a step."""
    return cdiv(max(chunk.start + chunk.length for chunk in chunks), page_size)


def pack_decodes(chunks: list[Chunk], layout: TileLayout) -> PackedDecodes | None:
    """Return how the decodes of a step share tiles, for a layout with a `cascade`; None if they should not."""
    if any(chunk.length > 1 for chunk in chunks):
        return None
    rows, positions = np.array([(chunk.sequence.row, chunk.start) for chunk in chunks]).T
    index = layout.packed_mask
    return pack(rows, positions, layout.masks[index], layout.tables[index], layout.cascade)


def cut_into_tiles(lengths: np.ndarray, positions: np.ndarray, layout: TileLayout) -> list[np.ndarray]:
    """Cut chunks of the given lengths [C] into tiles. Returns the tokens [tiles, L] of each call of FlexAttention.

    `positions` [T]: the position of each token.
    """
    firsts = np.cumsum(lengths) - lengths  # [C] index of the first token of each chunk
    pages = positions[firsts + lengths - 1] // layout.tables[0].page_size + 1  # [C] that a chunk may visit
    kind_of_chunk = np.array([layout.kind_index(length) for length in lengths])
    calls = []
    for index in np.unique(kind_of_chunk):
        chosen = kind_of_chunk == index
        calls += _cut(layout.kinds[index], firsts[chosen], lengths[chosen], pages[chosen])
    return calls


def _cut(kind: TileKind, firsts: np.ndarray, lengths: np.ndarray, pages: np.ndarray) -> list[np.ndarray]:
    """Cut chunks, given by the index of the first token, the length and the pages, into tiles of one kind."""
    tiles_per_chunk = cdiv(lengths, kind.tile_len)
    num_tiles = tiles_per_chunk.sum()
    chunk = np.repeat(np.arange(len(lengths)), tiles_per_chunk)  # [tiles] chunk of each tile
    number = np.arange(num_tiles) - np.repeat(np.cumsum(tiles_per_chunk) - tiles_per_chunk, tiles_per_chunk)
    offset = number[:, None] * kind.tile_len + np.arange(kind.tile_len)  # [tiles, L] within the chunk
    tokens = np.where(offset < lengths[chunk, None], firsts[chunk, None] + offset, -1)
    calls = []
    for of_call in np.split(tokens, calls_of(kind, pages[chunk], number == 0)):
        padding = 0 if kind.num_tiles is None else kind.num_tiles - len(of_call)
        padded = np.pad(of_call, ((0, padding), (0, 0)), constant_values=-1)
        calls.append(np.concatenate([padded[hand :: kind.num_hands] for hand in range(kind.num_hands)]))
    return calls


def in_tiles(tiles: list[np.ndarray], positions: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Return the arrays of `InTiles`, given the tokens of each call, and position and row of each token [T].

    The place of a token in none of the tiles is 0.
    """
    every = np.concatenate([tokens.ravel() for tokens in tiles])
    used = np.flatnonzero(every >= 0)
    places = np.zeros(len(positions), dtype=np.int64)
    places[every[used]] = used
    arrays = [places]
    for tokens in tiles:
        q_pos, first = np.where(tokens < 0, -1, positions[tokens]), tokens[:, 0]
        arrays += [tokens, q_pos.astype(np.int32), np.where(first < 0, 0, rows[first]).astype(np.int32)]
    return arrays


def _row_of(rows: Tensor, group_size: int) -> RowOf:
    """Return the function that gives the page-table row of a query, for `rows` of a `Cut`."""
    return (lambda tile, q: rows[tile]) if rows.ndim == 1 else (lambda tile, q: rows[tile, q // group_size])


def logical_block_mask(q_pos: Tensor, mask: LayerMask, group_size: int, page_size: int, width: int) -> BlockMask:
    """Return the mask of a step in logical positions: the logical pages of each tile, and the mask_mod of the layer.

    The lists of pages follow from the first and the last position of each tile. `create_block_mask` would evaluate the
    mask for every query and every slot of the pool.

    Args:
        q_pos: [tiles, L] int32, position of each query in its sequence; -1 for padding, which sees nothing.
        mask: the mask of the layer.
        group_size: G; a tile has L * G query rows, G consecutive ones for each token.
        width: logical pages up to the last position, or more.
    """
    tile_len = q_pos.shape[1]
    first, last = q_pos[:, 0], q_pos.amax(dim=1)  # [tiles]; -1 for padding, which needs no pages
    if mask.window is not None:
        width = min(width, cdiv(mask.window - 1 + tile_len, page_size) + 1)
    last_end = last // page_size + 1
    full_begin, full_end = mask.full_pages(first, last, page_size)
    full_end = torch.minimum(torch.maximum(full_begin, full_end), last_end)
    partial, previous_end = [], torch.zeros_like(first)
    for begin, end in mask.visible_pages(first, last, page_size):
        begin, end = torch.maximum(begin, previous_end), torch.minimum(end, last_end)  # ranges may overlap
        partial += [(begin, torch.minimum(end, full_begin)), (torch.maximum(begin, full_end), end)]
        previous_end = torch.maximum(previous_end, end)
    block_size = tile_len * group_size, page_size
    mask_mod = of_queries(mask.mask_mod, q_pos, group_size)
    full = [(full_begin, full_end)]
    return mask_of_tiles(_listed(partial, width), _listed(full, width), block_size, mask_mod, width * page_size)


def _listed(ranges: list[Pages], width: int) -> PageList:
    """Return the number of pages in ascending ranges, [tiles], and their list, [tiles, width].

    The entries past the end of a list are undefined.
    """
    index = torch.arange(width, dtype=torch.int32, device=ranges[0][0].device)
    number, pages = torch.zeros_like(ranges[0][0]), index.expand(len(ranges[0][0]), width)
    for begin, end in ranges:
        pages = torch.where(index < number[:, None], pages, index - number[:, None] + begin[:, None])
        number = number + (end - begin).clamp(min=0)
    return number, pages
