"""Which models are supported, and how a model is patched and restored. Independent of steps.

The code of the model is not changed. `patch_model` gives its attention layers a `PagedKVCache`, replaces the `forward`
of its last layer, and selects the engine's attention function by name. `unpatch_model` reverts all of this.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from flex_nano_vllm.attention import ATTN_IMPLEMENTATION, PagedKVCache, paged_flex_attention
from flex_nano_vllm.geometry import Geometry, ModelSpec
from flex_nano_vllm.masks import LayerMask, layer_mask
from flex_nano_vllm.sampling_params import is_int

# tests/test_exactness.py compares the tokens of each of these types with Hugging Face's `generate`.
SUPPORTED_MODEL_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


def check_supported(model: PreTrainedModel) -> None:
    """Check that paged attention computes the model correctly. Raises ValueError with the reason if it does not."""
    if not isinstance(model, PreTrainedModel):
        got = f"model must be a loaded transformers model, not an object of type {type(model).__name__}"
        if hasattr(model, "get_base_model"):  # PEFT's wrapper; the layers of the base model contain the adapters
            raise ValueError(f"{got}: pass its get_base_model()")
        raise ValueError(f"{got}: see Inference.from_pretrained")
    name, config = type(model).__name__, model.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(f"{name} (model_type {config.model_type!r}) is not supported; supported are {supported}")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} uses bidirectional attention (use_bidirectional_attention), which cannot be paged")
    rope = config.rope_parameters
    for parameters in [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]:
        # Both types choose their frequencies by the longest sequence of a call, and a call contains many sequences.
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(f"{name} uses rope_type {parameters['rope_type']!r}, which depends on the batch")
    for module in model.modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
            raise ValueError(
                f"{name} has {type(module).__name__} layers of quantize_dynamic, which use one scale for all tokens of "
                "a step, so that requests would change each other's tokens: quantize the weights only (torchao)"
            )
    if model.training:
        raise ValueError(f"{name} is in training mode: call model.eval() first")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        raise ValueError(f"{name} must be on one device, but its parameters are on {sorted(map(str, devices))}")


def max_positions(model: PreTrainedModel) -> int:
    """Return the number of positions of a model: `max_position_embeddings`, or more if RoPE is scaled.

    YaRN supports `factor` times `original_max_position_embeddings`. Linear scaling supports `factor` times the number
    in the config. If a config has one RoPE for each layer type (Gemma-3), its number already includes the scaling.
    """
    config, rope = model.config, model.config.rope_parameters
    stated, kind = config.max_position_embeddings, rope.get("rope_type")
    if kind not in ("yarn", "linear"):
        return stated
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(stated, int((original or stated) * rope["factor"]))


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.self_attn for layer in model.get_decoder().layers]


def layer_windows(model: PreTrainedModel) -> list[int | None]:
    """Return the sliding window of each layer, as the model passes it to its attention function.

    None means full attention.
    """
    # Mistral's layers have no `sliding_window` attribute and read the config. Llama's layers do not read it.
    default = model.config.sliding_window if model.config.model_type == "mistral" else None
    return [getattr(attention, "sliding_window", default) for attention in attention_layers(model)]


def model_spec(model: PreTrainedModel) -> ModelSpec:
    """Read the properties of a model. Raises ValueError with the reason if `check_supported` rejects the model."""
    check_supported(model)
    config, head = model.config, model.get_output_embeddings()
    weight = getattr(head, "weight", None)  # a quantised head may not have it as a tensor
    return ModelSpec(
        masks=tuple(layer_masks(model)),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        num_embeddings=model.get_input_embeddings().num_embeddings,
        num_logits=len(weight) if isinstance(weight, Tensor) else head.out_features,
        max_positions=max_positions(model),
        eos_token_ids=_eos_token_ids(model.generation_config, config),
        dtype=model.dtype,
        device=model.device,
    )


def _eos_token_ids(*configs: object) -> frozenset[int]:
    """Return all EOS token ids of the configs. Chat models have more than one."""
    ids = [getattr(config, "eos_token_id", None) for config in configs]
    return frozenset(i for entry in ids if entry is not None for i in ([entry] if is_int(entry) else entry))


def layer_masks(model: PreTrainedModel) -> list[LayerMask]:
    """Return the mask of each layer. To try another mask, return it here."""
    return [layer_mask(window) for window in layer_windows(model)]


def distinct_masks(spec: ModelSpec, geometry: Geometry) -> tuple[tuple[LayerMask, ...], list[int]]:
    """Return the distinct masks of the layers, as simple as the longest row permits, and for each layer its index."""
    masks = [mask.within(geometry.max_row_tokens) for mask in spec.masks]
    distinct = tuple(dict.fromkeys(masks))
    return distinct, [distinct.index(mask) for mask in masks]


def patch_model(model: PreTrainedModel, spec: ModelSpec, geometry: Geometry) -> None:
    """Give every attention layer a `PagedKVCache` with the slots of its pool, and route attention through it.

    `unpatch_model` reverts this. Raises ValueError if the model is patched already.
    """
    if is_patched(model):
        raise ValueError(f"{type(model).__name__} is patched already: call unpatch_model(model) first")
    AttentionInterface.register(ATTN_IMPLEMENTATION, paged_flex_attention)  # no mask function: masks are ours
    sizes = spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device
    try:
        masks, indices = distinct_masks(spec, geometry)
        for attention, mask in zip(attention_layers(model), indices, strict=True):
            num_slots = geometry.pools[geometry.pool_of(masks[mask].window)] * geometry.page_size
            attention.unpatched_implementation = model.config._attn_implementation  # set first: marks it as patched
            attention.kv_cache = PagedKVCache(mask, num_slots, *sizes)
        last = model.get_decoder().layers[-1]
        last.unpatched_forward = vars(last).get("forward")  # set if a library such as accelerate wraps the layer
        last.forward = pruned_forward(last)
        model.set_attn_implementation(ATTN_IMPLEMENTATION)
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
