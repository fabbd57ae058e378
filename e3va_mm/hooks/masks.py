"""Ground-truth masks of detectors whose heads crop them."""

from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import HOOKS
from torch import nn


@HOOKS.register_module()
class DeviceMasksHook(Hook):
    """Has an image's ground-truth masks moved to the device once a step, where stock moves them at each crop.

    The targets are the same to the bit, see :class:`~e3va_mm.device_masks.DeviceMasks`. It listens to data
    preprocessors, of any class and nested ones too, and changes neither them nor the keys of a checkpoint.
    """

    def before_train(self, runner) -> None:
        listen_to_preprocessors(runner.model)


def listen_to_preprocessors(model: nn.Module) -> None:
    """Replaces the masks in what the data preprocessors in ``model`` return from now on."""
    for module in model.modules():
        if isinstance(module, BaseDataPreprocessor):
            # A function, other than a closure, can be copied and pickled with the model.
            module.register_forward_hook(_replace_masks)


def _replace_masks(module: nn.Module, args: tuple, output) -> None:
    samples = output.get('data_samples') if isinstance(output, dict) else None
    # Of several branches there is a dict, and each list in it comes from a preprocessor within.
    if isinstance(samples, (list, tuple)):
        from ..device_masks import move_masks_once

        move_masks_once(samples)
