"""Checks of all bookkeeping, and the row that holds each page. Independent of the model.

The checks recompute the bookkeeping from scratch and compare. They are slow, but simple. All functions read private
fields. They change nothing, except that the checks upload the changes of the page tables (`PageTable.sync`).
"""

import numpy as np
import torch

from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.scheduler import Scheduler


def check_scheduler(scheduler: Scheduler) -> None:
    """Check the queues, the rows of their sequences, and everything below. Raises AssertionError."""
    assert len(scheduler.running) <= scheduler.max_num_batched_tokens, "more sequences run than the token budget allows"
    sequences = [*scheduler.running, *scheduler.waiting]
    assert len(set(map(id, sequences))) == len(sequences), "a sequence is queued twice"
    for places in ([sequence.place for sequence in queue] for queue in (scheduler.running, scheduler.waiting)):
        assert places == sorted(places), f"a queue is not in the order of the policy: {places}"
    assert all(sequence.finish_reason is None for sequence in sequences), "a finished sequence is still queued"
    assert all(s.row is None and s.num_computed_tokens == 0 for s in scheduler.waiting), (
        "a waiting sequence has a row or computed tokens"
    )
    rows = sorted(sequence.row for sequence in scheduler.running)
    assert rows == sorted(scheduler.kv.primary._pages), "allocated rows differ from rows of running sequences"
    for sequence in scheduler.running:
        assert sequence.num_computed_tokens <= scheduler.kv.primary._num_tokens[sequence.row], (
            "a sequence has more computed tokens than its row has tokens reserved"
        )
    check_kv(scheduler.kv)


def check_kv(kv: KVManager) -> None:
    """Check that page tables have equal rows, and that cache entries equal the tables. Raises AssertionError."""
    for window, table in kv.pools.items():
        check_page_table(table)
        assert list(table._pages) == list(kv._rows), "the rows of a page table and of the KV manager differ"
        for page, entry in table.cached.items():
            assert entry.pages[window] == page, f"the entry of cached page {page} has page {entry.pages[window]}"
    for row, state in kv._rows.items():
        tokens = [token for entry in [*state.entries, *state.pending] for token in entry.token_ids]
        assert tokens == state.token_ids[: len(tokens)], f"the cache entries of row {row} differ from its tokens"
        first_new = len(state.entries) - 1
        for table in kv.pools.values():
            new = {table.page(row, i) for i in range(first_new, table.pages_for(table._num_tokens[row]))}
            assert new.isdisjoint(table.cached), f"a page of row {row} is cached before it is computed"


def holders(table: PageTable) -> list[int]:
    """Return for each page the lowest row that uses it: 0 if it is free, -1 if it is evictable, -2 for page 0."""
    result = [0] * table.n_pages
    for page in table._evictable:
        result[page] = -1
    for row in sorted(table._pages, reverse=True):
        for page in table._pages[row].values():
            result[page] = row
    result[0] = -2
    return result


def check_page_table(table: PageTable) -> None:
    """Recompute all bookkeeping from the page lists of the rows, and compare. Raises AssertionError."""
    table.sync()
    users = [0] * table.n_pages
    for pages in table._pages.values():
        for page in pages.values():
            users[page] += 1
    used = [page for page in range(table.n_pages) if users[page]]
    assert users == table._num_users, f"the number of users per page is {users}, but the counts are {table._num_users}"
    assert 0 not in table._free_rows and 0 not in table._pages, "row 0 is free or in use"
    assert 0 not in table._free_pages and 0 not in table._evictable and not users[0], "page 0 is free or in use"
    rows = sorted([*table._free_rows, *table._pages])
    assert rows == list(range(1, table.max_batch_size + 1)), f"rows missing or duplicated: {rows}"
    pages = sorted([*table._free_pages, *table._evictable, *used])
    assert pages == list(range(1, table.n_pages)), f"pages missing or duplicated: {pages}"
    assert table._evictable.keys() <= table.cached.keys() <= table._evictable.keys() | set(used), (
        "evictable pages are not cached, or free pages are"
    )
    assert table._num_tokens.keys() == table._pages.keys()
    expected = torch.zeros_like(table.table, device="cpu")
    inverse = torch.full_like(table.physical_to_logical, -1, device="cpu")
    for row, row_pages in table._pages.items():
        held, end = list(row_pages), table.pages_for(table._num_tokens[row])
        assert held == list(range(end - len(held), end)), (
            f"row {row} holds pages {held} for {table._num_tokens[row]} tokens"
        )
        assert table.window is not None or len(held) == end, f"row {row} has released pages without a window"
        for logical, page in row_pages.items():
            expected[row, logical], inverse[row, page] = page, logical
    assert np.array_equal(table.host_table, expected.numpy()), "the host mirror differs from the rows"
    assert torch.equal(table.table.cpu(), expected), "the device table differs from the rows"
    assert torch.equal(table.physical_to_logical.cpu(), inverse), "the inverse table differs from the rows"
