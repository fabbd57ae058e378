"""e3va_mm: memory- and time-efficient fine-tuning of vision backbones for OpenMMLab.

Importing the package registers its modules with mmengine; neither mmseg nor mmdet is imported.
"""

from .compat import declare_torchvision_ops, leave_out_multimodal, resolve_config_scopes
from .named_configs import resolve_own_configs
from .ops import stand_in

declare_torchvision_ops()
resolve_config_scopes()
resolve_own_configs()
leave_out_multimodal()
stand_in()

from . import backbones, checkpoints, hooks, necks, optim, sharding  # noqa: E402, F401
from .shared import SharedInferencer  # noqa: E402, F401
from .tune import tune  # noqa: E402, F401

__version__ = '0.1.0'
