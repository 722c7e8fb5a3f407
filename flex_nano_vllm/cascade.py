"""Cascade attention in one call: decodes that share pages read them together. Independent of queues and text.

Sequences with a common prefix share pages (`prefix_cache.py`). Without packing, every decode has a tile of its own,
which reads all pages of the decode. Here one packed tile holds several decodes, and reads each page once for all of
them:

    row 1   [ 3 1 | 7 ]
    row 2   [ 3 1 | 4 5 ]         a tile of all three:  full pages [ 1 3 ], partial pages [ 2 4 5 7 ]
    row 3   [ 3 1 | 2 ]

Full pages, which all sequences of a tile see completely, need no mask. On partial pages, `mask_mod` masks the slots of
pages that the query's own row does not use, as in all tiles. Therefore each query has one softmax over all of its keys,
and there are no partial results to merge. (Hydragen, arXiv:2402.05099, and FlashInfer compute prefix and rest
separately, and merge them by their log-sum-exp, which FlexAttention does not return on a CPU.) The cost: pages that are
not shared are read with all query rows of the tile. `pack` compares the saving with this cost.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.masks import layer_mask, of_queries
from flex_nano_vllm.page_table import PageTable, visible_pages, widen
from flex_nano_vllm.transfer import upload

# Decodes are packed if that saves at least this many visits of a page by one kv head of one decode. The host's work for
# packing costs about as much.
LEAST_SAVING = 200


@dataclass(frozen=True)
class CascadeRule:
    """When and how to pack decodes. The costs are measured: docs/log.md."""

    tile_len: int  # decodes per packed tile, at most
    num_tiles: int  # number of packed tiles that a step is padded to
    least_decodes: int  # fewest decodes of a step that are packed: fewer have little to save
    full_cost: float  # cost of one visit of a full page by a packed tile; a visit by a decode's own tile costs 1
    partial_cost: float  # cost of one visit of a partial page by a packed tile
    heads_per_processor: float  # kv heads per processor

    def cost(self, visits: np.ndarray) -> float:
        """Return the cost of tiles, given the visits (or their costs) of each tile.

        Tiles and heads are divided among the processors, but one head of one tile runs on one processor.
        """
        return max(visits.sum() * self.heads_per_processor, visits.max())

    def can_pay(self, num_decodes: int, num_pages: int) -> bool:
        """Return whether packing pays if all decodes share all pages."""
        together = np.full(cdiv(num_decodes, self.tile_len), self.full_cost * num_pages)
        return self.cost(np.full(num_decodes, num_pages)) - self.cost(together) >= LEAST_SAVING


@dataclass(frozen=True)
class PackedDecodes:
    """Decodes of a step in packed tiles, which read every page once."""

    members: np.ndarray  # [tiles, L] index of each decode in the step, -1 for padding
    partial: np.ndarray  # [tiles, P] bool, partial pages: seen, but not completely by all sequences of the tile
    full: np.ndarray  # [tiles, P] bool, full pages: all sequences of the tile see them completely

    @classmethod
    def empty(cls, tile_len: int, n_pages: int) -> "PackedDecodes":
        """Return one tile without decodes."""
        nothing = np.zeros((1, n_pages), dtype=bool)
        return cls(np.full((1, tile_len), -1), nothing, nothing)

    def padded(self, num_tiles: int) -> "PackedDecodes":
        """Return the tiles padded to `num_tiles` with empty ones."""
        more = ((0, num_tiles - len(self.members)), (0, 0))
        members = np.pad(self.members, more, constant_values=-1)
        return PackedDecodes(members, np.pad(self.partial, more), np.pad(self.full, more))


def pack(
    rows: np.ndarray, positions: np.ndarray, window: int | None, table: PageTable, rule: CascadeRule
) -> PackedDecodes | None:
    """Pack decodes that share pages into common tiles; returns None if that does not pay.

    Args:
        rows: [C], page-table rows of a step in which every chunk is one token.
        positions: [C], positions of these tokens.
        window: the window of the layers, None for full attention.
    """
    most = table.num_repeated_pages * max(1, rule.heads_per_processor)  # upper bound of the saving
    if len(rows) < rule.least_decodes or most < LEAST_SAVING:
        return None
    # Sort the page-table rows as strings of bytes, which puts rows with a common prefix side by side.
    width = positions.max() // table.page_size + 1
    pages_of_rows = np.ascontiguousarray(table.host_table[rows, :width])  # [C, width]
    order = np.argsort(pages_of_rows.view(f"V{4 * width}")[:, 0], kind="stable")
    members = np.full((cdiv(len(rows), rule.tile_len), rule.tile_len), -1)
    members.ravel()[: len(rows)] = order
    is_member = members >= 0
    position = np.where(is_member, positions[members], -1)[..., None]  # [tiles, L, 1]; -1: padding, sees nothing
    first, end, first_full, end_full = visible_pages(position, position, window, table.page_size)
    logical = np.arange(width)
    pages = pages_of_rows[members]  # [tiles, L, width]
    num_seeing = _count(pages, (first <= logical) & (logical < end), table.n_pages)
    num_seeing_all = _count(pages, (first_full <= logical) & (logical < end_full), table.n_pages)
    full = num_seeing_all == is_member.sum(axis=1, keepdims=True)
    partial = (num_seeing > 0) & ~full
    packed = rule.cost(rule.full_cost * full.sum(axis=1) + rule.partial_cost * partial.sum(axis=1))
    saving = rule.cost((end - first)[is_member]) - packed
    return PackedDecodes(members, partial, full) if saving >= LEAST_SAVING else None


def packed_block_mask(
    packed: PackedDecodes,
    rows: Tensor,
    q_pos: np.ndarray,
    window: int | None,
    group_size: int,
    table: PageTable,
    kv_len: int,
) -> BlockMask:
    """Return the physical block mask of packed decodes, in tiles of L * G query rows.

    Args:
        rows: [tiles, L] int32, page-table row of each decode; 0 for padding.
        q_pos: [tiles, L], position of each decode; -1 for padding.
        kv_len: slots of the pool that attention receives.
    """
    page_size, num_members = table.page_size, q_pos.shape[1]
    most = min(table.n_pages, num_members * table.max_pages_per_row)  # the most pages that a tile can need
    arrays = [*_lists(packed.partial, most), *_lists(packed.full, most), q_pos]
    num_partial, partial, num_full, full, q_pos = upload(arrays, table.table.device, np.int32)
    partial, full = (widen(pages, most, cdiv(kv_len, page_size)) for pages in (partial, full))

    def row_of(tile: Tensor, q_idx: Tensor) -> Tensor:
        return rows[tile, q_idx // group_size]

    q_block = num_members * group_size
    return BlockMask.from_kv_blocks(
        num_partial[:, None],  # [tiles, 1, 1]
        partial[:, None, None],  # [tiles, 1, 1, >= kv_len / page_size]
        num_full[:, None],
        full[:, None, None],
        BLOCK_SIZE=(q_block, page_size),
        mask_mod=table.physical_mask(of_queries(layer_mask(window), q_pos, group_size), row_of),
        seq_lengths=(q_block, kv_len),
        compute_q_blocks=False,
    )


def _count(pages: np.ndarray, chosen: np.ndarray, n_pages: int) -> np.ndarray:
    """Count how many sequences of a tile have chosen each page of the pool: [tiles, L, width] to [tiles, P]."""
    tiles = np.arange(len(pages))[:, None, None]
    return np.bincount((tiles * n_pages + pages)[chosen], minlength=len(pages) * n_pages).reshape(-1, n_pages)


def _lists(chosen: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the chosen pages of each tile: their number, [tiles, 1], and their list, [tiles, width], padded with 0."""
    counts = chosen.sum(axis=1, keepdims=True)
    tiles, pages = np.nonzero(chosen)
    lists = np.zeros((len(chosen), width), dtype=np.int32)
    lists[tiles, np.arange(len(tiles)) - (np.cumsum(counts) - counts.ravel())[tiles]] = pages
    return counts, lists
