"""Running the model on a step: compilation, shape buckets, warm-up. Does not know which sequence is which."""

import functools
import gc
import math
import os
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import PreTrainedModel

from flex_nano_vllm.attention import ATTN_IMPLEMENTATION, step_in_progress
from flex_nano_vllm.page_table import PageTable, cdiv
from flex_nano_vllm.patching import layer_windows, patch_model
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.sequence import SamplingParams, Sequence
from flex_nano_vllm.step import StepBatch, TileKind, TileLayout, effective_window

# Rows of a large tile, tokens times G. On a GPU a full tile of matrix-multiply work; on a CPU what was fastest. (With
# 64 and more, torch's bfloat16 kernel first transposes the whole pool on CPUs that multiply bfloat16 in hardware.)
LARGE_TILE_ROWS = {"cuda": 128, "cpu": 16}
DYNAMO_CONFIG = {
    # The engines of a process share one table of graphs, and torch's default limit of 8 is for one model.
    "recompile_limit": 4096,
    "accumulated_recompile_limit": 4096,
    # Else a second softcap in the process becomes a symbol, and FlexAttention takes no symbolic floats.
    "specialize_float": True,
}

# Nobody exchanges the code of torch and transformers while it serves: to check that takes a fifth of a lookup's time.
UNGUARDED = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}


