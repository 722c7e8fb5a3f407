"""Examples for PageTable: which row uses which page, the tables on the host and on the device, and invalid calls.

`check_page_table` runs after every call that changes rows, always on a copy. It calls `sync`, which on the table itself
would hide outdated device tables. The tests at the end show that `check_page_table` detects each kind of corruption.
"""

import copy

import pytest
import torch

from flex_nano_vllm.invariants import check_page_table
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.prefix_cache import CachedPage


class CheckedPageTable(PageTable):
    """A PageTable that runs `check_page_table` after every call that changes its rows."""

    def reset(self):
        super().reset()
        check(self)

    def allocate(self):
        row = super().allocate()
        check(self)
        return row

    def reserve(self, row, num_tokens):
        reserved = super().reserve(row, num_tokens)
        check(self)
        return reserved

    def erase(self, row):
        super().erase(row)
        check(self)

    def share(self, row, pages):
        super().share(row, pages)
        check(self)

    def release_before(self, row, position):
        super().release_before(row, position)
        check(self)

    def sync(self):
        super().sync()
        assert not self._stale_table and not self._stale_inverse


def check(table: PageTable) -> None:
    copied = copy.deepcopy(table)
    copied.__class__ = PageTable  # so that `check_page_table` calls the unchecked `sync`
    check_page_table(copied)


def state(table: PageTable) -> dict:
    """Return the whole state, including changes not yet uploaded, as plain values that can be compared with ==."""
    plain = {name: copy.deepcopy(value) for name, value in vars(table).items()}
    for name in ("table", "host_table", "physical_to_logical"):
        plain[name] = plain[name].tolist()
    return plain


def pages_of(table: PageTable, row: int) -> list[int]:
    """Return the pages of `row` in logical order, from the host mirror."""
    return table.host_table[row, : table.num_pages(row)].tolist()


def make(
    n_pages: int = 8, page_size: int = 4, max_batch_size: int = 3, max_pages_per_row: int = 7, **kwargs
) -> PageTable:
    return CheckedPageTable(n_pages, page_size, max_batch_size, max_pages_per_row, **kwargs)


@pytest.fixture
def worked_example() -> PageTable:
    """The example in the docstring of `page_table`: row 2 holds 10 tokens on pages 3, 1, 6."""
    table = make()
    assert [table.allocate() for _ in range(3)] == [1, 2, 3]
    assert table.reserve(1, 4)  # page 1
    assert table.reserve(3, 4)  # page 2
    assert table.reserve(2, 4)  # page 3
    assert table.reserve(3, 12)  # pages 4 and 5
    table.erase(1)
    assert table.reserve(2, 8)  # page 1
    assert table.reserve(2, 10)  # page 6
    return table


def test_the_example_in_the_docstring_of_page_table_holds(worked_example):
    table = worked_example
    assert pages_of(table, 2) == [3, 1, 6]
    table.sync()
    assert table.table[2].tolist() == [3, 1, 6, 0, 0, 0, 0]
    assert table.physical_to_logical[2].tolist() == [-1, 1, -1, 0, -1, -1, 2, -1]
    assert table.slots(torch.tensor([2, 2]), torch.tensor([5, 9])).tolist() == [5, 25]


