"""Heads under bfloat16 autocast."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

# mmcv's CUDA kernels behind these modules exist for float32 and float16 only.
_MODULES = ('RoIAlign', 'RoIAlignRotated', 'RoIPool', 'DeformRoIPool', 'FocalLoss', 'SigmoidFocalLoss')


@HOOKS.register_module()
class Float32OpsHook(Hook):
    """Runs the ops that lack bfloat16 kernels in float32, and returns their results in bfloat16.

    ``tools/train.py`` adds it when ``optim_wrapper.dtype='bfloat16'``. It matches modules by class name, so that
    neither mmdet nor mmseg has to be there.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner) -> None:
        run_in_float32(runner.model)


def run_in_float32(model: torch.nn.Module) -> None:
    """Wraps the modules of ``model`` that can not compute in bfloat16."""
    for module in model.modules():
        if type(module).__name__ in _MODULES:
            module.register_forward_pre_hook(_to_float32, with_kwargs=True)
            module.register_forward_hook(_to_bfloat16)


def _to_float32(module, args, kwargs):
    upcast = [_cast(value, torch.bfloat16, torch.float32) for value in args]
    return tuple(upcast), {key: _cast(value, torch.bfloat16, torch.float32) for key, value in kwargs.items()}


def _to_bfloat16(module, args, output):
    # Losses are scalars and stay in float32; feature maps go back to what the head computes in.
    return _cast(output, torch.float32, torch.bfloat16) if output.ndim > 1 else output


def _cast(value, source, target):
    return value.to(target) if isinstance(value, torch.Tensor) and value.dtype == source else value
