#!/usr/bin/env python
"""What may become a part of E³VA's recipe, and has not earned its place. As a script, tools/train.py that knows it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from e3va_mm.highway.mixer import StateMixer
from e3va_mm.highway.stage_adapters import StageAdapters
from e3va_mm.optim import MergedGroupsConstructor

# The rate that adapters' and mixers' do not rise above, and the fan-in behind which it falls.
HIGHEST, WIDEST = 0.01, 256


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OwnRateConstructor(MergedGroupsConstructor):
    """A rate of its own for adapters and mixers: ``min(10 lr, 0.01)``, less behind more than 256 elements.

    Adam moves each element by about the rate, whatever its gradient, and a product by the rate times the number of
    elements that it sums: 8 in a core, 1536 in the input basis of Swin-L's last stage. Rates that fall with the fan-in
    are those of "Tensor Programs V" (arXiv 2203.03466).
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        if not prefix:
            self.fan_ins = fan_ins(module)
        super().add_params(params, module, prefix, is_dcn_module)

    def rate_of_added(self, parameter: nn.Parameter) -> float:
        fan_in = self.fan_ins.get(id(parameter))
        return self.base_lr if fan_in is None else min(10 * self.base_lr, HIGHEST) * min(1, WIDEST / fan_in)


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


if __name__ == '__main__':
    tool = Path(__file__).resolve().parent.parent / 'tools/train.py'
    # This folder has a coverage.py, which others would take for the library.
    sys.path[0] = str(tool.parent)
    runpy.run_path(str(tool), run_name='__main__')
