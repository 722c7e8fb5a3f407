"""What depends on the device: copies to it, its free memory, whether code is compiled for it, and the sizes of tiles.
Independent of models and requests.

The sizes for CPUs were measured: docs/log.md.
"""

import contextlib
import math
import os
import shutil
import sysconfig
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


def num_processors(device: torch.device) -> int:
    """Return how many tiles a kernel computes at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


# Query rows of a large tile: tokens times G. On a GPU they fill a matrix-multiply tile. On a CPU this number was the
# fastest. (With 64 and more query rows, torch's bfloat16 kernel first transposes the whole pool on CPUs that multiply
# bfloat16 in hardware.)
LARGE_TILE_ROWS = {"cuda": 128, "cpu": 16}


def tile_lens(group_size: int, device_type: str) -> tuple[int, int]:
    """Return how many tokens the small tiles (for decodes) and the large tiles (for prompts) contain.

    A CUDA tile has at least 16 query rows, the size of a matrix instruction. On a CPU the G query rows of one decode
    are best. (A single query row is avoided: for it, torch 2.13 to 2.15 select a decoding kernel that does not support
    our masks.)
    """
    small = 16 // math.gcd(16, group_size) if device_type == "cuda" else cdiv(2, group_size)
    large = max(small * 2, LARGE_TILE_ROWS[device_type] // group_size)
    # A power of two, as are the tiles of the kernel, which must divide the query block
    return small, 1 << (large.bit_length() - 1)


def packed_tiles(group_size: int, device_type: str) -> tuple[int, float, float]:
    """Return how many decodes a packed tile contains, and its costs: see `cascade.CascadeRule`.

    On a CPU a tile of 8 query rows is best: one of 16 query rows loses more on pages that are not shared than it saves
    on shared pages. On a GPU the tile of a single decode already has 16 query rows, so a packed tile costs no more. But
    it reads its pages one after the other. The costs on a GPU have not been measured.
    """
    if device_type == "cuda":
        return tile_lens(group_size, device_type)[0], 1.0, 1.0
    return max(2, 8 // group_size), 2.0, 2.5


def kernel_options(device: torch.device, q_block: int, page_size: int) -> dict[str, object] | None:
    """Return kernel options with which the tile sizes of the Triton kernel divide the blocks of the mask.

    Torch before 2.14 does not ensure this. The default sizes are tuned for the device and the head dim, and divide
    blocks of 128. If a block is not a multiple of 128, the options set a small size, which does not need more shared
    memory than the default.
    "TRITON" is the main kernel. "AUTO" would select the flex-decoding kernel for few query rows. It has not been
    measured whether that kernel is faster on small tiles.
    """
    if device.type != "cuda":
        return None
    options: dict[str, object] = {"BACKEND": "TRITON"}
    if q_block % 128:
        options["BLOCK_M"] = min(32, q_block & -q_block)  # the largest power of two that divides q_block
    if page_size % 128:
        options["BLOCK_N"] = 16
    return options
