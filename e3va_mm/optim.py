"""The optimizer's parameter groups."""

from __future__ import annotations

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedGroupsConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, but parameters of the same settings share a parameter group.

    With a ``paramwise_cfg`` mmengine makes a group of each parameter. An optimizer updates group by group, and adapters
    are many small parameters: their update is then hundreds of tiny kernels. The update itself is the same.
    ``optim_wrapper=dict(constructor='MergedGroupsConstructor')`` is all that a config needs; a run resumes from the
    optimizer state of the same constructor only, and AdapterCheckpointHook says so.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            params[:] = merge_groups(params)


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
