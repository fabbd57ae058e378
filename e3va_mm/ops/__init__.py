"""What mmcv's compiled operators compute, from torchvision's operators or plain torch: no compiler is needed.

``stand_in`` offers this package as ``mmcv._ext`` where mmcv has none of its own. Names and signatures are those that
mmcv's wrappers call, results included: most are written into tensors that the caller gives. fp16 and bf16 are computed
in fp32. An operator that is not here is there by name, and raises when it is called.
"""

import importlib.machinery
import importlib.util
import sys
import types

import torch

from .attention import ms_deform_attn_backward, ms_deform_attn_forward
from .boxes import nms, softnms
from .common import unsupported
from .deform import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from .losses import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from .masked import masked_col2im_forward, masked_im2col_forward
from .rois import roi_align_backward, roi_align_forward, roi_pool_backward, roi_pool_forward

__all__ = [
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'get_compiler_version',
    'get_compiling_cuda_version',
    'masked_col2im_forward',
    'masked_im2col_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'nms',
    'roi_align_backward',
    'roi_align_forward',
    'roi_pool_backward',
    'roi_pool_forward',
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
    'softnms',
]


def get_compiler_version() -> str:
    """For logs of the environment."""
    return 'none: operators of e3va_mm.ops'


def get_compiling_cuda_version() -> str:
    """For logs of the environment."""
    return torch.version.cuda or 'not available'


class _Operators(types.ModuleType):
    """Has any operator by name, as mmcv's wrappers ask on import; those not in ``__all__`` raise when called."""

    def __getattr__(self, name: str):
        if name.startswith('_'):
            raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')

        def missing(*_, **__):
            raise unsupported(name)

        return missing


def stand_in() -> bool:
    """Offers the operators as ``mmcv._ext`` where mmcv is installed without; whether it does now.

    Before anything imports ``mmcv.ops``. Importing mmcv to look takes a second, so its folder is searched.
    """
    name = 'mmcv._ext'
    mmcv = importlib.util.find_spec('mmcv')
    if mmcv is None or name in sys.modules:
        return isinstance(sys.modules.get(name), _Operators)
    if importlib.machinery.PathFinder.find_spec(name, mmcv.submodule_search_locations):
        return False
    module = _Operators(name, __doc__)
    module.__dict__.update({op: globals()[op] for op in __all__})
    # mmengine asks find_spec whether there are operators, and that wants a spec.
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, origin=__file__)
    sys.modules[name] = module
    return True
