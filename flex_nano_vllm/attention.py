"""Attention of a Hugging Face model over the paged pool, computed by FlexAttention. Independent of queues and budgets.

The code of the model is not changed. transformers selects a model's attention function by name (`AttentionInterface`)
and passes it query, key and value after projection, norms and RoPE. The engine uses only this interface:
`patching.patch_model` gives every attention layer a `PagedKVCache` and selects `paged_flex_attention`.

In a compiled engine, a step in which every chunk is one token runs one graph, attention included. The step is an
argument of the model, which passes it to every layer. Every other step runs one graph for any number of tokens. The
slots, tiles and masks of the step are not part of that graph. They are used in two operators, which are opaque to the
compiler:

    model, compiled       norm ─ q k v ─ RoPE ─┐                      ┌─ o ─ residual ─ norm ─ MLP ─ residual
    operators                                  └─ write_kv ─ attend ──┘
                                                     ▲         ▲
    step in progress       with step_in_progress(StepBatch, flex_attention): model(...)
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from flex_nano_vllm.masks import softcapped, with_sinks
from flex_nano_vllm.step import StepBatch, TiledQueries

# Must not contain the name of an implementation in transformers, which tests names by prefix and substring.
ATTN_IMPLEMENTATION = "paged_flex"

Flex = Callable[..., Tensor]  # `flex_attention`, compiled or not
Sinks = Tensor | None


class Scores(NamedTuple):
    """What a layer does to the product of queries and keys."""

    scale: float
    cap: float | None = None  # see `masks.softcapped`
    sinks: Sinks = None  # [H], see `masks.with_sinks`


_in_progress: ContextVar["StepInProgress | None"] = ContextVar("step_in_progress", default=None)


@torch.compiler.nested_compile_region
def flex_in_graph(mask: int, *args: object, **kwargs: object) -> Tensor:
    """FlexAttention within the graph of the whole model: one kernel for all layers of the same mask.

    Without the region, Inductor generates one kernel per layer, because the kernels differ in the names of variables.
    The argument `mask` separates the regions of different masks, which torch 2.15 does not do.
    """
    return flex_attention(*args, **kwargs)


@dataclass(frozen=True)
class StepInProgress:
    """Inputs of the two operators during a call of the model."""

    step: StepBatch
    flex: Flex  # a compiled `flex_attention`
    finite: Tensor  # [T] bool; an operator clears the tokens whose keys or values are not finite


@contextmanager
def step_in_progress(step: StepBatch, flex: Flex) -> Iterator[Tensor]:
    """Make `step` the input of the operators. Yields `finite`, which is complete after the model has returned."""
    finite = torch.ones_like(step.vectors.input_ids, dtype=torch.bool)
    token = _in_progress.set(StepInProgress(step, flex, finite))
    try:
        yield finite
    finally:
        _in_progress.reset(token)


def _current(num_tokens: int, ends: bool) -> StepInProgress:
    current = _in_progress.get()
    vectors = None if current is None else current.step.vectors
    if vectors is None or num_tokens != len(vectors.logits_indices if ends else vectors.input_ids):
        raise RuntimeError(
            "this model is patched for paged attention and belongs to an Inference engine: it cannot be called "
            "directly. Use the engine, or restore the model first with engine.close()"
        )
    return current


def attend(
    queries: TiledQueries, flex: Flex, query: Tensor, k_cache: Tensor, v_cache: Tensor, scores: Scores
) -> Tensor:
    """Compute attention of queries [1, H, T, D] over the pool. Returns [1, T, H, D]."""
    rows = query.transpose(1, 2).flatten(0, 2)  # [T * H, D]
    outputs = []
    for tiles in queries.tiles:
        score_mod = tiles.score_mod if scores.cap is None else softcapped(scores.cap, tiles.score_mod)
        if scores.sinks is not None:
            score_mod = with_sinks(scores.sinks, query.shape[1] // k_cache.shape[1], score_mod)
        output = flex(
            rows[tiles.query_rows],  # [tiles, K, L * G, D]
            tiles.of_pool(k_cache),  # shared by all tiles: the batch of 1 is broadcast
            tiles.of_pool(v_cache),
            score_mod=score_mod,
            block_mask=tiles.block_mask,
            scale=scores.scale,
            kernel_options=tiles.kernel_options,
        )
        outputs.append(output.flatten(0, 2))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output[queries.output_rows][None]


def write_kv(slots: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Write keys and values of a step, [1, K, T, D], into their slots of the pool, [1, K, slots, D]."""
    k_cache.index_copy_(2, slots, key)
    v_cache.index_copy_(2, slots, value)


def write_kv_op(key: Tensor, value: Tensor, finite: Tensor, k_cache: Tensor, v_cache: Tensor, mask: int) -> None:
    """Operator form of `write_kv`. `finite` [T] marks the tokens with finite keys and values."""
    current = _current(num_tokens=key.shape[2], ends=False)
    current.finite.logical_and_(finite)
    write_kv(current.step.slots[mask], key, value, k_cache, v_cache)


def attend_op(
    query: Tensor, keys: Tensor, values: Tensor, mask: int, ends: bool, scale: float, cap: float | None, sinks: Sinks
) -> Tensor:
    """Operator form of `attend`. `ends`: only logits indices have queries (see `pruning.pruned_forward`)."""
    current = _current(query.shape[2], ends)
    queries = current.step.end_queries if ends else current.step.queries[mask]
    return attend(queries, current.flex, query, keys, values, Scores(scale, cap, sinks))


