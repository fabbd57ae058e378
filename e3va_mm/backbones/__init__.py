from .base import FrozenBackbone
from .base_weights import CheckpointMismatchError
from .e3va import E3VABackbone
from .tuned import TunedBackbone

__all__ = ['CheckpointMismatchError', 'E3VABackbone', 'FrozenBackbone', 'TunedBackbone']
