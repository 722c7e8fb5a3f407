"""Compare attention on pages in place with attention on gathered pages: time and memory over length, batch, page size.

There are three ways to attend, all on the same keys and values: the engine's FlexAttention, which reads pages in place;
`scaled_dot_product_attention` on keys and values gathered into [B, K, S, D]; and naive attention on the gathered ones.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import device_name
from flex_nano_vllm.attention import PagedKVCache, Scores, step_in_progress
from flex_nano_vllm.device import kernel_options, tile_kinds, why_not_compiled
from flex_nano_vllm.geometry import Geometry, cdiv
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.masks import Causal
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.runner import compile_flex_attention, padding_chunk
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.step import StepBatch, StepVectors, TileLayout, num_pages

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 4, 128  # as in gemma2-small
KV_LENS, BATCH_SIZES, PAGE_SIZES = [128, 512, 2048], [1, 8, 32], [16, 64, 128]
REPETITIONS = 7
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Measurement:
    """Time and memory of one way to attend, at one size."""

    phase: str  # "decode": one query per sequence; "prefill": one query per token
    kv_len: int  # tokens of each sequence
    batch_size: int
    page_size: int
    way: str
    seconds: float  # median
    peak_bytes: int  # temporaries and the output


def measure_crossover(
    device: torch.device, dtype: torch.dtype, kv_lens: list[int], batch_sizes: list[int], page_sizes: list[int]
) -> Iterator[Measurement]:
    """Measure decodes of all combinations, and those prefills that have at most `max(kv_lens)` tokens in all.

    Raises RuntimeError if two ways give different outputs, and ValueError if FlexAttention cannot be compiled.
    """
    if obstacle := next(filter(None, (why_not_compiled(device, dtype, page_size) for page_size in page_sizes)), None):
        raise ValueError(f"cannot time compiled attention: {obstacle}")
    longest, largest, group_size = max(kv_lens), max(batch_sizes), NUM_HEADS // NUM_KV_HEADS
    flex = compile_flex_attention(device.type, compiled=True)
    for page_size in page_sizes:
        torch.compiler.reset()  # a pool of another size needs other graphs
        max_pages = cdiv(longest, page_size)
        n_pages = 1 + largest * max_pages
        cache = PagedKVCache(0, (NUM_KV_HEADS, n_pages * page_size, HEAD_DIM, HEAD_DIM), dtype, device)
        for pool in (cache.k_cache, cache.v_cache):
            pool.normal_(generator=torch.Generator(device).manual_seed(0))
        kinds = tile_kinds(group_size, largest, longest, device.type)  # pages are not gathered
        decode_kinds = (replace(kinds[0], num_tiles=None),)
        all_rows = [kind.tile_len * group_size for kind in kinds]
        options = kernel_options(device, all_rows, page_size, HEAD_DIM, dtype)
        for kv_len, batch_size in itertools.product(kv_lens, batch_sizes):
            kv = KVManager(Geometry(n_pages, page_size, largest, longest, longest), device, prefix_caching=False)
            layout = TileLayout(kinds, NUM_KV_HEADS, group_size, (Causal(),), (kv.primary,), 0, True, None, options)
            rows = [kv.allocate([]) for _ in range(batch_size)]
            # One page for each row in turn, so that the pages of a row are scattered
            for num_tokens in range(page_size, kv_len + page_size, page_size):
                for row in rows:
                    kv.reserve(row, min(num_tokens, kv_len))
            for phase, num_queries in (("decode", 1), ("prefill", kv_len)):
                if phase == "prefill" and batch_size * kv_len > longest:
                    continue
                sequences = [replace(padding_chunk(kv_len).sequence, row=row) for row in rows]
                chunks = [Chunk(sequence, kv_len - num_queries, num_queries) for sequence in sequences]
                of_phase = replace(layout, kinds=decode_kinds) if phase == "decode" else layout
                kv.sync()
                vectors = StepVectors.build(chunks, of_phase, device)
                step = StepBatch.build(vectors, num_pages(chunks, page_size), of_phase)
                ways = _ways(cache, kv.primary, rows, kv_len, num_queries, step, flex)
                outputs = {way: attend() for way, attend in ways.items()}
                for way, output in outputs.items():
                    difference = (output - outputs["gather + naive"]).abs().max()
                    if not difference <= TOLERANCE[dtype]:  # also true of a NaN
                        raise RuntimeError(f"{way} is off by {difference:.2g}: {phase}, {batch_size} x {kv_len} tokens")
                for way, seconds in _median_seconds(ways, device).items():
                    peak = _peak_bytes(ways[way], device)
                    yield Measurement(phase, kv_len, batch_size, page_size, way, seconds, peak)


def _ways(
    cache: PagedKVCache,
    page_table: PageTable,
    rows: list[int],
    kv_len: int,
    num_queries: int,
    step: StepBatch,
    flex: Callable[..., Tensor],
) -> dict[str, Callable[[], Tensor]]:
    """Return a function for each way to attend with the last `num_queries` tokens of each row.

    Each function returns [1, T, H, D]. The functions do not compute block masks or slots, because a step computes these
    once for all of its layers.
    """
    pool = cache.k_cache
    positions = torch.arange(kv_len, device=pool.device)
    pages = page_table.table[torch.tensor(rows, device=pool.device)].long()  # [B, N]
    slots = pages[:, positions // page_table.page_size] * page_table.page_size + positions % page_table.page_size
    generator = torch.Generator(pool.device).manual_seed(1)
    shape = (1, NUM_HEADS, len(rows) * num_queries, HEAD_DIM)
    query = torch.randn(shape, generator=generator, dtype=pool.dtype, device=pool.device)

    def paged() -> Tensor:
        with step_in_progress(step, flex):
            return cache.attend(query, Scores(HEAD_DIM**-0.5))

    return {
        "flex, paged": paged,
        "gather + sdpa": lambda: _sdpa(query, *_gather(cache, slots)),
        "gather + naive": lambda: _naive(query, *_gather(cache, slots)),
    }


def _gather(cache: PagedKVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copy keys and values of the sequences into two tensors [B, K, S, D]."""
    return tuple(pool[0, :, slots].transpose(0, 1) for pool in (cache.k_cache, cache.v_cache))


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with queries [1, H, T, D], T = B * Q, to keys and values [B, K, S, D]. Returns [1, T, H, D]."""
    dense = query[0].unflatten(1, (len(key), -1)).transpose(0, 1)  # [B, H, Q, D]
    output = scaled_dot_product_attention(dense, key, value, is_causal=dense.shape[2] > 1, enable_gqa=True)
    return output.transpose(1, 2).flatten(0, 1)[None]


def _naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute the result of `_sdpa` with all scores in memory."""
    dense = query[0].unflatten(1, (len(key), -1)).transpose(0, 1)
    key, value = (x.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for x in (key, value))
    scores = dense @ key.transpose(-1, -2) * HEAD_DIM**-0.5
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(
        1 + key.shape[2] - dense.shape[2]
    )
    output = scores.masked_fill(unseen, -torch.inf).softmax(dim=-1) @ value
    return output.transpose(1, 2).flatten(0, 1)[None]


