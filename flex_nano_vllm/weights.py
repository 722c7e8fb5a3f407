"""Whether a model's weights are still those that cached pages were computed with. Knows no engine."""

from typing import Any

import torch
from torch import nn


class WeightsWatch:
    """Notices changes of a model between two looks: parameters written to (`load_state_dict`, an optimizer's step) or
    replaced, modules exchanged, and PEFT's adapters switched, exchanged or scaled.

    A look costs about a microsecond a parameter. It does not see writes through `.data` or to buffers, parameters that
    were made in inference mode, or forward hooks.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._remember()

    def has_changed(self) -> bool:
        """Whether there has been a change since the last look."""
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
