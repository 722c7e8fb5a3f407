"""Compiles an engine's Triton kernels for real GPUs, without a GPU, and compares their resources with the limits.

A kernel that needs more shared memory than a GPU gives to one block cannot be launched. One that needs more than 255
registers per thread stores some of them in memory ("spills"), which is slow. The assembler of Triton reports both.

    uv run python -m benchmarks.gpu_kernels
"""

import itertools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from unittest import mock

import torch
import triton
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.pretended_gpu import GPUS, Gpu, Kernel, engines_on, loaded, pretended
from flex_nano_vllm import Inference
from flex_nano_vllm.attention import Scores, attend
from flex_nano_vllm.compiling import compile_settings
from flex_nano_vllm.runner import padding_chunk
from flex_nano_vllm.step import StepBatch, StepVectors, num_pages
from flex_nano_vllm.warmup import warm_up

# What the kernels depend on: the kind of model, query heads, kv heads, head dim, and the hidden size, which norms sum.
SHAPES = {
    "gemma-2-2b": (Gemma2Config, 8, 4, 256, 2304),
    "gemma-2-9b": (Gemma2Config, 16, 8, 256, 3584),
    "qwen3-0.6b": (Qwen3Config, 16, 8, 128, 1024),
    "llama-3-8b": (LlamaConfig, 32, 8, 128, 4096),
    "llama-3-1b": (LlamaConfig, 32, 8, 64, 2048),
}
PAGE_SIZE, PROMPT_LEN = 128, 300  # a prompt of several tiles
VOCABULARY = 256_000  # which the sampler searches


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one GPU, or the most that any of several kernels needs."""

    model: str
    dtype: str
    gpu: str
    kernel: str  # attention of "decodes" (packed or not) or of "prompts"; or "20 others"
    block: str  # BLOCK_M x BLOCK_N of attention
    num_stages: int
    num_warps: int
    shared_memory: int  # bytes per block
    shared_limit: int
    registers: int  # per thread
    spilled: int  # bytes per thread

    @property
    def fits(self) -> bool:
        return self.shared_memory <= self.shared_limit and self.spilled == 0


def kernels_of(
    shape: str, dtype: torch.dtype, gpu: Gpu, all_kernels: bool = False
) -> tuple[dict[str, list[Kernel]], list[Kernel]]:
    """Return the kernels of an engine: those of attention, and with `all_kernels` all others. They are not run.

    The others are norms, activations, RoPE, writes to the pool, lists of pages, and the search of the sampler.
    """
    config_class, num_heads, num_kv_heads, head_dim, hidden_size = SHAPES[shape]
    heads = dict(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim)
    others = dict(vocab_size=64, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2)
    config = config_class(**heads, **others, sliding_window=4096, max_position_embeddings=8192)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    sizes = dict(max_batch_size=1, n_pages=17, page_size=PAGE_SIZE, max_num_batched_tokens=512)
    with (
        mock.patch.object(Kernel, "run", lambda *args, **kwargs: None),
        engines_on(gpu) as compiler,
        Inference(model, None, **sizes, compile=True) as engine,
        compile_settings("cpu"),
    ):
        runner = engine.runner
        small, large = (kind.tile_len * num_heads // num_kv_heads for kind in runner.layout.kinds)
        if all_kernels:
            warm_up(runner)
            engine.sampler.warmup(VOCABULARY, engine.spec.device)
        else:
            cache = model.get_decoder().layers[-1].self_attn.kv_cache
            cap = getattr(config, "attn_logit_softcapping", None)
            for length in (1, PROMPT_LEN):
                chunks = [padding_chunk(length)]
                vectors = StepVectors.build(chunks, runner.layout, runner.kv.device)
                step = StepBatch.build(vectors, num_pages(chunks, PAGE_SIZE), runner.layout)
                query = torch.zeros(1, num_heads, length, head_dim, dtype=dtype)
                attend(step.queries[cache.mask], runner.flex, query, cache.k_cache, cache.v_cache, Scores(1.0, cap))
    of_attention, others = {"decodes": {}, "prompts": {}}, {}
    for kernel in (kernel for graph in compiler.graphs for kernel in graph.kernels.values()):
        if "_tem_" in kernel.name:
            rows = int(re.search(r"SPARSE_Q_BLOCK_SIZE : tl.constexpr = (\d+)", kernel.source)[1])
            alike = of_attention[{small: "decodes", large: "prompts"}[rows]]
        else:
            alike = others
        alike[kernel.source.replace(kernel.name, "")] = kernel  # graphs have many kernels in common
    return {name: list(alike.values()) for name, alike in of_attention.items()}, list(others.values())


def resources(shape: str, dtype: torch.dtype, gpu: Gpu, all_kernels: bool = False) -> Iterator[Resources]:
    """Compile the kernels of a model for a GPU: those of attention, or all."""
    names = shape, str(dtype).removeprefix("torch."), gpu.name
    of_attention, others = kernels_of(shape, dtype, gpu, all_kernels)
    for name, kernels in of_attention.items():
        needs = [needs for kernel in kernels for needs in needs_of(gpu, kernel)]
        block = " x ".join(re.search(rf"BLOCK_{axis} : tl.constexpr = (\d+)", kernels[0].source)[1] for axis in "MN")
        yield Resources(*names, name, block, *map(max, zip(*needs)))
    if others:
        # Inductor has several sizes of blocks for these, and takes the fastest. So one that fits is enough.
        best = [min(needs_of(gpu, kernel), key=lambda needs: (needs[-1], needs[2])) for kernel in others]
        yield Resources(*names, f"{len(others)} others", "", *map(max, zip(*best)))


def needs_of(gpu: Gpu, kernel: Kernel) -> list[tuple[int, ...]]:
    """Compile a kernel as inductor does, and return what it needs with each size of its blocks.

    The numbers are the last six of `Resources`.
    """
    needs, (major, minor) = [], gpu.capability
    assembler = get_ptxas(10 * major + minor).path
    for binary in compiled_for(gpu, kernel):
        target = re.search(r"\.target (\w+)", binary.asm["ptx"])[1]
        command = [assembler, "-v", "--gpu-name", target, "/dev/stdin", "-o", "/dev/null"]
        report = subprocess.run(command, input=binary.asm["ptx"], capture_output=True, text=True, check=True).stderr
        registers, spilled = (
            int(re.search(rf"(\d+) {what}", report)[1]) for what in ("registers", "bytes spill stores")
        )
        metadata = binary.metadata
        options = metadata.num_stages, metadata.num_warps, metadata.shared, gpu.shared_memory
        needs.append((*options, registers, spilled))
    return needs


def compiled_for(gpu: Gpu, kernel: Kernel) -> list[triton.compiler.CompiledKernel]:
    """Compile a kernel with each size of its blocks, for a GPU that need not be present."""
    binaries, compile_kernel = [], triton.compile

    def kept(*args: object, **kwargs: object) -> triton.compiler.CompiledKernel:
        binaries.append(compile_kernel(*args, **kwargs))
        return binaries[-1]

    with pretended(gpu), mock.patch.object(triton, "compile", kept):
        loaded(kernel.name, kernel.source).precompile(warm_cache_only=True)
    major, minor = gpu.capability
    assert {binary.metadata.target.arch for binary in binaries} == {10 * major + minor}
    return binaries


def main(
    dtype: str = "bfloat16",
    gpus: str = ",".join(GPUS),
    models: str = ",".join(SHAPES),
    all_kernels: bool = False,
) -> None:
    """Print a table of the kernels. Exit with status 1 if a kernel needs too much shared memory, or spills registers.

    GPUs and models are separated by commas. `all_kernels`: not only those of attention.
    """
    if triton.knobs.runtime.interpret:
        raise SystemExit("unset TRITON_INTERPRET: Triton's interpreter does not compile kernels")
    table = Table(*(field.name.replace("_", " ") for field in fields(Resources)), box=box.MARKDOWN)
    pairs = itertools.product(models.split(","), (GPUS[name] for name in gpus.split(",")))
    needs = [need for shape, gpu in pairs for need in resources(shape, getattr(torch, dtype), gpu, all_kernels)]
    for need in needs:
        table.add_row(*map(str, astuple(need)), style=None if need.fits else "red")
    Console(width=160).print(table)
    raise typer.Exit(not all(need.fits for need in needs))


if __name__ == "__main__":
    typer.run(main)
