"""A trained model laid out for the machine that is to translate with it.

A step of decoding multiplies few rows by every weight of the decoder. On the CPU, PyTorch's own
linear map arranges the weight for its kernel anew in each call, which takes longer than the
product. Here that is done once, with the operators that ``torch.compile`` uses for the same end.
"""

import copy
import platform

import torch
from torch import Tensor, nn

from mt.model import Transformer
from mt.runtime import Runtime


class PackedLinear(nn.Module):
    """A linear map whose weight has the layout of oneDNN's kernels; its product is in ``dtype``."""

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D'], in the type of x"""
        given, x = x.dtype, x if x.dtype is self.dtype else x.to(self.dtype)
        product = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product if product.dtype is given else product.to(given)


def can_pack(runtime: Runtime) -> bool:
    """Whether this machine has such kernels for the precision."""
    if runtime.device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    operators = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operators, "_linear_pointwise")):
        return False
    if runtime.dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return runtime.dtype == torch.float32


def for_inference(model: Transformer, runtime: Runtime) -> Transformer:
    """A twin of a model with its linear maps packed, or the model itself where that cannot be.

    The twin shares everything else with the model; only its matrix products are in the runtime's
    precision, all between them is in the model's own.
    """
    if not can_pack(runtime):
        return model
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    for part in ("encoder", "decoder", "output"):
        twin._modules[part] = _packed(model.get_submodule(part), runtime.dtype)
    return twin


def _packed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Linear):
        return PackedLinear(module, dtype=dtype)
    twin = copy.copy(module)
    twin._modules = {name: _packed(child, dtype) for name, child in module.named_children()}
    return twin
