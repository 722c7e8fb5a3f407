"""Time of a decode step outside the model, and whether it grows with anything but the number of its decodes."""

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from unittest import mock

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.random_models import byte_tokenizer
from benchmarks.report import device_name
from benchmarks.workload import RunOptions
from flex_nano_vllm.async_inference import AsyncInference
from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.output_processor import OutputReader
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.step import StepBatch, StepVectors

PROMPT_LEN = 256
BATCH_SIZES = (1, 8, 32, 64)
POOL_FACTORS = (1, 2, 4)
NUM_WAITING = (0, 100, 1_000, 10_000)
MAX_SEQ_LENGTHS = (1_024, 8_192, 32_768, 131_072)
NUM_STREAMS = (0, 64, 1_024)
OUTPUT_LENS = (16, 1_024, 4_096)
SAME_TOKEN = 100  # of the constant logits; it has text
STOP = "\n\n"  # never in a text of that token


@dataclass(frozen=True)
class StepTime:
    """Median times of decode steps of one kind."""

    batch_size: int  # sequences that decode
    n_pages: int  # in the pool
    max_seq_length: int
    num_waiting: int  # requests in the queue
    output_len: int  # tokens of each output whose text is followed; 0: no text is followed
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


def requests_of(
    engine: Inference, batch_size: int, prompt_len: int, num_steps: int, num_waiting: int = 0
) -> tuple[list[list[int]], SamplingParams]:
    """Return the prompts of `batch_size` requests that can decode `num_steps` times together, and their parameters.

    The prompts of `num_waiting` other requests follow, of one token each. Raises ValueError for requests that do not
    fit, and also if `num_waiting` is not 0 although a row is free (`batch_size` is less than the engine's
    `max_batch_size`).
    """
    max_batch_size = engine.page_table.max_batch_size
    if num_waiting and batch_size != max_batch_size:
        raise ValueError(
            f"requests wait only if max_batch_size={max_batch_size} others run, but batch_size is {batch_size}"
        )
    # The first request decodes while the other prompts are computed, with the part of the budget that decodes leave.
    budget = engine.scheduler.max_num_batched_tokens - batch_size
    num_prefill_steps = batch_size * prompt_len // max(1, budget) + batch_size
    max_tokens = num_prefill_steps + num_steps + 1
    num_tokens = prompt_len + max_tokens
    needed = batch_size * engine.page_table.pages_for(num_tokens)
    if num_tokens > engine.max_request_tokens or needed > engine.page_table.num_usable_pages:
        raise ValueError(
            f"{batch_size} requests of {num_tokens} tokens do not fit: max_seq_length is {engine.max_seq_length}; they "
            f"need {needed} pages, and the pool has {engine.page_table.num_usable_pages} usable ones"
        )
    prompts = distinct_prompts(batch_size, prompt_len) + [[5 + i % 200] for i in range(num_waiting)]
    return prompts, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@contextmanager
def decoding_together(
    engine: Inference, batch_size: int, prompt_len: int, num_steps: int, num_waiting: int = 0, follow: bool = False
) -> Iterator[Callable[[], None]]:
    """Add `batch_size` requests that decode `num_steps` times together, while `num_waiting` other requests wait.

    Yields the function that runs a step. The engine must be idle, and is idle again afterwards. Raises ValueError as
    `requests_of` does.

    `follow`: decode the outputs token by token, for a stop string, and read them as streams after each step.
    """
    prompts, params = requests_of(engine, batch_size, prompt_len, num_steps, num_waiting)
    if follow:
        params = replace(params, stop=STOP)
    groups = [engine.input_processor.request(prompt, params, follow=follow) for prompt in prompts]
    readers = [OutputReader(group, engine.tokenizer) for group in groups] if follow else []

    def step() -> None:
        if engine.run_one_step():
            raise RuntimeError(f"a request ended before {batch_size} requests had decoded {num_steps} tokens together")
        for reader in readers:
            list(reader.deltas())

    engine.reset_prefix_cache()  # otherwise prompts of earlier calls would be cache hits
    try:
        for group in groups:
            engine.add(group)
        yield step
    finally:
        for group in groups:
            engine.abort(group[0].request_id)


