"""Attention of a Hugging Face model over the paged pool: all that calls FlexAttention. Knows no queues, no budgets.

The model keeps its own code. transformers lets a model's attention function be chosen by name (`AttentionInterface`)
and hands it query, key and value after projection, norms and RoPE. That is the whole seam: `patch_model` gives every
attention layer a `PagedKVCache` and chooses `paged_flex_attention`.

Whoever compiles the layers around the seam gets one graph that serves any number of tokens. What depends on the step
(which slots, which tiles, which masks) stays out of that graph, in two operators that it calls without looking inside:

    layer, compiled       norm ─ q k v ─ RoPE ─┐                            ┌─ o ─ residual ─ norm ─ MLP ─ residual
    operators                                  └─ write_kv ─ paged_attend ──┘
                                                     ▲            ▲
    the step in progress   with step_in_progress(StepBatch, flex_attention): model(...)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, PreTrainedModel

from flex_nano_vllm.masks import softcap as softcap_mod
from flex_nano_vllm.step import StepBatch

# Must not contain the name of one of transformers' own implementations: it tests names by prefix and substring.
ATTN_IMPLEMENTATION = "paged_flex"

# Every one of these is held to Hugging Face's `generate`, token for token, by tests/test_exactness.py.
SUPPORTED_MODEL_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")

_in_progress: ContextVar[tuple[StepBatch, Callable[..., Tensor]] | None] = ContextVar("step_in_progress", default=None)


@contextmanager
def step_in_progress(step: StepBatch, flex: Callable[..., Tensor] = flex_attention) -> Iterator[None]:
    """What the operators below work on while the model is called. `flex` is `flex_attention`, or a compiled one."""
    token = _in_progress.set((step, flex))
    try:
        yield
    finally:
        _in_progress.reset(token)


def _step(ends: bool, num_tokens: int) -> tuple[StepBatch, Callable[..., Tensor]]:
    step, flex = _in_progress.get() or (None, None)
    if ends and step is not None:
        step = step.ends
    if step is None or len(step.slots) != num_tokens:
        raise RuntimeError(
            "this model is patched for paged attention and belongs to an Inference engine: it cannot be called "
            "directly. Use the engine, or give the model back first with engine.close()"
        )
    return step, flex


def write_kv(key: Tensor, value: Tensor, finite: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Put the step's keys and values, [1, K, T, D], into their slots of the pool, [1, K, slots, D].

    `finite` [T] says which tokens had finite ones. The step keeps count.
    """
    step, _ = _step(ends=False, num_tokens=key.shape[2])
    step.finite.logical_and_(finite)
    k_cache.index_copy_(2, step.slots, key)
    v_cache.index_copy_(2, step.slots, value)


def paged_attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    window: int | None,
    scale: float,
    cap: float | None,
    ends: bool,
) -> Tensor:
    """Attention of the step's queries, [1, H, T, D], over the pool. Returns [1, T, H, D].

    `ends`: the queries are those of the chunks' ends only (see `pruned_forward`).
    """
    num_heads, num_tokens, head_dim = query.shape[1:]
    step, flex = _step(ends, num_tokens)
    num_kv_heads = k_cache.shape[1]
    group_size = num_heads // num_kv_heads
    k_cache, v_cache = k_cache[:, :, : step.kv_len], v_cache[:, :, : step.kv_len]
    outputs = []
    for tiles in step.tiles:
        block_mask = tiles.block_masks[window]
        # Heads of a group share their keys: as rows of one query block they read each page once.
        grouped = query[0].transpose(0, 1)[tiles.tokens].view(-1, tiles.tile_len, num_kv_heads, group_size, head_dim)
        output = flex(
            grouped.transpose(1, 2).reshape(-1, num_kv_heads, tiles.tile_len * group_size, head_dim),
            k_cache,  # for all tiles: a batch of 1 is broadcast
            v_cache,
            score_mod=None if cap is None else softcap_mod(cap),
            block_mask=block_mask,
            scale=scale,
            kernel_options=kernel_options(query.device, *block_mask.BLOCK_SIZE),
        )
        ungrouped = output.view(-1, num_kv_heads, tiles.tile_len, group_size, head_dim).transpose(1, 2)
        outputs.append(ungrouped.reshape(-1, num_heads, head_dim))  # [tiles * L, H, D]
    return torch.cat(outputs)[step.tile_slot][None]


