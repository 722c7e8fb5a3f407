"""Gathered pages: attention of prompts receives a copy of the pages that it visits. Independent of queues and text.

FlexAttention's CPU kernel uses the bfloat16 instructions of a CPU only for keys and values that it has packed, and it
packs everything that it receives. For a whole pool, packing would take longer than attention itself. So a call for the
tiles of prompts receives only the pages that its tiles visit, copied side by side:

    page table                        pages of a call          its `PageMap`: places in the copy
    row 1 [ 3 1 6 ]                   [ 3 1 6 | 5 2 | · · ]    row 1 [ 0 1 2 ]
    row 2 [ 5 2 ]                                              row 2 [ 3 4 ]

The masks are those of the pool, rewritten by the same functions. The number of pages is padded to one of a few buckets,
so that the compiled kernels get only a few shapes.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from flex_nano_vllm.device import TileKind, uses_bfloat16
from flex_nano_vllm.masks import LayerMask
from flex_nano_vllm.page_table import PageMap, PageTable

# Padding is copied and packed too, so short prompts have a bucket of their own.
PAGE_BUCKETS = (4, 16, 64, 256, 1024, 4096)


def page_buckets(
    device: torch.device, dtype: torch.dtype, page_size: int, max_pages_per_row: int, sinks: bool
) -> tuple[int, ...]:
    """Return the numbers of pages that calls receive, the largest for the longest row; () if nothing is gathered.

    Torch's kernel reads packed values of pages with an odd number of tokens from wrong places. Attention sinks are in
    page 0, which the copy does not have.
    """
    packs = uses_bfloat16(device, dtype) and torch.__version__ < "2.16.dev0"  # see `compiling.REPLACEMENTS`
    if sinks or page_size % 2 or not packs:
        return ()
    return *itertools.takewhile(lambda bucket: bucket < max_pages_per_row, PAGE_BUCKETS), max_pages_per_row


def calls_of(kind: TileKind, pages: np.ndarray, is_first: np.ndarray) -> list[int]:
    """Divide tiles among calls of FlexAttention. Returns the first tile of each call but the first.

    A call has at most `num_tiles` tiles. If its pages are gathered, it has tiles of one chunk, or of several whose
    pages fit into the second bucket.

    Args:
        pages: [tiles], pages that the chunk of each tile may visit.
        is_first: [tiles] bool, whether a tile is the first of its chunk.
    """
    begins, most_pages, num_pages = [0], max(kind.page_buckets[:2], default=math.inf), 0
    for tile, (of_chunk, begins_chunk) in enumerate(zip(pages.tolist(), is_first.tolist())):
        num_pages += of_chunk * begins_chunk
        if tile - begins[-1] == kind.num_tiles or (begins_chunk and num_pages > most_pages and tile > 0):
            begins.append(tile)
            num_pages = of_chunk
    return begins[1:]


def gather(
    table: PageTable, mask: LayerMask, q_pos: Tensor, rows: Tensor, buckets: tuple[int, ...]
) -> tuple[PageMap, Tensor]:
    """Choose the pages that tiles visit, row by row in logical order.

    Args:
        mask: the mask of the layers.
        q_pos: [tiles, L] int32, position of each query in its sequence; -1 for padding.
        rows: [tiles] int32, the page-table row of each tile; row 0 for padding.
        buckets: the number of pages is padded to one of these.
    Returns:
        Where the pages of each row lie in the copy, and the physical pages to copy, [N] int32.
    """
    begin, _ = mask.visible_pages(q_pos[:, 0], last := q_pos.amax(dim=1), table.page_size)[0]
    logical = torch.arange(table.max_pages_per_row, dtype=torch.int32, device=rows.device)
    begin = torch.where(last < 0, len(logical), begin.int())  # padding visits nothing
    begins = torch.full_like(table.table[:, 0], len(logical)).scatter_reduce(0, rows.long(), begin, "amin")
    ends = torch.zeros_like(begins).scatter_reduce(0, rows.long(), last // table.page_size + 1, "amax")
    row, page = ((begins[:, None] <= logical) & (logical < ends[:, None])).nonzero().unbind(dim=1)
    places = torch.arange(len(row), dtype=torch.int32, device=rows.device)
    num_pages = next(bucket for bucket in buckets if bucket >= len(row))
    forward, inverse = torch.zeros_like(table.table), table.table.new_full((len(begins), num_pages), -1)
    forward[row, page], inverse[row, places] = places, page.int()
    return PageMap(table.page_size, forward, inverse), pad(table.table[row, page], (0, num_pages - len(row)))
