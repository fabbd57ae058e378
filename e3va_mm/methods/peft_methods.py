"""LoRA and its relatives, by the peft library (https://github.com/huggingface/peft)."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..checks import check_count, check_names, check_number
from ..families.base import Family
from .base import Method

_ATTENTION = ('qkv', 'proj')
# Where the forward methods are that compute what torch's do.
_PLAIN = ('torch.nn.', 'mmcv.cnn.bricks.wrappers')


class PEFT(Method):
    """Any tuner of the peft library that can be injected into linear layers and, some of them, into convolutions.

    Args:
        peft_type: 'LORA', 'LOHA', 'LOKR', 'IA3', 'OFT', ... as peft names them.
        **options: of peft's config class of that type; ``target_modules`` are names of the backbone's layers (in a
            Swin ``qkv`` and ``proj`` for attention, ``layers.0.0`` and ``layers.1`` for the MLP), a regular expression
            for their full names, or 'all-linear'.

    Raises:
        ImportError: peft is not installed.
        ValueError: peft refuses the options.
    """

    def __init__(self, family: Family, peft_type: str, **options) -> None:
        super().__init__(family)
        self.given = dict(peft_type=peft_type, **options)
        targets = options.get('target_modules', '')
        if not isinstance(targets, str):
            check_names('method.target_modules', targets)
        self._uncalled = family.uncalled
        defaults = {} if 'target_modules' in options else self.default_options(family)
        with self._refusals():
            self.config = _import_peft().get_peft_config(dict(self.given, **defaults))

    def default_options(self, family: Family) -> dict:
        """What is given to peft where ``target_modules`` are not."""
        return {}

    def inject(self, backbone: nn.Module) -> None:
        with self._refusals():
            _import_peft().inject_adapter_in_model(copy.deepcopy(self.config), backbone)
        tuned = _tuned_layers(backbone)
        for _, module in tuned:
            # peft's factors of a convolution know its stride, not its dilation.
            for factor in getattr(module, 'lora_A', {}).values():
                if isinstance(factor, nn.Conv2d):
                    factor.dilation = module.get_base_layer().dilation
        targets = {name.rpartition('.')[2] for name, _ in tuned if name.endswith(self._uncalled)}
        if targets:
            raise ValueError(
                f'method.target_modules has {sorted(targets)}, but this backbone uses the weights of these layers '
                'without calling them: what peft injects there would have no effect'
            )

    def trained_names(self, backbone: nn.Module) -> set[str]:
        # peft has frozen all that it does not train.
        return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Names the options in what peft raises, which does not know them as those of ``method``."""
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'peft does not take method={self.given}: {error}') from error


class LoRA(PEFT):
    """Low-rank updates of layers (Hu et al., arXiv 2106.09685); can be merged, see ``TunedBackbone.merge``.

    Rank 42 in ``qkv`` and ``proj`` gives Swin-B 3,032,064 parameters, the 3.03 M of the published comparison. Of a
    convolution of any size, the first factor is a convolution like it to ``r`` channels, the second a pointwise one.

    Args:
        r: rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``; default: ``r``.
        target_modules: see :class:`PEFT`. Default: the blocks' ``qkv`` and ``proj`` where they have such linear
            layers, else all their linear layers and ungrouped convolutions.
        **options: of ``peft.LoraConfig``, e.g. ``use_dora=True``.
    """

    def __init__(
        self, family: Family, r: int = 42, lora_alpha: float | None = None, target_modules=None, **options
    ) -> None:
        check_count('method.r', r)
        if lora_alpha is not None:
            check_number('method.lora_alpha', lora_alpha)
        super().__init__(
            family,
            'LORA',
            r=r,
            lora_alpha=r if lora_alpha is None else lora_alpha,
            **(options if target_modules is None else dict(options, target_modules=target_modules)),
        )

    def default_options(self, family: Family) -> dict:
        layers = {name: layer for name, layer in _layers(family).items() if _is_plain(layer)}
        names = [name for name in layers if name.rpartition('.')[2] in _ATTENTION]
        names = names or [name for name in layers if not name.endswith(family.uncalled)]
        if not names:
            raise ValueError(
                f"LoRA finds no linear layer and no ungrouped convolution of torch's in the blocks of "
                f'{type(family.backbone).__name__}: name layers by method.target_modules'
            )
        # As a regular expression: peft takes a name in a list for the end of other names, too.
        return dict(target_modules='|'.join(map(re.escape, names)))


def _layers(family: Family) -> dict[str, nn.Module]:
    """All that is in the blocks, by names in the backbone."""
    return {
        '.'.join(filter(None, (block.name, name))): layer
        for block in family.blocks()
        for name, layer in family.module(block.name).named_modules()
    }


def _is_plain(layer: nn.Module) -> bool:
    """Whether it computes what torch's linear layer or ungrouped convolution does: peft puts its own beside it."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not type(layer).forward.__module__.startswith(_PLAIN):
        return False
    return isinstance(layer, nn.Linear) or (layer.groups == 1 and layer.padding_mode == 'zeros')


def merge(backbone: nn.Module) -> nn.Module:
    """Folds what peft injected into the base weights, in place, and unwraps the layers.

    Raises:
        ValueError: it is in a grouped convolution, which peft does not merge.
    """
    grouped = [name for name, module in _tuned_layers(backbone) if getattr(module.get_base_layer(), 'groups', 1) > 1]
    if grouped:
        raise ValueError(f'peft does not merge into grouped convolutions; method.target_modules has {grouped}')
    for name, module in _tuned_layers(backbone):
        module.merge()
        parent, _, child = name.rpartition('.')
        setattr(backbone.get_submodule(parent), child, module.get_base_layer())
    return backbone


def _tuned_layers(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    """What peft has put around layers, by their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in backbone.named_modules() if isinstance(module, BaseTunerLayer)]


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError("methods LoRA and PEFT need the peft library: pip install 'e3va_mm[peft]'") from error
    return peft
