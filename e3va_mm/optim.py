"""The optimizer's parameter groups."""

from __future__ import annotations

import re

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

# The projection at the end of a low-rank update or a bottleneck, by the names of E³VA, of our methods and of peft.
_UP_PROJECTION = re.compile(r'(^|\.)(up|up_out|up_bias|lora_B)(\.|$)')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedGroupsConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, but parameters of the same settings share a parameter group.

    With a ``paramwise_cfg`` mmengine makes a group of each parameter. An optimizer updates group by group, and adapters
    are many small parameters: their update is then hundreds of tiny kernels. The update itself is the same.
    ``optim_wrapper=dict(constructor='MergedGroupsConstructor')`` is all that a config needs; a run resumes from the
    optimizer state of the same constructor only, and AdapterCheckpointHook says so.

    ``paramwise_cfg=dict(up_lr_mult=10)`` multiplies the learning rate of the up-projections, on top of what other keys
    say. They start at zero; that they learn faster is LoRA+ (arXiv 2402.12354), here for E³VA's adapters and mixers and
    the bottlenecks and LoRA of the comparison methods.

    Raises:
        ValueError: ``up_lr_mult`` is not a positive number, or the model trains no up-projection.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            factor = self.paramwise_cfg.get('up_lr_mult', 1)
            if factor != 1:
                self._scale_up_projections(params, module, factor)
            params[:] = merge_groups(params)

    def _scale_up_projections(self, params: list[dict], model: nn.Module, factor: float) -> None:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor <= 0:
            raise ValueError(f'optim_wrapper.paramwise_cfg.up_lr_mult must be a positive number, got {factor!r}')
        named = model.named_parameters()
        scaled = {id(value) for name, value in named if value.requires_grad and _UP_PROJECTION.search(name)}
        if not scaled:
            raise ValueError(f'optim_wrapper.paramwise_cfg.up_lr_mult={factor}: the model trains no up-projection')
        for group in params:
            if id(group['params'][0]) in scaled:
                group['lr'] = group.get('lr', self.base_lr) * factor


def merge_groups(groups: list[dict]) -> list[dict]:
    """The groups, those that differ in nothing but their ``params`` as one; in the order of their first parameters."""
    merged: list[dict] = []
    for group in groups:
        settings = {**group, 'params': None}
        for known in merged:
            if {**known, 'params': None} == settings:
                known['params'] = [*known['params'], *group['params']]
                break
        else:
            merged.append(dict(group))
    return merged
