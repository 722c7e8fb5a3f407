"""Decode steps of one engine, with one decision about its work on a GPU changed at a time, measured in turns.

    uv run python -m benchmarks.switches

A switch is a context manager in which engines are built and run. It patches functions of the package. No switch changes
a token.
"""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Annotated
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from benchmarks.exactness import compare
from benchmarks.overhead import decoding_together
from benchmarks.random_models import random_model
from benchmarks.report import device_name
from flex_nano_vllm import page_table, runner
from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.page_table import PageList, PageTable
from flex_nano_vllm.sampler import ARGMAX
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.sequence import Sample
from flex_nano_vllm.step import StepBatch, StepVectors

NUM_UNTIMED = 3  # decode steps that compile the graph, record it as a CUDA graph, and replay it for the first time


@contextmanager
def tiles_of_decodes(**changed: object) -> Iterator[None]:
    """Change options of the kernel for the tiles of decodes."""
    options_of = runner.kernel_options

    def changed_options(device: torch.device, all_rows: list[int], *args: object) -> dict[int, dict[str, object]]:
        options = options_of(device, all_rows, *args)
        return options | {all_rows[0]: options[all_rows[0]] | changed}

    with mock.patch.object(runner, "kernel_options", changed_options):
        yield


@contextmanager
def blocks_of_torch() -> Iterator[None]:
    """Let torch choose the sizes of blocks for all tiles. They do not fit every GPU, see `device.kernel_options`."""

    def only_the_kernel(device: torch.device, all_rows: list[int], *args: object) -> dict[int, dict[str, object]]:
        return {rows: dict(BACKEND="TRITON") for rows in all_rows}

    with mock.patch.object(runner, "kernel_options", only_the_kernel):
        yield


@contextmanager
def all_pages_partial() -> Iterator[None]:
    """List full pages behind the partial ones, so that masks have no full pages. Packed tiles keep theirs.

    "AUTO" selects the decoding kernel for tiles of less than 128 query rows with static shapes, and its result is right
    with full pages too. But then each split gets an equal part of the *pool* (flex_decode.py.jinja of torch 2.15:
    `TILE_KV_OG = tl.cdiv(KV_LEN, SPLIT_KV)`), which is longer than most sequences: one split reads all partial pages of
    a decode, and another one all full pages. Without full pages, the splits share the pages of each decode.
    """
    mask_of_tiles = page_table.mask_of_tiles

    def without_full_pages(masked: PageList, full: PageList, *args: object) -> BlockMask:
        (num_masked, pages), (num_full, full_pages) = masked, full
        index = torch.arange(pages.shape[1], device=pages.device)
        behind = (index - num_masked[:, None]).clamp(min=0)
        pages = torch.where(index < num_masked[:, None], pages, full_pages.gather(1, behind))
        # `widen` for its explicit strides: with those that inductor chooses, all tiles would read the first list.
        block_mask = mask_of_tiles((num_masked + num_full, page_table.widen(pages, pages.shape[1], 0)), full, *args)
        block_mask.full_kv_num_blocks = block_mask.full_kv_indices = None
        return block_mask

    with mock.patch.object(page_table, "mask_of_tiles", without_full_pages):
        yield


@contextmanager
def splits_of_decodes() -> Iterator[None]:
    """Divide the pages of a decode among several blocks of threads: "AUTO", and no full pages."""
    with tiles_of_decodes(BACKEND="AUTO"), all_pages_partial():
        yield


@contextmanager
def no_cuda_graphs() -> Iterator[None]:
    """Launch the kernels of a step of decodes one by one."""
    inductor = runner.inductor

    def backend_of(*args: object) -> str | Callable[..., object]:
        backend = inductor(*args)
        return without_options if backend == "inductor" else backend

    with mock.patch.object(runner, "inductor", backend_of):
        yield


def without_options(graph: torch.fx.GraphModule, inputs: list[Tensor], options: object = None) -> object:
    """Inductor without the options of torch.compile, of which the engine has one: the use of CUDA graphs."""
    return torch._inductor.compile(graph, inputs)


@contextmanager
def static_tables() -> Iterator[None]:
    """Mark the page tables on the device, which are written in place, as inputs that a CUDA graph need not copy."""
    init = PageTable.__init__

    def init_and_mark(table: PageTable, *args: object, **kwargs: object) -> None:
        init(table, *args, **kwargs)
        for tensor in (table.table, table.physical_to_logical):
            torch._dynamo.mark_static_address(tensor)

    with mock.patch.object(PageTable, "__init__", init_and_mark):
        yield


