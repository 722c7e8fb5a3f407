"""Attention of a Hugging Face model over the paged pool: all that calls FlexAttention. Knows no queues, no budgets.

The model keeps its own code. transformers lets a model's attention function be chosen by name (`AttentionInterface`)
and hands it query, key and value after projection, norms and RoPE. That is the whole seam: `patching.patch_model` gives
every attention layer a `PagedKVCache` and chooses `paged_flex_attention`.

A step in which every chunk is one token is compiled with its attention, as one graph of static shapes: the step is an
argument of the model, and is handed on to every layer. Any other step has a length of its own, and is served by a graph
for any number of tokens. What depends on the step (which slots, which tiles, which masks) stays out of that one, in two
operators that it calls without looking inside:

    model, compiled       norm ─ q k v ─ RoPE ─┐                      ┌─ o ─ residual ─ norm ─ MLP ─ residual
    operators                                  └─ write_kv ─ attend ──┘
                                                     ▲         ▲
    the step in progress   with step_in_progress(StepBatch, flex_attention): model(...)
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from flex_nano_vllm.masks import softcap as softcap_mod
from flex_nano_vllm.step import StepBatch, TiledQueries

# Must not contain the name of one of transformers' own implementations: it tests names by prefix and substring.
ATTN_IMPLEMENTATION = "paged_flex"

_in_progress: ContextVar["StepInProgress | None"] = ContextVar("step_in_progress", default=None)


@torch.compiler.nested_compile_region
def flex_in_graph(window: int | None, *args: object, **kwargs: object) -> Tensor:
    """FlexAttention in a graph of the whole model: one kernel for all layers of the same window.

    Inductor would make one for each, since what it generates differs in the names of variables. `window` tells the
    regions apart: by their masks alone torch 2.15 does not.
    """
    return flex_attention(*args, **kwargs)


@dataclass(frozen=True)
class StepInProgress:
    """What the operators work on while the model is called."""

    step: StepBatch
    flex: Callable[..., Tensor]  # a compiled `flex_attention`
    finite: Tensor  # [T] bool, cleared by the operators where a token's keys or values are not


@contextmanager
def step_in_progress(step: StepBatch, flex: Callable[..., Tensor]) -> Iterator[Tensor]:
    """Let the operators work on `step`. Gives `finite`, which is complete when the model has returned."""
    finite = torch.ones_like(step.input_ids[0], dtype=torch.bool)
    token = _in_progress.set(StepInProgress(step, flex, finite))
    try:
        yield finite
    finally:
        _in_progress.reset(token)


def _current(num_tokens: int, ends: bool) -> StepInProgress:
    current = _in_progress.get()
    if current is None or num_tokens != (len(current.step.logits_indices) if ends else current.step.num_tokens):
        raise RuntimeError(
            "this model is patched for paged attention and belongs to an Inference engine: it cannot be called "
            "directly. Use the engine, or give the model back first with engine.close()"
        )
    return current


def attend(
    queries: TiledQueries,
    flex: Callable[..., Tensor],
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    window: int | None,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Attention of queries, [1, H, T, D], over the pool. Returns [1, T, H, D]."""
    head_dim = query.shape[-1]
    rows = query.transpose(1, 2).reshape(-1, head_dim)  # [T * H, D]
    outputs = []
    for tiles in queries.tiles:
        block_mask = tiles.block_masks[window]
        kv_len = block_mask.seq_lengths[1]
        output = flex(
            rows[tiles.query_rows],  # [tiles, K, L * G, D]
            k_cache[:, :, :kv_len],  # for all tiles: a batch of 1 is broadcast
            v_cache[:, :, :kv_len],
            score_mod=None if cap is None else softcap_mod(cap),
            block_mask=block_mask,
            scale=scale,
            kernel_options=kernel_options(query.device, *block_mask.BLOCK_SIZE),
        )
        outputs.append(output.reshape(-1, head_dim))
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return together[queries.output_rows][None]