def test_slots_maps_every_token_of_every_row_to_its_page_and_offset(worked_example):
    pages = {2: [3, 1, 6], 3: [2, 4, 5]}
    rows, positions, expected = [], [], []
    for row, num_tokens in ((3, 12), (2, 10)):
        for position in reversed(range(num_tokens)):
            rows.append(row)
            positions.append(position)
            expected.append(pages[row][position // 4] * 4 + position % 4)
    worked_example.sync()
    assert worked_example.slots(torch.tensor(rows), torch.tensor(positions)).tolist() == expected
    assert len(set(expected)) == len(expected)


def test_slots_of_unmapped_positions_and_of_row_0_lie_in_page_0(worked_example):
    worked_example.sync()
    rows = torch.tensor([0, 0, 2, 2, 1, 1])
    positions = torch.tensor([0, 27, 12, 27, 0, 5])  # row 2 has three pages, row 1 was erased
    assert worked_example.slots(rows, positions).tolist() == [0, 3, 0, 3, 0, 1]


def test_slots_includes_reservations_after_sync():
    table = make()
    row = table.allocate()
    table.reserve(row, 5)
    assert table.table.count_nonzero() == 0, "nothing is uploaded before sync"
    table.sync()
    assert table.slots(torch.tensor([row, row]), torch.tensor([0, 4])).tolist() == [4, 8]
    assert table.table[row].tolist() == [1, 2, 0, 0, 0, 0, 0]


def test_a_second_sync_changes_nothing(worked_example):
    worked_example.sync()
    before = state(worked_example)
    worked_example.sync()
    assert state(worked_example) == before


def test_a_new_table_maps_nothing_and_has_all_pages_except_page_0_free():
    table = make(n_pages=8)
    assert (table.num_usable_pages, table.num_free_pages, table.num_used_pages) == (7, 7, 0)
    assert table.num_live_pages == 1
    assert not table._pages
    assert not table.table.any() and not table.host_table.any()
    assert (table.physical_to_logical == -1).all()


def test_allocate_returns_every_row_except_row_0_once_and_then_raises():
    table = make(max_batch_size=3)
    assert sorted(table.allocate() for _ in range(3)) == [1, 2, 3]
    before = state(table)
    with pytest.raises(RuntimeError, match="all 3 rows"):
        table.allocate()
    assert state(table) == before


def test_every_page_except_page_0_is_allocated_once():
    table = make(n_pages=6, page_size=1, max_pages_per_row=5)
    first, second = table.allocate(), table.allocate()
    assert table.reserve(first, 2)
    assert table.reserve(second, 3)
    assert sorted(pages_of(table, first) + pages_of(table, second)) == [1, 2, 3, 4, 5]
    assert table.num_free_pages == 0
    assert not table.reserve(first, 3)


@pytest.mark.parametrize("n_pages", [2, 3, 8])
@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_a_pool_of_n_pages_holds_exactly_n_minus_1_pages_of_tokens(n_pages, page_size):
    table = make(n_pages, page_size, max_pages_per_row=n_pages)
    row = table.allocate()
    capacity = (n_pages - 1) * page_size
    assert not table.reserve(row, capacity + 1)
    assert table.num_free_pages == n_pages - 1
    assert table.reserve(row, capacity)
    assert table.num_free_pages == 0
    assert not table.reserve(row, capacity + 1)


def test_a_row_holds_exactly_the_pages_that_its_tokens_need():
    table = make(page_size=4)
    row = table.allocate()
    for num_tokens, pages in [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)]:
        assert table.reserve(row, num_tokens)
        assert table.num_pages(row) == table.pages_for(num_tokens) == pages
        assert table.num_used_pages == pages


def test_reserving_fewer_tokens_than_before_releases_nothing():
    table = make(page_size=4)
    row = table.allocate()
    table.reserve(row, 9)
    before = state(table)
    assert table.reserve(row, 2)
    assert state(table) == before


def test_growing_a_row_keeps_its_earlier_pages(worked_example):
    assert worked_example.reserve(2, 16)
    assert pages_of(worked_example, 2) == [3, 1, 6, 7]


@pytest.mark.parametrize("synced", [False, True])
def test_a_reservation_that_does_not_fit_returns_false_and_changes_nothing(worked_example, synced):
    assert worked_example.num_free_pages == 1
    if synced:
        worked_example.sync()
    before = state(worked_example)
    assert not worked_example.reserve(2, 17)  # needs two more pages; the one free page must not be taken
    assert not worked_example.reserve(3, 28)
    assert state(worked_example) == before


def test_reserving_on_a_row_that_is_not_allocated_raises_with_its_number(worked_example):
    before = state(worked_example)
    for row in (0, 1, 4, -1):  # row 0 is reserved, row 1 was erased, rows 4 and -1 do not exist
        with pytest.raises(ValueError, match=f"row {row} of the page table is not allocated"):
            worked_example.reserve(row, 1)
    assert state(worked_example) == before


def test_erasing_a_row_that_is_not_allocated_raises_with_its_number(worked_example):
    before = state(worked_example)
    for row in (0, 1, 4, -1):
        with pytest.raises(ValueError, match=f"row {row} of the page table is not allocated"):
            worked_example.erase(row)
    assert state(worked_example) == before


def test_erasing_a_row_twice_raises_and_frees_nothing_twice(worked_example):
    worked_example.erase(2)
    before = state(worked_example)
    with pytest.raises(ValueError, match="row 2 "):
        worked_example.erase(2)
    assert state(worked_example) == before
    assert worked_example.allocate() != worked_example.allocate(), "one row was allocated twice"


def test_reserving_more_tokens_than_a_row_can_list_raises_with_the_numbers():
    table = make(n_pages=8, page_size=4, max_pages_per_row=2)
    row = table.allocate()
    assert table.reserve(row, 8)
    before = state(table)
    with pytest.raises(ValueError, match=r"9 tokens need 3 pages of 4 tokens, but a row can list at most 2 pages"):
        table.reserve(row, 9)
    assert state(table) == before


def test_reserving_too_many_tokens_for_a_row_raises_even_if_the_pool_is_too_small():
    table = make(n_pages=3, page_size=4, max_pages_per_row=2)
    with pytest.raises(ValueError, match="100 tokens need 25 pages"):
        table.reserve(table.allocate(), 100)


def test_erase_releases_the_row_and_all_its_pages(worked_example):
    worked_example.erase(2)
    assert list(worked_example._pages) == [3]
    assert (worked_example.num_free_pages, worked_example.num_used_pages) == (4, 3)
    worked_example.erase(3)
    assert not worked_example._pages
    assert worked_example.num_free_pages == worked_example.num_usable_pages
    row = worked_example.allocate()
    assert worked_example.reserve(row, 28)
    assert sorted(pages_of(worked_example, row)) == [1, 2, 3, 4, 5, 6, 7]


def test_an_erased_row_maps_nothing_after_the_next_sync(worked_example):
    worked_example.sync()
    worked_example.erase(2)
    worked_example.sync()
    assert worked_example.table[2].tolist() == [0] * 7
    assert worked_example.physical_to_logical[2].tolist() == [-1] * 8


def test_a_page_that_changes_rows_between_two_syncs_is_mapped_by_its_new_row_only():
    table = make()
    old, new = table.allocate(), table.allocate()
    table.reserve(old, 8)  # pages 1 and 2
    table.sync()
    table.erase(old)
    table.reserve(new, 5)  # pages 1 and 2 again
    table.sync()
    assert table.table[old].tolist() == [0] * 7
    assert table.physical_to_logical[old].tolist() == [-1] * 8
    assert table.table[new].tolist() == [1, 2, 0, 0, 0, 0, 0]
    assert table.physical_to_logical[new].tolist() == [-1, 0, 1, -1, -1, -1, -1, -1]


def test_a_page_that_returns_to_its_row_between_two_syncs_has_its_last_logical_page():
    table = make()
    row, other = table.allocate(), table.allocate()
    table.reserve(row, 12)  # pages 1, 2, 3
    table.sync()
    table.erase(row)
    table.reserve(other, 4)  # page 1
    assert table.allocate() == row
    table.reserve(row, 8)  # pages 2 and 3, each one logical page earlier than before
    table.sync()
    assert table.table[row].tolist() == [2, 3, 0, 0, 0, 0, 0]
    assert table.physical_to_logical[row].tolist() == [-1, -1, 0, 1, -1, -1, -1, -1]
    assert table.table[other].tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_a_page_reserved_and_released_between_two_syncs_is_not_mapped():
    table = make()
    table.sync()
    row = table.allocate()
    table.reserve(row, 12)
    table.erase(row)
    table.sync()
    assert not table.table.any()
    assert (table.physical_to_logical == -1).all()


def test_reset_clears_the_table_including_changes_not_yet_uploaded(worked_example):
    worked_example.sync()
    worked_example.erase(2)
    worked_example.reserve(3, 16)
    worked_example.reset()
    assert state(worked_example) == state(make())
    worked_example.sync()
    assert not worked_example.table.any()
    assert (worked_example.physical_to_logical == -1).all()


def test_num_live_pages_is_one_more_than_the_highest_page_in_use(worked_example):
    assert worked_example.num_live_pages == 7  # page 6
    worked_example.erase(2)
    assert worked_example.num_live_pages == 6  # page 5
    worked_example.erase(3)
    assert worked_example.num_live_pages == 1  # page 0 always counts
    worked_example.allocate()
    assert worked_example.num_live_pages == 1, "a row without pages does not count"


# ---- pages used by several rows, or by none ----


def test_a_shared_page_is_free_after_its_last_row_has_released_it():
    table = make()
    first, second = table.allocate(), table.allocate()
    assert table.reserve(first, 8)  # pages 1 and 2
    table.share(second, [1, 2])
    assert pages_of(table, first) == pages_of(table, second) == [1, 2]
    assert table.reserve(second, 10)  # page 3 is not shared
    assert pages_of(table, second) == [1, 2, 3]
    assert table.num_used_pages == 3
    table.sync()
    assert table.physical_to_logical[first].tolist() == [-1, 0, 1, -1, -1, -1, -1, -1]
    assert table.physical_to_logical[second].tolist() == [-1, 0, 1, 2, -1, -1, -1, -1]
    table.erase(first)
    assert table.num_used_pages == 3
    table.erase(second)
    assert table.num_used_pages == 0


def entry() -> CachedPage:
    return CachedPage(b"", [], None)


def test_a_cached_page_without_users_is_evictable_and_can_be_shared_again():
    table = make()
    row = table.allocate()
    assert table.reserve(row, 12)  # pages 1, 2, 3
    first, second = entry(), entry()
    table.cache_page(1, first)
    table.cache_page(2, second)
    table.erase(row)
    assert (table.num_evictable_pages, table.num_free_pages, table.num_used_pages) == (2, 7, 0)
    row = table.allocate()
    table.share(row, [1, 2])
    assert (table.num_evictable_pages, table.num_free_pages, table.num_used_pages) == (0, 5, 2)
    assert table.reserve(row, 28)
    assert pages_of(table, row) == [1, 2, 3, 4, 5, 6, 7]
    assert (first.pages, second.pages) == ({None: 1}, {None: 2}), "no page was evicted"


def test_pages_are_evicted_only_if_none_is_free_oldest_row_first_and_last_page_first():
    table = make(n_pages=6, max_pages_per_row=5)
    old, young = table.allocate(), table.allocate()
    assert table.reserve(old, 8) and table.reserve(young, 8)  # pages 1, 2 and 3, 4; page 5 is free
    entries = {page: entry() for page in range(1, 5)}
    for page in range(1, 5):
        table.cache_page(page, entries[page])
    table.erase(old)
    table.erase(young)
    row = table.allocate()
    for num_tokens, evicted in ((4, []), (8, [2]), (12, [2, 1]), (16, [2, 1, 4]), (20, [2, 1, 4, 3])):
        assert table.reserve(row, num_tokens)
        assert {page: entries[page].pages for page in entries} == {
            page: {} if page in evicted else {None: page} for page in entries
        }
        assert pages_of(table, row) == [5, *evicted]
    assert not table.reserve(table.allocate(), 1)


def test_an_uncached_page_is_free_when_no_row_uses_it():
    table = make()
    row, first, second = table.allocate(), entry(), entry()
    table.reserve(row, 8)
    table.cache_page(1, first)
    table.uncache_page(1)
    table.cache_page(2, second)
    assert (first.pages, second.pages) == ({}, {None: 2})
    table.erase(row)
    assert (table.num_evictable_pages, table.num_free_pages) == (1, 7)
    table.uncache_page(2)
    assert (table.num_evictable_pages, table.num_free_pages) == (0, 7)
    assert second.pages == {}


@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 9])
def test_exactly_the_pages_out_of_the_window_are_released(window, page_size):
    table = make(n_pages=40, page_size=page_size, max_pages_per_row=40, window=window)
    row = table.allocate()
    for position in range(20):  # the token that is computed next
        assert table.reserve(row, position + 1)
        table.release_before(row, position)
        seen = {past // page_size for past in range(max(0, position - window + 1), position + 1)}
        assert [logical for logical in range(20) if table.page(row, logical) is not None] == sorted(seen)
        assert table.num_pages(row) == len(seen) == table.num_used_pages
        assert (table.host_table[row] > 0).sum() == len(seen)


def test_without_a_window_no_page_is_released():
    table = make()
    row = table.allocate()
    table.reserve(row, 28)
    table.release_before(row, 27)
    assert table.num_pages(row) == 7


def set_device_table(table: PageTable) -> None:
    table.sync()
    table.table[2, 1] = 7


def set_device_inverse(table: PageTable) -> None:
    table.sync()
    table.physical_to_logical[2, 6] = 1


def leave_page_in_inverse_of_erased_row(table: PageTable) -> None:
    table.sync()
    table.physical_to_logical[1, 1] = 0  # page 1 was used by row 1, and is now used by row 2


def leave_page_in_table_of_erased_row(table: PageTable) -> None:
    table.sync()
    table.table[1, 0] = 1


def forget_upload(table: PageTable) -> None:
    table.sync()
    table.erase(2)
    table._stale_table.clear()


def forget_inverse_upload(table: PageTable) -> None:
    table.sync()
    table.erase(2)
    table._stale_inverse.clear()


def map_page_0(table: PageTable) -> None:
    table._pages[2][3] = 0
    table._num_users[0] = 1


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        pytest.param(lambda t: t._free_pages.pop(), "pages missing", id="lost free page"),
        pytest.param(lambda t: t._pages[2].popitem(), "number of users", id="lost used page"),
        pytest.param(lambda t: t._free_pages.append(7), "duplicated", id="page free twice"),
        pytest.param(lambda t: t._free_pages.append(6), "duplicated", id="page free and used"),
        pytest.param(lambda t: t._pages[3].update({3: 6}), "number of users", id="page of two rows"),
        pytest.param(lambda t: t._num_users.__setitem__(6, 2), "number of users", id="page with too many users"),
        pytest.param(lambda t: t._free_pages.append(0), "page 0", id="page 0 free"),
        pytest.param(lambda t: map_page_0(t), "page 0", id="page 0 used"),
        pytest.param(lambda t: t._free_rows.append(0), "row 0", id="row 0 free"),
        pytest.param(lambda t: t._pages.update({0: {}}), "row 0", id="row 0 in use"),
        pytest.param(lambda t: t._free_rows.clear(), "rows missing", id="lost row"),
        pytest.param(lambda t: t._free_rows.append(2), "rows missing or duplicated", id="row free and in use"),
        pytest.param(lambda t: t._free_rows.append(1), "rows missing or duplicated", id="row free twice"),
        pytest.param(lambda t: t._num_tokens.update({2: 8}), "row 2 holds pages .* for 8", id="one page too many"),
        pytest.param(lambda t: t._num_tokens.update({2: 13}), "row 2 holds pages .* for 13", id="too few pages"),
        pytest.param(lambda t: t._num_tokens.pop(2), None, id="row without a count"),
        pytest.param(lambda t: t.host_table.__setitem__((2, 1), 7), "host mirror", id="stale host mirror"),
        pytest.param(lambda t: t.host_table.__setitem__((1, 0), 1), "host mirror", id="host maps an erased row"),
        pytest.param(set_device_table, "device table", id="stale device table"),
        pytest.param(set_device_inverse, "inverse", id="stale device inverse"),
        pytest.param(leave_page_in_inverse_of_erased_row, "inverse", id="inverse maps an erased row"),
        pytest.param(leave_page_in_table_of_erased_row, "device table", id="device maps an erased row"),
        pytest.param(forget_upload, "device table", id="missing upload"),
        pytest.param(forget_inverse_upload, "inverse", id="missing upload of the inverse"),
    ],
)
def test_check_invariants_detects_corruption(worked_example, corrupt, message):
    table = worked_example
    table.__class__ = PageTable  # so that only the checks in this test can fail
    check_page_table(table)
    corrupt(table)
    with pytest.raises(AssertionError, match=message):
        check_page_table(table)


def test_check_invariants_detects_swapped_pages(worked_example):
    worked_example.sync()
    pages = worked_example._pages
    pages[2][0], pages[3][0] = pages[3][0], pages[2][0]
    with pytest.raises(AssertionError, match="host mirror differs"):
        check_page_table(worked_example)