@contextmanager
def host_one_step_behind() -> Iterator[None]:
    """Launch the next decodes before the host reads the tokens of a step, which stay on the device as their inputs.

    For greedy requests only. The host then schedules and commits while the device computes. If the scheduler chooses
    other chunks than those that were launched, because a request has ended or another one is admitted, their result is
    not used. The keys and values that they wrote are written again, or lie behind the last token of an ended request.
    """
    launched: dict[Inference, tuple[list[Chunk], Tensor]] = {}  # what runs ahead

    def step(engine: Inference) -> None:
        started, chunks = time.perf_counter(), engine.scheduler.schedule()
        ahead, tokens = launched.pop(engine, (None, None))
        if chunks:
            if chunks != ahead:
                tokens = chosen(engine, chunks)
            on_host = copy_begun(tokens)
            following = [Chunk(chunk.sequence, chunk.start + chunk.length, 1) for chunk in chunks]
            if all(chunk.needs_sample and next_is_known(engine, chunk) for chunk in chunks):
                launched[engine] = following, launch(engine, following, tokens)
            samples = [Sample(None if token < 0 else [token]) for token in on_host()]
            for sequence in engine.scheduler.commit(chunks, samples):
                engine._close(sequence.group)
            engine.statistics.count_step(chunks, started)

    def next_is_known(engine: Inference, chunk: Chunk) -> bool:
        sequence, end = chunk.sequence, chunk.start + chunk.length + 1
        if end >= sequence.max_total_tokens:
            return False
        # Not through `KVManager.reserve`, which also notes the tokens of the page, one of which is not known yet.
        return all(table.reserve(sequence.row, end) for table in engine.kv.pools.values())

    def launch(engine: Inference, chunks: list[Chunk], token_ids: Tensor) -> Tensor:
        def with_token_ids(run: Callable[..., Tensor], inputs: StepVectors | StepBatch, *others: object) -> Tensor:
            getattr(inputs, "vectors", inputs).input_ids[: len(token_ids)] = token_ids.clamp(min=0)
            return run(inputs, *others)

        for chunk in chunks:
            chunk.sequence.token_ids.append(0)  # in place of the token that the host does not know yet
        try:
            with mock.patch.object(engine.runner, "call_model", with_token_ids):
                return chosen(engine, chunks)
        finally:
            for chunk in chunks:
                chunk.sequence.token_ids.pop()

    with mock.patch.object(Inference, "_step", step):
        yield


def chosen(engine: Inference, chunks: list[Chunk]) -> Tensor:
    return engine.sampler.choose(engine.runner.forward(chunks), [ARGMAX] * len(chunks))


def copy_begun(tokens: Tensor) -> Callable[[], list[int]]:
    """Begin to copy tokens to the host. Returns the function that waits for this copy only, and gives them."""
    if not tokens.is_cuda:
        return tokens.tolist
    on_host, is_done = torch.empty_like(tokens, device="cpu", pin_memory=True), torch.cuda.Event()
    on_host.copy_(tokens, non_blocking=True)
    is_done.record()

    def wait() -> list[int]:
        is_done.synchronize()
        return on_host.tolist()

    return wait


SWITCHES: dict[str, Callable[[], AbstractContextManager]] = {
    "default": nullcontext,
    "AUTO": partial(tiles_of_decodes, BACKEND="AUTO"),
    "all pages partial": all_pages_partial,
    "AUTO, all pages partial": splits_of_decodes,
    "blocks of torch": blocks_of_torch,
    "no checks of the pool's end": partial(tiles_of_decodes, IS_DIVISIBLE=True),  # blocks divide queries and pages
    "8 warps": partial(tiles_of_decodes, num_warps=8),  # 4 is the default in bfloat16, with 3 stages
    "2 stages": partial(tiles_of_decodes, num_stages=2),
    "4 stages": partial(tiles_of_decodes, num_stages=4),
    "no CUDA graphs": no_cuda_graphs,
    "static tables": static_tables,
    "host one step behind": host_one_step_behind,
}


