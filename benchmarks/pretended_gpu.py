"""A pretended GPU: on a machine without one, inductor generates the code that it would generate for a real GPU.

`GpuCompiler` is a backend of torch.compile. Inductor receives the graph with fake tensors on "cuda" and the properties
of a GPU. It generates Triton kernels and a wrapper that launches them. Triton's interpreter then runs the kernels on
CPU tensors, one program of the grid after the other, with numpy.

    compiler = GpuCompiler(GPUS["RTX 3090"])
    torch.compile(function, backend=compiler, fullgraph=True, dynamic=False)(*cpu_tensors)
    compiler.graphs[0].kernels

The interpreter is part of Triton's functions when they are defined, so `TRITON_INTERPRET=1` must be set before triton
is imported. `main` runs another program on the pretended GPU:

    TRITON_INTERPRET=1 uv run python -m benchmarks.pretended_gpu "RTX 3090" benchmark --model gemma2-mini

A run checks indices, masks, sizes of blocks and dtypes of the kernels, and shows what inductor says about
CUDA graphs. It cannot check speed, races between programs, or the rounding of tensor cores.
"""

import contextlib
import itertools
import linecache
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import torch
import torch._inductor.lowering  # first: the other modules of inductor cannot be imported before it
import torch.utils._triton
import triton
import triton.language as tl
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor import async_compile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_compat import libdevice
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter

from flex_nano_vllm import cascade, page_table, patching, runner, sampler


@dataclass(frozen=True)
class Gpu:
    """What inductor and the engine ask about a GPU."""

    name: str
    capability: tuple[int, int]
    num_processors: int
    shared_memory: int  # bytes that one block may use
    threads_per_processor: int

    @property
    def properties(self) -> types.SimpleNamespace:
        """The result of `torch.cuda.get_device_properties`."""
        return types.SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.num_processors,
            shared_memory_per_block_optin=self.shared_memory,
            shared_memory_per_block=49_152,
            max_threads_per_multi_processor=self.threads_per_processor,
            max_threads_per_block=1024,
            regs_per_multiprocessor=65_536,
            warp_size=32,
            total_memory=24 << 30,
            L2_cache_size=6 << 20,
            gcnArchName="",
        )


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", (8, 0), 108, 166_912, 2048),
        Gpu("RTX 3090", (8, 6), 82, 101_376, 1536),
        Gpu("RTX 4090", (8, 9), 128, 101_376, 1536),
        Gpu("H100", (9, 0), 132, 232_448, 2048),
        Gpu("RTX 5090", (12, 0), 170, 101_376, 1536),
    )
}
FEW_PROCESSORS = 4


@contextlib.contextmanager
def pretended(gpu: Gpu) -> Iterator[None]:
    """Make torch and inductor see `gpu`. Only fake tensors can be on it."""
    major, minor = gpu.capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    answers = dict(
        is_available=True,
        current_device=0,
        get_device_properties=gpu.properties,
        get_rng_state=torch.empty(0, dtype=torch.uint8),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
    )
    # These prepare patterns of graph rewrites, with tensors on the device.
    prepare = ((fuse_attention, "_sfdp_init"), (misc_patterns, "_misc_patterns_init"), (pad_mm, "_pad_mm_init"))
    driver = types.SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_active_torch_device=lambda: 0
    )
    settings = {
        "fx_graph_cache": False,
        "compile_threads": 1,
        "joint_graph_constant_folding": False,  # would compute on the device
        "shape_padding": False,  # would measure products on the device
    }
    caches = [function for function in vars(torch.utils._triton).values() if hasattr(function, "cache_clear")]
    caches.append(vars(DeviceProperties)["create"].__func__)
    with contextlib.ExitStack() as stack:

        def patch(owner: object, name: str, answer: object) -> None:
            if hasattr(owner, name):  # versions of torch differ
                stack.enter_context(mock.patch.object(owner, name, staticmethod(lambda *args, **kwargs: answer)))

        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            for name, answer in answers.items():
                patch(owner, name, answer)
        for owner, name in prepare:
            patch(owner, name, None)
        patch(torch._C, "_cuda_getCurrentRawStream", 0)
        patch(triton_helpers, "set_driver_to_gpu", None)
        stack.enter_context(mock.patch.object(type(triton.runtime.driver), "active", driver))
        stack.enter_context(torch._inductor.config.patch(settings))
        for function in caches:
            function.cache_clear()
            stack.callback(function.cache_clear)
        yield


