#!/usr/bin/env python
"""What may become a part of E³VA's recipe, and has not earned its place. As a script, tools/train.py that knows it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn

from e3va_mm.backbones.e3va import E3VABackbone
from e3va_mm.highway.highway import HighwayPass
from e3va_mm.highway.mixer import StateMixer
from e3va_mm.highway.stage_adapters import StageAdapters
from e3va_mm.highway.tap_record import TapRecord
from e3va_mm.optim import MergedGroupsConstructor

# The fan-in at which a parameter learns at the config's rate, and the rate that the highway's do not rise above.
REFERENCE, HIGHEST = 256, 5e-4
# The rate that OwnRateConstructor's do not rise above.
OWN_RATE = 0.01


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class FanInRatesConstructor(MergedGroupsConstructor):
    """Rates of adapters and mixers by the shape of each matrix: ``min(lr, 5e-4) * 256 / fan_in``; for Adam's family.

    Adam moves each element by about the rate, whatever its gradient, and a product by the rate times the number of
    elements that it sums: 8 in a core, 1536 in the input basis of Swin-L's last stage. So one rate for all lets some
    rest or others run away. Rates that fall with the fan-in are those of "Tensor Programs V" (arXiv 2203.03466).
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        if not prefix:
            self.fan_ins = fan_ins(module)
        super().add_params(params, module, prefix, is_dcn_module)

    def rate_of_added(self, parameter: nn.Parameter) -> float:
        fan_in = self.fan_ins.get(id(parameter))
        return self.base_lr if fan_in is None else min(self.base_lr, HIGHEST) * REFERENCE / fan_in


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OwnRateConstructor(FanInRatesConstructor):
    """A rate of its own for adapters and mixers: ``min(10 lr, 0.01)``, less behind more than 256 elements."""

    def rate_of_added(self, parameter: nn.Parameter) -> float:
        fan_in = self.fan_ins.get(id(parameter))
        return self.base_lr if fan_in is None else min(10 * self.base_lr, OWN_RATE) * min(1, REFERENCE / fan_in)


def fan_ins(model: nn.Module) -> dict[int, int]:
    """By the id of each matrix and bias of adapters and mixers: how many elements an output sums.

    A bias has that of the narrowest matrix beside it, or of its own layer.
    """
    found = {}
    for module in model.modules():
        if isinstance(module, StageAdapters):
            for name, factor in module.named_parameters(recurse=False):
                is_bias = name.endswith('bias')
                found[id(factor)] = module.up_out.shape[-2] if is_bias else factor.shape[-2]
        elif isinstance(module, StateMixer):
            layers = (layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
            found.update({id(each): layer.weight[0].numel() for layer in layers for each in layer.parameters()})
    return found


@MODELS.register_module()
class NormalisedE3VABackbone(E3VABackbone):
    """Adapters read taps of RMS 1, token by token, and add in units of the RMS of the frozen tokens at the stage's end.

    Both differ by an order of magnitude between backbones and stages, so that the same step of an adapter's weights
    means something else in each.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for module in self.highway:
            if isinstance(module, StageAdapters):
                module.__class__ = NormalisedAdapters


class NormalisedAdapters(StageAdapters):
    def record(self) -> TapRecord:
        return NormalisedRecord(self.down_in, self.storage)

    def forward(self, record: TapRecord) -> Tensor:
        tokens = record.stage_end
        rms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=torch.float32) / tokens.shape[-1] ** 0.5
        return super().forward(record) * rms


class NormalisedRecord(TapRecord):
    def add(self, tap: Tensor) -> None:
        super().add(F.rms_norm(tap, tap.shape[-1:], eps=1e-6))


def _record_with_end(along: HighwayPass, index: int, tokens: Tensor, take=HighwayPass._record) -> TapRecord:
    record = take(along, index, tokens)
    record.stage_end = tokens
    return record


HighwayPass._record = _record_with_end


if __name__ == '__main__':
    tool = Path(__file__).resolve().parent.parent / 'tools/train.py'
    # This folder has a coverage.py, which others would take for the library.
    sys.path[0] = str(tool.parent)
    runpy.run_path(str(tool), run_name='__main__')
