"""Heads under bfloat16 autocast."""

from types import MethodType

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

# mmcv's CUDA kernels behind these modules exist for float32 and float16 only.
_MODULES = {
    *('RoIAlign', 'RoIAlignRotated', 'RoIPool', 'DeformRoIPool', 'FocalLoss', 'SigmoidFocalLoss'),
    *('MultiScaleDeformableAttention', 'DeformConv2d', 'ModulatedDeformConv2d'),
}


@HOOKS.register_module()
class Float32OpsHook(Hook):
    """Runs the modules that lack bfloat16 kernels in float32, and returns maps in what they were given.

    ``tools/train.py`` adds it when ``optim_wrapper.dtype='bfloat16'``. It matches modules by their class names, so
    that neither mmdet nor mmseg has to be there.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner) -> None:
        run_in_float32(runner.model)


def run_in_float32(model: torch.nn.Module) -> None:
    """Changes the modules of ``model`` that can not compute in bfloat16."""
    for module in model.modules():
        if any(cls.__name__ in _MODULES for cls in type(module).__mro__):
            # A bound method, other than a closure, follows a deep copy to the copy.
            module.forward = MethodType(_float32_forward, module)


def _float32_forward(module, *args, **kwargs):
    """The forward of ``module`` in float32. Only under autocast is it given bfloat16: validation is as ever."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    is_half = any(value.dtype == torch.bfloat16 for value in given)
    args = [_to_float32(value) for value in args]
    kwargs = {key: _to_float32(value) for key, value in kwargs.items()}
    with torch.autocast(given[0].device.type, enabled=False):
        output = type(module).forward(module, *args, **kwargs)
    # Losses are scalars and stay in float32; feature maps go back to what the head computes in.
    return output.bfloat16() if is_half and output.ndim > 1 else output


def _to_float32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
