"""Detects changes of a model's weights, after which cached pages are invalid. Independent of the engine."""

from typing import Any

import torch
from torch import nn


class WeightsWatch:
    """Detects changes of a model between two checks.

    It detects parameters that were written to (`load_state_dict`, an optimizer step) or replaced, modules that were
    replaced, and PEFT adapters that were enabled, disabled, exchanged or scaled.

    A check costs about a microsecond per parameter. It does not detect writes through `.data` or to buffers, writes to
    parameters that were created in inference mode, or forward hooks.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._remember()

    def has_changed(self) -> bool:
        """Return whether the model has changed since the last check."""
        if self._look() == self._seen:
            return False
        self._remember()
        return True

    def _remember(self) -> None:
        modules = list(self.model.modules())
        self._parts = [part for module in modules for part in (module._parameters, module._modules) if part]
        tensors = [member for part in self._parts for member in part.values() if isinstance(member, torch.Tensor)]
        self._versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        self._adapters = [module for module in modules if hasattr(module, "_disable_adapters")]
        self._seen = self._look()

    def _look(self) -> tuple[list[Any], ...]:
        members = [id(member) for part in self._parts for member in part.values()]
        versions = [tensor._version for tensor in self._versioned]
        adapters = [
            (module._disable_adapters, list(module.active_adapters), dict(getattr(module, "scaling", {})))
            for module in self._adapters
        ]
        return members, versions, adapters
