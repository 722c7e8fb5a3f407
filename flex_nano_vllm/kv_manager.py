"""The KV memory of a model: one page table for the layers of each window, and the prefix cache of their pages.

A sequence has the same row in all page tables:

    window   pages of row 2, with 10 computed tokens      page_size = 4
    none     [ 3, 1, 6 ]
    4        [ ·, 5, 2 ]     token 10, the next one, sees tokens 7 to 10: the first page was released

Full pages are cached with their tokens (`prefix_cache.py`). As long as a cached page is in use or evictable, a request
that begins with the same tokens can share it instead of computing it (a cache hit). Every layer writes the keys and
values of a step before it reads any. Therefore a page can be shared in the same step that fills it.
"""

from dataclasses import dataclass, field

import torch

from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.prefix_cache import CachedPage, PrefixCache


@dataclass
class RowState:
    """The tokens of a row and their entries in the prefix cache."""

    token_ids: list[int]  # the list of the sequence itself, which grows
    entries: list[CachedPage]  # the root of the salt, and one entry for each full page
    num_cached_tokens: int  # computed tokens that the row started with
    num_filled: int  # number of entries that are committed; `discard` removes the others
    unfilled: list[tuple[CachedPage, PageTable, int]] = field(default_factory=list)  # cached, not yet computed