def why_not_compiled(device: torch.device, dtype: torch.dtype, page_size: int) -> str | None:
    """The reason why FlexAttention cannot be compiled here, or None if it can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no FlexAttention kernel computes in {dtype}"
    if device.type == "cuda":
        if page_size < 16 or page_size & (page_size - 1):
            return f"the CUDA kernel needs page_size to be a power of two of at least 16, not {page_size}"
        language, variable, default = "C", "CC", "gcc"  # for Triton's launchers
    elif device.type == "cpu":
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return "FlexAttention's CPU kernel needs AVX2"
        language, variable, default = "C++", "CXX", "g++"
    else:
        return f"FlexAttention has no kernel for {device.type}"
    compiler = os.environ.get(variable, default)
    if shutil.which(compiler) is None:
        return f"there is no {language} compiler ({compiler} not found): install {default} or set {variable}"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"Python's C headers are not in {headers}: install python3-dev"
    return None


class ModelRunner:
    """Owns the patched model, compiled twice.

    A step of decodes, every chunk one token, is padded to a bucket of them and runs a graph of the whole model, its
    attention included, with static shapes: nothing is left for the host to do between layers, and a GPU replays it as a
    CUDA graph. All other steps share one graph for any number of tokens. In it FlexAttention is called through an
    operator and compiled by itself, with static shapes, one graph per (bucket of a kind of tile, distinct mask).
    All are made by `warmup()`, or by the first steps that need them; there are at most `max_graphs`, and a step whose
    shape is in no bucket cannot be built.

    Uncompiled, model and FlexAttention run operator by operator. That needs no compiler and computes in any dtype, but
    looks at every slot between the first page and the last one in use: for tests, small models, and machines without
    one.
    """

    def __init__(self, model: PreTrainedModel, page_table: PageTable, max_num_batched_tokens: int, compiled: bool):
        self.model, self.page_table, self.compiled = model, page_table, compiled
        config = model.config
        num_kv_heads = config.num_key_value_heads
        group_size = config.num_attention_heads // num_kv_heads
        if compiled:
            kinds = tile_kinds(group_size, page_table.max_batch_size, max_num_batched_tokens, model.device.type)
        else:
            kinds = (TileKind(tile_len=1, buckets=None),)
        self.layout = TileLayout(kinds, num_kv_heads, group_size, tuple(layer_windows(model)), whole_pool=compiled)
        decodes = TileKind(kinds[0].tile_len, decode_buckets(min(page_table.max_batch_size, max_num_batched_tokens)))
        self.decode_layout = replace(self.layout, kinds=(decodes,)) if compiled else None
        self.flex = compile_flex_attention(model.device.type, compiled)
        self.model_of_any_length, self.model_of_decodes = model, None
        if compiled:
            make = functools.partial(torch.compile, model, fullgraph=True, backend=inductor(model.device.type))
            self.model_of_any_length = make(dynamic=True, options=dict(UNGUARDED))
            cuda_graphs = {"triton.cudagraphs": True} if model.device.type == "cuda" else {}
            self.model_of_decodes = make(dynamic=False, options=UNGUARDED | cuda_graphs)
        patch_model(model, page_table.n_pages * page_table.page_size)  # last: nobody would undo it here

    @property
    def max_graphs(self) -> int:
        """The most graphs that serving can ever compile."""
        if not self.compiled:
            return 0
        masks = [effective_window(window, self.page_table) for window in self.layout.windows]
        small, *larger = (len(kind.buckets) for kind in self.layout.kinds)
        of_attention = len(set(masks)) * small + len(set(masks[:-1])) * sum(larger)  # the last layer attends for ends
        return len(self.decode_layout.kinds[0].buckets) + 1 + of_attention

    # Not set for good: it is the user's setting as well, and one of each thread.
    @torch._dynamo.config.patch(DYNAMO_CONFIG)
    # The check runs a graph's first call under other dispatch keys, for which attention would be compiled once more.
    @torch._functorch.config.patch(check_custom_op_aliasing=False)
    # Whatever mode the caller is in: tensors made in inference mode are other tensors to a kernel's guards.
    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Compute the chunks and return the logits at the end of each, [C, V]; valid until the next call.

        A row has a NaN where the chunk has met numbers that are not finite, at its end or anywhere before.
        """
        if self.model.config._attn_implementation != ATTN_IMPLEMENTATION:
            raise RuntimeError("set_attn_implementation was called on the engine's model: close the engine first")
        num_chunks = len(chunks)
        if self.compiled and all(chunk.length == 1 for chunk in chunks):
            layout = self.decode_layout
            num_padding = layout.kinds[0].num_padded_tiles(num_chunks) - num_chunks
        else:
            layout = self.layout
            num_padding = max(0, 2 - num_chunks)  # a dimension of size 1 would be a graph of its own
        batch = StepBatch.build(chunks + [padding_chunk(1)] * num_padding, self.page_table, layout)
        return self.call_model(batch)[:num_chunks]

    def call_model(self, batch: StepBatch) -> Tensor:
        """The logits at the ends of a step's chunks, [C, V], padding included."""
        arguments = dict(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,  # the default would concatenate everything into a cache of its own
        )
        if self.compiled and len(batch.chunk_ends) == len(batch.slots):  # then `forward` has built it for this graph
            return self.model_of_decodes(**arguments, step=batch).logits[0]
        with step_in_progress(batch, self.flex) as finite:
            logits = self.model_of_any_length(**arguments, chunk_ends=batch.chunk_ends).logits[0]
        chunk_of_token = torch.searchsorted(batch.chunk_ends, torch.arange(len(finite), device=logits.device))
        failed = torch.zeros_like(batch.chunk_ends).index_add_(0, chunk_of_token, (~finite).long()) > 0
        logits[:, 0].masked_fill_(failed, torch.nan)
        return logits

    def warmup(self) -> None:
        """Compile every graph by running each bucket, on padding: row 0 sees nothing and writes to page 0."""
        if not self.compiled:
            return
        for bucket in self.decode_layout.kinds[0].buckets:
            for _ in range(2 if self.model.device.type == "cuda" else 1):  # the second run records the CUDA graph
                self.forward([padding_chunk(1)] * bucket)
        longest = self.page_table.max_pages_per_row * self.page_table.page_size
        # Two tokens and one of padding. More tokens than chunks: else dynamo would learn that they are always the same.
        self.forward([padding_chunk(2)])
        shortest = self.layout.kinds[0].tile_len + 1  # chunk that goes into large tiles
        for kind in self.layout.kinds[1:] if shortest <= longest else ():
            num_tiles_reached = 0
            for bucket in kind.buckets:
                num_tiles = cdiv(bucket, self.page_table.max_batch_size)  # of each chunk
                length = min(longest, (num_tiles - 1) * kind.tile_len + shortest)
                num_chunks = min(bucket // cdiv(length, kind.tile_len), self.page_table.max_batch_size)
                if num_chunks * cdiv(length, kind.tile_len) > num_tiles_reached:
                    self.forward([padding_chunk(length)] * num_chunks)
                num_tiles_reached = bucket
        gc.collect()  # compiling leaves so much behind that a step of serving would soon pause for it, 0.3 s


def padding_chunk(length: int) -> Chunk:
    """Tokens of nobody: row 0, whose pages are all page 0."""
    nobody = Sequence(-1, None, [0] * length, length, SamplingParams(), 0, frozenset(), length, row=0)
    return Chunk(nobody, start=0, length=length)


def compile_flex_attention(device_type: str, compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention as kernels made by inductor, or (`compiled=False`) traced and run operator by operator."""
    return torch.compile(
        flex_attention,
        # Without fullgraph, a graph too many would silently run the uncompiled function instead.
        fullgraph=True,
        # Symbolic sizes break the C++ template (its kernel text is rewritten by name, and ks1 is part of ks17).
        dynamic=False if compiled else None,
        backend=inductor(device_type) if compiled else "eager",
        options=dict(UNGUARDED) if compiled else None,
    )


def inductor(device_type: str) -> str | Callable[..., object]:
    """The backend of torch.compile that makes kernels for the device."""
    return inductor_on_cpu if device_type == "cpu" else "inductor"


def inductor_on_cpu(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
    """Inductor without what slows it down on a CPU.

    - By its own name it starts processes that compile Triton, on a CPU too: they take the first seconds of serving.
    - Torch 2.11 to 2.15 multiply in the kernel of FlexAttention with register tiles of 1 x 16: every sum waits for
      the one before, and keys are read again for each query. With tiles of 8 x 16, attention of a prompt takes three
      fifths of the time in float32, nine tenths in bfloat16. Where a later torch chooses no size in this place,
      nothing is changed.

    And without what makes it crash: a kernel has buffers for so many threads, but torch 2.11 takes one that was made
    for fewer out of its cache. Hence both are part of the cache's key.
    """
    # In this order: the template cannot be imported first.
    import torch._inductor.lowering
    from torch._inductor.codegen import cpp_flex_attention_template as template
    from torch._inductor.compile_fx import compile_fx

    tag, widened = f"{torch.compiler.config.cache_key_tag} {torch.get_num_threads()} threads", nullcontext()
    if hasattr(template, "GemmBlocking"):
        tile = template.GemmBlocking(8, 16, 1)
        tag, widened = f"{tag}, register tile 8 x 16", mock.patch.object(template, "GemmBlocking", lambda *_: tile)
    with widened, torch.compiler.config.patch(cache_key_tag=tag):
        return compile_fx(graph, inputs)


def tile_kinds(
    group_size: int, max_batch_size: int, max_num_batched_tokens: int, device_type: str
) -> tuple[TileKind, ...]:
    """Small tiles for decodes and large ones for prompts, with buckets up to the most that a step can hold. Of the
    small ones there is one bucket: beside a prompt, tiles that see nothing are nothing.

    A chunk ends in at most one unfilled tile, and a step has at most `max_batch_size` chunks; that bounds the numbers.
    A CUDA tile has at least 16 rows, what its matrix instruction takes; a CPU is best off with a decode's G rows. (But
    not with a single one, for which torch 2.13 to 2.15 choose a decoding kernel that does not know our masks.)
    """
    small = 16 // math.gcd(16, group_size) if device_type == "cuda" else cdiv(2, group_size)
    large = max(small * 2, LARGE_TILE_ROWS[device_type] // group_size)
    large = 1 << (large.bit_length() - 1)  # a power of two, so that a power of two of rows divides the block
    bound = max_num_batched_tokens // large + max_batch_size
    return TileKind(small, (max(2, max_batch_size),)), TileKind(large, tuple(sorted({cdiv(bound, 4), bound})))


def decode_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Numbers of decodes that a step is padded to. The linear layers compute the padding as well."""
    return tuple(sorted({cdiv(max_batch_size, 4), cdiv(max_batch_size, 2), max_batch_size}))
