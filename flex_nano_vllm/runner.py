"""Runs the model on a step: compilation, buckets, warm-up. Independent of scheduling and sampling."""

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import PreTrainedModel

from flex_nano_vllm.attention import ATTN_IMPLEMENTATION, step_in_progress
from flex_nano_vllm.cascade import PackedDecodes, cascade_rule
from flex_nano_vllm.compiling import UNGUARDED, compile_settings, inductor
from flex_nano_vllm.device import TileKind, decode_buckets, kernel_options, pads_tokens, tile_kinds, upload
from flex_nano_vllm.gather import page_buckets
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.linear import TransposedProducts
from flex_nano_vllm.models import ModelSpec
from flex_nano_vllm.patching import attention_layers, distinct_masks, patch_model
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.sequence import Sequence
from flex_nano_vllm.step import StepBatch, StepVectors, TiledQueries, TileLayout, num_pages, pack_decodes

logger = logging.getLogger(__name__)


class ModelRunner:
    """Owns the patched model, in two compiled forms.

    A step of decodes, in which every chunk is one token, has its tiles padded to a bucket. It runs a graph of the whole
    model, attention included. The host has no work between layers. On a GPU the tokens are padded too, because a CUDA
    graph is replayed with static shapes. On a CPU one graph takes any number of decodes from two on.
    All other steps share one graph for any number of tokens. That graph calls FlexAttention through an operator.
    FlexAttention is then compiled separately with static shapes: one graph for each kind of tile and each distinct
    mask, and one more for each mask and each further bucket of gathered pages.
    `warmup.py` compiles all graphs. Without it, a graph is compiled in the first step that needs it. There are at most
    `max_graphs`, because the budget and the number of rows bound every step to the largest bucket.

    Uncompiled, the model and FlexAttention run operator by operator. This needs no compiler and supports any dtype, but
    it computes scores for every slot up to the last page in use. It is for tests, small models, and machines without a
    compiler.
    """

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, kv: KVManager, compiled: bool, cascade: bool):
        self.model, self.spec, self.kv, self.compiled = model, spec, kv, compiled
        device, geometry = model.device, kv.geometry
        max_batch_size, budget = geometry.max_batch_size, geometry.max_num_batched_tokens
        heads, group_size = spec.num_kv_heads, spec.num_heads // spec.num_kv_heads
        kinds, options, packing_rows = (TileKind(tile_len=1, num_tiles=None),), {}, 0
        if compiled:
            buckets = page_buckets(device, spec.dtype, geometry.page_size, geometry.max_pages_per_row, spec.has_sinks)
            kinds = tile_kinds(group_size, max_batch_size, budget, device.type, buckets)
            packing_rows = kinds[-1].tile_len * group_size if buckets else 0
            all_rows = [kind.tile_len * group_size for kind in kinds]
            options = kernel_options(device, all_rows, geometry.page_size, spec.head_dim, spec.dtype)
        masks, indices = distinct_masks(spec, geometry)
        # Only a model that passes options to attention can be given a step, or a part of a layer's work.
        takes_steps = compiled and spec.takes_options
        packs = cascade and (takes_steps or not compiled) and not spec.has_sinks
        rule = cascade_rule(heads, group_size, geometry, device) if packs else None
        tables = tuple(kv.table(mask.window) for mask in masks)
        self.prunes = compiled and spec.prunes_last_layer
        last = indices[-1] if self.prunes else None
        self.layout = TileLayout(kinds, heads, group_size, masks, tables, last, compiled, rule, options, spec.has_sinks)
        buckets = decode_buckets(min(max_batch_size, budget), device.type) if takes_steps else ()
        self.decode_layouts = {n: replace(self.layout, kinds=(replace(kinds[0], num_tiles=n),)) for n in buckets}
        self.pads_tokens = pads_tokens(device.type)
        self.flex = compile_flex_attention(device.type, compiled, packing_rows)
        self.model_of_any_length, self.model_of_decodes = model, None
        self._compiled_shapes: set[tuple] = set()  # what identifies the graphs of the steps so far
        self.on_compile: Callable[[str], None] | None = None  # called with a notice before a step that compiles
        if compiled:
            make = functools.partial(torch.compile, fullgraph=True, backend=inductor(device.type))
            self.model_of_any_length = make(model, dynamic=True, options=dict(UNGUARDED))
            cuda_graphs = {"triton.cudagraphs": True} if device.type == "cuda" else {}
            decode = decode_function(model, self.layout)
            self.model_of_decodes = make(decode, dynamic=False, options=UNGUARDED | cuda_graphs)
        patch_model(model, spec, geometry, compiled)  # last: if something above raises, the model is not patched
        self.attention_layers = attention_layers(model, spec)

    @property
    def max_graphs(self) -> int:
        """The largest number of graphs that serving can compile for the model."""
        of_attention = len(self.layout.masks) * sum(len(kind.page_buckets) or 1 for kind in self.layout.kinds)
        of_decodes = len(self.decode_layouts) + (self.layout.cascade is not None)
        return of_decodes + 1 + of_attention if self.compiled else 0

    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Compute the chunks, and return the logits [W, V] of the last `num_logits` tokens of each chunk.

        The result is valid until the next call. A logits row has a NaN if any token of its chunk had numbers that are
        not finite.
        """
        if self.attention_layers[0].config._attn_implementation != ATTN_IMPLEMENTATION:
            raise RuntimeError("set_attn_implementation was called on the engine's model: close the engine first")
        with compile_settings(self.model.device.type):
            if self.kv.copies:
                self._copy_pages()
            return self.run(chunks, pack_decodes(chunks, self.layout) if self.layout.cascade else None)

    def run(self, chunks: list[Chunk], packed: PackedDecodes | None = None) -> Tensor:
        """Compute chunks whose pages are reserved and copied, under `compile_settings`; see `forward`."""
        as_decodes = bool(self.decode_layouts) and all(chunk.length == 1 for chunk in chunks)
        bucket = next(n for n in self.decode_layouts if n >= len(chunks)) if as_decodes else 2
        layout = self.decode_layouts[bucket] if as_decodes else self.layout
        # Apart from decodes, a dimension of size 1 would need another graph.
        num_padding = 0 if as_decodes and not self.pads_tokens else max(0, bucket - len(chunks))
        chunks = chunks + [padding_chunk(1)] * num_padding
        self.kv.sync()
        vectors = StepVectors.build(chunks, layout, self.kv.device)
        packed = packed and TiledQueries.of_packed(packed, chunks, layout)
        if as_decodes:
            shapes, run, inputs = {("decodes", bucket, packed is not None)}, self.model_of_decodes, (vectors, packed)
            of_tokens = [vectors.input_ids, vectors.positions, vectors.rows, vectors.queries.places]
            of_tokens += [] if packed is None else [packed.output_rows]
            for tensor in () if self.pads_tokens or len(chunks) == 1 else of_tokens:
                torch._dynamo.mark_dynamic(tensor, 0)
        else:
            step = StepBatch.build(vectors, num_pages(chunks, self.kv.geometry.page_size), layout, packed)
            shapes, run, inputs = _shapes(step, layout.last_mask), self._run_any_length, (step,)
        if self.compiled and not shapes <= self._compiled_shapes:
            self._announce_compilation()
        logits = self.call_model(run, *inputs)
        self._compiled_shapes |= shapes
        return logits[: len(logits) - num_padding]

    def _announce_compilation(self) -> None:
        """Log the first compilation, and call `on_compile` before each one."""
        notice = f"compiling up to {self.max_graphs} graphs of the model: 2-3 minutes the first time, seconds later"
        if not self._compiled_shapes:
            logger.info(notice)
        if self.on_compile is not None:
            self.on_compile(notice)

    def _copy_pages(self) -> None:
        """Copy pages for forked sequences, in every layer, before the step writes to the pages."""
        copies = [copy for of_row in self.kv.copies.values() for copy in of_row]
        for table in {table for table, _, _ in copies}:
            pairs = np.array([(source, target) for other, source, target in copies if other is table])
            sources, targets = upload([*pairs.T], table.table.device)
            for attention in self.attention_layers:
                if attention.writes_kv_cache and self.layout.tables[attention.kv_cache.mask] is table:
                    attention.kv_cache.copy_pages(sources, targets, table.page_size)
        self.kv.copies.clear()

    def call_model(self, run: Callable[..., Tensor], *inputs: object) -> Tensor:
        """Return the logits [W, V] of a step, padding included. `measure_decode_step` replaces it."""
        return run(*inputs)

    def _run_any_length(self, step: StepBatch) -> Tensor:
        vectors = step.vectors
        with step_in_progress(step, self.flex) as finite:
            # A pruned layer takes the indices. Otherwise the model takes them, and computes logits only there.
            indices = {"logits_indices" if self.prunes else "logits_to_keep": vectors.logits_indices}
            output = self.model_of_any_length(**model_inputs(vectors), **indices)
        logits = output.logits[0]
        chunk_of_token = torch.searchsorted(vectors.chunk_ends, torch.arange(len(finite), device=logits.device))
        failed = torch.zeros_like(vectors.chunk_ends).index_add_(0, chunk_of_token, (~finite).long()) > 0
        logits[:, 0].masked_fill_(failed[chunk_of_token[vectors.logits_indices]], torch.nan)
        return logits


def model_inputs(vectors: StepVectors) -> dict[str, object]:
    """Return the arguments of the model for a step."""
    # `use_cache=True`, the default, would also append all keys and values to transformers' cache.
    return dict(input_ids=vectors.input_ids[None], position_ids=vectors.positions[None], use_cache=False)


def decode_function(model: PreTrainedModel, layout: TileLayout) -> Callable[[StepVectors, TiledQueries | None], Tensor]:
    """Return the function to compile for steps of decodes. Its graph also computes the page lists of the step."""
    products = TransposedProducts if model.dtype == torch.float32 and model.device.type == "cpu" else nullcontext

    def decode(vectors: StepVectors, packed: TiledQueries | None) -> Tensor:
        step = StepBatch.build(vectors, layout.tables[0].max_pages_per_row, layout, packed)
        with products():
            return model(**model_inputs(vectors), step=step).logits[0]

    return decode


def _shapes(step: StepBatch, last_mask: int | None) -> set[tuple]:
    """Return what identifies the graphs of a step of any length: the masks and shapes of its tiles."""
    queries = [*enumerate(step.queries)] + ([] if last_mask is None else [(last_mask, step.end_queries)])
    return {(mask, *tiles.block_mask.shape) for mask, tiled in queries for tiles in tiled.tiles}


@functools.cache
def padding_chunk(length: int, start: int = 0, with_prompt_logprobs: bool = False) -> Chunk:
    """Return a chunk of padding tokens in row 0, where every logical page is page 0."""
    params = SamplingParams(prompt_logprobs=0 if with_prompt_logprobs else None)
    end = start + length
    padding = Sequence(-1, None, [0] * end, end, params, 0, frozenset(), end, row=0)
    return Chunk(padding, start, length)


def compile_flex_attention(device_type: str, compiled: bool, packing_rows: int = 0) -> Callable[..., Tensor]:
    """Return FlexAttention compiled by inductor, or (`compiled=False`) traced and then run operator by operator."""
    # Symbolic sizes break the C++ template: it replaces names in the kernel text, and ks1 is part of ks17.
    settings = dict(dynamic=False, backend=inductor(device_type, packing_rows), options=dict(UNGUARDED))
    # Without fullgraph, a call beyond the recompile limit would silently run the uncompiled function.
    return torch.compile(flex_attention, fullgraph=True, **(settings if compiled else dict(backend="eager")))
