"""What every wrapper around a frozen backbone shares: its base weights, and checkpoints without them."""

from __future__ import annotations

import contextlib
import copy
import logging

import torch
from mmengine.logging import print_log
from mmengine.model.weight_init import initialize
from torch import Tensor, nn

from ..checkpoints.base_weights import load_base_weights, names_weights, required_tensors, weights_source
from ..checkpoints.comparison import below, check_same
from ..checkpoints.errors import CheckpointMismatchError
from ..checkpoints.fingerprint import FINGERPRINT, describe_difference, fingerprint, frozen_tensors, named_tensors
from ..checkpoints.reader import reading
from .freezing import FrozenModule


class FrozenBackbone(FrozenModule):
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
            'int8' and 'nf4' are 'bfloat16' with the weights of the frozen linear layers quantised, see
            :mod:`.quantised`.
        init_cfg: mmengine initialisation of the wrapper itself, e.g. ``dict(type='Pretrained', checkpoint=...)``
            with a trained adapter.
        taps: where to tap a backbone, if not where its family does, see :class:`~e3va_mm.families.custom.CustomFamily`.

    Raises:
        ImportError: ``frozen_dtype`` needs torchao, which is not installed.
        KeyError, TypeError: ``backbone`` names no registered or no supported type.
        ValueError: ``frozen_dtype`` is none of the above, or the backbone has no layers for it.
    """

    # Set by :mod:`e3va_mm.sharding`: then no process holds the base as a whole.
    is_sharded = False

    def __init__(
        self,
        backbone: dict | nn.Module,
        frozen_dtype: str | None = None,
        init_cfg: dict | None = None,
        taps: list[dict] | None = None,
    ) -> None:
        super().__init__(backbone, frozen_dtype, init_cfg, taps)
        self._base_is_loaded = False
        self._base_record: dict[str, Tensor] = {}
        self._register_state_dict_hook(_drop_base)

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
        if self._quantised:
            return self._quantised.staging(self.backbone)
        # The fingerprint is of the weights as published, so reduced precision is applied to a copy of them.
        return copy.deepcopy(self.backbone).float() if self.frozen_dtype else self.backbone

    @torch.no_grad()
    def _adopt(self, staging: nn.Module) -> None:
        values = named_tensors(staging)
        for name, tensor in named_tensors(self.backbone).items():
            tensor.copy_(values[name])
        if self._quantised:
            self._quantised.adopt(self.backbone, staging)

    def frozen_forward(self, images: Tensor) -> contextlib.AbstractContextManager:
        if self._quantised and not self._base_is_loaded:
            self.load_base()
        return super().frozen_forward(images)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained beside the backbone, by name; in tables of parameters it is a part of its own."""
        return {}

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
        holder = self._quantised.stock if self._quantised else self.backbone
        return fingerprint(frozen_tensors(holder, self._trained_base))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # mmengine loads with strict=False and only logs what does not fit, so the checks are made here.
        given = below(prefix, state_dict)
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
        # The children load next, from the same dict: the base is given back what it holds. Copies of buffers, since
        # some modules (mmcv's ConvAWS2d) overwrite theirs before they read.
        for name, value in self._frozen_tensors().items():
            state_dict[f'{prefix}backbone.{name}'] = value if isinstance(value, nn.Parameter) else value.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _stock_module(self) -> nn.Module:
        """One with the stock backbone's names and shapes."""
        return self._quantised.staging(self.backbone) if self._quantised else self.backbone

    def fits_stock(self, given: dict[str, Tensor]) -> bool:
        """Whether a state dict has all weights of the stock backbone, by its names: that of a whole stock model has."""
        required = required_tensors(self._stock_module(), self.family.added())
        fits = (name in given and given[name].shape == tensor.shape for name, tensor in required.items())
        return FINGERPRINT not in given and bool(required) and all(fits)

    def _load_stock(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the base from a stock state dict, leaves the rest as it is, and returns the wrapper's own state."""
        if self.is_sharded:
            self._check_stock(given)
            return self.state_dict()
        staging = self._staging()
        own = named_tensors(staging)
        known = {name: given[name] for name in given.keys() & own.keys() if given[name].shape == own[name].shape}
        staging.load_state_dict(known, strict=False)
        self._take_base(staging)
        unread = [*own.keys() - known.keys(), *given.keys() - known.keys()]
        rest = f'; it differs from the model in {sorted(unread)}' if unread else ''
        print_log(f'the frozen base comes from the backbone of the stock model in the checkpoint{rest}', 'current')
        return self.state_dict()

    def _check_stock(self, given: dict[str, Tensor]) -> None:
        """Makes sure that a stock state dict has the base that is here, where that can not be replaced."""
        own = dict(zip(self._base_names, self.base_fingerprint().tolist()))
        found = {name: given[name] for name in own if name in given}
        if fingerprint(found).tolist() != [own[name] for name in found]:
            raise CheckpointMismatchError(
                'a sharded backbone can not take another base, that of the stock model in the checkpoint: name its '
                "file in backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone.')"
            )

    def _check_keys(self, given: dict[str, Tensor]) -> None:
        expected = self.state_dict()
        del expected[FINGERPRINT]
        check_same(expected, given, f'this {type(self).__name__}')

    def _check_base(self, found: Tensor | None) -> None:
        if found is None:
            raise CheckpointMismatchError(f'{FINGERPRINT} is missing: the checkpoint was not saved by this wrapper')
        difference = describe_difference(found.cpu(), self.base_fingerprint(), self._base_names)
        if difference:
            raise CheckpointMismatchError(
                f'the checkpoint belongs to another frozen base: {difference}; '
                f"this model's base is given by {weights_source(self.backbone)}. If training began by load_from of a "
                'stock model, name that file there: '
                "backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone.')"
            )

    def _apply(self, fn, *args) -> FrozenBackbone:
        if self._quantised:
            self._quantised.move(self.backbone, fn)
        return super()._apply(fn, *args)

    def __getstate__(self) -> dict:
        # A copy (EMAHook's) is of a base in place: what averages it may never be told of weights that come later.
        if not self._base_is_loaded:
            self.load_base()
        return self.__dict__

    def __deepcopy__(self, memo: dict) -> FrozenBackbone:
        if self.is_sharded:
            raise ValueError(
                "a sharded backbone can not be copied: take EMAHook out of custom_hooks, or runner_type='Runner'"
            )
        state = self.__getstate__()
        if self._quantised:
            memo.update(self._quantised.shared(self.backbone))
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied


def _drop_base(wrapper: FrozenBackbone, state_dict: dict, prefix: str, _) -> None:
    """State-dict hook; a function rather than a method, so that it follows a deep copy to the copy's own base."""
    for name in wrapper._frozen_tensors():
        state_dict.pop(f'{prefix}backbone.{name}', None)
    state_dict[prefix + FINGERPRINT] = wrapper.base_fingerprint()
