"""Running the model on a step: compilation, shape buckets, warm-up. Does not know which sequence is which."""

import ctypes
import functools
import gc
import math
import os
import shutil
import sysconfig
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import PreTrainedModel

from flex_nano_vllm.attention import ATTN_IMPLEMENTATION, step_in_progress
from flex_nano_vllm.cascade import CascadeRule, PackedDecodes
from flex_nano_vllm.geometry import Geometry, cdiv
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.patching import attention_layers, num_logits, patch_model
from flex_nano_vllm.sampler import ARGMAX, Draw, choose, sample
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.sequence import Sequence
from flex_nano_vllm.step import StepBatch, TileKind, TileLayout, pack_decodes
from flex_nano_vllm.transfer import upload

# Rows of a large tile, tokens times G. On a GPU a full tile of matrix-multiply work; on a CPU what was fastest. (With
# 64 and more, torch's bfloat16 kernel first transposes the whole pool on CPUs that multiply bfloat16 in hardware.)
LARGE_TILE_ROWS = {"cuda": 128, "cpu": 16}
NUM_SAMPLER_GRAPHS = 2  # with and without cutting tokens off by their ranks
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

    def __init__(self, model: PreTrainedModel, kv: KVManager, compiled: bool, cascade: bool):
        self.model, self.kv, self.compiled = model, kv, compiled
        config, geometry = model.config, kv.geometry
        max_batch_size, budget = geometry.max_batch_size, geometry.max_num_batched_tokens
        num_kv_heads = config.num_key_value_heads
        group_size = config.num_attention_heads // num_kv_heads
        if compiled:
            kinds = tile_kinds(group_size, max_batch_size, budget, model.device.type)
        else:
            kinds = (TileKind(tile_len=1, buckets=None),)
        windows = geometry.layer_windows
        most = min(max_batch_size, budget)
        rule = cascade_rule(kinds, num_kv_heads, group_size, geometry, model.device) if cascade else None
        distinct = tuple(dict.fromkeys(windows))
        self.layout = TileLayout(kinds, num_kv_heads, group_size, distinct, windows[-1], compiled, rule)
        decodes = TileKind(kinds[0].tile_len, decode_buckets(most))
        self.decode_layout = replace(self.layout, kinds=(decodes,)) if compiled else None
        self.flex = compile_flex_attention(model.device.type, compiled)
        self.model_of_any_length, self.model_of_decodes, self.choose = model, None, choose
        self._sampler_is_ready = not compiled
        if compiled:
            make = functools.partial(torch.compile, fullgraph=True, backend=inductor(model.device.type))
            self.model_of_any_length = make(model, dynamic=True, options=dict(UNGUARDED))
            cuda_graphs = {"triton.cudagraphs": True} if model.device.type == "cuda" else {}
            self.model_of_decodes = make(model, dynamic=False, options=UNGUARDED | cuda_graphs)
            self.choose = make(choose, dynamic=True, options=dict(UNGUARDED))
        patch_model(model, geometry)  # last: nobody would undo it here

    @property
    def max_graphs(self) -> int:
        """The most graphs that serving can ever compile."""
        if not self.compiled:
            return 0
        windows = self.kv.geometry.layer_windows
        of_attention = len(set(windows)) * sum(len(kind.buckets) for kind in self.layout.kinds)
        packed = self.layout.cascade is not None
        return len(self.decode_layout.kinds[0].buckets) + packed + 1 + of_attention + NUM_SAMPLER_GRAPHS

    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Compute the chunks and return the logits of each one's last tokens, `num_logits` of them: [W, V], valid until
        the next call.

        A row has a NaN where the chunk has met numbers that are not finite, there or anywhere else.
        """
        if self.model.config._attn_implementation != ATTN_IMPLEMENTATION:
            raise RuntimeError("set_attn_implementation was called on the engine's model: close the engine first")
        with self._without_autocast():
            self._copy_pages()
            return self._run(chunks, pack_decodes(chunks, self.kv, self.layout))

    def _without_autocast(self) -> torch.autocast:
        """The engine computes in the model's dtype, in whatever mode its caller's thread is: so do the KV pools."""
        return torch.autocast(self.model.device.type, enabled=False)

    def sample(self, logits: Tensor, draws: list[Draw]) -> Tensor:
        """`sampler.sample`, compiled: the same for any number of rows, of edits, and of ranks that are looked at."""
        with self._without_autocast():
            if all(draw is ARGMAX for draw in draws):
                return sample(logits, draws)  # nothing compiled takes part: the compiler's settings stay
            return self._sample_compiled(logits, draws)

    @torch._dynamo.config.patch(DYNAMO_CONFIG)
    @torch.inference_mode(False)
    @torch.no_grad()
    def _sample_compiled(self, logits: Tensor, draws: list[Draw]) -> Tensor:
        if not self._sampler_is_ready:
            # Sizes that are the same the first time would be taken for one.
            some = logits.new_zeros(3, logits.shape[1])
            sample(some, [Draw(temperature=1.0, top_k=4)] * 3, self.choose)
            sample(some, [Draw(temperature=1.0)] * 3, self.choose)
            self._sampler_is_ready = True
        return sample(logits, draws, self.choose)

    # Not set for good: it is the user's setting as well, and one of each thread.
    @torch._dynamo.config.patch(DYNAMO_CONFIG)
    # The check runs a graph's first call under other dispatch keys, for which attention would be compiled once more.
    @torch._functorch.config.patch(check_custom_op_aliasing=False)
    # Whatever mode the caller is in: tensors made in inference mode are other tensors to a kernel's guards.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, chunks: list[Chunk], packed: PackedDecodes | None = None) -> Tensor:
        num_chunks = len(chunks)
        as_decodes = self.compiled and all(chunk.length == 1 for chunk in chunks)
        if as_decodes:
            layout = self.decode_layout
            num_padding = layout.kinds[0].num_padded_tiles(num_chunks) - num_chunks
        else:
            layout = self.layout
            num_padding = max(0, 2 - num_chunks)  # a dimension of size 1 would be a graph of its own
        batch = StepBatch.build(chunks + [padding_chunk(1)] * num_padding, self.kv, layout, packed)
        logits = self.call_model(batch, as_decodes)
        return logits[: len(logits) - num_padding]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _copy_pages(self) -> None:
        """Copy the pages of forked sequences, in every layer, before anybody writes to them."""
        copies = [copy for of_row in self.kv.copies.values() for copy in of_row]
        for table in {table for table, _, _ in copies}:
            pairs = np.array([(source, target) for other, source, target in copies if other is table])
            sources, targets = upload([*pairs.T], table.table.device)
            for attention in attention_layers(self.model):
                if self.kv.table(attention.kv_cache.window) is table:
                    attention.kv_cache.copy_pages(sources, targets, table.page_size)
        self.kv.copies.clear()

    def call_model(self, batch: StepBatch, as_decodes: bool) -> Tensor:
        """The logits that a step wants, [W, V], those of padding included. `as_decodes`: a bucket of decodes."""
        arguments = dict(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,  # the default would concatenate everything into a cache of its own
        )
        if as_decodes:
            return self.model_of_decodes(**arguments, step=batch).logits[0]
        with step_in_progress(batch, self.flex) as finite:
            logits = self.model_of_any_length(**arguments, logits_indices=batch.logits_indices).logits[0]
        chunk_of_token = torch.searchsorted(batch.chunk_ends, torch.arange(len(finite), device=logits.device))
        failed = torch.zeros_like(batch.chunk_ends).index_add_(0, chunk_of_token, (~finite).long()) > 0
        logits[:, 0].masked_fill_(failed[chunk_of_token[batch.logits_indices]], torch.nan)
        return logits

    def warmup(self) -> None:
        """Compile every graph by running each bucket, on padding: row 0 sees nothing and writes to page 0."""
        if not self.compiled:
            return
        with self._without_autocast():
            self._warmup()

    def _warmup(self) -> None:
        rule, buckets = self.layout.cascade, self.decode_layout.kinds[0].buckets
        decodes = [(bucket, None) for bucket in buckets]
        if rule is not None:
            decodes.append((buckets[-1], PackedDecodes.empty(rule.tile_len, self.kv.primary.n_pages)))
        for bucket, packed in decodes:
            for _ in range(2 if self.model.device.type == "cuda" else 1):  # the second run records the CUDA graph
                self._run([padding_chunk(1)] * bucket, packed)
        geometry = self.kv.geometry
        longest = geometry.max_pages_per_row * geometry.page_size
        # Two tokens and one of padding. More tokens than chunks: else dynamo would learn that they are always the same.
        self._run([padding_chunk(2)])
        shortest = self.layout.kinds[0].tile_len + 1  # chunk that goes into large tiles
        # The last layer attends in such tiles for rated prompts only. Other layers of its window do so anyhow.
        in_large_tiles = geometry.layer_windows[-1] not in geometry.layer_windows[:-1]
        for kind in self.layout.kinds[1:] if shortest <= longest else ():
            num_tiles_reached = 0
            for bucket in kind.buckets:
                num_tiles = cdiv(bucket, geometry.max_batch_size)  # of each chunk
                length = min(longest, (num_tiles - 1) * kind.tile_len + shortest)
                num_chunks = min(bucket // cdiv(length, kind.tile_len), geometry.max_batch_size)
                if num_chunks * cdiv(length, kind.tile_len) > num_tiles_reached:
                    self._run([padding_chunk(length, in_large_tiles)] * num_chunks)
                num_tiles_reached = bucket
        logits = torch.zeros(2, num_logits(self.model), device=self.model.device)
        self.sample(logits.to(self.model.dtype), [Draw(temperature=1.0)] * 2)
        gc.collect()  # compiling leaves so much behind that a step of serving would soon pause for it, 0.3 s


def release_openmp_threads() -> None:
    """Let the calling thread's OpenMP threads go, before another thread runs the model.

    Each thread that computes gets helpers of its own and keeps them. Once there are more of them in the process than
    processors, GNU's OpenMP lets all of them sleep between two parallel regions, and every operator takes 70
    microseconds more: decode steps of a small model half as long again. The calling thread gets new ones if it needs
    them.
    """
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    except OSError:
        return  # another system, where it is not known to matter
    for path in mapped:
        if Path(path).name.startswith(("libgomp", "libiomp")):
            pause = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)  # of OpenMP 5.0, GCC 9
            if pause is not None:
                pause(1)  # softly: settings stay


def let_thread_use_cuda_graphs() -> None:
    """Give the calling thread a place for the CUDA graphs that it will record. They are a thread's own, and before 2.15
    torch has such a place in one thread only (https://github.com/pytorch/pytorch/issues/123177)."""
    from torch._inductor import cudagraph_trees as trees

    if not hasattr(trees.local, "tree_manager_containers"):
        trees.local.tree_manager_containers = {}
        trees.local.tree_manager_locks = defaultdict(threading.Lock)


def padding_chunk(length: int, with_prompt_logprobs: bool = False) -> Chunk:
    """Tokens of nobody: row 0, whose pages are all page 0."""
    params = SamplingParams(prompt_logprobs=0 if with_prompt_logprobs else None)
    nobody = Sequence(-1, None, [0] * length, length, params, 0, frozenset(), length, row=0)
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


# What the kernel of FlexAttention takes from two headers, for which g++ needs four of the nine seconds that a kernel
# takes it. (Torch 2.11 includes the first one only.)
DECLARATIONS = {
    "#include <ATen/Context.h>": """
#include <c10/core/CPUAllocator.h>
namespace at { c10::Allocator* getCPUAllocator(); }""",
    "#include <ATen/cpu/Utils.h>": "namespace at::cpu { bool init_amx(); }",
}


def inductor_on_cpu(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
    """Inductor without what slows it down on a CPU.

    - By its own name it starts processes that compile Triton, on a CPU too: they take the first seconds of serving.
    - Torch 2.11 to 2.15 multiply in the kernel of FlexAttention with register tiles of 1 x 16: every sum waits for
      the one before, and keys are read again for each query. With tiles of 8 x 16, attention of a prompt takes three
      fifths of the time in float32, nine tenths in bfloat16. Where a later torch chooses no size in this place,
      nothing is changed.
    - Its kernel includes two headers that take as long to read as the kernel takes to compile. It gets `DECLARATIONS`
      instead, but not from torch 2.16 on, which may need more of them.

    And without what makes it crash: a kernel has buffers for so many threads, but torch 2.11 takes one that was made
    for fewer out of its cache. Hence both are part of the cache's key.
    """
    # In this order: the template cannot be imported first.
    import torch._inductor.lowering
    from torch._inductor.codegen import cpp_flex_attention_template as template
    from torch._inductor.compile_fx import compile_fx

    tag, changed = f"{torch.compiler.config.cache_key_tag} {torch.get_num_threads()} threads", {}
    if hasattr(template, "GemmBlocking"):
        tile = template.GemmBlocking(8, 16, 1)
        tag, changed["GemmBlocking"] = f"{tag}, register tile 8 x 16", lambda *_: tile
    if torch.__version__ < "2.16.dev0":
        for name, text in vars(template).items():
            if isinstance(text, str) and "#include" in text:
                for header, declaration in DECLARATIONS.items():
                    text = text.replace(header, declaration)
                changed[name] = text
    with mock.patch.dict(vars(template), changed), torch.compiler.config.patch(cache_key_tag=tag):
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


def cascade_rule(
    kinds: tuple[TileKind, ...], num_kv_heads: int, group_size: int, geometry: Geometry, device: torch.device
) -> CascadeRule | None:
    """Packed tiles, for steps of more than half of the decodes that there can be; None where they can never pay.

    On a CPU a tile of 8 rows is best: one of 16 costs more with each page that is not shared than it saves with those
    that are. On a GPU the tile of a single decode has 16 rows already, and a packed one costs no more; but it reads its
    pages one after the other. That half of the rule has not been measured.
    """
    if device.type == "cuda":
        tile_len, costs = kinds[0].tile_len, (1.0, 1.0)
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        tile_len, costs = max(2, 8 // group_size), (2.0, 2.5)
        num_processors = torch.get_num_threads()
    most = min(geometry.max_batch_size, geometry.max_num_batched_tokens)
    num_tiles = max(2, cdiv(most, tile_len))
    rule = CascadeRule(tile_len, num_tiles, cdiv(most, 2) + 1, *costs, num_kv_heads / num_processors)
    return rule if rule.can_pay(most, geometry.max_pages_per_row) else None


def decode_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Numbers of decodes that a step is padded to. The linear layers compute the padding as well."""
    return tuple(sorted({cdiv(max_batch_size, 4), cdiv(max_batch_size, 2), max_batch_size}))