OPS = torch.library.Library("flex_nano_vllm", "DEF")
OPS.define("write_kv" + torch.library.infer_schema(write_kv, mutates_args=("k_cache", "v_cache")))
OPS.define("paged_attend" + torch.library.infer_schema(paged_attend, mutates_args=()))
for _dispatch_key in ("CPU", "CUDA", "MPS", "XPU"):  # not for all at once, that would include fake tensors
    OPS.impl("write_kv", write_kv, _dispatch_key)
    OPS.impl("paged_attend", paged_attend, _dispatch_key)


@torch.library.register_fake("flex_nano_vllm::write_kv")
def _(*args: object) -> None:
    return None


@torch.library.register_fake("flex_nano_vllm::paged_attend")
def _(query: Tensor, *args: object) -> Tensor:
    batch, num_heads, num_tokens, head_dim = query.shape
    return query.new_empty(batch, num_tokens, num_heads, head_dim)


class PagedKVCache(nn.Module):
    """The KV pool of one attention layer.

    `k_cache` and `v_cache` are two separate buffers [1, K, P * page_size, D]: heads outermost, so that a page of one
    head is contiguous; two buffers, because the CPU template copies a buffer that K and V share (and torch 2.11
    refuses it). They start as zeros, and are finite at all times.
    """

    def __init__(self, num_slots: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        shape = (1, num_kv_heads, num_slots, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def update(self, key: Tensor, value: Tensor) -> None:
        """Write the step's keys and values, [1, K, T, D], into their slots.

        Only finite numbers enter the pool. A NaN there would reach every query whose kernel passes by, since a masked
        slot still counts as 0 * V, and the CPU kernel's running maximum may lose one that should be seen. So a token
        whose numbers are not finite is written as zeros and marked in `step.finite`: its request fails, alone and at
        once, and its pages can be used again by anybody.
        """
        finite = (key.isfinite() & value.isfinite()).all(dim=-1, keepdim=True).all(dim=1, keepdim=True)  # [1, 1, T, 1]
        key, value = torch.where(finite, key, 0), torch.where(finite, value, 0)
        torch.ops.flex_nano_vllm.write_kv(key, value, finite.flatten(), self.k_cache, self.v_cache)

    def attend(self, query: Tensor, window: int | None, scale: float, cap: float | None, ends: bool) -> Tensor:
        """Attention of the step's queries, [1, H, T, D], over the pool. Returns [1, T, H, D]."""
        return torch.ops.flex_nano_vllm.paged_attend(query, self.k_cache, self.v_cache, window, scale, cap, ends)


def kernel_options(device: torch.device, q_block: int, page_size: int) -> dict[str, object] | None:
    """The Triton kernel's own tile must divide the mask's blocks; before torch 2.14 nobody else sees to it.

    Its defaults are tuned for the device and the head dim, and divide blocks of 128. Where a block is no multiple of
    128, the tile is made small, so that it takes no more shared memory than the default would.
    "TRITON" is the main kernel. Whether the flex-decoding kernel, which "AUTO" would pick for few query rows, is faster
    on small tiles has not been measured.
    """
    if device.type != "cuda":
        return None
    options: dict[str, object] = {"BACKEND": "TRITON"}
    if q_block % 128:
        options["BLOCK_M"] = min(32, q_block & -q_block)  # the largest power of two that divides it
    if page_size % 128:
        options["BLOCK_N"] = 16
    return options


def paged_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    phase: str | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer: query [1, H, T, D], key and value [1, K, T, D],
    after RoPE. Returns [1, T, H, D] and no weights.

    `phase`, see `pruned_forward`: "keys" writes keys and values and returns nothing of interest, "ends" attends only.
    Raises RuntimeError when the model was called by anybody but the engine, whose step says where and what.
    """
    if phase != "ends":
        module.kv_cache.update(key, value)
    if phase == "keys":
        return query.transpose(1, 2), None
    return module.kv_cache.attend(query, sliding_window, scaling, softcap, ends=phase == "ends"), None


def check_supported(model: PreTrainedModel) -> None:
    """Raises ValueError, naming the reason, for a model that this attention would answer wrongly for."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a loaded transformers model, got {model!r}: see Inference.from_pretrained")
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
    if model.training:
        raise ValueError(f"{name} is in training mode: call model.eval() first")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        raise ValueError(f"{name} must live on one device, but its parameters are on {sorted(map(str, devices))}")


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


def patch_model(
    model: PreTrainedModel, num_slots: int, compile_layer: Callable[[Callable], Callable] = lambda forward: forward
) -> None:
    """Give every attention layer a `PagedKVCache` of `num_slots` slots and route attention through it.

    `compile_layer` is given the `forward` of each decoder layer, and returns what is to be called instead.
    Undone by `unpatch_model`. Raises ValueError for a model that is patched already.
    """
    if is_patched(model):
        raise ValueError(f"{type(model).__name__} is patched already: unpatch_model(model) first")
    AttentionInterface.register(ATTN_IMPLEMENTATION, paged_flex_attention)  # with no mask function: we bring our masks
    num_kv_heads, head_dim = kv_shape(model)
    try:
        for attention in attention_layers(model):
            weight = attention.o_proj.weight
            attention.kv_cache = PagedKVCache(num_slots, num_kv_heads, head_dim, model.dtype, weight.device)
            attention.unpatched_implementation = model.config._attn_implementation
        layers = model.get_decoder().layers
        for layer in layers:
            layer.unpatched_forward = vars(layer).get("forward")  # some wrap a layer by setting it, accelerate for one
            forward = layer.forward if layer is not layers[-1] else pruned_forward(layer)
            layer.forward = compile_layer(forward)
        model.set_attn_implementation(ATTN_IMPLEMENTATION)
    except BaseException:
        unpatch_model(model)
        raise


def pruned_forward(layer: nn.Module) -> Callable[..., Tensor]:
    """A forward for the last layer that computes keys and values for all tokens of a step, and the rest only for the
    tokens whose logits are wanted, the ends of the chunks: nobody looks at what the layer makes of the others."""
    unpruned = layer.forward

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        chunk_ends: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        if chunk_ends is None:
            return unpruned(hidden_states, position_embeddings=position_embeddings, **kwargs)
        # Its output is of no use, so a compiler leaves out all that is not for the keys and values.
        normed = layer.input_layernorm(hidden_states)
        layer.self_attn(normed, position_embeddings=position_embeddings, attention_mask=None, phase="keys")
        at_ends = tuple(x[:, chunk_ends] for x in position_embeddings)
        return unpruned(hidden_states[:, chunk_ends], position_embeddings=at_ends, phase="ends", **kwargs)

    return forward


def unpatch_model(model: PreTrainedModel) -> None:
    """Give the model back as it was, and the pool's memory with it. Does nothing to a model that is not patched."""
    for attention in attention_layers(model):
        if hasattr(attention, "kv_cache"):
            model.set_attn_implementation(attention.unpatched_implementation)
            del attention.kv_cache, attention.unpatched_implementation
    for layer in model.get_decoder().layers:
        if hasattr(layer, "unpatched_forward"):
            vars(layer).pop("forward", None)  # not there yet if patching was interrupted
            if layer.unpatched_forward is not None:
                layer.forward = layer.unpatched_forward
            del layer.unpatched_forward


def is_patched(model: PreTrainedModel) -> bool:
    return any(hasattr(attention, "kv_cache") for attention in attention_layers(model))
