"""The KV memory of a model: one page table for the layers of each window, and the prefix cache of their pages.

A sequence has the same row in all page tables:

    window   pages of row 2, with 10 computed tokens      page_size = 4
    none     [ 3, 1, 6 ]
    4        [ ·, 5, 2 ]     token 10, the next one, sees tokens 7 to 10: the first page was released

A full page is cached with its tokens (`prefix_cache.py`) when it is computed. As long as a cached page is in use or
evictable, a request that begins with the same tokens can share it instead of computing it (a cache hit). While a step
computes pages that a request could share, the request waits: in the next step, these pages are cache hits.
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
    entries: list[CachedPage]  # the root (`PrefixCache.root`), and one entry for each full page that is computed
    num_cached_tokens: int  # computed tokens that the row started with
    pending: list[CachedPage] = field(default_factory=list)  # entries of the pages that the current step fills


class KVManager:
    """Allocates rows for sequences, and pages in all page tables at once.

    For each step, the scheduler reserves pages for all running rows, and then admits sequences to other rows. `commit`
    caches the pages that a row has filled in the step. A step that fails changes nothing: the next step reserves again.
    """

    def __init__(self, geometry: Geometry, device: torch.device | str = "cpu", prefix_caching: bool = True):
        self.geometry, self.prefix_caching = geometry, prefix_caching
        self.device = torch.device(device)
        sizes = geometry.page_size, geometry.max_batch_size, geometry.max_pages_per_row
        self.pools = {window: PageTable(n_pages, *sizes, device, window) for window, n_pages in geometry.pools.items()}
        self.primary = next(iter(self.pools.values()))
        self.reset()

    def table(self, window: int | None) -> PageTable:
        """Return the page table of the layers with this window."""
        return self.pools[self.geometry.pool_of(window)]

    def reset(self) -> None:
        """Free all rows and pages, and empty the prefix cache."""
        for table in self.pools.values():
            table.reset()
        self.prefix_cache = PrefixCache(self.geometry.page_size)
        self._rows: dict[int, RowState] = {}
        # Pages to copy before the next step, by row: (page table, source page, target page)
        self.copies: dict[int, list[tuple[PageTable, int, int]]] = {}

    def num_cached_tokens(self, row: int) -> int:
        """Return how many computed tokens `row` started with."""
        return self._rows[row].num_cached_tokens

    def allocate(self, token_ids: list[int], salt: str | None = None, find: bool = True) -> int | None:
        """Allocate a free row for a sequence, and share the cached pages that the sequence begins with.

        The last token is never taken from the cache, because its logits are needed. Without `find`, no pages are
        shared. Returns None if the current step computes more pages that the sequence could share. Raises RuntimeError
        if all rows are allocated.
        """
        root = self.prefix_cache.root(salt)
        found = self.prefix_cache.find(token_ids[:-1], root) if self.prefix_caching and find else []
        for entry in found[self._first_page(len(found)) :]:
            entry.keep_hint = True
        found, missing = self._usable(found)
        if missing and not {entry for state in self._rows.values() for entry in state.pending}.isdisjoint(missing):
            return None
        row = self._open_row()
        num_cached = len(found) * self.geometry.page_size
        for window, table in self.pools.items():
            first = table.first_page(num_cached)
            table.share(row, [entry.pages[window] if i >= first else None for i, entry in enumerate(found)])
        self._rows[row] = RowState(token_ids, [root, *found], num_cached)
        return row

    def fork(self, row: int, num_tokens: int, token_ids: list[int]) -> int | None:
        """Allocate a free row for a sequence that begins with the first `num_tokens` tokens of `row`.

        These tokens must be computed. Full pages are shared. If the last page is not full, it is copied, because both
        sequences write to it; a page must be free for the copy. Returns None if `row` has released a page that the
        fork needs.
        """
        parent = self._rows[row]
        num_full, rest = divmod(num_tokens, self.geometry.page_size)
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
        self._rows[child] = RowState(token_ids, parent.entries[: num_full + 1], num_tokens)
        return child

    def reserve(self, row: int, num_tokens: int) -> bool:
        """Reserve pages so that `row` can hold `num_tokens` tokens in total, all of which the current step computes.

        Returns False, and changes nothing, if too few pages are free.
        """
        primary, *secondary = self.pools.values()
        if not primary.reserve(row, num_tokens):
            return False
        for table in secondary:
            reserved = table.reserve(row, num_tokens)
            assert reserved, "a secondary pool ran out of pages before the primary pool"
        if self.prefix_caching:
            state, page_size = self._rows[row], self.geometry.page_size
            state.pending = []
            for start in range((len(state.entries) - 1) * page_size, num_tokens - page_size + 1, page_size):
                parent = (state.pending or state.entries)[-1]
                state.pending.append(self.prefix_cache.add(parent, state.token_ids[start : start + page_size]))
        return True

    def commit(self, row: int, num_computed_tokens: int) -> None:
        """Mark the first `num_computed_tokens` tokens of `row`, for which it has pages, as computed.

        Caches the pages that are full now. Releases the pages that are out of the window of the last of these tokens,
        and so of all later tokens. The pages in the window of that token are kept, because a fork computes the last
        token of the prompt again.
        """
        state = self._rows[row]
        for entry in state.pending:
            self._cache(row, len(state.entries) - 1, entry)
            state.entries.append(entry)
        state.pending = []
        for table in self.pools.values():
            table.release_before(row, num_computed_tokens - 1)

    def erase(self, row: int) -> None:
        """Release the row and all its pages."""
        for table in self.pools.values():
            table.erase(row)
        del self._rows[row]
        self.copies.pop(row, None)

    def _open_row(self) -> int:
        rows = {table.allocate() for table in self.pools.values()}
        assert len(rows) == 1, f"the page tables allocated different rows: {rows}"
        return rows.pop()

    def _first_page(self, num_pages: int) -> int:
        """Return the first page that a query after `num_pages` full pages sees in any layer with a window."""
        windows = [table for table in self.pools.values() if table.window is not None]
        return min((table.first_page(num_pages * self.geometry.page_size) for table in windows), default=num_pages)

    def _usable(self, found: list[CachedPage]) -> tuple[list[CachedPage], list[CachedPage]]:
        """Return the longest prefix of `found` after which every pool has all pages that later tokens see, and the rest
        of `found`.
        """
        # For each pool, the number of consecutive entries up to the current one that have a page in this pool
        num_usable, num_consecutive = 0, dict.fromkeys(self.pools, 0)
        for num_pages, entry in enumerate(found, start=1):
            is_usable = True
            for window, table in self.pools.items():
                num_consecutive[window] = num_consecutive[window] + 1 if window in entry.pages else 0
                num_needed = num_pages - table.first_page(num_pages * self.geometry.page_size)
                is_usable &= num_consecutive[window] >= num_needed
            num_usable = num_pages if is_usable else num_usable
        return found[:num_usable], found[num_usable:]

    def _cache(self, row: int, logical: int, entry: CachedPage) -> None:
        """Cache a computed page of `row`, unless another row has already cached this page in all pools."""
        if entry.pages.keys() == self.pools.keys():
            return
        # The page is new, or a pool has evicted its copy of it. Remove the other copies from the cache too: a page is
        # shared in every pool or in none, otherwise a secondary pool could run out before the primary pool.
        for window, page in list(entry.pages.items()):
            self.pools[window].uncache_page(page)
        for table in self.pools.values():
            table.cache_page(table.page(row, logical), entry)

    def sync(self) -> None:
        """Upload all changes to the device tables."""
        for table in self.pools.values():
            table.sync()
