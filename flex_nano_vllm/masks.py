"""Masks in logical positions: which keys a query may attend to. Independent of pages, rows and steps.

A `mask_mod` here compares two positions *of one sequence*: `q_pos` of the query and `kv_pos` of the key, both
0-based. `step.py` maps each query to its position, and `page_table.py` maps each physical slot to the position of its
key. FlexAttention runs the composition of the three. A new mask is written here, and `page_table.visible_pages` must
return its pages, because compiled kernels visit only these pages and skip the mask on full pages.

References: FlexAttention (Dong et al., 2024, arXiv:2412.05496); Gemma 2 (2024, arXiv:2408.00118) for the
alternation of full and sliding-window layers and for the softcap.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(b: Tensor, h: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    """A query sees its own token and all tokens before it."""
    return kv_pos <= q_pos


@functools.cache
def sliding_window(window: int) -> MaskMod:
    """A query sees the last `window` tokens, including its own (the convention of Gemma-2, Gemma-3, Mistral, Qwen)."""

    def sliding_window_mask(b: Tensor, h: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        return (kv_pos <= q_pos) & (q_pos - kv_pos < window)

    return sliding_window_mask


def layer_mask(window: int | None) -> MaskMod:
    """Return the mask of a layer: causal, or causal within its sliding window."""
    return causal if window is None else sliding_window(window)


def of_queries(mask: MaskMod, q_pos: Tensor, group_size: int) -> MaskMod:
    """Return `mask` for tiles: it takes the index of a query in its tile instead of the position of the query.

    Args:
        q_pos: [tiles, L], the position of each query in its sequence; -1 for padding, which sees nothing.
        group_size: G; a tile has L * G query rows, G consecutive ones for each token.
    """

    def mask_of_queries(tile: Tensor, h: Tensor, q_idx: Tensor, kv_pos: Tensor) -> Tensor:
        return mask(tile, h, q_pos[tile, q_idx // group_size], kv_pos)

    return mask_of_queries


def softcap(cap: float) -> ScoreMod:  # not cached: a compiled graph calls it, and dynamo does not support caches
    """Return Gemma-2's soft cap, which maps the (already scaled) attention scores into (-cap, cap)."""

    def softcap_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return softcap_score
