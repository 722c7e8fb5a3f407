"""Copies arrays from the host to the device. Independent of their contents."""

import numpy as np
import torch
from torch import Tensor


def upload(arrays: list[np.ndarray], device: torch.device, dtype: type = np.int64) -> list[Tensor]:
    """Copy arrays of any shapes to the device in one transfer, without waiting for it.

    The parts are cloned, because a compiled region does not accept two tensors that share memory.
    """
    packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays], dtype=dtype, casting="same_kind"))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.to(device).split([array.size for array in arrays])
    return [part.view(array.shape).clone() for part, array in zip(parts, arrays)]
