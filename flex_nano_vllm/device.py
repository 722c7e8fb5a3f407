"""What depends on the device: copies to it, its free memory, whether code is compiled for it and weights are packed,
the kinds of tiles, and the blocks of the CUDA kernel.

Independent of models and requests.

The sizes for CPUs were measured: docs/log.md.
"""

import contextlib
import functools
import math
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from flex_nano_vllm.geometry import cdiv


def upload(arrays: list[np.ndarray], device: torch.device, dtype: type | None = None) -> list[Tensor]:
    """Copy arrays of any shapes to the device in one transfer, without waiting for it.

    `dtype`: convert all arrays to it; None keeps the type of each array.
    The results never share memory, because a compiled region does not accept two tensors that do.
    """
    arrays = [array if dtype is None else array.astype(dtype, casting="same_kind") for array in arrays]
    if device.type == "cpu":
        return [torch.tensor(array) for array in arrays]
    packed = packed_bytes(arrays)
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return unpacked(packed.to(device), arrays)


def packed_bytes(arrays: list[np.ndarray]) -> Tensor:
    """Return the bytes of all arrays, each padded to a multiple of 16, so that all arrays are aligned."""
    parts = [np.ascontiguousarray(array).view(np.uint8).ravel() for array in arrays]
    return torch.from_numpy(np.concatenate([np.pad(part, (0, -len(part) % 16)) for part in parts]))


def unpacked(packed: Tensor, arrays: list[np.ndarray]) -> list[Tensor]:
    """Return copies of the arrays in `packed_bytes`, as tensors on its device."""
    tensors, start = [], 0
    for array in arrays:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        tensors.append(packed[start : start + array.nbytes].view(dtype).view(array.shape).clone())
        start += array.nbytes + -array.nbytes % 16
    return tensors


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device, within the memory limit of a container if any."""
    if device.type == "cuda":
        # Memory that torch's caching allocator has reserved but does not use counts as free.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = psutil.virtual_memory().available
    cgroup = Path("/sys/fs/cgroup")  # version 2, as Docker and Kubernetes mount it
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or its limit is "max"
        limit, used = (int((cgroup / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines())
        free = min(free, limit - used + int(statistics["file"]))  # the system can evict its page cache
    return free


def why_not_compiled(device: torch.device, dtype: torch.dtype, page_size: int) -> str | None:
    """Return the reason why FlexAttention cannot be compiled here, or None if it can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention has no kernel for {dtype}"
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
        return f"Python's C headers were not found in {headers}: install python3-dev"
    return None


