"""Measurements of what shared pages and released pages save.

All parts but `long_contexts` run the same work with a switch off and on, in turns.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from benchmarks.report import device_name
from benchmarks.workload import TOKEN_IDS, RunOptions, make_workload
from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.memory import token_bytes
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.step import pack_decodes


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiments; lengths are in tokens."""

    num_requests: int = 64  # with a common prefix
    prefix_len: int = 1024
    own_len: int = 32
    new_tokens: int = 32
    num_turns: int = 12  # of a conversation
    turn_len: int = 128  # half of it from the user, half of it generated
    cascade_prefixes: tuple[int, ...] = (256, 512, 1024, 2048)
    cascade_batches: tuple[int, ...] = (16, 32, 64)
    cascade_steps: int = 24
    context_len: int = 8192
    num_contexts: int = 4
    repetitions: int = 3
    unshared_repetitions: int = 16  # where prefix caching should make no difference


@dataclass(frozen=True)
class Engines:
    """Builds engines for one model. Each size is compiled once."""

    model: PreTrainedModel
    options: RunOptions
    sizes: Sizes

    def of_size(
        self, max_batch_size: int, max_seq_length: int | None = None, n_pages: int | None = None
    ) -> Callable[..., Inference]:
        """Compile the graphs for these sizes, and return a function that builds an engine with given switches.

        Without `max_seq_length`, engines take contexts of `sizes.context_len`, and the pool has room for all
        `sizes.num_requests` requests of `common_prefix`.
        """
        sizes, options = self.sizes, self.options
        if max_seq_length is None:
            length = sizes.prefix_len + sizes.own_len + sizes.new_tokens
            n_pages = 1 + sizes.num_requests * cdiv(length, options.page_size)
            max_seq_length = sizes.context_len
        budget, compiled = options.max_num_batched_tokens, None if options.compile else False
        engine_sizes = (max_batch_size, max_seq_length, n_pages, options.page_size)
        build = partial(Inference, self.model, None, *engine_sizes, max_num_batched_tokens=budget, compile=compiled)
        with build() as engine:
            engine.warmup()
        return build


def common_prefix(engines: Engines) -> list[dict]:
    """Measure the throughput of requests with a common prefix."""
    sizes = engines.sizes
    (prefix,) = random_texts(1, sizes.prefix_len, seed=0)
    prompts = [prefix + own for own in random_texts(sizes.num_requests, sizes.own_len, seed=1)]
    lengths = [sizes.new_tokens] * len(prompts)

    def seconds(engine: Inference) -> float:
        return seconds_of(engine, prompts, lengths)

    times = in_turns(engines.of_size(len(prompts)), "enable_prefix_caching", seconds, sizes.repetitions)
    off, on = (len(prompts) / statistics.median(times[switch]) for switch in (False, True))
    common = {"requests": len(prompts), "tokens in common": sizes.prefix_len}
    return [common | {"requests/s": off, "with prefix caching": on, "ratio": on / off}]


