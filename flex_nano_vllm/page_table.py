"""Which page of the KV pool holds which tokens of which sequence. Knows nothing of text, policy or layers.

The pool is `n_pages` pages of `page_size` slots. A running sequence owns one *row* of the table, and the row
lists its pages in logical order:

    page_size = 4                     logical page   0  1  2
    row 2 holds 10 tokens             page table  [  3, 1, 6 ]     physical page of each logical page
                                      inverse     1 -> 1   3 -> 0   6 -> 2     (-1 for pages of other rows)

    token 5 of row 2 is on logical page 5 // 4 = 1, hence on physical page 1, at offset 5 % 4 = 1:
    its slot in the pool is 1 * 4 + 1 = 5. Token 9 lies on page 6, offset 1, slot 25.

Row 0 and page 0 belong to nobody. Unmapped entries of the table point at page 0, so that padding reads and
writes land in a harmless place and no index is ever negative.
"""

import heapq

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class PageTable:
    """Owns the rows, the pages, and the way from logical to physical.

    Invariant (`check_invariants`): every page but page 0 is either free or in exactly one row; a row that holds
    `num_tokens` tokens has exactly `ceil(num_tokens / page_size)` pages; the two device tables are exact inverses.

    The host decides: it keeps its own lists and a numpy mirror of the table, so that scheduling never waits for
    the device. What it decided reaches the device at the next `sync()`, once a step.

    Args:
        n_pages: pages in the pool, the reserved page 0 included.
        page_size: tokens per page.
        max_batch_size: rows, that is sequences that can hold pages at once; row 0 comes on top.
        max_pages_per_row: the longest sequence, in pages.
    """

    def __init__(
        self,
        n_pages: int,
        page_size: int,
        max_batch_size: int,
        max_pages_per_row: int,
        device: torch.device | str = "cpu",
    ):
        self.n_pages, self.page_size = n_pages, page_size
        self.max_batch_size, self.max_pages_per_row = max_batch_size, max_pages_per_row
        rows = max_batch_size + 1
        # [rows, N] physical page of a logical one, 0 where unmapped; and its mirror on the host
        self.table = torch.empty((rows, max_pages_per_row), dtype=torch.int32, device=device)
        self.host_table = np.empty((rows, max_pages_per_row), dtype=np.int32)
        # [rows, P] logical page of a physical one, -1 where the page is not of this row
        self.physical_to_logical = torch.empty((rows, n_pages), dtype=torch.int32, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget everything: all rows and pages are free."""
        # Heaps hand out the lowest number first, which keeps the used part of the pool compact.
        self._free_rows = list(range(1, self.max_batch_size + 1))
        self._free_pages = list(range(1, self.n_pages))
        self._pages: dict[int, list[int]] = {}  # row -> physical pages in logical order
        self._num_tokens: dict[int, int] = {}  # row -> tokens that its pages were reserved for
        self.host_table.fill(0)
        self.table.fill_(0)
        self.physical_to_logical.fill_(-1)
        # What the device does not know yet. Dicts: when a page changes hands twice in a step, the last word counts.
        self._stale_table: dict[tuple[int, int], int] = {}  # (row, logical page) -> physical page
        self._stale_inverse: dict[tuple[int, int], int] = {}  # (row, physical page) -> logical page

    @property
    def num_usable_pages(self) -> int:
        return self.n_pages - 1

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def num_used_pages(self) -> int:
        return self.num_usable_pages - self.num_free_pages

    @property
    def num_live_pages(self) -> int:
        """The length of the pool's used part: one more than the highest page in use."""
        return 1 + max((max(pages, default=0) for pages in self._pages.values()), default=0)

    def pages_for(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self.page_size)

    @property
    def allocated_rows(self) -> list[int]:
        return list(self._pages)

    def num_pages(self, row: int) -> int:
        """Pages that `row` holds."""
        return len(self._pages[row])

    def allocate(self) -> int:
        """Take a free row. Raises RuntimeError when all `max_batch_size` rows are taken."""
        if not self._free_rows:
            raise RuntimeError(f"all {self.max_batch_size} rows of the page table are taken")
        row = heapq.heappop(self._free_rows)
        self._pages[row], self._num_tokens[row] = [], 0
        return row

    def reserve(self, row: int, num_tokens: int) -> bool:
        """Let `row` hold `num_tokens` tokens (in all, not in addition).

        Returns False, and changes nothing, when too few pages are free. Raises ValueError for a row that is not
        allocated and for more tokens than a row can list.
        """
        if row not in self._pages:
            raise ValueError(f"row {row} of the page table is not allocated")
        pages = self._pages[row]
        needed = self.pages_for(num_tokens)
        if needed > self.max_pages_per_row:
            raise ValueError(
                f"{num_tokens} tokens are {needed} pages of {self.page_size}, "
                f"but a row lists at most {self.max_pages_per_row}"
            )
        if needed - len(pages) > len(self._free_pages):
            return False
        while len(pages) < needed:
            self._map(row, len(pages), heapq.heappop(self._free_pages))
        self._num_tokens[row] = max(self._num_tokens[row], num_tokens)
        return True

    def erase(self, row: int) -> None:
        """Give the row and all its pages back. Raises ValueError for a row that is not allocated."""
        if row not in self._pages:
            raise ValueError(f"row {row} of the page table is not allocated")
        for logical, page in enumerate(self._pages.pop(row)):
            self._stale_table[row, logical] = self.host_table[row, logical] = 0
            self._stale_inverse[row, page] = -1
            heapq.heappush(self._free_pages, page)
        del self._num_tokens[row]
        heapq.heappush(self._free_rows, row)

    def _map(self, row: int, logical: int, page: int) -> None:
        self._pages[row].append(page)
        self._stale_table[row, logical] = self.host_table[row, logical] = page
        self._stale_inverse[row, page] = logical

    def slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at `positions` of `rows` live in the pool (both [T]; result [T])."""
        return self.host_table[rows, positions // self.page_size] * self.page_size + positions % self.page_size

    def sync(self) -> None:
        """Bring the device tables up to date with what has changed since the last time."""
        for stale, table in ((self._stale_table, self.table), (self._stale_inverse, self.physical_to_logical)):
            if stale:
                changes = np.array([(*key, value) for key, value in stale.items()], dtype=np.int64)
                row, column, value = upload(changes, table.device).unbind(dim=1)
                table[row, column] = value.to(table.dtype)
                stale.clear()

    def convert_logical_block_mask(self, block_mask: BlockMask, rows: Tensor, kv_len: int) -> BlockMask:
        """Rewrite a mask over logical positions into one over the slots of the pool.

        A logical mask has one batch entry per *tile*, and every tile belongs to one sequence. Its KV blocks are
        that sequence's logical pages, its `mask_mod(tile, h, q_idx, kv_pos)` speaks of logical KV positions. Two
        things change, and nothing else:

            logical                                         physical
            kv_indices   [0 1 2 · ·]  tile of row 2  ──►    [3 1 6 · ·]    table[row, logical page]
                         [0 · · · ·]  tile of row 1  ──►    [5 · · · ·]
            mask_mod     (q_idx, kv_pos)             ──►    (q_idx, slot)  slot -> page -> logical page -> kv_pos

        The kernel visits only the pages in the list. The rewritten mask_mod is complete without it, though: a slot
        on a page that is not of the tile's own row is masked, whoever visits it. The uncompiled FlexAttention
        relies on that (it looks at every slot), and it makes the isolation of requests a property of one line.

        Entries of `kv_indices` past `kv_num_blocks` are never visited; whatever they hold is translated too, which
        is harmless, since unmapped logical pages point at page 0.

        Args:
            block_mask: logical; `kv_indices` [tiles, 1, 1, N] with N logical pages, blocks of (q rows, page_size).
            rows: [tiles] int32, the page-table row of each tile; row 0 for padding, which sees nothing.
            kv_len: slots of the pool that attention is handed: all of them, or the used part.
        Returns:
            The physical BlockMask: `kv_indices` [tiles, 1, 1, >= kv_len / page_size], same blocks.
        """
        page_size, physical_to_logical, logical_mask = self.page_size, self.physical_to_logical, block_mask.mask_mod
        if page_size & (page_size - 1):
            page_of, offset_of = (lambda slot: slot // page_size), (lambda slot: slot % page_size)
        else:  # a kernel's vectors know no division of integers
            shift = page_size.bit_length() - 1
            page_of, offset_of = (lambda slot: slot >> shift), (lambda slot: slot & (page_size - 1))

        def physical_mask(tile: Tensor, h: Tensor, q_idx: Tensor, slot: Tensor) -> Tensor:
            logical_page = physical_to_logical[rows[tile], page_of(slot)]
            kv_pos = logical_page * page_size + offset_of(slot)
            return (logical_page >= 0) & logical_mask(tile, h, q_idx, kv_pos)

        def physical_pages(logical_pages: Tensor) -> Tensor:  # [tiles, 1, 1, N]
            pages = self.table[rows[:, None], logical_pages[:, 0, 0]]
            return _widen(pages, cdiv(kv_len, page_size))[:, None, None]

        return BlockMask.from_kv_blocks(
            block_mask.kv_num_blocks,
            physical_pages(block_mask.kv_indices),
            block_mask.full_kv_num_blocks,
            physical_pages(block_mask.full_kv_indices),
            BLOCK_SIZE=block_mask.BLOCK_SIZE,
            mask_mod=physical_mask,
            seq_lengths=(block_mask.seq_lengths[0], kv_len),
            compute_q_blocks=False,  # the transposed lists serve the backward pass only
        )

    def check_invariants(self) -> None:
        """Recompute all bookkeeping from the rows' page lists and compare. Slow, and obviously right.

        Raises AssertionError that says what does not hold.
        """
        self.sync()
        owned = [page for pages in self._pages.values() for page in pages]
        assert 0 not in self._free_rows and 0 not in self._pages, "row 0 is free or in use"
        assert 0 not in self._free_pages and 0 not in owned, "page 0 is free or in use"
        rows = sorted([*self._free_rows, *self._pages])
        assert rows == list(range(1, self.max_batch_size + 1)), f"rows lost or doubled: {rows}"
        pages = sorted([*self._free_pages, *owned])
        assert pages == list(range(1, self.n_pages)), f"pages lost or doubled: {pages}"
        assert self._num_tokens.keys() == self._pages.keys()
        table = torch.zeros_like(self.table, device="cpu")
        inverse = torch.full_like(self.physical_to_logical, -1, device="cpu")
        for row, row_pages in self._pages.items():
            assert len(row_pages) == self.pages_for(self._num_tokens[row]), (
                f"row {row} holds {len(row_pages)} pages for {self._num_tokens[row]} tokens"
            )
            for logical, page in enumerate(row_pages):
                table[row, logical], inverse[row, page] = page, logical
        assert np.array_equal(self.host_table, table.numpy()), "the host mirror differs from the rows"
        assert torch.equal(self.table.cpu(), table), "the device table differs from the rows"
        assert torch.equal(self.physical_to_logical.cpu(), inverse), "the inverse table differs from the rows"


def _widen(pages: Tensor, width: int) -> Tensor:
    """[tiles, N] seen as [tiles, width] without a wider copy; the extra columns run into the next row.

    FlexAttention's CPU template insists that the index lists be as wide as the pool has pages, even though it reads
    only the first `kv_num_blocks` of each (torch/_inductor/kernel/flex/flex_cpu.py, 2.11 to 2.15). A view with the
    old row stride satisfies it: a step then costs what its tokens cost, whatever the size of the pool.
    """
    tiles, narrow = pages.shape
    if pages.device.type != "cpu" or width <= narrow:
        return pages.contiguous()
    storage = pages.new_zeros(tiles * narrow + width)
    storage[: tiles * narrow] = pages.reshape(-1)
    return storage.as_strided((tiles, width), (narrow, 1))