class KVManager:
    """Allocates rows for sequences, and pages in all page tables at once.

    The scheduler reserves pages for a step. Full pages are cached when they are reserved, before they are computed.
    `commit` marks the tokens of a row in the step as computed. `discard` removes pages that will not be computed.
    """

    def __init__(self, geometry: Geometry, device: torch.device | str = "cpu", prefix_caching: bool = True):
        self.geometry, self.prefix_caching = geometry, prefix_caching
        self.device = torch.device(device)
        self.pools = {
            window: PageTable(
                n_pages,
                geometry.page_size,
                geometry.max_batch_size,
                geometry.max_pages_per_row,
                device,
                window,
                on_evict=lambda entry, window=window: entry.pages.pop(window),
                keep_hint=lambda entry: entry.keep_hint,
            )
            for window, n_pages in geometry.pools.items()
        }
        self.primary = next(iter(self.pools.values()))
        self._forget()

    def table(self, window: int | None) -> PageTable:
        """Return the page table of the layers with this window."""
        return self.pools[self.geometry.pool_of(window)]

    def reset(self) -> None:
        """Free all rows and pages, and empty the prefix cache."""
        for table in self.pools.values():
            table.reset()
        self._forget()

    def _forget(self) -> None:
        self.prefix_cache = PrefixCache(self.geometry.page_size)
        self._rows: dict[int, RowState] = {}
        # Pages to copy before the next step, by row: (page table, source page, target page)
        self.copies: dict[int, list[tuple[PageTable, int, int]]] = {}

    @property
    def num_free_pages(self) -> int:
        return self.primary.num_free_pages

    def num_pages(self, row: int) -> int:
        """Return how many pages of the primary pool `row` holds."""
        return self.primary.num_pages(row)

    def num_cached_tokens(self, row: int) -> int:
        """Return how many computed tokens `row` started with."""
        return self._rows[row].num_cached_tokens

    def allocate(self, token_ids: list[int], salt: str | None = None, find: bool = True) -> int:
        """Allocate a free row for a sequence, and share the cached pages that the sequence begins with.

        The last token is never taken from the cache, because its logits are needed. Without `find`, no pages are
        shared. Raises RuntimeError if all rows are allocated.
        """
        row = self._open_row()
        root = self.prefix_cache.root(salt)
        found = self.prefix_cache.find(token_ids[:-1], root) if self.prefix_caching and find else []
        for entry in found[self._first_page(len(found)) :]:
            entry.keep_hint = True
        found = self._usable(found)
        num_cached = len(found) * self.geometry.page_size
        for window, table in self.pools.items():
            first = table.first_page(num_cached)
            table.share(row, [entry.pages[window] if i >= first else None for i, entry in enumerate(found)])
        self._rows[row] = RowState(token_ids, [root, *found], num_cached, 1 + len(found))
        return row

    def fork(self, row: int, num_tokens: int, token_ids: list[int]) -> int | None:
        """Allocate a free row for a sequence that begins with the first `num_tokens` tokens of `row`.

        These tokens must be computed. Full pages are shared. If the last page is not full, it is copied, because both
        sequences write to it; a page must be free for the copy. Returns None if `row` has released a page that the
        fork needs.
        """
        page_size = self.geometry.page_size
        parent = self._rows[row]
        num_full, rest = divmod(num_tokens, page_size)
        needed = {table: range(table.first_page(num_tokens), num_full + bool(rest)) for table in self.pools.values()}
        if any(table.page(row, logical) is None for table, pages in needed.items() for logical in pages):
            return None
        child = self._open_row()
        for table, pages in needed.items():
            table.share(child, [table.page(row, i) if i in pages else None for i in range(num_full)])
            reserved = table.reserve(child, num_tokens)
            assert reserved, "no page is free for the copy of the last page"
        if rest:
            self.copies[child] = [(table, table.page(row, num_full), table.page(child, num_full)) for table in needed]
        self._rows[child] = RowState(token_ids, parent.entries[: num_full + 1], num_tokens, 1 + num_full)
        return child

    def reserve(self, row: int, num_tokens: int) -> bool:
        """Reserve pages so that `row` can hold `num_tokens` tokens in total, and cache those that become full.

        Returns False, and changes nothing, if too few pages are free.
        """
        primary, *secondary = self.pools.values()
        if not primary.reserve(row, num_tokens):
            return False
        for table in secondary:
            reserved = table.reserve(row, num_tokens)
            assert reserved, "a secondary pool ran out of pages before the primary pool"
        if self.prefix_caching:
            self._remember(row, num_tokens)
        return True

    def commit(self, row: int, num_computed_tokens: int) -> None:
        """Mark the first `num_computed_tokens` tokens of `row` as computed.

        Releases the pages that are out of the window of the last of these tokens, and so of all later tokens. The
        pages in the window of that token are kept, because a fork computes the last token of the prompt again.
        """
        known = self._rows[row]
        known.unfilled.clear()
        known.num_filled = len(known.entries)
        for table in self.pools.values():
            table.release_before(row, num_computed_tokens - 1)

    def discard(self, row: int) -> set[int]:
        """Remove the pages that `row` has not computed from the cache. Returns the other rows that share them."""
        known = self._rows[row]
        invalidated = set()
        for entry, table, page in known.unfilled:
            invalidated.update(table.rows_of(page))
            table.uncache_page(page)
            del entry.pages[table.window]
        known.unfilled.clear()
        del known.entries[known.num_filled :]
        return invalidated - {row}

    def erase(self, row: int) -> None:
        """Release the row and all its pages."""
        # The result can be ignored: other rows share these pages only after a failed step, and `Scheduler._undo`
        # requeues the sequences of these rows before the next step.
        self.discard(row)
        for table in self.pools.values():
            table.erase(row)
        del self._rows[row]
        self.copies.pop(row, None)

    def _open_row(self) -> int:
        rows = {table.allocate() for table in self.pools.values()}
        assert len(rows) == 1, f"the page tables allocated different rows: {rows}"
        return rows.pop()

    def _first_page(self, num_pages: int) -> int:
        """Return the first logical page that a query after `num_pages` full pages sees in any layer with a window."""
        windows = [table for table in self.pools.values() if table.window is not None]
        return min((table.first_page(num_pages * self.geometry.page_size) for table in windows), default=num_pages)

    def _usable(self, found: list[CachedPage]) -> list[CachedPage]:
        """Return the longest prefix of `found` after which every pool has all pages that later tokens see."""
        # For each pool, the number of consecutive entries up to the current one that have a page in this pool
        most, in_a_row = 0, dict.fromkeys(self.pools, 0)
        for num_pages, entry in enumerate(found, start=1):
            enough = True
            for window, table in self.pools.items():
                in_a_row[window] = in_a_row[window] + 1 if window in entry.pages else 0
                enough &= in_a_row[window] >= num_pages - table.first_page(num_pages * self.geometry.page_size)
            most = num_pages if enough else most
        return found[:most]

    def _remember(self, row: int, num_tokens: int) -> None:
        """Cache the pages of `row` that its first `num_tokens` tokens fill."""
        known, page_size = self._rows[row], self.geometry.page_size
        for logical in range(len(known.entries) - 1, num_tokens // page_size):
            token_ids = known.token_ids[logical * page_size : (logical + 1) * page_size]
            entry = self.prefix_cache.add(known.entries[-1], token_ids)
            known.entries.append(entry)
            if entry.pages.keys() == self.pools.keys():
                continue  # another row has already cached this page in all pools
            # The page is new, or a pool has evicted its copy of it. Remove the other copies from the cache too: a page
            # is shared in every pool or in none, otherwise a secondary pool could run out before the primary pool.
            for window, page in entry.pages.items():
                self.pools[window].uncache_page(page)
            for window, table in self.pools.items():
                page = entry.pages[window] = table.page(row, logical)
                table.cache_page(page, entry)
                known.unfilled.append((entry, table, page))

    def sync(self) -> None:
        """Upload all changes to the device tables."""
        for table in self.pools.values():
            table.sync()

    def check_invariants(self) -> None:
        """Raise AssertionError if the page tables differ in their rows, or the cache entries differ from the tables."""
        for window, table in self.pools.items():
            table.check_invariants()
            assert table.allocated_rows == list(self._rows), "the rows of a page table and of the KV manager differ"
            for page, entry in table.cached.items():
                assert entry.pages[window] == page, f"the entry of cached page {page} has page {entry.pages[window]}"
        for row, known in self._rows.items():
            tokens = [token for entry in known.entries for token in entry.token_ids]
            assert tokens == known.token_ids[: len(tokens)], f"the cache entries of row {row} differ from its tokens"
