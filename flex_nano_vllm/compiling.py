"""Settings of torch for compiled code, and the backend that compiles it.

Independent of what is compiled.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

DYNAMO_CONFIG = {
    # All engines of a process share one table of graphs. Torch's default limit of 8 is meant for one model.
    "recompile_limit": 4096,
    "accumulated_recompile_limit": 4096,
    # Otherwise a second softcap in the process becomes a symbolic float, which FlexAttention does not accept.
    "specialize_float": True,
}

# Skip guards on module globals: the code of torch and transformers does not change while the engine serves, and the
# guards take a fifth of the time of a cache lookup.
UNGUARDED = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}


@contextmanager
def compile_settings(device_type: str) -> Iterator[None]:
    """Set everything that compiled code depends on, because user code shares the settings. Each thread has its own."""
    with (
        torch._dynamo.config.patch(DYNAMO_CONFIG),
        # The check runs the first call of a graph under other dispatch keys, which would compile attention once more.
        torch._functorch.config.patch(check_custom_op_aliasing=False),
        # The engine computes in the model's dtype, which the KV pools have too.
        torch.autocast(device_type, enabled=False),
        # The caller may be in inference mode, but kernel guards distinguish tensors that are made in that mode.
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


@functools.cache  # torch shares graphs only between equal backends
def inductor(device_type: str, packing_rows: int = 0) -> str | Callable[..., object]:
    """Return the backend of torch.compile for the device. `packing_rows`: see `inductor_on_cpu`."""
    return functools.partial(inductor_on_cpu, packing_rows=packing_rows) if device_type == "cpu" else "inductor"


# What replaces parts of the text of inductor's FlexAttention kernel. g++ takes nine seconds to compile a kernel, and
# four of them are for two headers, of which the kernel needs one declaration each. (Torch 2.11 to 2.13 include one of
# them.) The third part multiplies weights and values of few bfloat16 query rows in the kernel, as those of float16.
# Torch calls a library for each page instead, which takes longer. The fourth part decides which kernels pack.
REPLACEMENTS = {
    "#include <ATen/Context.h>": """
#include <c10/core/CPUAllocator.h>
namespace at { c10::Allocator* getCPUAllocator(); }""",
    "#include <ATen/cpu/Utils.h>": "namespace at::cpu { bool init_amx(); }",
    "if (!std::is_same_v<scalar_t, at::Half>) {": """
            if (sizeof(scalar_t) == 4 || (!std::is_same_v<scalar_t, at::Half> && cur_qSplitSize > 8)) {""",
    "// Pad is needed for packing when K is not even": "need_pack = is_reduced_type && qSize == PACKING_ROWS;",
}


def inductor_on_cpu(graph: torch.fx.GraphModule, inputs: list[Tensor], packing_rows: int) -> Callable[..., object]:
    """Inductor with changes that make it faster on a CPU, and with the fix of a crash.

    - The backend name "inductor" also starts processes that compile Triton kernels, even on a CPU. These processes
      slow down the first seconds of serving. This function does not start them.
    - In torch 2.11 to 2.15 the FlexAttention kernel multiplies with register tiles of 1 x 16. Every sum waits for the
      previous one, and keys are read again for each query. With tiles of 8 x 16, attention of a prompt takes three
      fifths of the time in float32, and nine tenths in bfloat16. If a later torch does not set the size here, nothing
      is changed.
    - In bfloat16, a kernel for few query rows computes the product of weights and values itself, with register tiles of
      4 x 64 where AVX-512 has registers for them. Attention of 32 decodes takes six tenths of the time.
    - A kernel for tiles of `packing_rows` query rows packs keys and values of 16 bits (`gather.py`). No other kernel
      does. Torch packs for 64 rows and more, and only on a CPU with AMX, although the library that multiplies packed
      numbers needs AVX-512 only.
    - tanh is computed from exp (`use_decompose_tanh`), for softcaps and GELU, with an absolute error of about 1e-7. The
      library function takes longer.
    - The kernel includes two headers, and reading them takes as long as compiling the kernel. Declarations replace
      the headers before torch 2.16. Later versions may need more declarations.
    - A kernel has buffers for a fixed number of threads, but torch 2.11 reuses a cached kernel that was compiled for
      fewer threads, which crashes. Hence the number of threads is part of the cache key, as is the register tile.
    """
    # Import order matters: the template cannot be imported first.
    import torch._inductor.lowering
    from torch._inductor.codegen import cpp_flex_attention_template as template
    from torch._inductor.compile_fx import compile_fx

    tag, changed = f"{torch.compiler.config.cache_key_tag} {torch.get_num_threads()} threads", {}
    if hasattr(template, "GemmBlocking"):
        is_wide = torch.cpu._is_avx512_supported() and torch.bfloat16 in [getattr(x, "dtype", None) for x in inputs]
        # of both products of a kernel
        tiles = [template.GemmBlocking(*tile) for tile in ((8, 16, 1), (4, 64, 1) if is_wide else (8, 16, 1))]
        tag, in_turn = f"{tag}, {tiles} {REPLACEMENTS} {packing_rows}", itertools.cycle(tiles)
        changed["GemmBlocking"] = lambda *_: next(in_turn)
    if torch.__version__ < "2.16.dev0":
        for name, text in vars(template).items():
            if isinstance(text, str) and not name.startswith("__"):
                for old, new in REPLACEMENTS.items():
                    text = text.replace(old, new.replace("PACKING_ROWS", str(packing_rows)))
                changed[name] = text
    with mock.patch.dict(vars(template), changed), torch.compiler.config.patch(cache_key_tag=tag):
        return compile_fx(graph, inputs, config_patches={"cpp.use_decompose_tanh": True})