class Kernel:
    """A Triton kernel of inductor, run by Triton's interpreter."""

    def __init__(self, name: str, source: str):
        self.name, self.source = name, source
        self.launches: list[tuple[int, int, int]] = []  # the grid of each launch
        with mock.patch.dict(vars(triton_heuristics), dict.fromkeys(DECORATORS, self._keep)):
            self.function = loaded(name, source)

    def _keep(self, size_hints: dict[str, int] | None = None, **kwargs: object) -> Callable[[object], object]:
        """Stand for the decorators of inductor, which would choose sizes of blocks and compile the kernel."""
        self.size_hints, self.inductor_meta = size_hints, kwargs["inductor_meta"]
        return lambda function: function

    def run(self, *args: object, stream: object = None) -> None:
        """Launch the kernel, as inductor's launcher does."""
        if not triton.knobs.runtime.interpret:
            raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported: there is no GPU to run the kernel")
        names, extra = self.function.arg_names, self.inductor_meta.get("extra_launcher_args", [])
        largest = {"x": 64, "y": 64, "z": 64, "r0_": 2048, "r1_": 2048}
        sized = {axis: f"{axis.upper()}BLOCK" for axis in largest if f"{axis.upper()}BLOCK" in names}
        blocks = {name: min(largest[axis], self.size_hints[axis]) for axis, name in sized.items()}
        values = dict(zip([*(name for name in names if name not in blocks), *extra], args)) | blocks
        grid = triton_heuristics.GridExpr.from_meta(self.inductor_meta, blocks).eval_slow(values)
        self.launches.append(grid)
        self.function[grid](*args[: len(args) - len(extra)], **blocks)


# Those of inductor's decorators that the kernels use.
DECORATORS = ("template", "pointwise", "reduction", "persistent_reduction")


def loaded(name: str, source: str) -> object:
    """Execute the text of a kernel and return the kernel."""
    file = f"<{name} {next(NUMBERS)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # from which Triton reads it
    namespace = {"__name__": file, "__file__": file}
    exec(compile(source, file, "exec"), namespace)
    return namespace[name]


NUMBERS = itertools.count()


@dataclass
class Graph:
    """A graph as inductor compiled it."""

    num_inputs: int
    static_inputs: list[int]  # parameters and buffers, which a CUDA graph need not copy
    mutated_inputs: list[int]
    why_no_cuda_graph: str | None
    kernels: dict[str, Kernel] = field(default_factory=dict)


class GpuCompiler:
    """A backend of torch.compile that generates code for `gpu` and interprets it on CPU tensors.

    `graphs` has what was compiled.
    """

    def __init__(self, gpu: Gpu):
        self.gpu, self.graphs = gpu, []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        static_inputs = []

        def inner_compile(graph: torch.fx.GraphModule, inputs: list[object], **kwargs: object) -> object:
            static_inputs[:] = kwargs["static_input_idxs"]
            return compile_fx_inner(graph, inputs, **kwargs)

        def interpreted(lowering: GraphLowering) -> types.SimpleNamespace:
            wrapper, _ = lowering.codegen()
            reason, mutated = lowering.disable_cudagraphs_reason, sorted(lowering.mutated_input_idxs)
            self.graphs.append(Graph(len(lowering.graph_inputs), list(static_inputs), mutated, reason))
            return types.SimpleNamespace(call=interpreted_wrapper(wrapper.value, self.graphs[-1].kernels))

        # Dynamo's own tensors, because the sizes of `inputs` are those of the first call, and not symbols.
        examples = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        mode = detect_fake_mode(inputs)
        with pretended(self.gpu), mode, mock.patch.object(mode, "allow_non_fake_inputs", True):
            fakes = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
                for x in examples
            ]
            with mock.patch.object(GraphLowering, "compile_to_module", interpreted):
                return compile_fx(on_gpu(graph), fakes, inner_compile=inner_compile)


