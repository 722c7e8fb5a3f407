"""How long a row may be and how many pages the layers of each window need: arithmetic, done once for an engine."""

import math
from dataclasses import dataclass
from functools import cached_property


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Geometry:
    """The sizes of an engine's KV memory.

    Layers with a sliding window need few pages of a long sequence, so the layers of each window have a pool of their
    own. The widest window leads: its pool is what the user sizes, and only that one can run out. The others are as
    large as `max_batch_size` rows and one step can make necessary.

    Args:
        n_pages: pages of the primary pool, the reserved page 0 included.
        page_size: tokens per page.
        max_batch_size: rows, that is sequences that hold pages at once.
        max_seq_length: tokens of a sequence.
        max_num_batched_tokens: tokens of a step.
        windows: the sliding window of each layer, None for full attention.
        window_release: give pages back that are out of the window; otherwise one pool serves all layers.
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
        """Logical pages of the longest row. One that gives pages back may be longer than its pool."""
        longest = cdiv(self.max_seq_length, self.page_size)
        if self.window_release and None not in self.windows and self._most_pages(max(self.windows)) < self.n_pages:
            return longest
        return min(longest, self.n_pages - 1)

    @property
    def max_request_tokens(self) -> int:
        """Prompt and output of one request, at most."""
        return min(self.max_seq_length, self.max_pages_per_row * self.page_size)

    def refusal(self, prompt_len: int) -> str | None:
        """Why a prompt of so many tokens is refused, None if it is not."""
        if prompt_len < self.max_request_tokens:
            return None
        pool = f"{self.n_pages - 1} usable pages x {self.page_size}"
        to_raise = "max_seq_length" if self.max_request_tokens == self.max_seq_length else "n_pages"
        return (
            f"has {prompt_len} tokens, but the maximum context length is {self.max_request_tokens} tokens, prompt and "
            f"output together (max_seq_length={self.max_seq_length}; the pool holds {pool}): shorten it or raise "
            f"{to_raise}"
        )

    @cached_property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where no row is long enough to notice it."""
        noticed = self.max_pages_per_row * self.page_size
        return tuple(None if window is None or window >= noticed else window for window in self.windows)

    @cached_property
    def pools(self) -> dict[int | None, int]:
        """Pages of the pool of each window, page 0 included, the primary one first."""
        if not self.window_release:
            return {None: self.n_pages}
        primary, *others = sorted(set(self.layer_windows), key=lambda window: -(window or math.inf))
        return {primary: self.n_pages} | {window: self._secondary_pool(window) for window in others}

    def pool_of(self, window: int | None) -> int | None:
        """Which of `pools` serves the layers of a window."""
        return window if self.window_release else None

    def pages_held(self, window: int | None, num_tokens: int) -> int:
        """Pages of a row while the last of so many tokens is computed, in the pool of the layers of a window."""
        retained = self.pool_of(window)
        first = 0 if retained is None else max(0, num_tokens - 1 - retained) // self.page_size
        return cdiv(num_tokens, self.page_size) - first

    def most_pages(self, num_tokens: int) -> int:
        """The most pages of the primary pool that a row of so many tokens holds at once."""
        primary = next(iter(self.pools))
        needed = cdiv(num_tokens, self.page_size)
        return needed if primary is None else min(needed, self._most_pages(primary))

    def _most_pages(self, window: int) -> int:
        """Those with tokens that the first query of a step sees, or that are computed in it."""
        return cdiv(window - 1 + self.max_num_batched_tokens, self.page_size) + 1

    def _secondary_pool(self, window: int) -> int:
        """The sum over all rows of a step, whose tokens are shared out among them, and for each row the end of another
        sequence, which may be taken up again; never more than the primary pool, since whoever holds a page here holds
        one there."""
        end = cdiv(window - 1, self.page_size) + 1
        of_step = self.max_batch_size * (end + 1) + cdiv(self.max_num_batched_tokens, self.page_size)
        return min(self.n_pages, 1 + of_step + self.max_batch_size * end)