def measure(
    model: PreTrainedModel, batch_sizes: list[int], prompt_len: int, num_steps: int, page_size: int
) -> tuple[dict[int, float], int]:
    """Return the median seconds of a decode step by batch size, and how many tokens are not the model's choice.

    The tokens are those of the first request of the smallest batch. Raises ValueError for a prompt that does not fit.
    """
    torch.compiler.reset()  # graphs have no guards on functions of modules, and a switch replaces one
    gc.collect()
    largest, num_decodes, seconds, tokens = max(batch_sizes), NUM_UNTIMED + num_steps, {}, []
    budget = max(2048, 2 * largest)
    num_prefill_steps = largest * prompt_len // (budget - largest) + largest  # as `decoding_together` counts them
    length = page_size * cdiv(prompt_len + num_prefill_steps + num_decodes + 1, page_size)
    sizes = dict(max_batch_size=largest, max_seq_length=length, page_size=page_size, max_num_batched_tokens=budget)
    with Inference(model, None, **sizes, compile=True) as engine:
        for batch_size in batch_sizes:
            times = []
            with decoding_together(engine, batch_size, prompt_len, num_decodes) as step:
                running, waiting = engine.scheduler.running, engine.scheduler.waiting
                while waiting or any(sequence.num_computed_tokens < prompt_len for sequence in running):
                    step()
                for _ in range(num_decodes):
                    started = time.perf_counter()
                    step()
                    times.append(time.perf_counter() - started)
                tokens = tokens or list(running[0].token_ids)
            seconds[batch_size] = statistics.median(times[NUM_UNTIMED:])
    outputs = [tokens[prompt_len:]]
    return seconds, compare(model, [tokens[:prompt_len]], outputs, outputs).mismatches


def main(
    model: Annotated[str, typer.Option(help="Shape with random weights, see random_models.py.")] = "gemma-2-2b-short",
    dtype: Annotated[str, typer.Option(help="Type of weights, keys and values.")] = "bfloat16",
    batch_sizes: Annotated[str, typer.Option(help="Numbers of decodes, separated by commas, ascending.")] = "1,32",
    prompt_len: Annotated[int, typer.Option(help="Tokens before the first decode.")] = 2048,
    num_steps: Annotated[int, typer.Option(help="Timed decode steps of each engine.")] = 32,
    page_size: Annotated[int, typer.Option(help="Tokens per page.")] = 128,
    turns: Annotated[int, typer.Option(help="How often each switch is measured; the switches alternate.")] = 3,
) -> None:
    """Print the time of decode steps with each switch, and its ratio to the default. The last line is JSON.

    A switch that raises is shown with its error, for example blocks that need too much memory. An error of the default
    ends the program.
    """
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("switches change kernels for GPUs: they need a GPU, or `python -m benchmarks.pretended_gpu`")
    device, console = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Console()
    weights, sizes = random_model(model, getattr(torch, dtype), device), [int(size) for size in batch_sizes.split(",")]
    runs: dict[str, list[dict[int, float]]] = {name: [] for name in SWITCHES}
    wrong, errors = {}, {}
    for turn in range(turns):
        for name in [name for name in SWITCHES if name not in errors]:
            try:
                with SWITCHES[name]():
                    seconds, wrong[name] = measure(weights, sizes, prompt_len, num_steps, page_size)
            except Exception as error:  # of the compiler, of the driver, or of memory
                if name == "default":
                    raise
                errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                console.print(f"{name}: {errors[name]}", markup=False)
                continue
            runs[name].append(seconds)
            times = ", ".join(f"{1e3 * each:.3f}" for each in seconds.values())
            console.print(f"turn {turn + 1}, {name}: {times} ms")
    medians = {
        name: {size: statistics.median(run[size] for run in of_switch) for size in sizes}
        for name, of_switch in runs.items()
        if name not in errors
    }
    table = Table("switch", *(f"{size} decodes, ms (ratio)" for size in sizes), "wrong tokens")
    for name, times in medians.items():
        cells = [f"{1e3 * times[size]:.3f} ({times[size] / medians['default'][size]:.3f})" for size in sizes]
        table.add_row(name, *cells, str(wrong[name]))
    for name, error in errors.items():
        table.add_row(name, error)
    console.print(table)
    record = {"torch": torch.__version__, "device": device_name(device), "model": model, "dtype": dtype}
    record |= {"page_size": page_size, "prompt_len": prompt_len, "runs": runs, "medians": medians}
    print(json.dumps(record | {"wrong_tokens": wrong, "errors": errors}))


if __name__ == "__main__":
    typer.run(main)