def on_gpu(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return the graph with new tensors on "cuda" instead of the CPU."""
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.kwargs.get("device") in ("cpu", torch.device("cpu")):
                    node.update_kwarg("device", torch.device("cuda", 0))
            module.recompile()
    return graph


def interpreted_wrapper(source: str, kernels: dict[str, Kernel]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return the function in the text of inductor's wrapper, with interpreted kernels and buffers on the CPU."""

    class Kernels:
        def triton(self, name: str, source: str, **kwargs: object) -> Kernel:
            kernels[name] = Kernel(name, source)
            return kernels[name]

        def wait(self, scope: dict[str, object]) -> None:
            pass

    for on_gpu, on_cpu in (
        ("empty_strided_cuda", "empty_strided_cpu"),
        ("device(type='cuda', index=0)", "device('cpu')"),
        ("device='cuda'", "device='cpu'"),
    ):
        source = source.replace(on_gpu, on_cpu)
    namespace = {"__name__": "wrapper"}
    with mock.patch.object(async_compile, "AsyncCompile", Kernels):
        exec(compile(source, "<wrapper>", "exec"), namespace)
    call = namespace["call"] if "call" in namespace else namespace["runner"].call

    def call_on_cpu(args: list[Tensor]) -> list[Tensor]:
        guard = mock.patch.object(torch.cuda, "_DeviceGuard", lambda index: contextlib.nullcontext())
        with guard, mock.patch.object(torch.cuda, "set_device", lambda index: None), mended_interpreter():
            return call(args)

    return call_on_cpu


@contextlib.contextmanager
def engines_on(gpu: Gpu) -> Iterator[GpuCompiler]:
    """Give engines whose model is on the CPU the tiles, the masks and the compiler of `gpu`. Yields the compiler."""
    compiler, cpu, cuda, widen = GpuCompiler(gpu), torch.device("cpu"), torch.device("cuda", 0), page_table.widen

    def on_gpu(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            with pretended(gpu):
                return function(*(cuda if arg == cpu else cuda.type if arg == cpu.type else arg for arg in args))

        return call

    with contextlib.ExitStack() as stack:
        in_runner = ["tile_kinds", "decode_buckets", "pads_tokens", "kernel_options", "page_buckets"]
        in_cascade = ["packed_tiles", "num_processors"]
        places = [*((runner, name) for name in in_runner), *((cascade, name) for name in in_cascade)]
        for module, name in [*places, (patching, "packs_weights")]:
            stack.enter_context(mock.patch.object(module, name, on_gpu(getattr(module, name))))
        stack.enter_context(mock.patch.object(runner, "TransposedProducts", contextlib.nullcontext))
        for module in (runner, sampler):
            stack.enter_context(mock.patch.object(module, "inductor", lambda *args: compiler))
        for module in (page_table, cascade):

            def widen_on_gpu(pages: Tensor, stride: int, width: int) -> Tensor:
                return widen(pages, stride, 0)

            stack.enter_context(mock.patch.object(module, "widen", widen_on_gpu))
        yield compiler


@contextlib.contextmanager
def mended_interpreter() -> Iterator[None]:
    """Supply what Triton's interpreter lacks: products of bfloat16, rounding to it, and functions of libdevice.

    The interpreter stores a bfloat16 number as an integer of its bits. A product would multiply these integers, and a
    conversion from float32 would cut off bits, where a GPU rounds to the nearest number.
    """
    create_dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def float32(operand: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: interpreter.InterpreterBuilder, a: object, b: object, *rest: object) -> interpreter.TensorHandle:
        return create_dot(self, float32(a), float32(b), *rest)

    def rounded(numbers: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(numbers, source, target, mode)
        return torch.tensor(numbers).bfloat16().view(torch.uint16).numpy()

    def function(name: str) -> Callable[..., tl.tensor]:
        def call(*args: tl.tensor) -> tl.tensor:
            tensors = [torch.tensor(arg.handle.data) for arg in args]
            data = getattr(torch, name)(*tensors).numpy()
            return tl.tensor(interpreter.TensorHandle(data, args[0].handle.dtype), args[0].type)

        return call

    functions = {name: function(name) for name in ("tanh", "exp", "exp2", "rsqrt")}
    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot),
        mock.patch.object(interpreter, "_convert_float", rounded),
        mock.patch.dict(vars(libdevice), functions),
    ):
        yield


def main() -> None:
    """Run a module as `python -m` does, with its engines on a pretended GPU. The arguments: GPU, module, arguments.

    The GPU gets few processors: torch's decoding kernel splits its work among all of them, and the interpreter runs one
    split after the other.
    """
    gpu, *arguments = sys.argv[1:]
    sys.argv[:] = arguments
    with engines_on(replace(GPUS[gpu], num_processors=FEW_PROCESSORS)):
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
