"""Which models an engine takes, and how it takes one over and gives it back. Knows no steps.

A model keeps its own code. Its attention layers get a `PagedKVCache`, its last layer another `forward`, and the name of
its attention function becomes ours; `unpatch_model` undoes all of it.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from flex_nano_vllm.attention import ATTN_IMPLEMENTATION, PagedKVCache, paged_flex_attention
from flex_nano_vllm.geometry import Geometry

# Every one of these is held to Hugging Face's `generate`, token for token, by tests/test_exactness.py.
SUPPORTED_MODEL_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


def check_supported(model: PreTrainedModel) -> None:
    """Raises ValueError, naming the reason, for a model that this attention would answer wrongly for."""
    if not isinstance(model, PreTrainedModel):
        got = f"model must be a loaded transformers model, not an object of type {type(model).__name__}"
        if hasattr(model, "get_base_model"):  # PEFT's wrapper, around a model whose layers have the adapters in them
            raise ValueError(f"{got}: pass its get_base_model()")
        raise ValueError(f"{got}: see Inference.from_pretrained")
    name, config = type(model).__name__, model.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(f"{name} (model_type {config.model_type!r}) is not supported; supported are {supported}")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} attends in both directions (use_bidirectional_attention), which no decoder can page")
    rope = config.rope_parameters
    for parameters in [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]:
        # These two choose their frequencies by the longest sequence in the call, and a call holds many sequences.
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(f"{name} uses rope_type {parameters['rope_type']!r}, which depends on the batch")
    for module in model.modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
            raise ValueError(
                f"{name} has {type(module).__name__} layers of quantize_dynamic, which scale all tokens of a step "
                "together, so that requests would change each other's tokens: quantize the weights only (torchao)"
            )
    if model.training:
        raise ValueError(f"{name} is in training mode: call model.eval() first")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        raise ValueError(f"{name} must live on one device, but its parameters are on {sorted(map(str, devices))}")


def max_positions(model: PreTrainedModel) -> int:
    """How many positions a model can tell apart: `max_position_embeddings`, or more where RoPE is stretched.

    YaRN reaches `factor` times `original_max_position_embeddings`; linear scaling, `factor` times the number in the
    config. In a config with a RoPE for each kind of layer the number is that of the stretched one already (Gemma-3).
    """
    config, rope = model.config, model.config.rope_parameters
    stated, kind = config.max_position_embeddings, rope.get("rope_type")
    if kind not in ("yarn", "linear"):
        return stated
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(stated, int((original or stated) * rope["factor"]))


def num_logits(model: PreTrainedModel) -> int:
    """How many logits a model has for each token. The head may be quantised, and have no weight as a tensor."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else head.out_features


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.self_attn for layer in model.get_decoder().layers]


def layer_windows(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer, None for full attention, as the model passes it to the attention function."""
    # Mistral's layers have no attribute of their own, they read the config; Llama's do not read it.
    default = model.config.sliding_window if model.config.model_type == "mistral" else None
    return [getattr(attention, "sliding_window", default) for attention in attention_layers(model)]


def kv_shape(model: PreTrainedModel) -> tuple[int, int]:
    """(kv heads, head dim) of every layer."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim


def patch_model(model: PreTrainedModel, geometry: Geometry) -> None:
    """Give every attention layer a `PagedKVCache` with the slots of its pool and route attention through it.

    Undone by `unpatch_model`. Raises ValueError for a model that is patched already.
    """
    if is_patched(model):
        raise ValueError(f"{type(model).__name__} is patched already: unpatch_model(model) first")
    AttentionInterface.register(ATTN_IMPLEMENTATION, paged_flex_attention)  # with no mask function: we bring our masks
    num_kv_heads, head_dim = kv_shape(model)
    try:
        for attention, window in zip(attention_layers(model), geometry.layer_windows, strict=True):
            num_slots = geometry.pools[geometry.pool_of(window)] * geometry.page_size
            attention.unpatched_implementation = model.config._attn_implementation  # first: it marks what to undo
            attention.kv_cache = PagedKVCache(window, num_slots, num_kv_heads, head_dim, model.dtype, model.device)
        last = model.get_decoder().layers[-1]
        last.unpatched_forward = vars(last).get("forward")  # some wrap a layer by setting it, accelerate for one
        last.forward = pruned_forward(last)
        model.set_attn_implementation(ATTN_IMPLEMENTATION)
    except BaseException:
        unpatch_model(model)
        raise


def pruned_forward(layer: nn.Module) -> Callable[..., Tensor]:
    """A forward for the last layer that computes keys and values for all tokens of a step, and the rest only for the
    tokens whose logits are wanted, the ends of the chunks above all: nobody looks at what it makes of the others.

    Projections that serve neither are left out by a compiler; uncompiled, they are computed for nothing.
    """
    unpruned = layer.forward

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        logits_indices: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        if logits_indices is None:  # every token is one
            return unpruned(hidden_states, position_embeddings=position_embeddings, **kwargs)
        normed = layer.input_layernorm(hidden_states)
        layer.self_attn(normed, position_embeddings=position_embeddings, attention_mask=None, part="keys")
        at_ends = tuple(x[:, logits_indices] for x in position_embeddings)
        return unpruned(hidden_states[:, logits_indices], position_embeddings=at_ends, part="ends", **kwargs)

    return forward


def unpatch_model(model: PreTrainedModel) -> None:
    """Give the model back as it was, and the pool's memory with it. Does nothing to a model that is not patched."""
    for attention in attention_layers(model):
        if hasattr(attention, "unpatched_implementation"):
            model.set_attn_implementation(attention.unpatched_implementation)
            if hasattr(attention, "kv_cache"):  # not yet if patching was interrupted
                del attention.kv_cache
            del attention.unpatched_implementation
    last = model.get_decoder().layers[-1]
    if hasattr(last, "unpatched_forward"):
        vars(last).pop("forward", None)  # not there yet if patching was interrupted
        if last.unpatched_forward is not None:
            last.forward = last.unpatched_forward
        del last.unpatched_forward


def is_patched(model: PreTrainedModel) -> bool:
    return any(hasattr(attention, "kv_cache") for attention in attention_layers(model))
