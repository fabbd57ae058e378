"""timm's plain vision transformers: ViT, EVA and the image encoder of SAM."""

from __future__ import annotations

import copy
import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Size, Stage
from .timm_base import TIMMFamily, pad_to, transformer_block, uncalled_qkv

_NUM_STAGES = 4


class ViTFamily(TIMMFamily):
    """Plain vision transformers (arXiv 2010.11929): AugReg, DINOv2 with registers, CLIP, ...

    Four stages of equal depth at one resolution. Images are padded to whole patches; if the patch size is no power of
    two (14), they are resized first, so that a patch covers the next power of two: heads expect such strides.
    """

    layout = 'NLC'
    grid = 'model.patch_embed'
    model_args = dict(dynamic_img_size=True)
    unused = ('norm', 'fc_norm', 'attn_pool', 'head')

    def __init__(self, backbone: nn.Module, out_indices: tuple[int, ...]) -> None:
        super().__init__(backbone, out_indices)
        self.num_prefix = getattr(backbone.model, 'num_prefix_tokens', 0)

    def describe(self, model: nn.Module) -> list[Stage]:
        blocks = [transformer_block(f'model.blocks.{number}', block) for number, block in enumerate(model.blocks)]
        parts = [blocks[start:stop] for start, stop in itertools.pairwise([0, *_ends(model)])]
        return [Stage(part, part[-1].name, model.embed_dim, None) for part in parts]

    def feature_index(self, model: nn.Module, index: int) -> int:
        return _ends(model)[index] - 1

    def prepare(self, images: Tensor) -> Tensor:
        patch = self.backbone.model.patch_embed.patch_size[0]
        stride = 1 << (patch - 1).bit_length()
        images = pad_to(images, stride)
        if stride == patch:
            return images
        size = [length // stride * patch for length in images.shape[2:]]
        return F.interpolate(images, size=size, mode='bilinear', align_corners=False)

    def new_norm(self, model: nn.Module, stage: int) -> nn.Module:
        found = [getattr(model, name, None) for name in ('norm', 'fc_norm')]
        norm = next((norm for norm in found if isinstance(norm, nn.LayerNorm)), None)
        return copy.deepcopy(norm) if norm is not None else super().new_norm(model, stage)


def _ends(model: nn.Module) -> list[int]:
    """The numbers of blocks up to the ends of the stages."""
    return [round(len(model.blocks) * number / _NUM_STAGES) for number in range(1, _NUM_STAGES + 1)]


class EvaFamily(ViTFamily):
    """EVA, EVA-02 and DINOv3 (arXiv 2303.11331, 2508.10104)."""

    def __init__(self, backbone: nn.Module, out_indices: tuple[int, ...]) -> None:
        super().__init__(backbone, out_indices)
        self.uncalled = uncalled_qkv(backbone.model.blocks[0].attn)

    def enters_graph(self) -> bool:
        # Blocks are called with rotary embeddings, which the model makes.
        return False


class SAMFamily(ViTFamily):
    """The image encoder of Segment Anything (arXiv 2304.02643), without its neck; tokens in windows but for four
    blocks."""

    layout = 'NHWC'
    model_args = {}
    unused = ('neck', 'head')
    exports_fused = open_sizes = False

    def tap(self, stage: int, output: Tensor, grid: Size | None) -> tuple[Tensor, Size | None]:
        """Attention's output is in windows, one behind the other in the batch."""
        if output.ndim == 3:
            return output, None
        window, (height, width) = output.shape[1], grid
        if output.shape[1:3] == (height, width):
            return output.flatten(1, 2), grid
        rows, columns = -(-height // window), -(-width // window)
        image = output.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return image[:, :height, :width].flatten(1, 2), grid

    def new_norm(self, model: nn.Module, stage: int) -> nn.Module:
        return TIMMFamily.new_norm(self, model, stage)
