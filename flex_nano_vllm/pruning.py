"""The last layer computes its output only for the tokens whose logits are needed. Independent of pages and steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def pruned_forward(layer: nn.Module) -> Callable[..., object]:
    """Return a forward for the last layer that computes the output only at the logits indices of a step.

    Keys and values are computed for all tokens of the step. The output at other tokens is not used. The logits indices
    are the ends of the chunks, and with prompt logprobs also tokens before them. The first call below computes keys and
    values, and an output that is not used. A compiler removes all that only this output needs. Hence an uncompiled
    layer is not pruned.
    """
    unpruned = layer.forward

    def forward(hidden_states: Tensor, *args: object, logits_indices: Tensor | None = None, **kwargs: object) -> object:
        if logits_indices is None:  # every token of the step is one of them
            return unpruned(hidden_states, *args, **kwargs)
        if hidden_states.shape[0] != 1:
            raise ValueError("the layer has other hidden states than [1, T, ...]")
        unpruned(hidden_states, *args, part="keys", **kwargs)
        at_ends = rows_at(logits_indices, (hidden_states, args, kwargs), hidden_states.shape[:2])
        return unpruned(at_ends[0], *at_ends[1], part="ends", **at_ends[2])

    return forward


def rows_at(indices: Tensor, value: object, shape: torch.Size) -> object:
    """Return a value in which all tensors [1, T, ...] have the rows of `indices` only. `shape`: (1, T)."""
    if isinstance(value, Tensor):
        return value[:, indices] if value.shape[:2] == shape else value
    if isinstance(value, tuple):
        return tuple(rows_at(indices, member, shape) for member in value)
    if isinstance(value, dict):
        return {name: rows_at(indices, member, shape) for name, member in value.items()}
    return value


def prune(layer: nn.Module) -> None:
    """Replace the forward of a layer, see `pruned_forward`."""
    layer.unpruned_forward = vars(layer).get("forward")  # set if a library such as accelerate wraps the layer
    layer.forward = pruned_forward(layer)


def unprune(layer: nn.Module) -> None:
    """Undo `prune`. Does nothing if the layer is not pruned."""
    if hasattr(layer, "unpruned_forward"):
        vars(layer).pop("forward", None)  # missing if pruning was interrupted
        if layer.unpruned_forward is not None:
            layer.forward = layer.unpruned_forward
        del layer.unpruned_forward


@contextmanager
def pruned(layer: nn.Module) -> Iterator[None]:
    """Prune a layer temporarily."""
    try:
        prune(layer)
        yield
    finally:
        unprune(layer)
