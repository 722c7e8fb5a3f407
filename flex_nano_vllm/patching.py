"""Patches a model, and restores it. Independent of steps.

The code of the model is not changed. `patch_model` gives its attention layers a `PagedKVCache`, replaces the `forward`
of its last layer, and selects the engine's attention function by name. It may also pack the weights (`linear.py`).
`unpatch_model` reverts all of this.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from flex_nano_vllm.attention import ATTN_IMPLEMENTATION, PagedKVCache, paged_flex_attention
from flex_nano_vllm.device import packs_weights
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.linear import pack_weights, unpack_weights
from flex_nano_vllm.masks import LayerMask
from flex_nano_vllm.models import ModelSpec, attention_layers


def distinct_masks(spec: ModelSpec, geometry: Geometry) -> tuple[tuple[LayerMask, ...], list[int]]:
    """Return the distinct masks of the layers, as simple as the longest row permits, and for each layer its index."""
    masks = [mask.within(geometry.max_row_tokens) for mask in spec.masks]
    distinct = tuple(dict.fromkeys(masks))
    return distinct, [distinct.index(mask) for mask in masks]


def patch_model(model: PreTrainedModel, spec: ModelSpec, geometry: Geometry, compiled: bool = False) -> None:
    """Give every attention layer a `PagedKVCache` with the slots of its pool, and route attention through it.

    `compiled`: also pack the weights (`linear.py`), where this makes linear layers faster.
    `unpatch_model` reverts this. Raises ValueError if the model is patched already.
    """
    if is_patched(model):
        raise ValueError(f"{type(model).__name__} is patched already: call unpatch_model(model) first")
    AttentionInterface.register(ATTN_IMPLEMENTATION, paged_flex_attention)  # no mask function: masks are ours
    try:
        masks, indices = distinct_masks(spec, geometry)
        for attention, mask in zip(attention_layers(model), indices, strict=True):
            num_slots = geometry.pools[geometry.pool_of(masks[mask].window)] * geometry.page_size
            attention.unpatched_implementation = model.config._attn_implementation  # set first: marks it as patched
            shape = spec.num_kv_heads, num_slots, spec.head_dim
            attention.kv_cache = PagedKVCache(mask, shape, spec.dtype, spec.device)
        last = model.get_decoder().layers[-1]
        last.unpatched_forward = vars(last).get("forward")  # set if a library such as accelerate wraps the layer
        last.forward = pruned_forward(last)
        model.set_attn_implementation(ATTN_IMPLEMENTATION)
        if compiled and packs_weights(spec.device, spec.dtype):
            pack_weights(model)
    except BaseException:
        unpatch_model(model)
        raise


def pruned_forward(layer: nn.Module) -> Callable[..., Tensor]:
    """Return a forward for the last layer that computes the output only at the logits indices of a step.

    Keys and values are computed for all tokens of the step. The output at other tokens is not used. The logits indices
    are the ends of the chunks, and with prompt logprobs also tokens before them. Both calls below contain projections
    whose result is not used: a compiler removes them; uncompiled, they are computed in vain.
    """
    unpruned = layer.forward

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        logits_indices: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        if logits_indices is None:  # every token of the step is one of them
            return unpruned(hidden_states, position_embeddings=position_embeddings, **kwargs)
        normed = layer.input_layernorm(hidden_states)
        layer.self_attn(normed, position_embeddings=position_embeddings, attention_mask=None, part="keys")
        at_ends = tuple(x[:, logits_indices] for x in position_embeddings)
        return unpruned(hidden_states[:, logits_indices], position_embeddings=at_ends, part="ends", **kwargs)

    return forward


def unpatch_model(model: PreTrainedModel) -> None:
    """Restore the model and release the memory of its pool. Does nothing if the model is not patched."""
    unpack_weights(model)
    for attention in attention_layers(model):
        if hasattr(attention, "unpatched_implementation"):
            model.set_attn_implementation(attention.unpatched_implementation)
            if hasattr(attention, "kv_cache"):  # missing if patching was interrupted
                del attention.kv_cache
            del attention.unpatched_implementation
    last = model.get_decoder().layers[-1]
    if hasattr(last, "unpatched_forward"):
        vars(last).pop("forward", None)  # missing if patching was interrupted
        if last.unpatched_forward is not None:
            last.forward = last.unpatched_forward
        del last.unpatched_forward


def is_patched(model: PreTrainedModel) -> bool:
    return any(hasattr(attention, "kv_cache") for attention in attention_layers(model))