def conversation(engines: Engines) -> list[dict]:
    """Measure the time to first token of each turn of a conversation. A turn extends all turns before it."""
    sizes = engines.sizes

    def ttfts(engine: Inference) -> list[float]:
        text, times = [], []
        for said in random_texts(sizes.num_turns, sizes.turn_len // 2, seed=2):
            (output,) = engine.generate(text + said, greedy(sizes.turn_len // 2), use_tqdm=False)
            text = output.prompt_token_ids + output.outputs[0].token_ids
            times.append(1e3 * output.metrics.ttft)
        return times

    times = in_turns(engines.of_size(sizes.num_requests), "enable_prefix_caching", ttfts, sizes.repetitions)
    off, on = (map(statistics.median, zip(*times[switch])) for switch in (False, True))
    return [
        {
            "tokens of the prompt": sizes.turn_len * turn + sizes.turn_len // 2,
            "time to first token, ms": without,
            "with prefix caching": with_caching,
        }
        for turn, (without, with_caching) in enumerate(zip(off, on))
    ]


def long_contexts(engines: Engines) -> list[dict]:
    """Measure the KV memory of one request while its context grows, and the peak of several requests.

    The result also has the memory that the requests would use if every layer held as many pages as full-attention
    layers.
    """
    sizes = engines.sizes
    with engines.of_size(sizes.num_requests)() as engine:
        geometry = engine.kv.geometry
        layers = Counter(geometry.pool_of(window) for window in geometry.layer_windows)
        megabytes = geometry.page_size * token_bytes(engine.spec) / 1e6  # of one page in one layer

        def watch(num_requests: int) -> list[dict]:
            """Record the pages in use in each step, after pages are reserved and before pages are released."""
            rows, forward = [], engine.runner.forward

            def watched_forward(chunks: list[Chunk]) -> torch.Tensor:
                pages = sum(table.num_used_pages * layers[window] for window, table in engine.kv.pools.items())
                alike = engine.kv.primary.num_used_pages * len(geometry.layer_windows)
                row = {"requests": num_requests, "tokens of the first": chunks[0].start + chunks[0].length}
                row |= {"pages, all layers together": pages, "if all layers were full": alike}
                rows.append(row | {"MB": pages * megabytes, "if all were full": alike * megabytes})
                return forward(chunks)

            engine.runner.forward = watched_forward
            prompts = random_texts(num_requests, sizes.context_len - sizes.new_tokens, seed=num_requests)
            seconds_of(engine, prompts, [sizes.new_tokens] * num_requests)
            del engine.runner.forward  # restore the method
            return [row | {"saved": 1 - row["MB"] / row["if all were full"]} for row in rows]

        one = watch(1)
        peak = max(watch(sizes.num_contexts), key=lambda row: row["MB"])
    prefill = [row for row in one if row["tokens of the first"] <= sizes.context_len - sizes.new_tokens]
    return [*prefill, one[-1], peak]


def cascade(engines: Engines) -> list[dict]:
    """Measure a decode step of requests with a common prefix, over their number and the length of the prefix."""
    sizes = engines.sizes

    def step_time(engine: Inference, prefix_len: int) -> tuple[float, bool]:
        """Return the median milliseconds of a step, and whether its decodes were packed."""
        engine.reset_prefix_cache()
        (prefix,) = random_texts(1, prefix_len, seed=3)
        engine.generate(prefix, greedy(1), use_tqdm=False)  # its pages are cached from here on
        batch_size = engine.page_table.max_batch_size
        params, seconds = greedy(sizes.cascade_steps + batch_size * (sizes.own_len + engine.page_table.page_size)), []
        ids = [engine.add_request(prefix + own, params) for own in random_texts(batch_size, sizes.own_len, seed=4)]
        sequences = [*engine.scheduler.waiting]
        while len(seconds) < sizes.cascade_steps:
            all_decode = all(sequence.num_computed_tokens >= sequence.num_prompt_tokens for sequence in sequences)
            started = time.perf_counter()
            engine.run_one_step()
            if all_decode:
                seconds.append(time.perf_counter() - started)
        next_step = [Chunk(sequence, sequence.num_computed_tokens, 1) for sequence in sequences]
        layout = engine.runner.layout
        packed = layout.cascade is not None and pack_decodes(next_step, layout) is not None
        for request_id in ids:
            engine.abort(request_id)
        return 1e3 * statistics.median(seconds), packed

    def step_times(engine: Inference) -> list[tuple[float, bool]]:
        return [step_time(engine, prefix_len) for prefix_len in sizes.cascade_prefixes]

    rows = []
    for batch_size in sizes.cascade_batches:
        steps = in_turns(engines.of_size(batch_size), "enable_cascade", step_times, sizes.repetitions)
        for i, prefix_len in enumerate(sizes.cascade_prefixes):
            off, on = (statistics.median(run[i][0] for run in steps[switch]) for switch in (False, True))
            row = {"decodes": batch_size, "tokens in common": prefix_len, "step, ms": off, "with cascade": on}
            rows.append(row | {"ratio": off / on, "packed": steps[True][-1][i][1]})
    return rows


def nothing_in_common(engines: Engines) -> list[dict]:
    """Measure the throughput of the benchmark's own workload, whose requests share no pages."""
    options = engines.options
    requests = options.requests()
    prompts, lengths = [list(r.prompt_token_ids) for r in requests], [r.max_tokens for r in requests]

    def seconds(engine: Inference) -> float:
        return seconds_of(engine, prompts, lengths)

    build = engines.of_size(options.max_batch_size, options.max_seq_length, options.n_pages)
    times = in_turns(build, "enable_prefix_caching", seconds, engines.sizes.unshared_repetitions)
    off, on = (sum(lengths) / statistics.median(times[switch]) for switch in (False, True))
    return [{"requests": len(prompts), "output tokens/s": off, "with prefix caching": on, "ratio": on / off}]


PARTS = {part.__name__: part for part in (common_prefix, conversation, long_contexts, cascade, nothing_in_common)}


def report_savings(
    model: PreTrainedModel, options: RunOptions, sizes: Sizes, parts: list[str], console: Console
) -> None:
    """Measure the named `PARTS`, or "all". Prints a table for each, then one JSON line.

    Raises ValueError for other names.
    """
    if unknown := set(parts) - {*PARTS, "all"}:
        raise ValueError(f"unknown parts: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}, or all")
    record = {"torch": torch.__version__, "device": device_name(model.device), "threads": torch.get_num_threads()}
    record |= {"model": options.model, "dtype": options.dtype}
    engines = Engines(model, options, sizes)
    for name in PARTS if "all" in parts else parts:
        record[name] = rows = PARTS[name](engines)
        table = Table(*rows[0], title=name)
        for row in rows:
            table.add_row(*map(_shown, row.values()))
        console.print(table)
    print(json.dumps(record))


def in_turns(
    build: Callable[..., Inference], switch: str, measure: Callable[[Inference], object], repetitions: int
) -> dict[bool, list]:
    """Measure fresh engines with the switch on and with the switch off, `repetitions` times.

    The order alternates: on before off in the first repetition, off before on in the second. Returns the measurements
    for each value of the switch.
    """
    results: dict[bool, list] = {False: [], True: []}
    for i in range(repetitions):
        for on in (False, True) if i % 2 else (True, False):
            with build(**{switch: on}) as engine:
                results[on].append(measure(engine))
    return results


def seconds_of(engine: Inference, prompts: list[list[int]], max_tokens: list[int]) -> float:
    started = time.perf_counter()
    engine.generate(prompts, list(map(greedy, max_tokens)), use_tqdm=False)
    return time.perf_counter() - started


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def random_texts(num_texts: int, length: int, seed: int) -> list[list[int]]:
    return [list(r.prompt_token_ids) for r in make_workload(num_texts, (length, length), (1, 1), TOKEN_IDS, seed)]


def _shown(value: float | int | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