def _median_seconds(ways: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, float]:
    """Return the median time of each way. The ways run in turns, so that other load on the machine affects all."""
    seconds = {way: [] for way in ways}
    for _ in range(REPETITIONS):
        for way, attend in ways.items():
            started = time.perf_counter()
            attend()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[way].append(time.perf_counter() - started)
    return {way: sorted(each)[REPETITIONS // 2] for way, each in seconds.items()}


def _peak_bytes(attend: Callable[[], Tensor], device: torch.device) -> int:
    """Return the peak of the bytes that a call has allocated."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        attend()
    held = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def report_crossover(device: torch.device, dtype: str, console: Console) -> None:
    """Print time and peak memory of paged FlexAttention and of attention on gathered pages, and the ratio of times."""
    console.print(f"attention on pages, {NUM_HEADS}/{NUM_KV_HEADS} heads of {HEAD_DIM}, {dtype}, {device_name(device)}")
    measurements = list(measure_crossover(device, getattr(torch, dtype), KV_LENS, BATCH_SIZES, PAGE_SIZES))
    size = ["phase", "page_size", "batch_size", "kv_len"]
    frame = pd.DataFrame(map(asdict, measurements))
    ways = list(frame["way"].unique())
    table = Table(*(name.replace("_", " ") for name in size), *ways, "flex / best other", title="ms (peak MB)")
    for key, group in frame.groupby(size, sort=False):
        group = group.set_index("way")
        cells = [f"{group.seconds[way] * 1e3:,.2f} ({group.peak_bytes[way] / 1e6:,.1f})" for way in ways]
        ratio = group.seconds[ways[0]] / group.seconds[ways[1:]].min()
        table.add_row(*map(str, key), *cells, f"{ratio:.2f}")
    console.print(table)
    record = {"torch": torch.__version__, "device": device_name(device), "threads": torch.get_num_threads()}
    print(json.dumps(record | {"dtype": dtype, "attention": frame.to_dict("records")}))
