"""The form of linear layers on a CPU: packed weights in bfloat16, transposed products in float32.

Independent of attention and requests.

oneDNN multiplies bfloat16 in a layout of its own. It converts plain weights in every call, and for few tokens this
takes as long as the product itself. `pack_weights` converts them once. Weights are never held twice: while they are
packed, each parameter is a single NaN, expanded to the shape of the weight. `unpack_weights` restores the same bits.
"""

import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

OPS = torch.library.Library("flex_nano_vllm", "FRAGMENT")
OPS.define("packed_linear(Tensor input, Tensor handle, Tensor? bias, int num_outputs) -> Tensor")

_packed_by_handle: dict[int, Tensor] = {}  # packed weight by the address of its layer's handle


def packed_linear_op(input: Tensor, handle: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    """Compute a linear layer of [..., K] with a packed weight [N, K]. Returns [..., N].

    An operator, because compiled graphs take plain tensors only: `handle` stands for the packed weight.
    """
    return torch.ops.mkldnn._linear_pointwise(input, _packed_by_handle[handle.data_ptr()], bias, "none", [], "")


OPS.impl("packed_linear", packed_linear_op, "CPU")


@torch.library.register_fake("flex_nano_vllm::packed_linear")
def _(input: Tensor, handle: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], num_outputs)


def pack_weights(model: nn.Module) -> None:
    """Pack the bfloat16 weights of the linear layers of a model on a CPU. `unpack_weights` reverts this.

    Subclasses of Linear and of Parameter (quantised weights), weights of two modules (tied heads), and layers whose
    `forward` a library has replaced keep their form.
    """
    num_owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    linears = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    of_bfloat16 = [layer for layer in linears if layer.weight.dtype == torch.bfloat16]
    layers = [x for x in of_bfloat16 if type(x.weight) is nn.Parameter and num_owners[id(x.weight)] == 1]
    model.refusals = []  # otherwise a model that is saved would silently have no weights
    for module in model.modules() if layers else ():
        model.refusals.append(module.register_state_dict_pre_hook(_refuse))
        model.refusals.append(module.register_load_state_dict_pre_hook(_refuse))
    for layer in layers:
        _pack(layer)


def _pack(layer: nn.Linear) -> None:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
    layer.register_buffer("packed_handle", torch.empty(1), persistent=False)  # set first: marks the layer as packed
    _packed_by_handle[layer.packed_handle.data_ptr()] = packed
    layer.forward = functools.partial(_packed_forward, layer)
    layer.weight.data = torch.full((), torch.nan, dtype=torch.bfloat16).expand(layer.weight.shape)


def _packed_forward(layer: nn.Linear, input: Tensor) -> Tensor:
    return torch.ops.flex_nano_vllm.packed_linear(input, layer.packed_handle, layer.bias, layer.out_features)


def _refuse(*args: object) -> None:
    raise RuntimeError(
        "the weights of this model are packed while an Inference engine uses it: close the engine before you save or "
        "load them, or build it with compile=False"
    )


def unpack_weights(model: nn.Module) -> None:
    """Restore the weights of all layers that `pack_weights` has packed."""
    for refusal in vars(model).pop("refusals", ()):
        refusal.remove()
    for layer in model.modules():
        if hasattr(layer, "packed_handle"):
            vars(layer).pop("forward", None)  # missing if packing was interrupted, as may be the packed weight
            packed = _packed_by_handle.pop(layer.packed_handle.data_ptr(), None)
            if packed is not None:
                layer.weight.data = packed.to_dense()
            del layer.packed_handle


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
