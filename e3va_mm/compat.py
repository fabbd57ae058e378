"""Two repairs to the environment, each done only where it is needed."""

import importlib.util

import mmengine.config.utils
import torch
from mmengine.utils import is_installed

_library = None  # Schemas live as long as the library object that declared them.


def declare_torchvision_ops() -> None:
    """Makes a registry torchvision importable beside a CPU-only torch.

    PyPI's torchvision wheels are CUDA builds. Without CUDA their operators stay unregistered, and torchvision then
    fails on import while attaching meta kernels to two of them; mmengine, which imports it to log its version, fails
    with it. Declaring the two schemas is enough: nothing here calls the operators themselves.
    """
    global _library
    if torch.version.cuda or torch.version.hip or _library or not importlib.util.find_spec('torchvision'):
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _library = torch.library.Library('torchvision', 'FRAGMENT')
        for name in ('nms', 'qnms'):
            _library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')


def resolve_config_scopes() -> None:
    """Lets ``_base_ = 'mmseg::...'`` find mmseg under the name of its maintained distribution.

    mmengine looks ``mmseg::`` up as the distribution ``mmsegmentation``; ``onedl-mmsegmentation`` holds the same
    module under another name. The module's own name finds either.
    """
    packages = mmengine.config.utils.MODULE2PACKAGE
    if not is_installed(packages['mmseg']):
        packages['mmseg'] = 'mmseg'
