"""E³VA as an OpenMMLab backbone (arXiv 2306.09729)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..checks import check_options, check_positive, checks_options
from ..families.base import listen
from ..families.first_pass import FirstPass
from ..highway.highway import Highway, HighwayStage
from ..highway.several import DeferredPasses, HighwayPasses
from ..highway.tap_record import TapStorage, in_trace
from ..optim import check_at_first_step
from .base import FrozenBackbone
from .freezing import parse_dtype

_SAVED_DTYPES = {None: None, 'bfloat16': torch.bfloat16, 'float8_e4m3fn': torch.float8_e4m3fn}


@MODELS.register_module()
@checks_options
class E3VABackbone(FrozenBackbone):
    """A frozen backbone with a trainable highway beside it; the loss gradient enters no backbone block (by default).

    The frozen pass is the backbone's own forward, and the highway listens to it; :mod:`e3va_mm.highway.highway` has the
    formula. A stage's output goes through the backbone's own output norm, trained, and the next stage starts from the
    backbone's own (frozen) downsampling. The first forward pass checks that what is heard is what the backbone returns.

    Args:
        backbone: config of a backbone that returns maps, its ``init_cfg`` included: one of a toolbox, or
            :class:`TIMMFeatures`.
        adapter: ``rank`` (8), ``branches`` (2) and ``hidden_ratio`` (0.5) of the low-rank adapters. The defaults are
            the paper's: 1,197,312 parameters for Swin-B, 1,792,896 for Swin-L.
        frozen_dtype: 'float16' or 'bfloat16' halves the memory of the frozen weights and speeds their forward up;
            'auto' is 'bfloat16' on a GPU that has it. ``None`` is the paper's method, in the weights' own precision.
            'int8' and 'nf4' are for giants, see :mod:`.quantised`.
        saved_dtype: 'bfloat16' or 'float8_e4m3fn' is what the backward pass keeps of the taps, where it is narrower
            than theirs; the highway's state at the end of a stage is then kept in bfloat16. The forward pass is exact.
            By default, taps of a frozen forward in half precision are kept in that.
        saved_fraction: share of the tokens that the backward pass keeps of the taps (but no fewer than 4096 a batch),
            drawn at random in every step; the gradient stays unbiased and becomes noisier. 1 keeps all.
        mixer: an extension of the paper: at the end of each stage with taps the state goes through a bottleneck of
            ``width`` (32) with depthwise convolutions of ``kernel_sizes`` ((3, 5, 7)), see
            :class:`~e3va_mm.highway.mixer.StateMixer`. ``dict()`` takes the defaults; None has none.
        graph_stages: an extension of the paper: in that many of the last stages the highway's state itself runs through
            the frozen blocks, with mixers behind each block in place of the adapters. The gradient runs through these
            blocks, which the backward pass computes again, one at a time. Needs ``mixer``; for Swin and MiT, and timm's
            Swin, ConvNeXt, PVT and SAM's ViT: no class tokens, and no block that changes the size of its input.
        init: 'zero' starts exactly at the frozen backbone; 'kaiming' draws all factors.
        init_cfg, taps: see :class:`FrozenBackbone`.

    Raises:
        ValueError: an option is unknown or outside its range; by the first forward pass, the backbone returns other
            maps than the highway hears.
        KeyError, TypeError: ``backbone`` is of an unknown or unsupported type.
    """

    def __init__(
        self,
        backbone: dict | nn.Module,
        adapter: dict | None = None,
        frozen_dtype: str | None = 'auto',
        saved_dtype: str | None = None,
        saved_fraction: float = 1.0,
        mixer: dict | None = None,
        graph_stages: int = 0,
        init: str = 'zero',
        init_cfg: dict | None = None,
        taps: list[dict] | None = None,
    ) -> None:
        adapter = check_options('adapter', adapter, ('rank', 'branches', 'hidden_ratio'))
        if mixer is not None:
            mixer = check_options('mixer', mixer, ('width', 'kernel_sizes'))
        check_positive('saved_fraction', saved_fraction, most=1)
        super().__init__(backbone, frozen_dtype, init_cfg, taps)
        self._check_graph_stages(graph_stages, mixer)
        # Layer scales and norms widen a tap to fp32 behind a matrix that was computed in less.
        kept_dtype = parse_dtype('saved_dtype', saved_dtype, _SAVED_DTYPES) or self.frozen_dtype
        adapter.update(init=init, storage=TapStorage(kept_dtype, float(saved_fraction)))
        # The state's rounding reaches the gradients of all earlier stages: 8 bits would be too few.
        state_dtype = torch.bfloat16 if saved_dtype else None
        exact = self.frozen_dtype is not None
        highway = Highway(self._stages(), self.family, adapter, mixer, graph_stages, state_dtype, exact)
        # Under the names that checkpoints have; not registered once more as a whole.
        self.highway, self.mixers, self._highway = highway.adapters, highway.mixers, [highway]
        self._is_checked = False
        self.family.accelerate()
        norms = {name: self.backbone.get_submodule(name) for name in self.family.norm_names}
        self.freeze_base({f'{name}.{part}' for name, norm in norms.items() for part, _ in norm.named_parameters()})
        check_at_first_step(self)

    def _stages(self) -> list[HighwayStage]:
        stages = []
        for stage in self.family.stages:
            norm = stage.norm and self.family.module(stage.norm)
            block_taps = [len(block.taps) for block in stage.blocks]
            tells_start = stage.crossing is not None
            stages.append(HighwayStage(block_taps, stage.embed_dims, norm, tells_start, stage.tap_dims))
        return stages

    def _check_graph_stages(self, number: int, mixer: dict | None) -> None:
        most = len(self.family.stages) - 1
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
            raise ValueError(f'graph_stages must be an integer of 0 to {most}, got {number!r}')
        if number and mixer is None:
            raise ValueError(f'graph_stages={number} needs a mixer, such as mixer=dict()')
        if number and not self.family.enters_graph():
            name = type(self.backbone).__name__
            raise ValueError(f"graph_stages={number}: the blocks of this {name} can not run on the highway's state")

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The highway's parameters by name (the mixers' included); with the output norms, all that is trained here."""
        parts = {'highway': self.highway, 'mixers': self.mixers}
        return {f'{part}.{name}': value for part, module in parts.items() for name, value in module.named_parameters()}

    def base_rate_parameters(self) -> dict[str, nn.Parameter]:
        """Highway, mixers and output norms: all that is trained here."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the highway.

        Args:
            images: (B, 3, H, W), any height and width.

        Returns:
            One (B, C_s, H_s, W_s) a stage with an output, in the stock backbone's dtype (fp32 with a ``frozen_dtype``);
            no tuple where the backbone returns one map without.
            Gradient flows to highway, mixers and output norms alone, with ``graph_stages`` through the last blocks.
        """
        with self.frozen_forward(images):
            maps = self._hear([self], images).finish(0)
        return self._show(maps, images)

    def hear_together(self, wrappers: Sequence[E3VABackbone], images: Tensor) -> HighwayPasses | DeferredPasses:
        """One frozen pass through the base of this one, heard by several wrappers, for :meth:`maps_of` of each.

        Args:
            wrappers: of equal bases, see :class:`~.shared_pass.SharedPass`; none has more stages than this one.
            images: see :meth:`forward`.
        """
        with self.frozen_forward(images):
            return self._hear(wrappers, images)

    def maps_of(self, heard: HighwayPasses | DeferredPasses, place: int, images: Tensor) -> tuple[Tensor, ...]:
        """What this wrapper, which was in that place, puts out by a pass of :meth:`hear_together`; asked for once."""
        with self.frozen_forward(images):
            maps = heard.finish(place)
        return self._show(maps, images)

    def _hear(self, wrappers: Sequence[E3VABackbone], images: Tensor) -> HighwayPasses | DeferredPasses:
        highways = [highway for wrapper in wrappers for highway in wrapper._highway]
        defers = len(highways) > 1 and not torch.is_grad_enabled()
        along = DeferredPasses(highways) if defers else HighwayPasses(highways)
        # A trace has no values to compare.
        if in_trace() or all(wrapper._is_checked for wrapper in wrappers):
            self._run_frozen(images, along)
            return along
        self._run_checked(images, along)
        for wrapper in wrappers:
            wrapper._is_checked = True
        return along

    def _show(self, maps: Sequence[Tensor], images: Tensor) -> tuple[Tensor, ...]:
        return self.family.show([self.restore_dtype(output) for output in maps], images, self.training)

    def _run_frozen(self, images: Tensor, along: HighwayPasses | DeferredPasses) -> None:
        num_heard = max(along.num_heard)
        ends_early = self.family.has_more or num_heard < len(self.family.stages)
        # It ends by an exception, from which the scopes of a trace do not recover.
        ends_early = ends_early and not in_trace()
        with torch.no_grad(), listen(self.family, along, num_heard, ends_early) as listener:
            returned = self.family.run(images)
            listener.hear_returned(self.family.returned_maps(returned, images))

    def _run_checked(self, images: Tensor, along: HighwayPasses | DeferredPasses) -> None:
        """The first pass, which runs to its end and compares the levels with the maps that the backbone returns."""
        check = FirstPass(self.family, along)
        with torch.no_grad(), listen(self.family, check, len(self.family.stages)) as listener:
            maps = self.family.returned_maps(self.family.run(images), images)
            if len(maps) == sum(stage.norm is not None for stage in self.family.stages):
                listener.hear_returned(maps)
        check.compare(maps)
