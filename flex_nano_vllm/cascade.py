"""Decodes that share pages read them together: cascade attention, in one call. Knows no queues and no text.

Requests that begin alike hold the same pages (`prefix_cache.py`). Cut as usual, every decode is a tile of its own and
reads all of its pages. Here several decodes ride in one tile, which reads a page once for all of them:

    row 1   [ 3 1 | 7 ]
    row 2   [ 3 1 | 4 5 ]         a tile of all three:  sees whole [ 1 3 ], some of [ 2 4 5 7 ]
    row 3   [ 3 1 | 2 ]

The pages that all of a tile's sequences see whole need no mask; on the others `mask_mod` masks what is not of the
query's own row, as ever. So there is one softmax over everything that a query sees, and nothing to merge. (Hydragen,
arXiv:2402.05099, and FlashInfer compute prefix and rest apart and merge them by their log-sum-exp, which FlexAttention
does not return on a CPU.) The price: what is not shared is read with all rows of the tile. `pack` weighs both.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.masks import layer_mask, of_queries
from flex_nano_vllm.page_table import PageTable, visible_pages, widen
from flex_nano_vllm.transfer import upload

# What must be saved, counted in visits of a page by one kv head of one decode: the host's work for it.
LEAST_SAVING = 200


@dataclass(frozen=True)
class CascadeRule:
    """When to pack decodes, and how. The costs are measured: docs/log.md."""

    tile_len: int  # decodes in a tile
    num_tiles: int  # that a step is padded to
    least_decodes: int  # in a step: few of them have little to save
    full_cost: float  # of a packed tile's visit of a page that it sees whole; one of a decode alone costs 1
    partial_cost: float  # where a mask decides
    heads_per_processor: float  # kv heads

    def cost(self, visits: np.ndarray) -> float:
        """Of tiles with so many visits each. Tiles and heads are shared out among the processors, but one head of one
        tile is the work of one processor."""
        return max(visits.sum() * self.heads_per_processor, visits.max())

    def can_pay(self, num_decodes: int, num_pages: int) -> bool:
        """Whether it would if all of the pages were shared by all."""
        together = np.full(cdiv(num_decodes, self.tile_len), self.full_cost * num_pages)
        return self.cost(np.full(num_decodes, num_pages)) - self.cost(together) >= LEAST_SAVING


@dataclass(frozen=True)
class PackedDecodes:
    """Decodes of a step in tiles that read every page once."""

    members: np.ndarray  # [tiles, L] which of the decodes, -1 where there is none
    partial: np.ndarray  # [tiles, P] bool, the pages of which the tile's sequences see something,
    full: np.ndarray  # [tiles, P] bool, and those that all of them see whole

    @classmethod
    def empty(cls, tile_len: int, n_pages: int) -> "PackedDecodes":
        """A tile with nobody in it."""
        nothing = np.zeros((1, n_pages), dtype=bool)
        return cls(np.full((1, tile_len), -1), nothing, nothing)

    def padded(self, num_tiles: int) -> "PackedDecodes":
        """As many tiles, the last ones empty."""
        more = ((0, num_tiles - len(self.members)), (0, 0))
        members = np.pad(self.members, more, constant_values=-1)
        return PackedDecodes(members, np.pad(self.partial, more), np.pad(self.full, more))


def pack(
    rows: np.ndarray, positions: np.ndarray, window: int | None, table: PageTable, rule: CascadeRule
) -> PackedDecodes | None:
    """Put decodes that share pages side by side; None where that does not pay.

    Args:
        rows: [C], of the page table, of a step in which every chunk is one token.
        positions: [C], of these.
        window: of the layers, None for full attention.
    """
    most = table.num_repeated_pages * max(1, rule.heads_per_processor)  # that can be saved
    if len(rows) < rule.least_decodes or most < LEAST_SAVING:
        return None
    # Rows that begin alike are the same bytes, and lie side by side when these are sorted.
    order = np.argsort(table.host_table[rows].view(f"V{4 * table.max_pages_per_row}")[:, 0], kind="stable")
    members = np.full((cdiv(len(rows), rule.tile_len), rule.tile_len), -1)
    members.ravel()[: len(rows)] = order
    is_member = members >= 0
    position = np.where(is_member, positions[members], -1)[..., None]  # [tiles, L, 1], of nobody -1: sees nothing
    first, end, first_full, end_full = visible_pages(position, position, window, table.page_size)
    logical = np.arange(table.max_pages_per_row)
    pages = table.host_table[rows[members]]  # [tiles, L, N]
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
    """The physical mask of packed decodes, in tiles of L * G rows.

    Args:
        rows: [tiles, L] int32, of each decode in the page table; 0 where there is none.
        q_pos: [tiles, L], its position; -1 where there is none.
        kv_len: slots of the pool that attention is handed.
    """
    page_size, num_members = table.page_size, q_pos.shape[1]
    most = min(table.n_pages, num_members * table.max_pages_per_row)  # pages that a tile can need
    arrays = [*_lists(packed.partial, most), *_lists(packed.full, most), q_pos]
    num_partial, partial, num_full, full, q_pos = upload(arrays, table.table.device, np.int32)
    partial, full = (widen(pages, cdiv(kv_len, page_size)) for pages in (partial, full))

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
    """How many of a tile's sequences have chosen each page of the pool: [tiles, L, N] to [tiles, P]."""
    tiles = np.arange(len(pages))[:, None, None]
    return np.bincount((tiles * n_pages + pages)[chosen], minlength=len(pages) * n_pages).reshape(-1, n_pages)


def _lists(chosen: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns chosen in each line: how many, [tiles, 1], and which, [tiles, width] with 0 past the end."""
    counts = chosen.sum(axis=1, keepdims=True)
    tiles, pages = np.nonzero(chosen)
    lists = np.zeros((len(chosen), width), dtype=np.int32)
    lists[tiles, np.arange(len(tiles)) - (np.cumsum(counts) - counts.ravel())[tiles]] = pages
    return counts, lists
