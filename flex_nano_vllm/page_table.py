"""Which page of a KV pool holds which tokens of which sequence. Knows nothing of text, or of who runs.

The pool is `n_pages` pages of `page_size` slots. A running sequence owns one *row* of the table, and the row
lists its pages in logical order:

    page_size = 4                     logical page   0  1  2
    row 2 holds 10 tokens             page table  [  3, 1, 6 ]     physical page of each logical page
                                      inverse     1 -> 1   3 -> 0   6 -> 2     (-1 for pages of other rows)

    token 5 of row 2 is on logical page 5 // 4 = 1, hence on physical page 1, at offset 5 % 4 = 1:
    its slot in the pool is 1 * 4 + 1 = 5. Token 9 lies on page 6, offset 1, slot 25.

Row 0 and page 0 belong to nobody. Unmapped entries of the table point at page 0, so that padding reads and
writes land in a harmless place and no index is ever negative.

Rows may share pages, which are then only read. A page that no row uses is free, or *idle*: its tokens are known to
somebody (`keep`), and a row may take it up again (`share`) until it is needed for others, longest idle first.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.masks import MaskMod
from flex_nano_vllm.transfer import upload


class PageTable:
    """Owns the rows, the pages, and the way from logical to physical, for the layers of one kind of attention.

    Invariant (`check_invariants`): every page but page 0 is either free, or idle, or in as many rows as it has users; a
    row that holds `num_tokens` tokens has a page for each `page_size` of them, but for those at its beginning that were
    given back because they are out of the window; the two device tables are exact inverses.

    The host decides: it keeps its own lists and a numpy mirror of the table, so that scheduling never waits for
    the device. What it decided reaches the device at the next `sync()`, once a step.

    Args:
        n_pages: pages in the pool, the reserved page 0 included.
        page_size: tokens per page.
        max_batch_size: rows, that is sequences that can hold pages at once; row 0 comes on top.
        max_pages_per_row: the longest sequence, in pages.
        window: tokens that a query sees, itself included; None: all before it.
        on_evict: called with the owner of an idle page (see `keep`) that is taken for other tokens.
        keep_hint: whether to keep an owner's page longer that is given back because it is out of the window.
    """

    def __init__(
        self,
        n_pages: int,
        page_size: int,
        max_batch_size: int,
        max_pages_per_row: int,
        device: torch.device | str = "cpu",
        window: int | None = None,
        on_evict: Callable[[object], None] | None = None,
        keep_hint: Callable[[object], bool] | None = None,
    ):
        self.n_pages, self.page_size, self.window = n_pages, page_size, window
        self.on_evict, self.keep_hint = on_evict, keep_hint
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
        self._num_users = [0] * self.n_pages
        self.cached: dict[int, object] = {}  # pages that are not free when nobody uses them
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached pages without users, in order of eviction
        self._pages: dict[int, dict[int, int]] = {}  # row -> logical page -> physical page, ascending
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
        """Pages that can be had, idle ones included."""
        return len(self._free_pages) + len(self._evictable)

    @property
    def num_evictable_pages(self) -> int:
        return len(self._evictable)

    @property
    def num_used_pages(self) -> int:
        return self.num_usable_pages - self.num_free_pages

    @property
    def num_repeated_pages(self) -> int:
        """How many more pages the rows list than there are in use: what they save by sharing."""
        return sum(map(len, self._pages.values())) - self.num_used_pages

    @property
    def num_live_pages(self) -> int:
        """The length of the pool's used part: one more than the highest page in use."""
        return 1 + max((max(pages.values(), default=0) for pages in self._pages.values()), default=0)

    def pages_for(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self.page_size)

    def first_page(self, position: int) -> int:
        """The first logical page of which a query at `position`, or any later one, sees something."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page_size

    @property
    def allocated_rows(self) -> list[int]:
        return list(self._pages)

    def num_pages(self, row: int) -> int:
        """Pages that `row` holds."""
        return len(self._pages[row])

    def num_tokens(self, row: int) -> int:
        """Tokens that `row` has pages for, or had before they were out of the window."""
        return self._num_tokens[row]

    def allocate(self) -> int:
        """Take a free row. Raises RuntimeError when all `max_batch_size` rows are taken."""
        if not self._free_rows:
            raise RuntimeError(f"all {self.max_batch_size} rows of the page table are taken")
        row = heapq.heappop(self._free_rows)
        self._pages[row], self._num_tokens[row] = {}, 0
        return row

    def reserve(self, row: int, num_tokens: int) -> bool:
        """Let `row` hold `num_tokens` tokens (in all, not in addition).

        Returns False, and changes nothing, when too few pages are free. Raises ValueError for a row that is not
        allocated and for more tokens than a row can list.
        """
        self._check_row(row)
        needed = self.pages_for(num_tokens)
        if needed > self.max_pages_per_row:
            raise ValueError(
                f"{num_tokens} tokens are {needed} pages of {self.page_size}, "
                f"but a row lists at most {self.max_pages_per_row}"
            )
        new = range(self.pages_for(self._num_tokens[row]), needed)
        if len(new) > self.num_free_pages:
            return False
        for logical in new:
            self._map(row, logical, self._take_page())
        self._num_tokens[row] = max(self._num_tokens[row], num_tokens)
        return True

    def share(self, row: int, pages: list[int | None]) -> None:
        """Let an empty `row` begin with these pages, full of tokens, that are idle or in other rows' use; None where it
        needs none, because it is out of the window of all that comes."""
        self._check_row(row)
        for logical, page in enumerate(pages):
            if page is not None:
                self._evictable.pop(page, None)
                self._map(row, logical, page)
        self._num_tokens[row] = len(pages) * self.page_size

    def release_before(self, row: int, position: int) -> None:
        """Give back the pages of `row` that no query at `position` or later sees.

        They are the first to be evicted: whoever takes up the whole sequence needs its last pages, and whoever takes
        up a part of it, those at the end of that part, which `keep_hint` knows when somebody has come for them.
        """
        pages, first_page = self._pages[row], self.first_page(position)
        while pages and (logical := next(iter(pages))) < first_page:
            page = pages.pop(logical)
            self._unmap(row, logical, page)
            if page in self._evictable and not self.keep_hint(self.cached[page]):
                self._evictable.move_to_end(page, last=False)

    def erase(self, row: int) -> None:
        """Give the row and all its pages back. Raises ValueError for a row that is not allocated."""
        self._check_row(row)
        pages = self._pages.pop(row)
        for logical in reversed(pages):  # without those before it a page is of no use: it should be evicted earlier
            self._unmap(row, logical, pages[logical])
        del self._num_tokens[row]
        heapq.heappush(self._free_rows, row)

    def page(self, row: int, logical: int) -> int | None:
        """The physical page of a logical one; None where `row` does not hold it."""
        return self._pages[row].get(logical)

    def rows_of(self, page: int) -> list[int]:
        """The rows that use the page."""
        return [row for row, pages in self._pages.items() if page in pages.values()]

    def holders(self) -> list[int]:
        """For each page the lowest row that uses it, 0 if it is free, -1 if it is idle; -2 for page 0."""
        holders = [0] * self.n_pages
        for page in self._evictable:
            holders[page] = -1
        for row in sorted(self._pages, reverse=True):
            for page in self._pages[row].values():
                holders[page] = row
        holders[0] = -2
        return holders

    def cache_page(self, page: int, owner: object) -> None:
        """Let a page in use not be free, but idle, when nobody uses it anymore. `on_evict(owner)` says when it ends."""
        self.cached[page] = owner

    def uncache_page(self, page: int) -> None:
        """Take `keep` back."""
        del self.cached[page]
        if page in self._evictable:
            del self._evictable[page]
            heapq.heappush(self._free_pages, page)

    def _check_row(self, row: int) -> None:
        if row not in self._pages:
            raise ValueError(f"row {row} of the page table is not allocated")

    def _take_page(self) -> int:
        if self._free_pages:
            return heapq.heappop(self._free_pages)
        page, _ = self._evictable.popitem(last=False)
        self.on_evict(self.cached.pop(page))
        return page

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

    def slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at `positions` of `rows` live in the pool (both [T]; result [T])."""
        return self.host_table[rows, positions // self.page_size] * self.page_size + positions % self.page_size

    def sync(self) -> None:
        """Bring the device tables up to date with what has changed since the last time."""
        for stale, table in ((self._stale_table, self.table), (self._stale_inverse, self.physical_to_logical)):
            if stale:
                changes = np.array([(*key, value) for key, value in stale.items()], dtype=np.int64)
                row, column, value = upload([changes], table.device)[0].unbind(dim=1)
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

        def physical_pages(logical_pages: Tensor) -> Tensor:  # [tiles, 1, 1, N]
            pages = self.table[rows[:, None], logical_pages[:, 0, 0]]
            return widen(pages, cdiv(kv_len, self.page_size))[:, None, None]

        return BlockMask.from_kv_blocks(
            block_mask.kv_num_blocks,
            physical_pages(block_mask.kv_indices),
            block_mask.full_kv_num_blocks,
            physical_pages(block_mask.full_kv_indices),
            BLOCK_SIZE=block_mask.BLOCK_SIZE,
            mask_mod=self.physical_mask(block_mask.mask_mod, lambda tile, q_idx: rows[tile]),
            seq_lengths=(block_mask.seq_lengths[0], kv_len),
            compute_q_blocks=False,  # the transposed lists serve the backward pass only
        )

    def physical_mask(self, logical_mask: MaskMod, row_of: Callable[[Tensor, Tensor], Tensor]) -> MaskMod:
        """Rewrite a mask_mod(tile, h, q_idx, kv_pos) into one over the slots of the pool; `row_of(tile, q_idx)` says
        whose query it is. A slot on a page that is not of that row is masked."""
        page_size, physical_to_logical = self.page_size, self.physical_to_logical
        if page_size & (page_size - 1):
            page_of, offset_of = (lambda slot: slot // page_size), (lambda slot: slot % page_size)
        else:  # a kernel's vectors know no division of integers
            shift = page_size.bit_length() - 1
            page_of, offset_of = (lambda slot: slot >> shift), (lambda slot: slot & (page_size - 1))

        def physical_mask(tile: Tensor, h: Tensor, q_idx: Tensor, slot: Tensor) -> Tensor:
            logical_page = physical_to_logical[row_of(tile, q_idx), page_of(slot)]
            kv_pos = logical_page * page_size + offset_of(slot)
            return (logical_page >= 0) & logical_mask(tile, h, q_idx, kv_pos)

        return physical_mask

    def check_invariants(self) -> None:
        """Recompute all bookkeeping from the rows' page lists and compare. Slow, and obviously right.

        Raises AssertionError that says what does not hold.
        """
        self.sync()
        users = [0] * self.n_pages
        for pages in self._pages.values():
            for page in pages.values():
                users[page] += 1
        used = [page for page in range(self.n_pages) if users[page]]
        assert users == self._num_users, f"pages with another number of users than counted: {users}, {self._num_users}"
        assert 0 not in self._free_rows and 0 not in self._pages, "row 0 is free or in use"
        assert 0 not in self._free_pages and 0 not in self._evictable and not users[0], "page 0 is free or in use"
        rows = sorted([*self._free_rows, *self._pages])
        assert rows == list(range(1, self.max_batch_size + 1)), f"rows lost or doubled: {rows}"
        pages = sorted([*self._free_pages, *self._evictable, *used])
        assert pages == list(range(1, self.n_pages)), f"pages lost or doubled: {pages}"
        assert self._evictable.keys() <= self.cached.keys() <= self._evictable.keys() | set(used), "free pages are kept"
        assert self._num_tokens.keys() == self._pages.keys()
        table = torch.zeros_like(self.table, device="cpu")
        inverse = torch.full_like(self.physical_to_logical, -1, device="cpu")
        for row, row_pages in self._pages.items():
            held, end = list(row_pages), self.pages_for(self._num_tokens[row])
            assert held == list(range(end - len(held), end)), (
                f"row {row} holds pages {held} for {self._num_tokens[row]} tokens"
            )
            assert self.window is not None or len(held) == end, f"row {row} has lost pages that all later tokens see"
            for logical, page in row_pages.items():
                table[row, logical], inverse[row, page] = page, logical
        assert np.array_equal(self.host_table, table.numpy()), "the host mirror differs from the rows"
        assert torch.equal(self.table.cpu(), table), "the device table differs from the rows"
        assert torch.equal(self.physical_to_logical.cpu(), inverse), "the inverse table differs from the rows"


def visible_pages(
    first: np.ndarray, last: np.ndarray, window: int | None, page_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The logical pages of which queries at the positions `first` to `last` see something, from which one up to which
    other; and those that all of them see whole. Nothing for position -1."""
    if window is None:
        first_page = first_full = np.zeros_like(first)
    else:
        first_page = np.maximum(first - window + 1, 0) // page_size
        first_full = cdiv(np.maximum(last - window + 1, 0), page_size)
    return first_page, last // page_size + 1, first_full, (first + 1) // page_size


def widen(pages: Tensor, width: int) -> Tensor:
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