def write_kv(slots: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Put a step's keys and values, [1, K, T, D], into their slots of the pool, [1, K, slots, D]."""
    k_cache.index_copy_(2, slots, key)
    v_cache.index_copy_(2, slots, value)


def write_kv_op(
    key: Tensor, value: Tensor, finite: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None
) -> None:
    """`finite` [T] says which tokens had finite keys and values."""
    current = _current(num_tokens=key.shape[2], ends=False)
    current.finite.logical_and_(finite)
    write_kv(current.step.slots[window], key, value, k_cache, v_cache)


def attend_op(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None, scale: float, cap: float | None, ends: bool
) -> Tensor:
    """`ends`: the queries are those of the chunks' ends only (see `patching.pruned_forward`)."""
    current = _current(query.shape[2], ends)
    queries = current.step.end_queries if ends else current.step.queries[window]
    return attend(queries, current.flex, query, k_cache, v_cache, window, scale, cap)


OPS = torch.library.Library("flex_nano_vllm", "DEF")
OPS.define("write_kv" + torch.library.infer_schema(write_kv_op, mutates_args=("k_cache", "v_cache")))
OPS.define("attend" + torch.library.infer_schema(attend_op, mutates_args=()))
for _dispatch_key in ("CPU", "CUDA", "MPS", "XPU"):  # not for all at once, that would include fake tensors
    OPS.impl("write_kv", write_kv_op, _dispatch_key)
    OPS.impl("attend", attend_op, _dispatch_key)


@torch.library.register_fake("flex_nano_vllm::write_kv")
def _(*args: object) -> None:
    return None


@torch.library.register_fake("flex_nano_vllm::attend")
def _(query: Tensor, *args: object) -> Tensor:
    batch, num_heads, num_tokens, head_dim = query.shape
    return query.new_empty(batch, num_tokens, num_heads, head_dim)


class PagedKVCache(nn.Module):
    """The KV pool of one attention layer, whose queries see `window` tokens (None: all before them).

    `k_cache` and `v_cache` are two separate buffers [1, K, P * page_size, D]: heads outermost, so that a page of one
    head is contiguous; two buffers, because the CPU template copies a buffer that K and V share (and torch 2.11
    refuses it). They start as zeros, and are finite at all times.
    """

    def __init__(
        self,
        window: int | None,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.window = window
        shape = (1, num_kv_heads, num_slots, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def update(self, key: Tensor, value: Tensor) -> None:
        """Write keys and values of the step in progress, [1, K, T, D], into their slots."""
        key, value, finite = _only_finite(key, value)
        torch.ops.flex_nano_vllm.write_kv(key, value, finite, self.k_cache, self.v_cache, self.window)

    def attend(self, query: Tensor, scale: float, cap: float | None, ends: bool = False) -> Tensor:
        """Attention of the queries of the step in progress, [1, H, T, D], over the pool; of the chunks' `ends` only,
        if so (see `patching.pruned_forward`). Returns [1, T, H, D]."""
        return torch.ops.flex_nano_vllm.attend(query, self.k_cache, self.v_cache, self.window, scale, cap, ends)

    def copy_pages(self, sources: Tensor, targets: Tensor, page_size: int) -> None:
        """Copy whole pages, given by their numbers, on the device."""
        for pool in (self.k_cache, self.v_cache):
            pages = pool.unflatten(2, (-1, page_size))  # [1, K, P, page_size, D]
            pages[:, :, targets] = pages[:, :, sources]

    def update_and_attend(
        self, decodes: StepBatch, query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        """Both for a step of decodes, compiled into the graph of the model. Where keys or values are not finite, the
        output is NaN, and so are then the logits: each token is the end of its chunk."""
        key, value, finite = _only_finite(key, value)
        write_kv(decodes.slots[self.window], key, value, self.k_cache, self.v_cache)
        flex = functools.partial(flex_in_graph, self.window)
        output = attend(decodes.queries[self.window], flex, query, self.k_cache, self.v_cache, self.window, scale, cap)
        return output.masked_fill(~finite[:, None, None], torch.nan)


def _only_finite(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values, [1, K, T, D], as they may enter the pool, and which tokens had only finite ones, [T] bool.

    A NaN in the pool would reach every query whose kernel passes by, since a masked slot still counts as 0 * V, and the
    CPU kernel's running maximum may lose one that should be seen. So a token whose numbers are not finite is written as
    zeros: its request fails, alone and at once, and its pages can be used again by anybody.
    """
    finite = (key.isfinite() & value.isfinite()).all(dim=-1, keepdim=True).all(dim=1, keepdim=True)  # [1, 1, T, 1]
    return torch.where(finite, key, 0), torch.where(finite, value, 0), finite.flatten()


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
    part: str | None = None,
    step: StepBatch | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer: query [1, H, T, D], key and value [1, K, T, D],
    after RoPE. Returns [1, T, H, D] and no weights.

    `part`, see `patching.pruned_forward`: "keys" writes keys and values and returns nothing of interest, "ends"
    attends only.
    `step`: given for a step of decodes, which is compiled with its attention; else it is the one in progress.
    Raises RuntimeError when the model was called by anybody but the engine, whose step says where and what.
    """
    cache = module.kv_cache
    if step is not None:
        return cache.update_and_attend(step, query, key, value, scaling, softcap), None
    if part != "ends":
        cache.update(key, value)
    if part == "keys":
        return query.transpose(1, 2), None
    return cache.attend(query, scaling, softcap, ends=part == "ends"), None
