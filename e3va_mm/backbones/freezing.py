"""A frozen backbone as a module: what is frozen and stays so, and in which precision its forward runs."""

from __future__ import annotations

import contextlib
import difflib
import sys

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints.fingerprint import frozen_tensors
from ..checks import check_choice
from ..compat import repair_text_detectors
from ..families.custom import CustomFamily
from ..families.registry import find_family
from .quantised import QUANTISED, QuantisedLinears

# Where weights are quantised, all else runs in bfloat16.
_FROZEN_DTYPES = {None: None, 'float16': torch.float16, **dict.fromkeys(('bfloat16', *QUANTISED), torch.bfloat16)}
# Their parameters are what autocast rounds in every call.
_MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


class FrozenModule(BaseModule):
    """A module whose child ``backbone`` is frozen, but for what :meth:`freeze_base` is told.

    Args:
        backbone, frozen_dtype, init_cfg, taps: see :class:`~e3va_mm.backbones.base.FrozenBackbone`.

    Raises:
        KeyError, TypeError: ``backbone`` names no registered or no supported type.
        ValueError: ``frozen_dtype`` is none of those.
    """

    # Whether the base takes part in training as a stock one does: dropout, stochastic depth, batch statistics.
    trains_base = False

    def __init__(
        self,
        backbone: dict | nn.Module,
        frozen_dtype: str | None = None,
        init_cfg: dict | None = None,
        taps: list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if 'mmdet.models.language_models' in sys.modules:
            # Of such a detector, the backbone is what is built first.
            repair_text_detectors()
        self.frozen_dtype = parse_dtype('frozen_dtype', frozen_dtype, {**_FROZEN_DTYPES, 'auto': _fast_dtype()})
        self.backbone = backbone if isinstance(backbone, nn.Module) else _build(backbone)
        self.family = CustomFamily(self.backbone, taps) if taps else find_family(self.backbone)
        self._trained_base: set[str] = set()
        self._quantised_dtype = frozen_dtype if frozen_dtype in QUANTISED else None
        self._quantised: QuantisedLinears | None = None

    def freeze_base(self, trained: set[str] = frozenset()) -> None:
        """Freezes all of the base but the parameters named in ``trained``; constructors end with this call.

        Freezing belongs to construction: optimizers with ``paramwise_cfg`` are built before weights are loaded.
        """
        self._trained_base = set(trained)
        self._base_names = list(self._frozen_tensors())
        if self._quantised_dtype:
            uncalled = self.family.uncalled
            self._quantised = QuantisedLinears(self._quantised_dtype, self.backbone, set(self._base_names), uncalled)
        self.list_parameters()
        # timm's, which have the activation in them.
        self._own_norms = {
            name: type(module)
            for name, module in self.backbone.named_modules()
            if isinstance(module, _BatchNorm)
            and not isinstance(module, nn.SyncBatchNorm)
            and not type(module).__module__.startswith('torch.')
        }
        self.hold_freeze()
        if self.frozen_dtype:
            self._reduce_matrices()

    def list_parameters(self) -> None:
        """Keeps which of its parameters are trained, and which not: anew, where others have taken their places."""
        self._trained, self._frozen = [], []
        for name, parameter in self.named_parameters():
            path, _, base_name = name.partition('.')
            is_frozen = path == 'backbone' and base_name not in self._trained_base
            (self._frozen if is_frozen else self._trained).append(parameter.requires_grad_(not is_frozen))

    def hold_freeze(self) -> None:
        """Sets what is trained, and the modes of the base, as :meth:`freeze_base` has it, whatever changed them since.

        Stock code does: ``train`` freezes stages of its own, ``requires_grad_`` of a model knows no exceptions. Only
        where all that is trained here has been switched off (as in averaged copies), it stays off.
        """
        if self.backbone.training and not self.trains_base:
            # mmdet's SwinTransformer.eval returns None, so nothing may be chained on it.
            self.backbone.eval()
        is_on = any(parameter.requires_grad for parameter in self._trained)
        for parameters, requires_grad in ((self._frozen, False), (self._trained, is_on)):
            for parameter in parameters:
                parameter.requires_grad_(requires_grad)

    def _check_norms(self) -> None:
        """``sync_bn='torch'`` puts plain norms in the place of subclasses, and loses what these do beside."""
        norms = self._own_norms
        replaced = [name for name in norms if isinstance(self.backbone.get_submodule(name), nn.SyncBatchNorm)]
        if replaced:
            raise ValueError(
                f"sync_bn='torch' has replaced {len(replaced)} {norms[replaced[0]].__name__} of backbone, such as "
                f'{replaced[0]}, by SyncBatchNorm, which computes something else: leave sync_bn out, and name SyncBN '
                'in the norm_cfg of the heads'
            )

    def _reduce_matrices(self) -> None:
        # Norms, scales and embeddings stay as they are: they are small, and with them the residual stream is in fp32.
        matrices = {
            f'{path}.{name}'
            for path, module in self.backbone.named_modules()
            if isinstance(module, _MATRICES)
            for name, _ in module.named_parameters(recurse=False)
        }
        for name, tensor in self._frozen_tensors().items():
            if name in matrices:
                tensor.data = tensor.data.to(self.frozen_dtype)

    def train(self, mode: bool = True) -> FrozenModule:
        """Sets the mode of the trained part; the frozen part stays in eval (no dropout, fixed statistics)."""
        super().train(mode)
        self.hold_freeze()
        self._check_norms()
        return self

    @contextlib.contextmanager
    def frozen_forward(self, images: Tensor):
        """Context of every call into the base: frozen, under autocast to ``frozen_dtype`` where one is set."""
        self.hold_freeze()
        if self.frozen_dtype is None:
            yield
        else:
            with torch.autocast(images.device.type, dtype=self.frozen_dtype):
                yield

    def restore_dtype(self, output: Tensor) -> Tensor:
        """A map as heads can take it (mmcv has no bfloat16 RoIAlign), where the forward ran in ``frozen_dtype``."""
        if not self.frozen_dtype:
            return output
        device = output.device.type
        in_half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        return output.half() if in_half and self.family.follows_autocast else output.float()

    @property
    def freezes_base(self) -> bool:
        """Whether any of the stock backbone is frozen: all methods but full fine-tuning do so."""
        return bool(self._frozen)

    @property
    def num_quantised(self) -> int:
        """How many frozen weights are none of its parameters, because they are quantised."""
        return self._quantised.num_weights if self._quantised else 0

    def _frozen_tensors(self) -> dict[str, Tensor]:
        return frozen_tensors(self.backbone, self._trained_base)


def _fast_dtype() -> torch.dtype | None:
    """bfloat16 where the hardware has it: emulation, and CPUs, are slower in it than in fp32."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else None


def parse_dtype(option: str, value: str | None, allowed: dict) -> torch.dtype | None:
    """The dtype that an option's value stands for, or a ValueError that names both."""
    check_choice(option, value, allowed)
    return allowed[value]


def _build(config: dict) -> nn.Module:
    try:
        return MODELS.build(config)
    except KeyError as error:
        registered = {name for registry in (MODELS, *MODELS.children.values()) for name in registry.module_dict}
        named = str(config.get('type'))
        near = difflib.get_close_matches(named.rpartition('.')[2], registered, 3)
        raise KeyError(f'backbone.type {named!r} can not be built; similar are {near} ({error})') from error
