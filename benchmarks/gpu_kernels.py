"""Compiles FlexAttention's kernels for real GPUs, without a GPU, and compares their resources with the limits.

A kernel that needs more shared memory than a GPU gives to one block cannot be launched. One that needs more than 255
registers per thread stores some of them in memory ("spills"), which is slow. A tool that Triton contains reports both.

    uv run python -m benchmarks.gpu_kernels
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from unittest import mock

import torch
import triton
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from benchmarks.pretended_gpu import GPUS, Gpu, Kernel, engines_on, loaded, pretended
from flex_nano_vllm import Inference
from flex_nano_vllm.attention import attend
from flex_nano_vllm.compiling import compile_settings
from flex_nano_vllm.runner import padding_chunk
from flex_nano_vllm.step import StepBatch, StepVectors, num_pages

# What attention depends on: the kind of model, query heads, kv heads, and head dim.
SHAPES = {
    "gemma-2-2b": (Gemma2Config, 8, 4, 256),
    "gemma-2-9b": (Gemma2Config, 16, 8, 256),
    "qwen3-0.6b": (Qwen3Config, 16, 8, 128),
    "llama-3-8b": (LlamaConfig, 32, 8, 128),
    "llama-3-1b": (LlamaConfig, 32, 8, 64),
}
PAGE_SIZE, PROMPT_LEN = 128, 300  # a prompt of several tiles
OBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one GPU."""

    model: str
    dtype: str
    gpu: str
    tile: str  # "decodes" or "prompts"
    block: str  # BLOCK_M x BLOCK_N
    num_stages: int
    num_warps: int
    shared_memory: int  # bytes per block
    shared_limit: int
    registers: int  # per thread
    spilled: int  # bytes per thread

    @property
    def fits(self) -> bool:
        return self.shared_memory <= self.shared_limit and self.spilled == 0


def attention_kernels(shape: str, dtype: torch.dtype, gpu: Gpu) -> dict[str, Kernel]:
    """Return the kernels of the full attention layers of a model, for decodes and for prompts. They are not run."""
    config_class, num_heads, num_kv_heads, head_dim = SHAPES[shape]
    heads = dict(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim)
    others = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, sliding_window=4096)
    config = config_class(**heads, **others, max_position_embeddings=8192)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    sizes = dict(max_batch_size=4, n_pages=17, page_size=PAGE_SIZE, max_num_batched_tokens=512)
    kernels = {}
    with (
        mock.patch.object(Kernel, "run", lambda *args, **kwargs: None),
        engines_on(gpu) as compiler,
        Inference(model, None, **sizes, compile=True) as engine,
        compile_settings("cpu"),
    ):
        runner = engine.runner
        cache = model.get_decoder().layers[-1].self_attn.kv_cache
        cap = getattr(config, "attn_logit_softcapping", None)
        for tile, length in (("decodes", 1), ("prompts", PROMPT_LEN)):
            chunks = [padding_chunk(length)]
            vectors = StepVectors.build(chunks, runner.layout, runner.kv.device)
            step = StepBatch.build(vectors, num_pages(chunks, PAGE_SIZE), runner.layout)
            query = torch.zeros(1, num_heads, length, head_dim, dtype=dtype)
            attend(step.queries[cache.mask], runner.flex, query, cache.k_cache, cache.v_cache, 1.0, cap)
            (kernels[tile],) = (kernel for kernel in compiler.graphs[-1].kernels.values() if "_tem_" in kernel.name)
    return kernels


def resources(shape: str, dtype: torch.dtype, gpu: Gpu) -> Iterator[Resources]:
    """Compile the kernels of a model for a GPU."""
    for tile, kernel in attention_kernels(shape, dtype, gpu).items():
        binary = compiled_for(gpu, kernel)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            report = subprocess.check_output([OBJDUMP, "-res-usage", file.name], stderr=subprocess.STDOUT, text=True)
        registers, spilled = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
        block = " x ".join(re.search(rf"BLOCK_{axis} : tl.constexpr = (\d+)", kernel.source)[1] for axis in "MN")
        metadata = binary.metadata
        options = metadata.num_stages, metadata.num_warps, metadata.shared, gpu.shared_memory
        yield Resources(shape, str(dtype).removeprefix("torch."), gpu.name, tile, block, *options, registers, spilled)


def compiled_for(gpu: Gpu, kernel: Kernel) -> triton.compiler.CompiledKernel:
    """Compile a kernel as inductor does, for a GPU that need not be present."""
    binaries, compile_kernel = [], triton.compile

    def kept(*args: object, **kwargs: object) -> triton.compiler.CompiledKernel:
        binaries.append(compile_kernel(*args, **kwargs))
        return binaries[-1]

    with pretended(gpu), mock.patch.object(triton, "compile", kept):
        loaded(kernel.name, kernel.source).precompile(warm_cache_only=True)
    (binary,) = binaries
    major, minor = gpu.capability
    assert binary.metadata.target.arch == 10 * major + minor
    return binary


def main(dtype: str = "bfloat16", gpus: str = ",".join(GPUS)) -> None:
    """Print a table of all kernels. Exit with status 1 if a kernel needs too much shared memory, or spills registers.

    The GPUs are separated by commas.
    """
    if triton.knobs.runtime.interpret:
        raise SystemExit("unset TRITON_INTERPRET: Triton's interpreter does not compile kernels")
    table = Table(*(field.name.replace("_", " ") for field in fields(Resources)), box=box.MARKDOWN)
    pairs = itertools.product(SHAPES, (GPUS[name] for name in gpus.split(",")))
    needs = [need for shape, gpu in pairs for need in resources(shape, getattr(torch, dtype), gpu)]
    for need in needs:
        table.add_row(*map(str, astuple(need)), style=None if need.fits else "red")
    Console(width=160).print(table)
    raise typer.Exit(not all(need.fits for need in needs))


if __name__ == "__main__":
    typer.run(main)
