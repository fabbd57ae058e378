"""Methods that insert modules into the backbone's blocks; gradient runs through the whole backbone.

They are inserted by forward hooks, so that the backbone keeps its code and its key names. The hooks are partials, not
closures, because a deep copy of the model (EMAHook) must call the copy's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count, check_kernel_sizes, check_number, check_switch
from ..families.base import Block, Family, Size
from ..highway.adapters import single_delta
from ..highway.mixer import MultiScaleDepthwise
from ..highway.stage_adapters import StageAdapters
from .base import Method


def _insert(family: Family, make: Callable[[int], nn.Module]) -> nn.ModuleList:
    """Modules of a width, behind attention and MLP of each block; of blocks that have not both, where its taps are."""
    inserted = nn.ModuleList()
    for stage in family.stages:
        dims = stage.tap_dims or stage.embed_dims
        for block in stage.blocks:
            for name in (block.attention, block.mlp) if block.attention and block.mlp else block.taps:
                inserted.append(make(dims))
                add = partial(_add, inserted[-1], dims if family.layout == 'NCHW' else None)
                if block.taps_inputs:
                    family.module(name).register_forward_pre_hook(partial(_ahead, add))
                else:
                    family.module(name).register_forward_hook(partial(_behind, add))
    return inserted


def _ahead(add: Callable, module: nn.Module, args: tuple) -> tuple:
    return add(args)


def _behind(add: Callable, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    return add(output)


def _add(inserted: nn.Module, map_dims: int | None, value: Tensor | tuple | list) -> Tensor | tuple:
    """Adds to tokens (B, L, C) or (B, H, W, C), or to a map (B, C, H, W) of ``map_dims`` channels."""
    if isinstance(value, (tuple, list)):
        return _add(inserted, map_dims, value[0]), *value[1:]
    if value.ndim == 4 and value.shape[1] == map_dims:
        return value + inserted(value.movedim(1, -1)).movedim(-1, 1)
    return value + inserted(value)


def _beside(inserted: nn.Module, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output + inserted(args[0])


def _after_block(inserted: nn.Module, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output + inserted(output, args[1])


def _branches(family: Family) -> Iterator[tuple[Block, int, nn.Module, nn.Module]]:
    """Each block with its width and its two branches, in the order of execution."""
    for stage in family.stages:
        for block in stage.blocks:
            if block.attention is None or block.mlp is None:
                name = type(family.module(block.name)).__name__
                raise ValueError(f'this method needs blocks with attn and mlp, and {name} has not both')
            yield block, stage.embed_dims, family.module(block.attention), family.module(block.mlp)


class Bottleneck(nn.Module):
    """``scale * up(act(down(z)))``; zero at the start.

    Args:
        embed_dims: width of the tokens.
        width: of the bottleneck.
        act: activation, a function of a tensor.
        scale: constant factor.
    """

    def __init__(self, embed_dims: int, width: int, act=F.gelu, scale: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(embed_dims, width), nn.Linear(width, embed_dims)
        self.act, self.scale = act, scale
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scale * self.up(self.act(self.down(tokens)))


class Adapter(Method):
    """Bottlenecks behind attention and MLP, before their residual additions (Houlsby et al., arXiv 1902.00751).

    Swin-B at width 64 has 3,107,328 parameters. In other blocks than a transformer's they are where E³VA has its taps:
    behind a convolutional block or its residual branch, and in a ResNet's bottleneck ahead of its last convolution.

    Args:
        width: of the bottleneck.
    """

    def __init__(self, family: Family, width: int = 64) -> None:
        super().__init__(family)
        check_count('method.width', width)
        self.inserted = _insert(family, lambda dims: Bottleneck(dims, width))


class AdaptFormer(Method):
    """Scaled bottlenecks beside attention and MLP, on their normalised input (Chen et al., arXiv 2205.13535).

    The paper has them beside the MLP alone; the published comparison's 3.11 M parameters for Swin-B are those of width
    64 beside both (3,107,328), which is the default here.

    Args:
        width: of the bottleneck.
        scale: the paper's ``s``.
        attention: insert them beside attention too.

    Raises:
        ValueError: ``attention`` where a block's attention pools, so that nothing of one shape is beside it (Hiera).
    """

    def __init__(self, family: Family, width: int = 64, scale: float = 0.1, attention: bool = True) -> None:
        super().__init__(family)
        check_count('method.width', width)
        check_number('method.scale', scale)
        check_switch('method.attention', attention)
        self.inserted = nn.ModuleList()
        for block, dims, *branches in _branches(family):
            if attention and block.pools:
                name = type(family.module(block.name)).__name__
                raise ValueError(f'method.attention=True does not fit {name}, whose attention pools; set it to False')
            for module in branches[0 if attention else 1 :]:
                self.inserted.append(Bottleneck(dims, width, F.relu, scale))
                module.register_forward_hook(partial(_beside, self.inserted[-1]))


class LoRand(Method):
    """Low-rank adapters behind attention and MLP (Yin et al., arXiv 2211.13587); 1,197,312 parameters for Swin-B.

    They are E³VA's adapters (:mod:`e3va_mm.highway.adapters`), in the backbone, where :class:`Adapter` has its own.
    Deviation: they start at zero unless ``init='kaiming'``, which is the authors' start.

    Args:
        rank, branches, hidden_ratio, init: see :class:`~e3va_mm.highway.stage_adapters.StageAdapters`.
        shared_core: whether the two projections share their core ``K``, as the paper's counts have it.
    """

    def __init__(
        self,
        family: Family,
        rank: int = 8,
        branches: int = 2,
        hidden_ratio: float = 0.5,
        init: str = 'zero',
        shared_core: bool = True,
    ) -> None:
        super().__init__(family)
        options = dict(rank=rank, branches=branches, hidden_ratio=hidden_ratio, init=init)
        self.inserted = _insert(family, lambda dims: _LowRankBottleneck(dims, shared_core, **options))


class _LowRankBottleneck(StageAdapters):
    """One adapter of a highway's stage, differentiable in its input."""

    def __init__(self, embed_dims: int, shared_core: bool, **options) -> None:
        super().__init__(1, embed_dims, **options)
        self.up_core = None if shared_core else nn.Parameter(self.core.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        fields = (self.down_in[0], *(field[0] for field in self.weights.bottleneck))
        return single_delta(tokens, *fields, up_core=None if self.up_core is None else self.up_core[0])


class Mona(Method):
    """Multi-cognitive visual adapters behind each residual addition (Yin et al., arXiv 2408.08345).

    ``h + up(gelu(filter(down(s1 * norm(h) + s2 * h))))``, where the filter averages depthwise convolutions of three
    sizes around a skip and ends in a pointwise one. Swin-B at width 64 has 3,667,456 parameters by this definition; the
    comparison that gives 4.16 M does not say what else it counts. Deviations: ``up`` starts at zero, no dropout.

    Args:
        width: of the bottleneck.
        kernel_sizes: of the depthwise convolutions, odd.
    """

    swin_only = True

    def __init__(self, family: Family, width: int = 64, kernel_sizes: tuple[int, ...] = (3, 5, 7)) -> None:
        super().__init__(family)
        check_count('method.width', width)
        check_kernel_sizes('method.kernel_sizes', kernel_sizes)
        self.inserted = nn.ModuleList()
        for block, dims, attention, _ in _branches(family):
            pair = [_MonaAdapter(dims, width, kernel_sizes) for _ in range(2)]
            self.inserted.extend(pair)
            hook = _AfterAttentionResidual(pair[0])
            family.module(block.norm1).register_forward_pre_hook(hook.remember)
            attention.register_forward_hook(hook)
            family.module(block.name).register_forward_hook(partial(_after_block, pair[1]))


class _AfterAttentionResidual:
    """The stock block adds attention's output to its own input outside of any module: the input is noted on its way."""

    def __init__(self, inserted: nn.Module) -> None:
        self.inserted, self.tokens = inserted, None

    def remember(self, norm: nn.Module, args: tuple) -> None:
        self.tokens = args[0]

    def __call__(self, attention: nn.Module, args: tuple, output: Tensor) -> Tensor:
        tokens, self.tokens = self.tokens, None
        return output + self.inserted(tokens + output, args[1])


class _MonaAdapter(nn.Module):
    def __init__(self, embed_dims: int, width: int, kernel_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dims)
        self.norm_scale = nn.Parameter(torch.full((embed_dims,), 1e-6))
        self.skip_scale = nn.Parameter(torch.ones(embed_dims))
        self.bottleneck = Bottleneck(embed_dims, width)
        self.filter = MultiScaleDepthwise(width, kernel_sizes)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, tokens: Tensor, size: Size) -> Tensor:
        """tokens (B, L, C) of height and width ``size`` -> what is added to them."""
        scaled = self.norm(tokens) * self.norm_scale + tokens * self.skip_scale
        reduced = self.bottleneck.down(scaled).transpose(1, 2).unflatten(2, tuple(size))
        reduced = self.filter(reduced)
        reduced = reduced + self.pointwise(reduced)
        return self.bottleneck.up(F.gelu(reduced.flatten(2).transpose(1, 2)))
