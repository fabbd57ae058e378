"""What a comparison method has to say."""

from __future__ import annotations

from torch import Tensor, nn

from ..families.base import Family


class Method(nn.Module):
    """A way of tuning a backbone.

    Subclasses add parameters, hook the backbone, or name parameters of the backbone that are trained.

    Args:
        family: of the stock backbone, which must not become a submodule.
    """

    # Whether the backbone takes part in training as a stock one does: dropout, stochastic depth, batch statistics.
    trains_backbone = False
    # Whether it works by what only mm's Swin blocks offer: being called with the tokens' height and width.
    swin_only = False

    def __init__(self, family: Family) -> None:
        super().__init__()

    def inject(self, backbone: nn.Module) -> None:
        """Wraps layers of ``backbone``, where the method does so: first a random one, then one with loaded weights."""

    def trained_names(self, backbone: nn.Module) -> set[str]:
        """Names of the backbone's own parameters, and of its buffers, that training changes."""
        return set()

    def run(self, family: Family, images: Tensor) -> Tensor | tuple[Tensor, ...] | list[Tensor]:
        """images (B, 3, H, W) -> what the backbone returns: feature maps, (B, C_s, H_s, W_s) each."""
        return family.run(images)