def measure_decode_step(engine: Inference, batch_size: int, num_waiting: int = 0, num_steps: int = 32) -> StepTime:
    """Measure decode steps of `batch_size` requests, while `num_waiting` other requests wait.

    Raises ValueError as `requests_of` does.
    """
    with decoding_together(engine, batch_size, PROMPT_LEN, num_steps + 1, num_waiting) as step:
        return time_steps(engine, step, batch_size, num_steps)


def measure_streams(engine: Inference, num_waiting: int, num_steps: int = 32) -> StepTime:
    """Measure decode steps of an `AsyncInference` in its thread, while `num_waiting` streams wait.

    `max_batch_size` streams decode, and are read in the event loop. Raises ValueError as `requests_of` does.
    """
    batch_size = engine.page_table.max_batch_size
    prompts, params = requests_of(engine, batch_size, PROMPT_LEN, num_steps + 1, num_waiting)
    engine.reset_prefix_cache()

    async def measure() -> StepTime:
        async with AsyncInference(engine, max_waiting=len(prompts)) as shared:

            def step() -> None:
                shared._step()
                if len(engine.scheduler.running) + len(engine.scheduler.waiting) < len(prompts):
                    raise RuntimeError(f"a request ended before {batch_size} requests had decoded {num_steps} tokens")

            # Each prompt of a submission has its own mailbox, as a stream has.
            with (
                await shared.submit(prompts[:batch_size], params) as running,
                await shared.submit(prompts[batch_size:], params),
            ):
                measurement = asyncio.ensure_future(
                    shared.call(lambda: time_steps(engine, step, batch_size, num_steps))
                )
                async for _ in running:
                    if measurement.done():
                        break
                return await measurement

    return asyncio.run(measure())


def measure_followed(engine: Inference, output_lens: Sequence[int], num_steps: int = 32) -> list[StepTime]:
    """Measure decode steps of `max_batch_size` requests whose outputs are followed and long.

    The steps are measured when all outputs have `output_lens` tokens (ascending). The engine has a tokenizer. Constant
    logits replace the model, so that outputs become long soon: the times are those of the host. Raises ValueError as
    `requests_of` does.
    """
    batch_size, times = engine.page_table.max_batch_size, []
    logits = torch.zeros(max(2, batch_size), engine.spec.num_logits, device=engine.spec.device)
    logits[:, SAME_TOKEN] = 1

    def constant(run: object, vectors: StepVectors | StepBatch, *others: object) -> Tensor:
        return logits[: len(getattr(vectors, "vectors", vectors).logits_indices)]

    with (
        mock.patch.object(engine.runner, "call_model", constant),
        decoding_together(engine, batch_size, PROMPT_LEN, output_lens[-1] + num_steps + 1, follow=True) as step,
    ):
        for output_len in output_lens:
            while any(s.output_len < output_len for s in (*engine.scheduler.running, *engine.scheduler.waiting)):
                step()
            times.append(replace(time_steps(engine, step, batch_size, num_steps), output_len=output_len))
    return times


def time_steps(engine: Inference, step: Callable[[], None], batch_size: int, num_steps: int) -> StepTime:
    """Run steps until `batch_size` requests decode, and time the next `num_steps` steps."""
    scheduler, call_model, model_seconds, seconds = engine.scheduler, engine.runner.call_model, [], []

    def timed_call(*args: object) -> Tensor:
        _finish(engine)
        started = time.perf_counter()
        output = call_model(*args)
        _finish(engine)
        model_seconds.append(time.perf_counter() - started)
        return output

    with mock.patch.object(engine.runner, "call_model", timed_call):
        while len(scheduler.running) < batch_size or any(
            sequence.num_computed_tokens < PROMPT_LEN for sequence in scheduler.running
        ):
            step()
        step()  # the first step of this shape is not measured
        model_seconds.clear()
        for _ in range(num_steps):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
    return StepTime(
        batch_size=batch_size,
        n_pages=engine.page_table.n_pages,
        max_seq_length=engine.max_seq_length,
        num_waiting=len(scheduler.waiting),
        output_len=0,
        seconds=statistics.median(seconds),
        model_seconds=statistics.median(model_seconds),
    )


