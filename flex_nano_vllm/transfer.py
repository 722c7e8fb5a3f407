"""Copies arrays from the host to the device. Independent of their contents."""

import numpy as np
import torch
from torch import Tensor


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