OPS = torch.library.Library("flex_nano_vllm", "DEF")
OPS.define("write_kv" + torch.library.infer_schema(write_kv_op, mutates_args=("k_cache", "v_cache")))
OPS.define("attend" + torch.library.infer_schema(attend_op, mutates_args=()))
for _dispatch_key in ("CPU", "CUDA", "MPS", "XPU"):  # not for all keys at once, which would include fake tensors
    OPS.impl("write_kv", write_kv_op, _dispatch_key)
    OPS.impl("attend", attend_op, _dispatch_key)


torch.library.register_fake("flex_nano_vllm::write_kv", lambda *args: None)


@torch.library.register_fake("flex_nano_vllm::attend")
def _(query: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object) -> Tensor:
    batch, num_heads, num_tokens, _ = query.shape
    return query.new_empty(batch, num_tokens, num_heads, v_cache.shape[-1])


class PagedKVCache(nn.Module):
    """The KV pool of one attention layer, and the index of the layer's mask in the layout.

    `k_cache` and `v_cache` are two separate buffers [1, K, P * page_size, D], which may differ in D. The heads are
    outermost, so that a page of one head is contiguous. The buffers are separate, because the CPU template copies a
    buffer that K and V share (and torch 2.11 rejects it). They start as zeros and always contain finite numbers.

    Args:
        mask: index of the mask of the layer in the layout.
        shape: (K, P * page_size, D of the keys, D of the values).
    """

    def __init__(self, mask: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.mask = mask
        for name, dim in (("k_cache", shape[2]), ("v_cache", shape[3])):
            pool = torch.zeros((1, *shape[:2], dim), dtype=dtype, device=device)
            self.register_buffer(name, pool, persistent=False)

    def update(self, key: Tensor, value: Tensor) -> None:
        """Write keys and values [1, K, T, D] of the step in progress into their slots."""
        key, value, finite = _only_finite(key, value)
        torch.ops.flex_nano_vllm.write_kv(key, value, finite, self.k_cache, self.v_cache, self.mask)

    def attend(self, query: Tensor, scores: Scores, ends: bool = False) -> Tensor:
        """Compute attention of the step in progress over the pool, for queries [1, H, T, D].

        `ends`: the queries are those at the logits indices only (see `pruning.pruned_forward`). Returns [1, T, H, D].
        """
        return torch.ops.flex_nano_vllm.attend(query, self.k_cache, self.v_cache, self.mask, ends, *scores)

    def copy_pages(self, sources: Tensor, targets: Tensor, page_size: int) -> None:
        """Copy whole pages on the device. `sources` and `targets` are physical page numbers."""
        for pool in (self.k_cache, self.v_cache):
            pages = pool.unflatten(2, (-1, page_size))  # [1, K, P, page_size, D]
            pages[:, :, targets] = pages[:, :, sources]

    def attend_in_graph(
        self, step: StepBatch, query: Tensor, key: Tensor, value: Tensor, scores: Scores, writes: bool = True
    ) -> Tensor:
        """Run `update` (if the layer `writes`) and `attend` for a step of decodes, compiled into the model's graph.

        The output of a token with non-finite keys or values is NaN. Its logits then are NaN too, because each token is
        the end of its chunk.
        """
        key, value, finite = _only_finite(key, value)
        if writes:
            write_kv(step.slots[self.mask], key, value, self.k_cache, self.v_cache)
        flex = functools.partial(flex_in_graph, self.mask)
        output = attend(step.queries[self.mask], flex, query, self.k_cache, self.v_cache, scores)
        return output.masked_fill(~finite[:, None, None], torch.nan)


def _only_finite(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace non-finite keys and values by zeros.

    A NaN in the pool would reach every query whose kernel visits its page, because a masked slot still contributes
    0 * V. Conversely, the running maximum of the CPU kernel may drop a NaN that a query sees. So a token with
    non-finite keys or values is written as zeros. Only its request fails, immediately, and any request can reuse its
    pages.

    Returns:
        Keys and values [1, K, T, D] for the pool, and a mask [T] bool of the tokens that were finite.
    """
    finite = (key.isfinite().all(dim=-1) & value.isfinite().all(dim=-1)).all(dim=1)[:, None, :, None]  # [1, 1, T, 1]
    return torch.where(finite, key, 0), torch.where(finite, value, 0), finite.flatten()


def paged_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    part: str | None = None,
    step: StepBatch | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        query: [1, H, T, D], after RoPE.
        key: [1, K, T, D], after RoPE.
        value: [1, K, T, D].
        scaling: None means D ** -0.5.
        s_aux: [H], attention sinks, see `masks.with_sinks`.
        part: see `pruning.pruned_forward`. "keys" only writes keys and values, and the output is not used. "ends" only
            computes attention. None does both.
        step: the step, if it is a step of decodes that is compiled with its attention. None: the step in progress.
    Returns:
        The output [1, T, H, D], and None instead of attention weights.
    Raises:
        RuntimeError: the model was not called by the engine, so that no step provides slots and masks.
    """
    cache, writes = module.kv_cache, module.writes_kv_cache
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if step is not None:
        return cache.attend_in_graph(step, query, key, value, scores, writes), None
    if part != "ends" and writes:
        cache.update(key, value)
    if part == "keys":
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    return cache.attend(query, scores, ends=part == "ends"), None