def uses_bfloat16(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether numbers of this type are multiplied with the bfloat16 instructions of a CPU."""
    has_instructions = torch.cpu._is_avx512_bf16_supported() and torch.backends.mkldnn.enabled
    is_used = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # ATEN_CPU_CAPABILITY may limit it
    return device.type == "cpu" and dtype == torch.bfloat16 and has_instructions and is_used


def packs_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether linear layers are faster with packed weights (`linear.py`).

    In float32, torch multiplies plain weights with MKL, which is slow on AMD's CPUs. On Intel's, packing gains nothing.
    """
    if dtype != torch.float32:
        return uses_bfloat16(device, dtype)
    return device.type == "cpu" and torch.backends.mkldnn.enabled and _is_made_by_amd()


@functools.cache
def _is_made_by_amd() -> bool:
    with contextlib.suppress(OSError):  # Linux only
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def num_processors(device: torch.device) -> int:
    """Return how many tiles a kernel computes at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


@dataclass(frozen=True)
class TileKind:
    """Tiles of `tile_len` tokens.

    A call of FlexAttention has `num_tiles` of them, padding included (None: as many as there are). With `page_buckets`
    it receives a copy of the pages that its tiles visit, padded to one of these numbers (`gather.py`).

    A CPU kernel gives each of its threads a run of consecutive tiles. Tiles are therefore dealt to `num_hands`, one
    after the other: otherwise one thread would get the longest contexts of a prompt, and another one all padding.
    """

    tile_len: int
    num_tiles: int | None
    num_hands: int = 1
    page_buckets: tuple[int, ...] = ()


# Query rows of a large tile: tokens times G. On a GPU they fill a matrix-multiply tile. On a CPU this number was the
# fastest.
LARGE_TILE_ROWS = {"cuda": 128, "cpu": 16}
# The same for tiles whose pages are gathered. A library multiplies the packed keys, in larger blocks.
GATHERED_TILE_ROWS = 32


def tile_lens(group_size: int, device_type: str, gathers: bool = False) -> tuple[int, int]:
    """Return how many tokens the small tiles (for decodes) and the large tiles (for prompts) contain.

    `gathers`: the pages of large tiles are gathered.

    A CUDA tile has at least 16 query rows, the size of a matrix instruction. On a CPU the G query rows of one decode
    are best. (A single query row is avoided: for it, torch 2.13 to 2.15 select a decoding kernel that does not support
    our masks.)
    """
    small = 16 // math.gcd(16, group_size) if device_type == "cuda" else cdiv(2, group_size)
    large = max(small * 2, (GATHERED_TILE_ROWS if gathers else LARGE_TILE_ROWS[device_type]) // group_size)
    # A power of two, as are the tiles of the kernel, which must divide the query block
    return small, 1 << (large.bit_length() - 1)


def tile_kinds(
    group_size: int, max_batch_size: int, budget: int, device_type: str, page_buckets: tuple[int, ...] = ()
) -> tuple[TileKind, ...]:
    """Return small tiles for decodes and large tiles for prompts.

    A step has one call for its small tiles, and at most four calls for its large ones (more if their pages are
    gathered), because each chunk has at most one unfilled tile and a step has at most `max_batch_size` chunks. One size
    of calls means one graph.

    Args:
        budget: the token budget of a step.
        page_buckets: those of the large tiles, see `TileKind`.
    """
    small, large = tile_lens(group_size, device_type, bool(page_buckets))
    bound = budget // large + max_batch_size
    hands = torch.get_num_threads() if device_type == "cpu" else 1
    of_decodes = TileKind(small, max(2, max_batch_size), hands)
    return of_decodes, TileKind(large, max(2, cdiv(bound, 4)), hands, page_buckets)


def decode_buckets(max_batch_size: int, device_type: str) -> tuple[int, ...]:
    """Return the numbers of tiles to which steps of decodes are padded, and their tokens too if `pads_tokens`.

    A single stream is not padded. Without padding of tokens, two or more decodes need one bucket only: a padding tile
    costs 3 microseconds in a layer (so a few decodes lose where `max_batch_size` is in the hundreds).
    """
    parts = (4, 2, 1) if pads_tokens(device_type) else (1,)
    return tuple(sorted({1, *(cdiv(max_batch_size, part) for part in parts)}))


def pads_tokens(device_type: str) -> bool:
    """Return whether the graphs of decodes have a fixed number of tokens, as CUDA graphs must."""
    return device_type == "cuda"


def packed_tiles(group_size: int, device_type: str) -> tuple[int, float, float]:
    """Return how many decodes a packed tile contains, and its costs: see `cascade.CascadeRule`.

    On a CPU a tile of 8 query rows is best: one of 16 query rows loses more on pages that are not shared than it saves
    on shared pages. On a GPU the tile of a single decode already has 16 query rows, so a packed tile costs no more. But
    it reads its pages one after the other. The costs on a GPU have not been measured.
    """
    if device_type == "cuda":
        return tile_lens(group_size, device_type)[0], 1.0, 1.0
    return max(2, 8 // group_size), 2.0, 2.5


def kernel_options(
    device: torch.device, all_rows: list[int], page_size: int, head_dim: int, dtype: torch.dtype
) -> dict[int, dict[str, object]]:
    """Return the options of FlexAttention's CUDA kernel, by the query rows of a tile; nothing on other devices.

    One block of threads computes BLOCK_M query rows. It loads BLOCK_N keys and values at a time, while the next ones
    are on their way (`num_stages`). Torch's own sizes are those of an A100 for every GPU of compute capability 8. An
    RTX 3090 has not enough shared memory for them at a head dim of 256 (pytorch/pytorch#180278 is the same failure).
    The sizes here fit, and no kernel that `benchmarks.gpu_kernels` compiles spills registers. No GPU has measured them.

    Both sizes divide the blocks of the mask, which torch before 2.14 does not ensure. "TRITON" is the main kernel:
    "AUTO" would select another one for few query rows.
    """
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    limit = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)  # not with ROCm
    return {rows: _fitting(rows, page_size, head_dim, dtype, limit) for rows in all_rows}


def _fitting(rows: int, page_size: int, head_dim: int, dtype: torch.dtype, limit: int) -> dict[str, object]:
    """Return the options of one kind of tile, given the bytes of shared memory that a block may use."""
    row_bytes = dtype.itemsize * max(16, 1 << (head_dim - 1).bit_length())  # the kernel rounds the head dim up
    # Matrix units do not multiply float32 exactly, and products without them need more registers.
    is_float32 = dtype == torch.float32
    block_m = max(16, min(rows & -rows, 64 if is_float32 else 128, 32_768 // row_bytes))
    block_n = max(16, min(page_size, 64, (8_192 if is_float32 else 16_384) // row_bytes))
    num_stages, num_warps = 3, 8 if is_float32 or block_m * row_bytes >= 16_384 else 4
    while _shared_memory(block_m, block_n, num_stages, row_bytes, dtype) > limit:
        if num_stages == 3:
            num_stages = 2
        elif max(block_m, block_n) > 16:
            block_m, block_n = (block_m // 2, block_n) if block_m >= block_n else (block_m, block_n // 2)
        else:
            break  # the compiler reports that the kernel does not fit
    blocks = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_stages=num_stages, num_warps=num_warps)
    return dict(BACKEND="TRITON", **blocks)


def _shared_memory(block_m: int, block_n: int, num_stages: int, row_bytes: int, dtype: torch.dtype) -> int:
    """Return the bytes of shared memory that the kernel needs: queries, keys and values, and weights.

    A kernel for compute capability 8 needs this at most. One for an H100, which has twice the memory, needs up to a
    third more. Blocks of 128 query rows keep their weights in registers.
    """
    weights = block_m * block_n * dtype.itemsize if block_m < 128 else 0
    return block_m * row_bytes + 2 * (num_stages - 1) * block_n * row_bytes + weights + 1024
