"""The form of linear layers on a CPU: packed weights, and transposed products.

Independent of attention and requests.

oneDNN multiplies weights in a layout of its own. In bfloat16 it converts plain weights in every call, which takes a
third of the time for 8 tokens. In float32, torch multiplies plain weights with MKL, which takes twice as long on AMD's
CPUs. `pack_weights` converts weights once. They are never held twice: while they are packed, each parameter is a single
NaN, expanded to the shape of the weight. `unpack_weights` restores the same bits.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

LINEAR_OPS = torch.library.Library("flex_nano_vllm", "FRAGMENT")
LINEAR_OPS.define("packed_linear(Tensor input, Tensor handle, Tensor? bias, int num_outputs) -> Tensor")

_handles = itertools.count()
_packed_of_handle: dict[int, Tensor] = {}


def packed_linear_op(input: Tensor, handle: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    """Compute a linear layer of [..., K] with a packed weight [N, K]. Returns [..., N].

    An operator, because compiled graphs take plain tensors only: the number in `handle` stands for the packed weight.
    """
    return torch.ops.mkldnn._linear_pointwise(input, _packed_of_handle[handle.item()], bias, "none", [], "")


LINEAR_OPS.impl("packed_linear", packed_linear_op, "CPU")


@torch.library.register_fake("flex_nano_vllm::packed_linear")
def _(input: Tensor, handle: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], num_outputs)


@dataclass
class PackedLayer:
    """A layer whose weight is packed, and what it was packed from."""

    layer: nn.Linear
    weight: nn.Parameter
    handle: int


def pack_weights(model: nn.Module) -> None:
    """Pack the weights of the linear layers of a model on a CPU. `unpack_weights` reverts this.

    These keep their form: subclasses of Linear and of Parameter (quantised weights), weights of two modules (tied
    heads), layers whose `forward` a library has replaced, and layers in PEFT's adapters, some of which read the weight.
    """
    unpack_weights(model)
    model.packed_layers, model.refusals_of_packed = [], []
    of_adapters = {id(module.base_layer) for module in model.modules() if "base_layer" in module._modules}
    linears = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    layers = [layer for layer in linears if id(layer) not in of_adapters and _can_pack(layer, model)]
    for module in model.modules() if layers else ():  # otherwise a model that is saved would silently have no weights
        model.refusals_of_packed.append(module.register_state_dict_pre_hook(_refuse))
        model.refusals_of_packed.append(module.register_load_state_dict_pre_hook(_refuse))
    for layer in layers:
        packed = PackedLayer(layer, layer.weight, next(_handles))
        model.packed_layers.append(packed)
        handle = torch.tensor(packed.handle, device="cpu")
        layer.register_buffer("packed_handle", handle, persistent=False)
        layer.__reduce_ex__ = _refuse  # called for a copy and for a pickle
        layer.forward = functools.partial(_packed_forward, layer)
        _pack(packed)


def _can_pack(layer: nn.Linear, model: nn.Module) -> bool:
    weight, is_held = layer.weight, _is_held(layer.weight)  # held: packed by the engine of another model
    num_owners = sum(weight is other for module in model.modules() for other in module._parameters.values())
    has_dtype = weight.dtype in (torch.bfloat16, torch.float32)
    is_plain = type(weight) is nn.Parameter and has_dtype and not weight.is_inference()
    return is_plain and weight.shape == (layer.out_features, layer.in_features) and num_owners == 1 and not is_held


def _pack(packed: PackedLayer) -> None:
    weight = packed.weight = packed.layer.weight
    with torch.inference_mode(False), torch.no_grad():
        plain = weight.detach().contiguous()
        _packed_of_handle[packed.handle] = torch.ops.mkldnn._reorder_linear_weight(plain, None)
        weight.data = torch.full((), torch.nan, dtype=weight.dtype, device="cpu").expand(weight.shape)


def _is_held(weight: Tensor) -> bool:
    """Return whether a parameter is the NaN that stands for a packed weight, not a weight written since."""
    return weight.stride() == (0, 0) and bool(weight.detach()[0, 0].isnan())


def _packed_forward(layer: nn.Linear, input: Tensor) -> Tensor:
    return torch.ops.flex_nano_vllm.packed_linear(input, layer.packed_handle, layer.bias, layer.out_features)


def _refuse(*args: object) -> None:
    raise RuntimeError(
        "the weights of this model are packed while an Inference engine uses it: close the engine before you save, "
        "load or copy them, or build it with compile=False"
    )


def repack_weights(model: nn.Module) -> bool:
    """Pack the weights that were written or replaced since `pack_weights`. Returns whether there are any.

    Raises RuntimeError for a weight that cannot be packed, for example one of another dtype.
    """
    changed = [packed for packed in vars(model).get("packed_layers", ()) if not _is_held(packed.layer.weight)]
    for packed in changed:
        if not _can_pack(packed.layer, model):
            weight = packed.layer.weight
            raise RuntimeError(
                "while an Inference engine had it packed, a weight was tied, or replaced by one of "
                f"{weight.dtype} with shape {list(weight.shape)}: close the engine first"
            )
        _pack(packed)
    return bool(changed)


def unpack_weights(model: nn.Module) -> None:
    """Restore the weights of all layers that `pack_weights` has packed. Weights written since then stay.

    Can be called again after an interrupt.
    """
    layers = vars(model).get("packed_layers", [])
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        for packed in layers:
            if packed.handle in _packed_of_handle and _is_held(packed.weight):
                packed.weight.data = _packed_of_handle[packed.handle].to_dense()
    for packed in layers:
        for name in ("forward", "__reduce_ex__"):
            vars(packed.layer).pop(name, None)
        packed.layer._buffers.pop("packed_handle", None)
        packed.layer._non_persistent_buffers_set.discard("packed_handle")
        _packed_of_handle.pop(packed.handle, None)
    for refusal in vars(model).get("refusals_of_packed", ()):
        refusal.remove()
    for name in ("packed_layers", "refusals_of_packed"):
        vars(model).pop(name, None)


class TransposedProducts(TorchFunctionMode):
    """Computes linear layers as `(weight @ input.T).T`. The libraries for CPUs are faster in this form for few rows of
    float32.

    Quantised weights, which are subclasses of Tensor, keep their own product.
    """

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        return (transposed_linear if func is linear and not types else func)(*args, **kwargs or {})


def transposed_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer of [..., K] with weights [N, K]. Returns [..., N], contiguous."""
    columns = input.flatten(0, -2).T
    product = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.T.contiguous().unflatten(0, input.shape[:-1])
