"""Patches a model, and restores it. Independent of steps.

The code of the model is not changed. `patch_model` gives its attention layers a `PagedKVCache`, and selects the
engine's attention function by name. For a compiled engine it also prunes the last layer (`pruning.py`), and may pack
the weights (`linear.py`). `unpatch_model` reverts all of this.
"""

from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from flex_nano_vllm.attention import ATTN_IMPLEMENTATION, PagedKVCache, paged_flex_attention
from flex_nano_vllm.device import packs_weights
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.linear import pack_weights, unpack_weights
from flex_nano_vllm.masks import LayerMask
from flex_nano_vllm.models import ModelSpec
from flex_nano_vllm.probe import configs_of, last_layer
from flex_nano_vllm.pruning import prune, unprune


def distinct_masks(spec: ModelSpec, geometry: Geometry) -> tuple[tuple[LayerMask, ...], list[int]]:
    """Return the distinct masks of the layers, as simple as the longest row permits, and for each layer its index."""
    masks = [mask.within(geometry.max_row_tokens) for mask in spec.masks]
    distinct = tuple(dict.fromkeys(masks))
    return distinct, [distinct.index(mask) for mask in masks]


def attention_layers(model: PreTrainedModel, spec: ModelSpec) -> list[nn.Module]:
    """Return the modules that call attention."""
    return [model.get_submodule(layer.name) for layer in spec.layers]


def patch_model(model: PreTrainedModel, spec: ModelSpec, geometry: Geometry, compiled: bool = False) -> None:
    """Give every attention layer a `PagedKVCache` with the slots of its pool, and route attention through it.

    A layer that uses the keys of an earlier layer gets the pool of that layer, and does not write to it.
    `compiled`: also prune the last layer, and pack the weights where this makes linear layers faster.
    `unpatch_model` reverts this. Raises ValueError if the model is patched already.
    """
    if is_patched(model):
        raise ValueError(f"{type(model).__name__} is patched already: call unpatch_model(model) first")
    AttentionInterface.register(ATTN_IMPLEMENTATION, paged_flex_attention)  # no mask function: masks are ours
    layers = attention_layers(model, spec)
    # Marks the model as patched.
    model.unpatched_implementations = [(c, c._attn_implementation_internal) for c in configs_of(model)]
    try:
        masks, indices = distinct_masks(spec, geometry)
        for number, (attention, layer, mask) in enumerate(zip(layers, spec.layers, indices)):
            attention.writes_kv_cache = layer.keys_of == number
            if attention.writes_kv_cache:
                num_slots = geometry.pools[geometry.pool_of(masks[mask].window)] * geometry.page_size
                shape = spec.num_kv_heads, num_slots, spec.key_dim, spec.value_dim
                attention.kv_cache = PagedKVCache(mask, shape, spec.dtype, spec.device)
            else:
                attention.kv_cache = layers[layer.keys_of].kv_cache
        for config, _ in model.unpatched_implementations:
            config._attn_implementation_internal = ATTN_IMPLEMENTATION
        if compiled and spec.prunes_last_layer:
            prune(last_layer(model, spec.layers))
        if compiled and packs_weights(spec.device, spec.dtype):
            pack_weights(model)
    except BaseException:
        unpatch_model(model)
        raise


def unpatch_model(model: PreTrainedModel) -> None:
    """Restore the model and release the memory of its pool. Does nothing if the model is not patched."""
    unpack_weights(model)
    for config, implementation in vars(model).pop("unpatched_implementations", ()):
        config._attn_implementation_internal = implementation
    for module in model.modules():
        if vars(module).pop("writes_kv_cache", None) is not None:
            module._modules.pop("kv_cache", None)  # missing if patching was interrupted
        unprune(module)


def is_patched(model: PreTrainedModel) -> bool:
    return "unpatched_implementations" in vars(model)
