from .base import FrozenBackbone
from .e3va import E3VABackbone
from .timm_features import TIMMFeatures
from .tuned import TunedBackbone

__all__ = ['E3VABackbone', 'FrozenBackbone', 'TIMMFeatures', 'TunedBackbone']
