"""Who may attend to whom, in logical positions. Knows nothing of pages, rows or steps.

A `mask_mod` here compares two positions *of one sequence*: `q_pos` of the query, `kv_pos` of the key, both
0-based. `step.py` says which query stands at which position, `page_table.py` says at which physical slot a
key lies; composed, the three are the mask that FlexAttention runs. To try another mask, write it here.

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
    """A query sees itself and everything before it."""
    return kv_pos <= q_pos


@functools.cache
def sliding_window(window: int) -> MaskMod:
    """A query sees the last `window` tokens, itself included (the convention of Gemma-2, Gemma-3, Mistral, Qwen)."""

    def sliding_window_mask(b: Tensor, h: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        return (kv_pos <= q_pos) & (q_pos - kv_pos < window)

    return sliding_window_mask


def layer_mask(window: int | None) -> MaskMod:
    """The mask of a layer: causal, or causal within its sliding window."""
    return causal if window is None else sliding_window(window)


def of_queries(mask: MaskMod, q_pos: Tensor, group_size: int) -> MaskMod:
    """A mask of tiles: the same one, asked by the number of a query in its tile instead of by its position.

    Args:
        q_pos: [tiles, L], the position of each query in its sequence; -1 where padded, which sees nothing.
        group_size: G; a tile has L * G rows, G consecutive ones for each token.
    """

    def mask_of_queries(tile: Tensor, h: Tensor, q_idx: Tensor, kv_pos: Tensor) -> Tensor:
        return mask(tile, h, q_pos[tile, q_idx // group_size], kv_pos)

    return mask_of_queries


def softcap(cap: float) -> ScoreMod:  # not cached: it is called within a compiled graph, and dynamo knows no cache
    """Gemma-2's soft cap: squashes the (already scaled) attention scores into (-cap, cap)."""

    def softcap_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return softcap_score
