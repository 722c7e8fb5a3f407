"""Masks in logical positions: which keys a query may attend to. Independent of pages, rows and steps.

A `LayerMask` compares two positions *of one sequence*: `q_pos` of the query and `kv_pos` of the key, both 0-based.
`of_queries` maps each query of a tile to its position, and `page_table.py` maps each physical slot to the position of
its key. FlexAttention runs the composition of the three.

A new mask is a subclass here, and `models.layer_masks` gives it to layers. Only `mask_mod` is required. `score_mod`
changes scores. `visible_pages`, `full_pages` and `window` are bounds that make attention faster:

    page_size = 4, window = 9      page           0            1            2            3
    query at position 14           positions   0  1  2  3   4  5  6  7   8  9 10 11  12 13 14
                                   seen        -  -  -  -   -  -  6  7   8  9 10 11  12 13 14
                                               skipped      partial      full        partial

Compiled kernels visit only the pages in `visible_pages`, and run `mask_mod` only on those that are not in
`full_pages`. `window` states how many tokens later queries need, so that the engine releases pages before them. A bound
may be too generous, but not too tight: `visible_pages` may contain too many pages, `full_pages` too few, and `window`
may be too large. The opposite gives wrong results without an error. The defaults are safe: all pages up to the query
are visited, `mask_mod` runs on all of them, and no page is released.
`tests/test_masks.py` compares the bounds of every mask with `mask_mod` at every position.

References: FlexAttention (Dong et al., 2024, arXiv:2412.05496); Gemma 2 (2024, arXiv:2408.00118) for the
alternation of full and sliding-window layers and for the softcap.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Pages = tuple[Tensor, Tensor]  # [tiles] each: a range of logical pages of each tile, first page and end (exclusive)


@dataclass(frozen=True)
class LayerMask:
    """The mask of a layer. Layers with equal masks share block masks; layers with equal windows share a KV pool.

    A query never sees a key after its own position, because later keys may not be computed yet.
    """

    window: ClassVar[int | None] = None  # a query needs this many last tokens, its own included; None: all tokens
    # score_mod(score, b, h, q_pos, kv_pos): changes the scaled score of a key, before the model's softcap
    score_mod: ClassVar[ScoreMod | None] = None

    def mask_mod(self, b: Tensor, h: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        """Return whether head `h` of a query at `q_pos` sees the key at `kv_pos`."""
        raise NotImplementedError

    def visible_pages(self, first: Tensor, last: Tensor, page_size: int) -> list[Pages]:
        """Return the pages that any query of a tile sees at least partly, as ascending ranges.

        `first` and `last` are the positions [tiles] of the first and the last query of each tile, -1 for padding. A
        range is empty if its end is not greater than its start. Ranges may overlap, and a range may end after the page
        of `last`.
        """
        return [(first_page(self.window, first, page_size), last // page_size + 1)]

    def full_pages(self, first: Tensor, last: Tensor, page_size: int) -> Pages:
        """Return a range of pages that all queries of a tile see completely; ranges are as in `visible_pages`."""
        return torch.zeros_like(first), torch.zeros_like(first)

    def within(self, num_tokens: int) -> "LayerMask":
        """Return the mask for sequences of at most `num_tokens` tokens, which may be simpler."""
        return self


@dataclass(frozen=True)
class Causal(LayerMask):
    """A query sees its own token and all tokens before it."""

    def mask_mod(self, b: Tensor, h: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        return kv_pos <= q_pos

    def full_pages(self, first: Tensor, last: Tensor, page_size: int) -> Pages:
        return torch.zeros_like(first), (first + 1) // page_size


@dataclass(frozen=True)
class SlidingWindow(LayerMask):
    """A query sees the last `window` tokens, including its own (the convention of Gemma-2, Gemma-3, Mistral, Qwen)."""

    window: int

    def mask_mod(self, b: Tensor, h: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        return (kv_pos <= q_pos) & (q_pos - kv_pos < self.window)

    def full_pages(self, first: Tensor, last: Tensor, page_size: int) -> Pages:
        return first_page(self.window, last + page_size - 1, page_size), (first + 1) // page_size

    def within(self, num_tokens: int) -> LayerMask:
        return Causal() if self.window >= num_tokens else self


class Chunked(SlidingWindow):
    """A query sees the tokens of its own chunk of `window` positions, up to itself (Llama-4).

    It sees no more than with a sliding window of this size, so the pages before that window are released.
    """

    def mask_mod(self, b: Tensor, h: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        return (kv_pos <= q_pos) & (q_pos // self.window == kv_pos // self.window)

    def visible_pages(self, first: Tensor, last: Tensor, page_size: int) -> list[Pages]:
        return [(first.clamp(min=0) // self.window * self.window // page_size, last // page_size + 1)]

    def full_pages(self, first: Tensor, last: Tensor, page_size: int) -> Pages:
        chunk = last.clamp(min=0) // self.window * self.window
        return (chunk + page_size - 1) // page_size, (first + 1) // page_size


def of_queries(mod: Callable[..., Tensor], q_pos: Tensor, group_size: int) -> Callable[..., Tensor]:
    """Return a mask_mod or score_mod for tiles: it takes the kv head and the index of a query row instead of query head
    and position.

    Args:
        q_pos: [tiles, L], the position of each query in its sequence; -1 for padding, which sees nothing.
        group_size: G; a tile has L * G query rows for each kv head, G consecutive ones for each token.
    """

    def mod_of_queries(*args: Tensor) -> Tensor:
        *score, tile, kv_head, q_idx, kv_pos = args  # the first argument of a score_mod is the score
        head = kv_head * group_size + q_idx % group_size
        return mod(*score, tile, head, q_pos[tile, q_idx // group_size], kv_pos)

    return mod_of_queries


def with_sinks(sinks: Tensor, group_size: int, score_mod: ScoreMod | None) -> ScoreMod:
    """Return a score_mod that gives slot 0 the attention sinks [H]: a learned score for each query head (gpt-oss).

    A sink takes part in the softmax and has no value. So slot 0 has a value of zeros.
    """

    def with_sink(score: Tensor, tile: Tensor, kv_head: Tensor, q_idx: Tensor, slot: Tensor) -> Tensor:
        other = score if score_mod is None else score_mod(score, tile, kv_head, q_idx, slot)
        return torch.where(slot == 0, sinks[kv_head * group_size + q_idx % group_size].to(score.dtype), other)

    return with_sink


def first_page(window: int | None, position: Tensor, page_size: int) -> Tensor:
    """Return the page of the first token in the window of a query at `position`."""
    return torch.zeros_like(position) if window is None else (position - window + 1).clamp(min=0) // page_size


def softcapped(cap: float, score_mod: ScoreMod | None = None) -> ScoreMod:
    """Return Gemma-2's soft cap, which maps the scaled attention scores, after `score_mod`, into (-cap, cap)."""

    # Not cached: a compiled graph calls this function, and dynamo does not support caches.
    def softcapped_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)
        return cap * torch.tanh(score / cap)

    return softcapped_score
