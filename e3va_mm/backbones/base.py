"""What every wrapper around a frozen backbone shares: freezing, its base weights, adapter-only checkpoints."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import sys

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints.base_weights import load_base_weights, names_weights, required_tensors, weights_source
from ..checkpoints.comparison import check_same
from ..checkpoints.errors import CheckpointMismatchError
from ..checkpoints.fingerprint import FINGERPRINT, describe_difference, fingerprint, frozen_tensors, named_tensors
from ..checkpoints.reader import reading
from ..checks import check_choice
from ..compat import repair_text_detectors
from ..families.custom import CustomFamily
from ..families.registry import find_family

_FROZEN_DTYPES = {None: None, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
# Their parameters are what autocast rounds in every call.
_MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


class FrozenBackbone(BaseModule):
    """A stock backbone, frozen, whose checkpoints hold everything but it.

    The base weights come from the backbone's own ``init_cfg``. They are loaded by ``init_weights`` (training) or
    with the first checkpoint (test, resume, ``init_model``), whichever comes first. The state dict holds the trained
    parameters and, under ``base_fingerprint``, a fingerprint of the base; it refuses to load onto another base. The
    state dict of a whole stock model (``load_from``) brings a base of its own, and takes the place of the one before.

    Args:
        backbone: config of the stock backbone, its ``init_cfg`` included, or a built module.
        frozen_dtype: 'float16' or 'bfloat16' keeps the frozen linear and convolution layers in that type and runs the
            frozen forward under autocast to it, whatever the rest of the model runs in; ``None`` leaves both as they
            are; 'auto' is 'bfloat16' where the constructor finds a CUDA device that computes in it, else ``None``.
        init_cfg: mmengine initialisation of the wrapper itself, e.g. ``dict(type='Pretrained', checkpoint=...)``
            with a trained adapter.
        taps: where to tap a backbone, if not where its family does, see :class:`~e3va_mm.families.custom.CustomFamily`.

    Raises:
        KeyError, TypeError: ``backbone`` names no registered or no supported type.
        ValueError: ``frozen_dtype`` is none of the above.
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
        self._base_is_loaded = False
        self._base_record: dict[str, Tensor] = {}
        self._register_state_dict_hook(_drop_base)

    def freeze_base(self, trained: set[str] = frozenset()) -> None:
        """Freezes all of the base but the parameters named in ``trained``; constructors end with this call.

        Freezing belongs to construction: optimizers with ``paramwise_cfg`` are built before weights are loaded.
        """
        self._trained_base, self._trained, self._frozen = set(trained), [], []
        for name, parameter in self.named_parameters():
            path, _, base_name = name.partition('.')
            is_frozen = path == 'backbone' and base_name not in trained
            (self._frozen if is_frozen else self._trained).append(parameter.requires_grad_(not is_frozen))
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

    def train(self, mode: bool = True) -> FrozenBackbone:
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

    def init_weights(self) -> None:
        """Loads the base (once), then applies the wrapper's own ``init_cfg``."""
        if not self._base_is_loaded:
            self.load_base()
        if self.init_cfg:
            with reading(f'init_cfg={self.init_cfg}'):
                initialize(self, self.init_cfg)

    def load_base(self) -> None:
        """Loads the base weights from ``backbone.init_cfg``, in place; without one, draws them at random.

        Raises:
            FileNotFoundError, CheckpointMismatchError: see :func:`.base_weights.load_base_weights`.
        """
        staging = self._staging()
        if names_weights(self.backbone):
            load_base_weights(staging, self.family.added())
        else:
            message = 'backbone.init_cfg names no weights: the frozen base is random, and no checkpoint will hold it'
            print_log(message, logger='current', level=logging.WARNING)
            staging.init_weights()
        self._take_base(staging)

    def _take_base(self, staging: nn.Module) -> None:
        """Makes the weights of a module from :meth:`_staging` those of the base, and records their fingerprint."""
        self._base_record['fingerprint'] = fingerprint(frozen_tensors(staging, self._trained_base))
        if staging is not self.backbone:
            self._adopt(staging)
        self.family.remember()
        self.hold_freeze()
        self._base_is_loaded = True

    def _staging(self) -> nn.Module:
        """The module that base weights are loaded into: stock, in fp32."""
        # The fingerprint is of the weights as published, so reduced precision is applied to a copy of them.
        return copy.deepcopy(self.backbone).float() if self.frozen_dtype else self.backbone

    @torch.no_grad()
    def _adopt(self, staging: nn.Module) -> None:
        for tensor, value in zip(named_tensors(self.backbone).values(), named_tensors(staging).values()):
            tensor.copy_(value)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained beside the backbone, by name; in tables of parameters it is a part of its own."""
        return {}

    @property
    def freezes_base(self) -> bool:
        """Whether any of the stock backbone is frozen: all methods but full fine-tuning do so."""
        return bool(self._frozen)

    def stock_names(self) -> list[str]:
        """Names of the parameters that the stock backbone has brought along."""
        return [f'backbone.{name}' for name, _ in self.backbone.named_parameters()]

    def base_rate_parameters(self) -> dict[str, nn.Parameter]:
        """What :class:`~e3va_mm.optim.MergedGroupsConstructor` trains at the base rate, by name: all that was added."""
        stock = set(self.stock_names())
        named = self.named_parameters()
        return {name: value for name, value in named if value.requires_grad and name not in stock}

    def base_fingerprint(self) -> Tensor:
        """(number of frozen tensors,) int64; see :func:`e3va_mm.checkpoints.fingerprint.fingerprint`."""
        if 'fingerprint' in self._base_record:
            return self._base_record['fingerprint']
        # Until the base is loaded its values may change, so nothing is recorded here.
        return fingerprint(self._frozen_tensors())

    def _frozen_tensors(self) -> dict[str, Tensor]:
        return frozen_tensors(self.backbone, self._trained_base)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # mmengine loads with strict=False and only logs what does not fit, so the checks are made here.
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if self.fits_stock(given):
            for key in given:
                del state_dict[prefix + key]
            given = self._load_stock(given)
            state_dict.update({prefix + key: value for key, value in given.items()})
        found = given.pop(FINGERPRINT, None)
        self._check_keys(given)
        if not self._base_is_loaded and names_weights(self.backbone):
            self.load_base()
        self._check_base(found)
        state_dict.pop(prefix + FINGERPRINT)
        # The children load next, from the same dict: the base is given back what it holds.
        state_dict.update({f'{prefix}backbone.{name}': value for name, value in self._frozen_tensors().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _stock_module(self) -> nn.Module:
        """One with the stock backbone's names."""
        return self.backbone

    def fits_stock(self, given: dict[str, Tensor]) -> bool:
        """Whether a state dict has all weights of the stock backbone, by its names: that of a whole stock model has."""
        required = required_tensors(self._stock_module(), self.family.added())
        fits = (name in given and given[name].shape == tensor.shape for name, tensor in required.items())
        return FINGERPRINT not in given and bool(required) and all(fits)

    def _load_stock(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the base from a stock state dict, leaves the rest as it is, and returns the wrapper's own state."""
        staging = self._staging()
        own = named_tensors(staging)
        known = {name: given[name] for name in given.keys() & own.keys() if given[name].shape == own[name].shape}
        staging.load_state_dict(known, strict=False)
        self._take_base(staging)
        unread = [*own.keys() - known.keys(), *given.keys() - known.keys()]
        rest = f'; it differs from the model in {sorted(unread)}' if unread else ''
        print_log(f'the frozen base comes from the backbone of the stock model in the checkpoint{rest}', 'current')
        return self.state_dict()

    def _check_keys(self, given: dict[str, Tensor]) -> None:
        expected = self.state_dict()
        del expected[FINGERPRINT]
        check_same(expected, given, f'this {type(self).__name__}')

    def _check_base(self, found: Tensor | None) -> None:
        if found is None:
            raise CheckpointMismatchError(f'{FINGERPRINT} is missing: the checkpoint was not saved by this wrapper')
        difference = describe_difference(found.cpu(), self.base_fingerprint(), list(self._frozen_tensors()))
        if difference:
            raise CheckpointMismatchError(
                f'the checkpoint belongs to another frozen base: {difference}; '
                f"this model's base is given by {weights_source(self.backbone)}. If training began by load_from of a "
                'stock model, name that file there: '
                "backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone.')"
            )

    def __getstate__(self) -> dict:
        # A copy (EMAHook's) is of a base in place: what averages it may never be told of weights that come later.
        if not self._base_is_loaded:
            self.load_base()
        return self.__dict__


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


def _drop_base(wrapper: FrozenBackbone, state_dict: dict, prefix: str, _) -> None:
    """State-dict hook; a function rather than a method, so that it follows a deep copy to the copy's own base."""
    for name in wrapper._frozen_tensors():
        state_dict.pop(f'{prefix}backbone.{name}', None)
    state_dict[prefix + FINGERPRINT] = wrapper.base_fingerprint()
