"""Frozen linear layers in 8 or 4 bits, by the weight-only types of torchao (https://github.com/pytorch/ao).

A layer multiplies in bfloat16: its weight is widened in each call, and again in the backward pass where gradient runs
through it. The types are those that torchao has in plain PyTorch, for any device with bfloat16: int8 and float8 with a
scale a row; for 4 bits NF4 in blocks of 64 (arXiv 2305.14314), since torchao's int4 needs further compiled packages, or
pads rows to 1024 and has no gradient.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_NF4_BLOCK, _NF4_MOST_BLOCKS = 64, 256


def _to_int8(weight: Tensor) -> Tensor:
    torchao = _import_torchao('int8')
    return torchao.Int8Tensor.from_hp(weight, torchao.PerRow())


def _to_float8(weight: Tensor) -> Tensor:
    torchao = _import_torchao('float8')
    return torchao.Float8Tensor.from_hp(weight, granularity=torchao.PerRow())


def _to_nf4(weight: Tensor) -> Tensor:
    num_blocks = weight.numel() // _NF4_BLOCK
    # The scales of so many blocks are quantised together, and as many groups must make the whole.
    return _import_torchao('nf4').to_nf4(weight, _NF4_BLOCK, math.gcd(num_blocks, _NF4_MOST_BLOCKS))


QUANTISED = {'int8': _to_int8, 'float8': _to_float8, 'nf4': _to_nf4}


class QuantisedLinears:
    """The weights of a backbone's frozen linear layers, which are quantised when the base has been loaded.

    Until then the backbone has empty ones, so that nothing wide goes to its device, and the stock module is kept here,
    on the host. What only reads a layer's weight without calling the layer keeps it in bfloat16.

    Args:
        frozen_dtype: 'int8', 'float8' or 'nf4'.
        backbone: changed in place.
        frozen: names of its tensors that are not trained.
        uncalled: ends of the names of its layers that are not called.

    Attributes:
        stock: the stock module, until the base is loaded; then None.

    Raises:
        ImportError: torchao is not installed.
        ValueError: the backbone has no such layers.
    """

    def __init__(self, frozen_dtype: str, backbone: nn.Module, frozen: set[str], uncalled: tuple[str, ...]) -> None:
        _import_torchao(frozen_dtype)
        self.frozen_dtype = frozen_dtype
        layers = {
            f'{path}.weight': module
            for path, module in backbone.named_modules()
            if isinstance(module, nn.Linear) and f'{path}.weight' in frozen and not path.endswith(uncalled)
            # MultiheadAttention has one whose weight it reads.
            and not isinstance(module, NonDynamicallyQuantizableLinear) and self._fits(module.weight)
        }  # fmt: skip
        if not layers:
            raise ValueError(
                f'frozen_dtype={frozen_dtype!r} is for frozen linear layers, and this {type(backbone).__name__} has '
                "none that it fits: take 'bfloat16'"
            )
        self.names = set(layers)
        self.stock: nn.Module | None = _wide_copy(backbone, {id(each.weight): each.weight for each in layers.values()})
        for layer in layers.values():
            layer.weight.data = layer.weight.new_empty(0)
            layer.register_forward_pre_hook(_narrow)

    def _fits(self, weight: Tensor) -> bool:
        return self.frozen_dtype != 'nf4' or weight.numel() % _NF4_BLOCK == 0

    def staging(self, backbone: nn.Module) -> nn.Module:
        """A stock module in fp32 on the host, for weights to be loaded into; those of the layers may be anything."""
        if self.stock is not None:
            return self.stock
        weights = [tensor for name, tensor in backbone.named_parameters() if name in self.names]
        return _wide_copy(backbone, {id(weight): torch.empty(weight.shape) for weight in weights}).cpu()

    @torch.no_grad()
    def adopt(self, backbone: nn.Module, staging: nn.Module) -> None:
        """Quantises the weights of a module from :meth:`staging` on the device of ``backbone``, layer by layer.

        Raises:
            ValueError: that device has not the type.
        """
        loaded, device = dict(staging.named_parameters()), None
        for name, weight in backbone.named_parameters():
            if name not in self.names:
                continue
            if weight.device != device:
                device = weight.device
                self._check_device(device)
            quantised = QUANTISED[self.frozen_dtype](loaded[name].detach().to(device, torch.bfloat16))
            # In place: optimizers and model wrappers hold on to the parameter.
            torch.utils.swap_tensors(weight, nn.Parameter(quantised, requires_grad=False))
        self.stock = None

    def copies(self, backbone: nn.Module) -> dict[int, Tensor]:
        """Copies of the weights by the ids of these, for ``copy.deepcopy``; torchao's NF4 would be rounded once more."""
        weights = [tensor for name, tensor in backbone.named_parameters() if name in self.names]
        return {id(weight): _exact_copy(weight) for weight in weights}

    def _check_device(self, device: torch.device) -> None:
        identity = torch.eye(_NF4_BLOCK, dtype=torch.bfloat16, device=device)
        try:
            F.linear(identity, QUANTISED[self.frozen_dtype](identity))
        except (AssertionError, RuntimeError, TypeError) as error:
            message = f"frozen_dtype={self.frozen_dtype!r} does not run on {device}: take 'bfloat16' ({error})"
            raise ValueError(message) from error


def _wide_copy(backbone: nn.Module, weights: dict[int, Tensor]) -> nn.Module:
    """A copy in fp32 that has ``weights``, by the ids of those in ``backbone``, which are not copied."""
    memo = {key: nn.Parameter(weight.data, requires_grad=False) for key, weight in weights.items()}
    return copy.deepcopy(backbone, memo).float()


def _exact_copy(weight: Tensor) -> nn.Parameter:
    names, context = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name).clone() for name in names}
    copied = type(weight).__tensor_unflatten__(parts, context, weight.shape, weight.stride())
    return nn.Parameter(copied, requires_grad=False)


def _narrow(layer: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook: what autocast does for a plain weight; torchao would widen its own to the input's type."""
    return tuple(each.bfloat16() for each in args)


def _import_torchao(frozen_dtype: str):
    try:
        from torchao import quantization

        # What older versions have not, or elsewhere.
        quantization.Int8Tensor, quantization.Float8Tensor, quantization.to_nf4  # noqa: B018
    except (AttributeError, ImportError) as error:
        message = f"frozen_dtype={frozen_dtype!r} needs torchao 0.18 or newer: pip install 'e3va_mm[quant]', or torchao"
        raise ImportError(f'{message} ({error})') from error
    return quantization
