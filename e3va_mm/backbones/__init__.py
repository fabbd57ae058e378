from .base import FrozenBackbone
from .base_weights import CheckpointMismatchError
from .e3va import E3VABackbone
from .timm_features import TIMMFeatures
from .tuned import TunedBackbone

__all__ = ['CheckpointMismatchError', 'E3VABackbone', 'FrozenBackbone', 'TIMMFeatures', 'TunedBackbone']