def _finish(engine: Inference) -> None:
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize()


def report_overhead(model: PreTrainedModel, options: RunOptions, console: Console) -> None:
    """Measure and print the time of a decode step over each size that it could grow with."""
    page_size, middle = options.page_size, BATCH_SIZES[len(BATCH_SIZES) // 2]
    pools = [1 + BATCH_SIZES[-1] * cdiv(options.max_seq_length, page_size) * factor for factor in POOL_FACTORS]

    def engine_of(
        n_pages: int,
        max_batch_size: int = middle,
        max_seq_length: int = options.max_seq_length,
        tokenizer: PreTrainedTokenizerBase | None = None,  # most tokens of a random model have no text
    ) -> Inference:
        sizes = (max_batch_size, max_seq_length, n_pages, page_size)
        budget, compiled = options.max_num_batched_tokens, None if options.compile else False
        return Inference(model, tokenizer, *sizes, max_num_batched_tokens=budget, compile=compiled)

    curves: dict[str, dict[int, StepTime]] = {}  # by the size that differs
    with engine_of(pools[0], max_batch_size=BATCH_SIZES[-1]) as engine:
        curves["batch size"] = {size: measure_decode_step(engine, size) for size in BATCH_SIZES}
    curves["pages"] = {}
    for n_pages in pools:
        with engine_of(n_pages) as engine:
            curves["pages"][n_pages] = measure_decode_step(engine, middle)
    with engine_of(pools[0]) as engine:
        curves["waiting"] = {number: measure_decode_step(engine, middle, number) for number in NUM_WAITING}
        curves["streams"] = {number: measure_streams(engine, number) for number in NUM_STREAMS}
    curves["max_seq_length"] = {}
    # The sequences are short: they need no position that the model does not have.
    with mock.patch.object(model.config, "max_position_embeddings", MAX_SEQ_LENGTHS[-1]):
        n_pages = 1 + cdiv(MAX_SEQ_LENGTHS[-1], page_size)  # a list of pages is not longer than the pool
        for max_seq_length in MAX_SEQ_LENGTHS:
            with engine_of(n_pages, max_seq_length=max_seq_length) as engine:
                curves["max_seq_length"][max_seq_length] = measure_decode_step(engine, middle)
        longest = OUTPUT_LENS[-1] + options.max_seq_length
        n_pages = 1 + middle * cdiv(longest, page_size)
        with engine_of(n_pages, max_seq_length=longest, tokenizer=byte_tokenizer()) as engine:
            curves["followed"] = dict(zip(OUTPUT_LENS, measure_followed(engine, OUTPUT_LENS)))
    table = Table(Column("curve", no_wrap=True), "value", "batch size", "pages", "step, ms", "host, ms", "host, share")
    for name, curve in curves.items():
        for value, step in curve.items():
            sizes = (f"{size:,}" for size in (value, step.batch_size, step.n_pages))
            host = step.seconds - step.model_seconds
            table.add_row(name, *sizes, f"{step.seconds * 1e3:.2f}", f"{host * 1e3:.2f}", f"{step.host_share:.1%}")
    console.print(table)
    record = {"torch": torch.__version__, "device": device_name(model.device), "threads": torch.get_num_threads()}
    record |= {"model": options.model, "dtype": options.dtype}
    print(json.dumps(record | {name: [asdict(step) for step in curve.values()] for name, curve in curves.items()}))
