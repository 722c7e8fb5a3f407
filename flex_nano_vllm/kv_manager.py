"""The KV memory of a model: a page table for the layers of each window, kept in step, and what is on their pages.

A request has the same row in all tables:

    window   pages of row 2, which has computed 10 tokens      page_size = 4
    none     [ 3, 1, 6 ]
    4        [ ·, 5, 2 ]     token 10, the next one, sees tokens 7 to 10: the first page was given back

Full pages are remembered by their tokens (`prefix_cache.py`). As long as one is in use or idle, a request that begins
with the same tokens takes it up instead of computing it. Every layer writes the keys and values of a step before it
reads any; so a page can be taken up in the very step that fills it.
"""

from dataclasses import dataclass, field

import torch

from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.prefix_cache import CachedPage, PrefixCache


@dataclass
class RowState:
    """What is known of the tokens of a row."""

    token_ids: list[int]  # the sequence's own list, which grows
    entries: list[CachedPage]  # the root, and one for each full page
    num_cached_tokens: int  # that it began with
    num_filled: int  # of the entries
    unfilled: list[tuple[CachedPage, PageTable, int]] = field(default_factory=list)  # remembered, not yet computed


class KVManager:
    """Gives requests rows, and pages in all tables at once.

    Whoever schedules a step reserves pages for it, and what will be on them is remembered at once. `commit` says of a
    row that its part of the step is computed, `discard` that it never will be.
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
        """The page table of the layers of a window."""
        return self.pools[self.geometry.pool_of(window)]

    def reset(self) -> None:
        """Forget everything: all rows and pages are free, and nothing is remembered."""
        for table in self.pools.values():
            table.reset()
        self._forget()

    def _forget(self) -> None:
        self.prefix_cache = PrefixCache(self.geometry.page_size)
        self._rows: dict[int, RowState] = {}
        # By row, the pages to be copied before the next step: from, to.
        self.copies: dict[int, list[tuple[PageTable, int, int]]] = {}

    @property
    def num_free_pages(self) -> int:
        return self.primary.num_free_pages

    def num_pages(self, row: int) -> int:
        """Pages of the primary pool that `row` holds."""
        return self.primary.num_pages(row)

    def num_cached_tokens(self, row: int) -> int:
        """Tokens that `row` had from the beginning."""
        return self._rows[row].num_cached_tokens

    def allocate(self, token_ids: list[int], salt: str | None = None, find: bool = True) -> int:
        """Take a free row for a sequence, with the pages at its beginning that are known: all but its last token at
        most, which has yet to give logits; none without `find`. Raises RuntimeError when all rows are taken."""
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
        """Take a free row for a sequence that begins with the first `num_tokens` of `row`, all of them computed. Full
        pages are shared; the last one, which both will write to, is copied, for which a page must be free. None when
        `row` has given back what is needed."""
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
            assert reserved, "there is no page for the copy"
        if rest:
            self.copies[child] = [(table, table.page(row, num_full), table.page(child, num_full)) for table in needed]
        self._rows[child] = RowState(token_ids, parent.entries[: num_full + 1], num_tokens, 1 + num_full)
        return child

    def reserve(self, row: int, num_tokens: int) -> bool:
        """Let `row` hold `num_tokens` tokens (in all, not in addition). Returns False, and changes nothing, when too
        few pages are free."""
        primary, *secondary = self.pools.values()
        if not primary.reserve(row, num_tokens):
            return False
        for table in secondary:
            reserved = table.reserve(row, num_tokens)
            assert reserved, "a pool that follows ran out before the primary one"
        if self.prefix_caching:
            self._remember(row, num_tokens)
        return True

    def commit(self, row: int, num_computed_tokens: int) -> None:
        """The tokens of `row` up to there are computed. Gives back what is out of the window of the last one, and so of
        all later ones (a fork computes the last one of the prompt again)."""
        known = self._rows[row]
        known.unfilled.clear()
        known.num_filled = len(known.entries)
        for table in self.pools.values():
            table.release_before(row, num_computed_tokens - 1)

    def discard(self, row: int) -> set[int]:
        """What `row` was to compute in this step is not computed: nobody will find it. Returns the rows that have."""
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
        """Give the row and all its pages back."""
        self.discard(
            row
        )  # whoever was invalidated has come with a step that failed, and is sent back before the next one
        for table in self.pools.values():
            table.erase(row)
        del self._rows[row]
        self.copies.pop(row, None)

    def _open_row(self) -> int:
        rows = {table.allocate() for table in self.pools.values()}
        assert len(rows) == 1, f"the tables are out of step: rows {rows}"
        return rows.pop()

    def _first_page(self, num_pages: int) -> int:
        """The first page that a query after so many pages sees in a layer with a window."""
        windows = [table for table in self.pools.values() if table.window is not None]
        return min((table.first_page(num_pages * self.geometry.page_size) for table in windows), default=num_pages)

    def _usable(self, found: list[CachedPage]) -> list[CachedPage]:
        """As many of the pages as have all that the tokens after them see, in every pool."""
        most, in_a_row = 0, dict.fromkeys(self.pools, 0)  # entries, up to the present one, whose page is there
        for num_pages, entry in enumerate(found, start=1):
            enough = True
            for window, table in self.pools.items():
                in_a_row[window] = in_a_row[window] + 1 if window in entry.pages else 0
                enough &= in_a_row[window] >= num_pages - table.first_page(num_pages * self.geometry.page_size)
            most = num_pages if enough else most
        return found[:most]

    def _remember(self, row: int, num_tokens: int) -> None:
        """Enter the pages of `row` that are full with its first `num_tokens`."""
        known, page_size = self._rows[row], self.geometry.page_size
        for logical in range(len(known.entries) - 1, num_tokens // page_size):
            token_ids = known.token_ids[logical * page_size : (logical + 1) * page_size]
            entry = self.prefix_cache.add(known.entries[-1], token_ids)
            known.entries.append(entry)
            if entry.pages.keys() == self.pools.keys():
                continue  # somebody else has computed the same
            # What is left of it goes: rows that share a page of one pool share it in all, or the pools that follow
            # could need more than the primary one.
            for window, page in entry.pages.items():
                self.pools[window].uncache_page(page)
            for window, table in self.pools.items():
                page = entry.pages[window] = table.page(row, logical)
                table.cache_page(page, entry)
                known.unfilled.append((entry, table, page))

    def sync(self) -> None:
        """Bring the device tables up to date."""
        for table in self.pools.values():
            table.sync()

    def check_invariants(self) -> None:
        """Raises AssertionError when the tables are out of step, or what is remembered is not there."""
        for window, table in self.pools.items():
            table.check_invariants()
            assert table.allocated_rows == list(self._rows), "a table has other rows than are known"
            for page, entry in table.cached.items():
                assert entry.pages[window] == page, f"page {page} is remembered at {entry.pages[window]}"
        for row, known in self._rows.items():
            tokens = [token for entry in known.entries for token in entry.token_ids]
            assert tokens == known.token_ids[: len(tokens)], f"row {row} is remembered by other tokens than it has"
