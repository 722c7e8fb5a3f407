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
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flex_nano_vllm.device import num_processors, packed_tiles, upload
from flex_nano_vllm.geometry import Geometry, cdiv
from flex_nano_vllm.masks import LayerMask, of_queries
from flex_nano_vllm.page_table import PageTable, RowOf, mask_of_tiles, widen

# Decodes are packed if that saves at least this many visits of a page by one kv head of one decode. The host's work for
# packing costs about as much.
LEAST_SAVING = 200


@dataclass(frozen=True)
class CascadeRule:
    """When and how to pack decodes. The costs on CPUs are measured: docs/log.md."""

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
        packed = np.full(cdiv(num_decodes, self.tile_len), self.full_cost * num_pages)
        return self.cost(np.full(num_decodes, num_pages)) - self.cost(packed) >= LEAST_SAVING


def cascade_rule(num_kv_heads: int, group_size: int, geometry: Geometry, device: torch.device) -> CascadeRule | None:
    """Return the rule for packed tiles; None if they can never be faster.

    Packed tiles are for steps with more than half of the largest number of decodes.
    """
    tile_len, *costs = packed_tiles(group_size, device.type)
    max_decodes = min(geometry.max_batch_size, geometry.max_num_batched_tokens)
    num_tiles = max(2, cdiv(max_decodes, tile_len))
    rule = CascadeRule(tile_len, num_tiles, cdiv(max_decodes, 2) + 1, *costs, num_kv_heads / num_processors(device))
    return rule if rule.can_pay(max_decodes, geometry.max_pages_per_row) else None


@dataclass(frozen=True)
class PackedDecodes:
    """Decodes of a step in packed tiles, which read every page once."""

    members: np.ndarray  # [tiles, L] index of each decode in the step, -1 for padding
    pages: np.ndarray  # [tiles, L * N] physical pages of all members
    partial: np.ndarray  # [tiles, L * N] bool, which pages to visit as partial: not all decodes see them completely
    full: np.ndarray  # [tiles, L * N] bool, which pages to visit as full: all decodes of the tile see them completely

    @classmethod
    def empty(cls, rule: CascadeRule) -> "PackedDecodes":
        """Return tiles without decodes."""
        nothing = np.zeros((rule.num_tiles, 1), dtype=bool)
        return cls(np.full((rule.num_tiles, rule.tile_len), -1), nothing.astype(np.int32), nothing, nothing)


def pack(
    rows: np.ndarray, positions: np.ndarray, mask: LayerMask, table: PageTable, rule: CascadeRule
) -> PackedDecodes | None:
    """Pack decodes that share pages into common tiles; returns None if that does not pay.

    Args:
        rows: [C], page-table rows of a step in which every chunk is one token.
        positions: [C], positions of these tokens.
        mask: the mask of the layers.
    """
    max_saving = table.num_repeated_pages * max(1, rule.heads_per_processor)  # upper bound of the saving
    if len(rows) < rule.least_decodes or max_saving < LEAST_SAVING:
        return None
    # Sort the page-table rows as strings of bytes, which puts rows with a common prefix side by side.
    width = positions.max() // table.page_size + 1
    pages_of_rows = np.ascontiguousarray(table.host_table[rows, :width])  # [C, width]
    order = np.argsort(pages_of_rows.view(f"V{4 * width}")[:, 0], kind="stable")
    members = np.full((rule.num_tiles, rule.tile_len), -1)
    members.ravel()[: len(rows)] = order
    pages = pages_of_rows[members]  # [tiles, L, width]; a page is in the same column of every row that lists it
    seen, full = _seen_pages(mask, np.where(members >= 0, positions[members], -1), table.page_size, width)
    repeated = np.zeros_like(seen)  # pages that an earlier member of the tile sees too
    for later in range(1, rule.tile_len):
        same = seen[:, :later] & (pages[:, :later] == pages[:, later : later + 1])
        repeated[:, later] = same.any(axis=1)
    by_all = ((full & (pages == pages[:, :1])) | (members < 0)[:, :, None]).all(axis=1, keepdims=True)
    first = np.arange(rule.tile_len)[:, None] == 0
    full, partial = by_all & first & seen, seen & ~repeated & ~by_all
    packed = rule.cost(rule.full_cost * full.sum(axis=(1, 2)) + rule.partial_cost * partial.sum(axis=(1, 2)))
    saving = rule.cost(seen.sum(axis=2)[members >= 0]) - packed
    if saving < LEAST_SAVING:
        return None
    return PackedDecodes(members, *(array.reshape(len(members), -1) for array in (pages, partial, full)))


def packed_block_mask(
    packed: PackedDecodes, row_of: RowOf, q_pos: Tensor, mask: LayerMask, group_size: int, table: PageTable, kv_len: int
) -> BlockMask:
    """Return the physical block mask of packed decodes, in tiles of L * G query rows.

    Args:
        row_of: the page-table row of each query.
        q_pos: [tiles, L] int32, position of each decode; -1 for padding.
        kv_len: slots of the pool that attention receives.
    """
    page_size, num_members = table.page_size, q_pos.shape[1]
    max_pages = min(table.n_pages, num_members * table.max_pages_per_row)  # the most pages that a tile can need
    lists = [*_lists(packed.pages, packed.partial), *_lists(packed.pages, packed.full)]
    num_partial, partial, num_full, full = upload(lists, table.table.device, np.int32)
    partial, full = (widen(pages, max_pages, cdiv(kv_len, page_size)) for pages in (partial, full))
    mask_mod = table.physical_mask(of_queries(mask.mask_mod, q_pos, group_size), row_of)
    block_size = num_members * group_size, page_size
    return mask_of_tiles((num_partial, partial), (num_full, full), block_size, mask_mod, kv_len)


def _seen_pages(mask: LayerMask, positions: np.ndarray, page_size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which logical pages queries see at least partly, and which completely: [..., width] bool each."""
    position, page = torch.from_numpy(positions)[..., None], torch.arange(width)
    seen = torch.zeros(*positions.shape, width, dtype=torch.bool)
    for begin, end in mask.visible_pages(position, position, page_size):
        seen |= (begin <= page) & (page < end)
    begin, end = mask.full_pages(position, position, page_size)
    return (seen & (page * page_size <= position)).numpy(), (seen & (begin <= page) & (page < end)).numpy()


def _lists(pages: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the chosen pages of each tile: their number, [tiles], and their list, [tiles, width], padded."""
    counts = chosen.sum(axis=1)
    first = np.argsort(~chosen, axis=1, kind="stable")[:, : counts.max()]
    return counts, np.take_along_axis(pages, first, axis=1)
