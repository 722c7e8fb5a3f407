"""Time of a decode step outside the model, and whether it grows with anything but the bucket of its decodes."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from benchmarks.report import device_name
from benchmarks.workload import RunOptions
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.sampling_params import SamplingParams

PROMPT_LEN = 256
BATCH_SIZES = (1, 8, 32, 64)


@dataclass(frozen=True)
class StepTime:
    """Median times of decode steps of one kind."""

    batch_size: int  # sequences that decode
    n_pages: int  # in the pool
    num_waiting: int  # requests in the queue
    seconds: float
    model_seconds: float  # in the call of the model, attention included

    @property
    def host_share(self) -> float:
        """Share of the step outside the model: scheduling, building the step, sampling and bookkeeping."""
        return 1 - self.model_seconds / self.seconds


def distinct_prompts(number: int, prompt_len: int) -> list[list[int]]:
    """Return prompts whose first two tokens differ. Otherwise a prompt could be a cache hit of another."""
    return [
        [5 + i % 200, 5 + i // 200, *(5 + (i + j) % 200 for j in range(prompt_len))][:prompt_len] for i in range(number)
    ]


@contextmanager
def decoding_together(
    engine: Inference, batch_size: int, prompt_len: int, num_steps: int, num_waiting: int = 0
) -> Iterator[Callable[[], None]]:
    """Add `batch_size` requests that decode `num_steps` times together, while `num_waiting` other requests wait.

    Yields the function that runs a step. The engine must be idle, and is idle again afterwards. Raises ValueError for
    requests that do not fit.
    """
    # The first request decodes while the other prompts are computed, with the part of the budget that decodes leave.
    budget = engine.scheduler.max_num_batched_tokens - batch_size
    num_prefill_steps = batch_size * prompt_len // max(1, budget) + batch_size
    params = SamplingParams(temperature=0, max_tokens=num_prefill_steps + num_steps + 1, ignore_eos=True)
    num_tokens = prompt_len + params.max_tokens
    needed = batch_size * engine.page_table.pages_for(num_tokens)
    if num_tokens > engine.max_request_tokens or needed > engine.page_table.num_usable_pages:
        raise ValueError(
            f"{batch_size} requests of {num_tokens} tokens do not fit: max_seq_length is {engine.max_seq_length}; they "
            f"need {needed} pages, and the pool has {engine.page_table.num_usable_pages} usable ones"
        )
    prompts = distinct_prompts(batch_size, prompt_len) + [[5 + i % 200] for i in range(num_waiting)]

    def step() -> None:
        if engine.run_one_step():
            raise RuntimeError(f"a request ended before {batch_size} requests had decoded {num_steps} tokens together")

    request_ids = []
    engine.reset_prefix_cache()  # otherwise prompts of earlier calls would be cache hits
    try:
        for prompt in prompts:
            request_ids.append(engine.add_request(prompt, params))
        yield step
    finally:
        for request_id in request_ids:
            engine.abort(request_id)


def measure_decode_step(engine: Inference, batch_size: int, num_waiting: int = 0, num_steps: int = 32) -> StepTime:
    """Measure decode steps of `batch_size` requests, while `num_waiting` other requests wait.

    Raises ValueError as `decoding_together` does, and also if `num_waiting` is not 0 although a row is free
    (`batch_size` is less than the engine's `max_batch_size`).
    """
    max_batch_size = engine.page_table.max_batch_size
    if num_waiting and batch_size != max_batch_size:
        raise ValueError(
            f"requests wait only if max_batch_size={max_batch_size} others run, but batch_size is {batch_size}"
        )
    call_model, model_seconds, seconds = engine.runner.call_model, [], []

    def timed_call(*args: object) -> object:
        _finish(engine)
        started = time.perf_counter()
        output = call_model(*args)
        _finish(engine)
        model_seconds.append(time.perf_counter() - started)
        return output

    with decoding_together(engine, batch_size, PROMPT_LEN, num_steps + 1, num_waiting) as step:
        try:
            engine.runner.call_model = timed_call
            while len(engine.scheduler.running) < batch_size or any(
                sequence.num_computed_tokens < PROMPT_LEN for sequence in engine.scheduler.running
            ):
                step()
            step()  # the first step of this shape is not measured
            model_seconds.clear()
            for _ in range(num_steps):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
        finally:
            vars(engine.runner).pop("call_model", None)  # restore the method
    n_pages = engine.page_table.n_pages
    return StepTime(batch_size, n_pages, num_waiting, statistics.median(seconds), statistics.median(model_seconds))


def _finish(engine: Inference) -> None:
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize()


def report_overhead(model: PreTrainedModel, options: RunOptions, console: Console) -> None:
    """Measure and print the time of a decode step over batch size, pool size, and number of waiting requests."""

    def measure(max_batch_size: int, pool_factor: int, cases: list[tuple[int, int]]) -> list[StepTime]:
        pages_per_sequence = -(-options.max_seq_length // options.page_size)
        n_pages = 1 + BATCH_SIZES[-1] * pages_per_sequence * pool_factor
        sizes = (max_batch_size, options.max_seq_length, n_pages, options.page_size)
        budget, compiled = options.max_num_batched_tokens, None if options.compile else False
        with Inference(model, None, *sizes, max_num_batched_tokens=budget, compile=compiled) as engine:
            return [measure_decode_step(engine, batch_size, num_waiting) for batch_size, num_waiting in cases]

    middle = BATCH_SIZES[len(BATCH_SIZES) // 2]
    curves = {
        "batch size": measure(BATCH_SIZES[-1], 1, [(batch_size, 0) for batch_size in BATCH_SIZES]),
        "pages": [measure(middle, factor, [(middle, 0)])[0] for factor in (1, 2, 4)],
        "waiting": measure(middle, 1, [(middle, num_waiting) for num_waiting in (0, 100, 1_000, 10_000)]),
    }
    table = Table("curve", "batch size", "pages", "waiting", "step, ms", "host, ms", "host, share")
    for name, steps in curves.items():
        for step in steps:
            sizes = (f"{size:,}" for size in (step.batch_size, step.n_pages, step.num_waiting))
            host = step.seconds - step.model_seconds
            table.add_row(name, *sizes, f"{step.seconds * 1e3:.2f}", f"{host * 1e3:.2f}", f"{step.host_share:.1%}")
    console.print(table)
    record = {"torch": torch.__version__, "device": device_name(model.device), "threads": torch.get_num_threads()}
    record |= {"model": options.model, "dtype": options.dtype}
    print(json.dumps(record | {name: [asdict(step) for step in steps] for name, steps in curves.items()}))
