"""Frozen linear layers in 8 or 4 bits, by the weight-only types of torchao (https://github.com/pytorch/ao).

A layer multiplies in bfloat16: its weight is widened in each call, and again in the backward pass where gradient runs
through it. The types are those that torchao has in plain PyTorch, for any device with bfloat16: int8 with a scale a
row; for 4 bits NF4 in blocks of 64 (arXiv 2305.14314), since torchao's int4 needs further compiled packages, or pads
rows to 1024 and has no gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..checkpoints.base_weights import names_weights

_NF4_BLOCK, _NF4_MOST_BLOCKS = 64, 256


def _to_int8(weight: Tensor) -> Tensor:
    torchao = _import_torchao('int8')
    return torchao.Int8Tensor.from_hp(weight, torchao.PerRow())


def _to_nf4(weight: Tensor) -> Tensor:
    num_blocks = weight.numel() // _NF4_BLOCK
    # The scales of so many blocks are quantised together, and as many groups must make the whole.
    return _import_torchao('nf4').to_nf4(weight, _NF4_BLOCK, math.gcd(num_blocks, _NF4_MOST_BLOCKS))


QUANTISED = {'int8': _to_int8, 'nf4': _to_nf4}


class QuantisedLinears:
    """The weights of a backbone's frozen linear layers, which are quantised when the base has been loaded.

    They are plain attributes of their layers: what averages, broadcasts or optimises parameters can not deal with such
    tensors, and has nothing to do with frozen ones. Until the base is loaded there are none, so that nothing wide gets
    to the backbone's device, and the stock module is kept here, on the host. What only reads a layer's weight without
    calling the layer (``torch.nn.MultiheadAttention`` does) keeps it in bfloat16.

    Args:
        frozen_dtype: 'int8' or 'nf4'.
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
        self._layers = {
            path: tuple(module.weight.shape)
            for path, module in backbone.named_modules()
            if isinstance(module, nn.Linear)
            and not isinstance(module, NonDynamicallyQuantizableLinear)  # MultiheadAttention's
            and f'{path}.weight' in frozen
            and not path.endswith(uncalled)
            and (frozen_dtype != 'nf4' or module.weight.numel() % _NF4_BLOCK == 0)
        }
        if not self._layers:
            raise ValueError(
                f'frozen_dtype={frozen_dtype!r} is for frozen linear layers, and this {type(backbone).__name__} has '
                "none that it fits: take 'bfloat16'"
            )
        self.stock: nn.Module | None = copy.deepcopy(backbone, self._handed_over(backbone)).float().cpu()
        for layer in self._in(backbone).values():
            layer.register_forward_pre_hook(_narrow)
            # The name keeps its place in the order of parameters, which fingerprints are in.
            layer._parameters['weight'] = layer.__dict__['weight'] = None

    def _in(self, backbone: nn.Module) -> dict[str, nn.Linear]:
        return {path: backbone.get_submodule(path) for path in self._layers}

    @property
    def num_weights(self) -> int:
        return sum(math.prod(shape) for shape in self._layers.values())

    def _handed_over(self, backbone: nn.Module) -> dict[int, nn.Parameter]:
        """Memo of a deep copy that takes the weights over, or room for those that will be loaded: no memory so far."""
        make = torch.empty_like if names_weights(backbone) else torch.Tensor.detach
        weights = [layer.weight for layer in self._in(backbone).values()]
        return {id(weight): nn.Parameter(make(weight), requires_grad=False) for weight in weights}

    def staging(self, backbone: nn.Module) -> nn.Module:
        """A stock module in fp32 on the host, for weights to be loaded into; those of the layers may be anything."""
        if self.stock is not None:
            return self.stock
        staging = copy.deepcopy(backbone, self.shared(backbone)).cpu().float()
        for path, layer in self._in(staging).items():
            del layer.__dict__['weight']
            layer.weight = nn.Parameter(torch.empty(self._layers[path]), requires_grad=False)
        return staging

    @torch.no_grad()
    def adopt(self, backbone: nn.Module, staging: nn.Module) -> None:
        """Quantises the weights of a module from :meth:`staging` on the device of ``backbone``, layer by layer.

        Raises:
            ValueError: that device has not the type.
        """
        device = next(backbone.parameters()).device
        self._check_device(device)
        loaded = self._in(staging)
        for path, layer in self._in(backbone).items():
            weight = loaded[path].weight.detach().to(device, torch.bfloat16)
            layer.__dict__['weight'] = QUANTISED[self.frozen_dtype](weight)
        self.stock = None

    def _check_device(self, device: torch.device) -> None:
        identity = torch.eye(_NF4_BLOCK, dtype=torch.bfloat16, device=device)
        try:
            F.linear(identity, QUANTISED[self.frozen_dtype](identity))
        except (AssertionError, RuntimeError, TypeError) as error:
            message = f"frozen_dtype={self.frozen_dtype!r} does not run on {device}: take 'bfloat16' ({error})"
            raise ValueError(message) from error

    def move(self, backbone: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
        """Follows the parameters of ``backbone`` to where ``convert`` takes them, but into no other type."""
        for layer in self._in(backbone).values():
            if layer.weight is not None:
                device = convert(torch.empty(0, dtype=torch.bfloat16, device=layer.weight.device)).device
                layer.__dict__['weight'] = layer.weight.to(device)

    def take(self, backbone: nn.Module, other: nn.Module) -> None:
        """Puts the weights of ``other``, as far as it has these layers, in the place of those of ``backbone``."""
        theirs = dict(other.named_modules())
        for path, layer in self._in(backbone).items():
            if path in theirs:
                layer.__dict__['weight'] = theirs[path].weight

    def shared(self, backbone: nn.Module) -> dict[int, Tensor]:
        """Memo of a deep copy that has the same weights: nothing writes to them, and torchao would round NF4 again."""
        return {id(layer.weight): layer.weight for layer in self._in(backbone).values()}


def _narrow(layer: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook: what autocast does for a plain weight; torchao would widen its own to the input's type."""
    return tuple(each.bfloat16() for each in args)


def _import_torchao(frozen_dtype: str):
    try:
        from torchao import quantization

        # What older versions have not, or elsewhere.
        quantization.Int8Tensor, quantization.to_nf4  # noqa: B018
    except (AttributeError, ImportError) as error:
        message = f"frozen_dtype={frozen_dtype!r} needs torchao 0.18 or newer: pip install 'e3va_mm[quant]', or torchao"
        raise ImportError(f'{message} ({error})') from error
    return quantization
