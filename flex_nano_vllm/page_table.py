"""The page table: which page of a KV pool holds which tokens of which row. Independent of text and scheduling.

A pool has `n_pages` pages of `page_size` slots. A running sequence has one *row* of the table. The row lists the pages
of the sequence in logical order:

    page_size = 4                     logical page   0  1  2
    row 2 holds 10 tokens             page table  [  3, 1, 6 ]     physical page of each logical page
                                      inverse     1 -> 1   3 -> 0   6 -> 2     (-1 for pages of other rows)

    token 5 of row 2 is on logical page 5 // 4 = 1, hence on physical page 1, at offset 5 % 4 = 1:
    its slot in the pool is 1 * 4 + 1 = 5. Token 9 is on page 6, at offset 1, in slot 25.

Row 0 and page 0 are reserved for padding. Unmapped entries of the table point at page 0. Therefore padding reads and
writes only page 0, and no index is ever negative.

The life of a page:

          reserve                       cache_page
    free ─────────► in use by one row ─────────────► cached, in use by some rows
     ▲                     │                            │ ▲
     ├─────────────────────┘                    no user │ │ share
     │                                                  ▼ │
     └───────────────────────────────────────────── evictable
                            evict

A page is cached when all its tokens are computed. Only then do other rows share it, and only read it. A row that is
erased, or whose window has passed the page (`release_before`), stops using it. An evictable page is a cached page that
no row uses. Free and evictable pages are *available*. If `reserve` needs a page and none is free, the first page in the
queue of evictable pages is evicted. A page joins the end of the queue, so this is the page that has been evictable for
the longest time, except that `release_before` puts pages at the front.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from flex_nano_vllm.device import upload
from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.masks import MaskMod, ScoreMod
from flex_nano_vllm.prefix_cache import CachedPage

RowOf = Callable[[Tensor, Tensor], Tensor]  # (tile, q_idx) -> page-table row of a query
# Number of pages of each tile, [tiles], and the pages, [tiles, N]. Entries past the number are undefined.
PageList = tuple[Tensor, Tensor]


class PageMap:
    """Says where the pages of rows lie: in a KV pool, or in a copy of some pages of it (`gather.py`).

    Args:
        page_size: tokens per page.
        table: [rows, N] int32, physical page of each logical page; 0 where unmapped.
        physical_to_logical: [rows, P] int32, logical page of each physical page; -1 if the row does not use the page.
    """

    def __init__(self, page_size: int, table: Tensor, physical_to_logical: Tensor):
        self.page_size, self.table, self.physical_to_logical = page_size, table, physical_to_logical
        self.n_pages = physical_to_logical.shape[1]

    def convert_logical_block_mask(
        self, block_mask: BlockMask, rows: Tensor, kv_len: int, sinks: bool = False
    ) -> BlockMask:
        """Rewrite a mask over logical positions into one over slots, of the pool or of a copy.

        A logical mask has one batch entry per *tile*, and every tile belongs to one sequence. The KV blocks of the tile
        are the logical pages of that sequence. `mask_mod(tile, h, q_idx, kv_pos)` takes logical KV positions. Only two
        things change:

            logical                                         physical
            kv_indices   [0 1 2 · ·]  tile of row 2  ──►    [3 1 6 · ·]    table[row, logical page]
                         [0 · · · ·]  tile of row 1  ──►    [5 · · · ·]
            mask_mod     (q_idx, kv_pos)             ──►    (q_idx, slot)  slot -> page -> logical page -> kv_pos

        Two things isolate requests from each other. A compiled kernel visits only the listed pages, and all of them are
        pages of the tile's own row. On full pages this is the only protection, because `mask_mod` does not run there.
        Everywhere else the physical mask_mod masks every slot on a page that the row does not use (`kv_pos >= 0` in
        `physical_mask`). Uncompiled FlexAttention evaluates every slot, and relies on that alone. Keys that an earlier
        user of a page has left behind are at positions after the query, where no logical mask sees them.

        Entries of `kv_indices` past `kv_num_blocks` are never visited. They are clamped to the table, so that no index
        is out of bounds.

        Args:
            block_mask: logical; `kv_indices` [tiles, 1, 1, N] with N logical pages, blocks of (query rows, page_size).
            rows: [tiles] int32, the page-table row of each tile; row 0 for padding, which sees nothing.
            kv_len: slots that attention receives: all of the pool or of the copy, or the used part of the pool.
            sinks: every query also sees slot 0, see `masks.with_sinks`.
        Returns:
            The physical BlockMask: `kv_indices` [tiles, 1, 1, >= kv_len / page_size], with equal blocks.
        """

        def physical(number: Tensor, logical: Tensor, zeros: int = 0) -> PageList:  # [tiles, 1, 1], [tiles, 1, 1, <= N]
            existing = logical[:, 0, 0].clamp(max=self.table.shape[1] - 1)
            pages = pad(self.table[rows[:, None], existing], (zeros, 0))
            return number[:, 0, 0] + zeros, widen(pages, self.table.shape[1] + sinks, cdiv(kv_len, self.page_size))

        partial = physical(block_mask.kv_num_blocks, block_mask.kv_indices, int(sinks))
        full = physical(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        mask_mod = self.physical_mask(block_mask.mask_mod, lambda tile, q_idx: rows[tile], sinks)
        return mask_of_tiles(partial, full, block_mask.BLOCK_SIZE, mask_mod, kv_len)

    def physical_mask(self, logical_mask: MaskMod, row_of: RowOf, sinks: bool = False) -> MaskMod:
        """Rewrite a mask_mod(tile, h, q_idx, kv_pos) into one over the slots of the pool or of a copy.

        `row_of(tile, q_idx)` returns the page-table row of a query. Slots on pages that this row does not use are
        masked.
        """
        position_of = self._position_of()

        def physical_mask(tile: Tensor, h: Tensor, q_idx: Tensor, slot: Tensor) -> Tensor:
            kv_pos = position_of(row_of(tile, q_idx), slot)
            visible = (kv_pos >= 0) & logical_mask(tile, h, q_idx, kv_pos)
            return visible | (slot == 0) if sinks else visible

        return physical_mask

    def physical_score(self, logical_score: ScoreMod, row_of: RowOf) -> ScoreMod:
        """Rewrite a score_mod(score, tile, h, q_idx, kv_pos) into one over slots. Masked slots get any score."""
        position_of = self._position_of()

        def physical_score(score: Tensor, tile: Tensor, h: Tensor, q_idx: Tensor, slot: Tensor) -> Tensor:
            return logical_score(score, tile, h, q_idx, position_of(row_of(tile, q_idx), slot))

        return physical_score

    def _position_of(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function (row, slot) -> position of the key in `row`; negative if `row` does not use its page."""
        page_size, physical_to_logical = self.page_size, self.physical_to_logical
        if page_size & (page_size - 1):
            return lambda row, slot: physical_to_logical[row, slot // page_size] * page_size + slot % page_size
        shift = page_size.bit_length() - 1  # a power of two: vector instructions of the kernel have no integer division
        return lambda row, slot: physical_to_logical[row, slot >> shift] * page_size + (slot & (page_size - 1))


class PageTable(PageMap):
    """Owns the rows and pages of a pool, for the layers of one window.

    Invariants (see `check_invariants`):
    - Every page except page 0 is free, evictable, or listed by as many rows as its user count.
    - A row that holds `num_tokens` tokens has one page for each `page_size` of them. Pages at its beginning may be
      missing, if they were released because they are out of the window.
    - The two device tables are exact inverses.

    The host keeps its own lists and a numpy mirror of the table, so that scheduling never waits for the device.
    `sync()` uploads the changes to the device, once in each step.

    Args:
        n_pages: pages in the pool, including the reserved page 0.
        page_size: tokens per page.
        max_batch_size: rows, not counting row 0: the number of sequences that can hold pages at once.
        max_pages_per_row: length of the longest sequence, in pages.
        window: tokens that a query sees, including its own; None: all tokens before it.
    """

    def __init__(
        self,
        n_pages: int,
        page_size: int,
        max_batch_size: int,
        max_pages_per_row: int,
        device: torch.device | str = "cpu",
        window: int | None = None,
    ):
        self.window, self.max_batch_size, self.max_pages_per_row = window, max_batch_size, max_pages_per_row
        rows = max_batch_size + 1
        sizes = (rows, max_pages_per_row), (rows, n_pages)
        super().__init__(page_size, *(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))
        self.host_table = np.empty((rows, max_pages_per_row), dtype=np.int32)  # mirror of `table` on the host
        self.reset()

    def reset(self) -> None:
        """Free all rows and all pages, cached pages included."""
        # Heaps return the lowest number first, which keeps the used part of the pool compact.
        self._free_rows = list(range(1, self.max_batch_size + 1))
        self._free_pages = list(range(1, self.n_pages))
        self._num_users = [0] * self.n_pages
        self.cached: dict[int, CachedPage] = {}  # page -> its entry in the prefix cache
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached pages without users, next to evict first
        self._pages: dict[int, dict[int, int]] = {}  # row -> logical page -> physical page, ascending
        self._num_tokens: dict[int, int] = {}  # row -> number of tokens that pages were reserved for
        self.host_table.fill(0)
        self.table.fill_(0)
        self.physical_to_logical.fill_(-1)
        # Changes that are not uploaded yet. Dicts, because only the last change of an entry in a step counts.
        self._stale_table: dict[tuple[int, int], int] = {}  # (row, logical page) -> physical page
        self._stale_inverse: dict[tuple[int, int], int] = {}  # (row, physical page) -> logical page

    @property
    def num_usable_pages(self) -> int:
        return self.n_pages - 1

    @property
    def num_free_pages(self) -> int:
        """Number of available pages: free pages and evictable pages."""
        return len(self._free_pages) + len(self._evictable)

    @property
    def num_evictable_pages(self) -> int:
        return len(self._evictable)

    @property
    def num_used_pages(self) -> int:
        return self.num_usable_pages - self.num_free_pages

    @property
    def num_repeated_pages(self) -> int:
        """Number of pages saved by sharing: pages listed by all rows, minus pages in use."""
        return sum(map(len, self._pages.values())) - self.num_used_pages

    @property
    def num_live_pages(self) -> int:
        """Length of the used part of the pool: one more than the highest page in use."""
        return 1 + max((max(pages.values(), default=0) for pages in self._pages.values()), default=0)

    def pages_for(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self.page_size)

    def first_page(self, position: int) -> int:
        """Return the first logical page that a query at `position`, or any later query, sees at least partly."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page_size

    def num_pages(self, row: int) -> int:
        """Return how many pages `row` holds."""
        return len(self._pages[row])

    def allocate(self) -> int:
        """Allocate a free row. Raises RuntimeError if all `max_batch_size` rows are allocated."""
        if not self._free_rows:
            raise RuntimeError(f"all {self.max_batch_size} rows of the page table are allocated")
        row = heapq.heappop(self._free_rows)
        self._pages[row], self._num_tokens[row] = {}, 0
        return row

    def reserve(self, row: int, num_tokens: int) -> bool:
        """Reserve pages so that `row` can hold `num_tokens` tokens in total.

        Returns False, and changes nothing, if too few pages are available. Raises ValueError if the row is not
        allocated, or if the tokens need more pages than a row can list.
        """
        self._check_row(row)
        needed = self.pages_for(num_tokens)
        if needed > self.max_pages_per_row:
            raise ValueError(
                f"{num_tokens} tokens need {needed} pages of {self.page_size} tokens, "
                f"but a row can list at most {self.max_pages_per_row} pages"
            )
        new = range(self.pages_for(self._num_tokens[row]), needed)
        if len(new) > self.num_free_pages:
            return False
        for logical in new:
            self._map(row, logical, self._take_page())
        self._num_tokens[row] = max(self._num_tokens[row], num_tokens)
        return True

    def share(self, row: int, pages: list[int | None]) -> None:
        """Let an empty `row` begin with `pages`. They are full of tokens, and evictable or in use by other rows.

        An entry is None if the row does not need the page, because it is out of the window of all later queries.
        """
        self._check_row(row)
        for logical, page in enumerate(pages):
            if page is not None:
                self._evictable.pop(page, None)
                self._map(row, logical, page)
        self._num_tokens[row] = len(pages) * self.page_size

    def release_before(self, row: int, position: int) -> None:
        """Release the pages of `row` that no query at `position` or later sees.

        Pages that become evictable are put at the front of the queue for eviction, because a request that shares the
        whole sequence needs only its last window. Exceptions are pages with the `keep_hint`, see `CachedPage`.
        """
        pages, first_page = self._pages[row], self.first_page(position)
        while pages and (logical := next(iter(pages))) < first_page:
            page = pages.pop(logical)
            self._unmap(row, logical, page)
            if page in self._evictable and not self.cached[page].keep_hint:
                self._evictable.move_to_end(page, last=False)

    def erase(self, row: int) -> None:
        """Release the row and all its pages. Raises ValueError if the row is not allocated."""
        self._check_row(row)
        pages = self._pages.pop(row)
        # Last page first: a page is useless without the pages before it, so it should be evicted before them.
        for logical in reversed(pages):
            self._unmap(row, logical, pages[logical])
        del self._num_tokens[row]
        heapq.heappush(self._free_rows, row)

    def page(self, row: int, logical: int) -> int | None:
        """Return the physical page of a logical page; None if `row` does not hold it."""
        return self._pages[row].get(logical)

    def cache_page(self, page: int, entry: CachedPage) -> None:
        """Cache a page in use: without users it becomes evictable, not free. `entry.pages` has it until eviction."""
        self.cached[page] = entry
        entry.pages[self.window] = page

    def uncache_page(self, page: int) -> None:
        """Undo `cache_page`: an evictable page becomes free (it is evicted)."""
        del self.cached.pop(page).pages[self.window]
        if page in self._evictable:
            del self._evictable[page]
            heapq.heappush(self._free_pages, page)

    def _check_row(self, row: int) -> None:
        if row not in self._pages:
            raise ValueError(f"row {row} of the page table is not allocated")

    def _take_page(self) -> int:
        if self._free_pages:
            return heapq.heappop(self._free_pages)
        self.uncache_page(next(iter(self._evictable)))
        return heapq.heappop(self._free_pages)

    def _map(self, row: int, logical: int, page: int) -> None:
        self._pages[row][logical] = page
        self._num_users[page] += 1
        self._stale_table[row, logical] = self.host_table[row, logical] = page
        self._stale_inverse[row, page] = logical

    def _unmap(self, row: int, logical: int, page: int) -> None:
        self._stale_table[row, logical] = self.host_table[row, logical] = 0
        self._stale_inverse[row, page] = -1
        self._num_users[page] -= 1
        if self._num_users[page] == 0:
            if page in self.cached:
                self._evictable[page] = None
            else:
                heapq.heappush(self._free_pages, page)

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the slots in the pool of the tokens at `positions` of `rows` (both [T]; result [T] int64)."""
        pages = self.table[rows, positions // self.page_size]
        return pages.long() * self.page_size + positions % self.page_size

    def sync(self) -> None:
        """Upload all changes since the last call to the device tables."""
        for stale, table in ((self._stale_table, self.table), (self._stale_inverse, self.physical_to_logical)):
            if stale:
                changes = np.array([(*key, value) for key, value in stale.items()], dtype=np.int64)
                row, column, value = upload([changes], table.device)[0].unbind(dim=1)
                table[row, column] = value.to(table.dtype)
                stale.clear()


def mask_of_tiles(
    partial: PageList, full: PageList, block_size: tuple[int, int], mask_mod: MaskMod, kv_len: int
) -> BlockMask:
    """Return the mask of tiles. Each tile is a batch entry with one query block, and all heads have the same pages.

    Args:
        partial: the pages on which the kernel runs `mask_mod`.
        full: the pages that all queries of a tile see completely.
        block_size: query rows of a tile, and tokens per page.
        kv_len: slots, or logical positions, that the mask covers.
    """
    # Explicit strides, because inductor (seen in torch 2.15) gives the dimensions of size 1 of `n[:, None, None]` a
    # stride of 0, and the CUDA kernel multiplies the number of a tile by it: all tiles would visit as many pages as the
    # first one.
    partial, full = ((n.as_strided((len(n), 1, 1), (1, 1, 1)), lists[:, None, None]) for n, lists in (partial, full))
    sizes = dict(BLOCK_SIZE=block_size, seq_lengths=(block_size[0], kv_len))
    # Only the backward pass uses the transposed lists.
    return BlockMask.from_kv_blocks(*partial, *full, mask_mod=mask_mod, compute_q_blocks=False, **sizes)


def widen(pages: Tensor, stride: int, width: int) -> Tensor:
    """Return [tiles, narrow] as the first columns of [tiles, stride]; the other entries are undefined.

    The shape is the same in every step, as compiled kernels need it. FlexAttention's CPU template requires index lists
    that are as wide as the pool has pages, although it reads only the first `kv_num_blocks` entries of each list
    (torch/_inductor/kernel/flex/flex_cpu.py, 2.11 to 2.15). A view whose extra columns contain the entries of the next
    tiles satisfies this check, so that the cost of a step does not depend on the size of the pool.
    """
    tiles, narrow = pages.shape
    width = max(width, stride) if pages.device.type == "cpu" else stride
    storage = pages.new_empty(tiles * stride + width)
    storage[: tiles * stride].view(tiles, stride)[:, :narrow] = pages
    return storage.as_strided((tiles, width), (stride, 1))
