"""Sizes of the KV memory: the longest row, and the pages of each pool. Computed once per engine."""

import math
from dataclasses import dataclass
from functools import cached_property


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Geometry:
    """The sizes of an engine's KV memory.

    Layers with a sliding window need few pages of a long sequence. Therefore the layers of each window have a pool of
    their own. The pool of the widest window is the primary pool: the user sets its size, and only this pool can run
    out. The secondary pools have enough pages for `max_batch_size` rows and one step.

    Args:
        n_pages: pages of the primary pool, including the reserved page 0.
        page_size: tokens per page.
        max_batch_size: rows, the number of sequences that can hold pages at once.
        max_seq_length: the most tokens of a sequence.
        max_num_batched_tokens: the token budget of a step.
        windows: the sliding window of each layer, None for full attention.
        window_release: release pages that are out of the window; if False, all layers use one pool.
    """

    n_pages: int
    page_size: int
    max_batch_size: int
    max_seq_length: int
    max_num_batched_tokens: int
    windows: tuple[int | None, ...] = (None,)
    window_release: bool = True

    @cached_property
    def max_pages_per_row(self) -> int:
        """Logical pages of the longest row. A row that releases pages may have more of them than the pool has pages."""
        longest = cdiv(self.max_seq_length, self.page_size)
        if self.window_release and None not in self.windows and self._most_pages(max(self.windows)) < self.n_pages:
            return longest
        return min(longest, self.n_pages - 1)

    @property
    def max_row_tokens(self) -> int:
        """The most tokens that the pages of a row hold."""
        return self.max_pages_per_row * self.page_size

    @property
    def max_request_tokens(self) -> int:
        """The most tokens of one request, prompt and output together."""
        return min(self.max_seq_length, self.max_row_tokens)

    @cached_property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None for full attention or if no row is longer than the window."""
        longest = self.max_row_tokens
        return tuple(None if window is None or window >= longest else window for window in self.windows)

    @cached_property
    def pools(self) -> dict[int | None, int]:
        """Number of pages of the pool of each window, including page 0; the primary pool is first."""
        if not self.window_release:
            return {None: self.n_pages}
        primary, *others = sorted(set(self.layer_windows), key=lambda window: -(window or math.inf))
        return {primary: self.n_pages} | {window: self._secondary_pool(window) for window in others}

    def pool_of(self, window: int | None) -> int | None:
        """Return the key in `pools` of the pool for the layers of a window."""
        if not self.window_release or window is None or window >= self.max_row_tokens:
            return None
        return window

    def most_pages(self, num_tokens: int) -> int:
        """Return the most pages of the primary pool that a row of `num_tokens` tokens holds at once."""
        primary = next(iter(self.pools))
        needed = cdiv(num_tokens, self.page_size)
        return needed if primary is None else min(needed, self._most_pages(primary))

    def _most_pages(self, window: int) -> int:
        """Return the most pages that a row with a sliding window holds at once.

        They contain the tokens that the first query of a step sees, and the tokens computed in the step.
        """
        return cdiv(window - 1 + self.max_num_batched_tokens, self.page_size) + 1

    def _secondary_pool(self, window: int) -> int:
        """Return the number of pages of a secondary pool, including page 0.

        It is an upper bound: the pages that all rows need in one step (the tokens of the step are divided among them),
        plus one window per row for cached prefixes. The pool is never larger than the primary pool, because each page
        here has a counterpart there.
        """
        end = cdiv(window - 1, self.page_size) + 1
        of_step = self.max_batch_size * (end + 1) + cdiv(self.max_num_batched_tokens, self.page_size)
        return min(self.n_pages, 1 + of_step + self.max_batch_size * end)
