"""Comparison methods for :class:`~e3va_mm.backbones.tuned.TunedBackbone`, one dict each.

A method is a module with its own parameters, built on the family of a backbone. It may hook the backbone's modules; it
never copies or replaces the backbone's code.
"""

from __future__ import annotations

import inspect

from ..checks import check_options
from ..families.base import Family
from ..families.swin import SwinFamily
from .base import Method
from .inserted import Adapter, AdaptFormer, LoRand, Mona
from .peft_methods import PEFT, LoRA
from .selective import BitFit, Frozen, Full, NormTuning, Partial
from .side import DTL, LST

METHODS = {
    cls.__name__: cls
    for cls in (Full, Frozen, BitFit, NormTuning, Partial, Adapter, AdaptFormer, LoRand, Mona, LoRA, PEFT, LST, DTL)
}


def build_method(family: Family, config: dict) -> Method:
    """Builds ``dict(type=..., **options)`` on a backbone.

    Raises:
        ValueError: the type or an option is unknown, an option is missing or outside its range, or the method is not
            defined for the backbone.
    """
    options = dict(config) if isinstance(config, dict) else {}
    cls = METHODS.get(options.pop('type', None))
    if cls is None:
        raise ValueError(f'method must be dict(type=...) with a type of {list(METHODS)}, got {config!r}')
    if cls.swin_only and not isinstance(family, SwinFamily):
        name = type(family.backbone).__name__
        raise ValueError(f'{cls.__name__} is defined for SwinTransformer only, not for {name}')
    known, takes_any = known_options(cls)
    if not takes_any:
        check_options('method', options, known)
    defaults = {name: each.default for name, each in inspect.signature(cls.__init__).parameters.items()}
    missing = [name for name in known if defaults[name] is inspect.Parameter.empty and name not in options]
    if missing:
        raise ValueError(f'method={dict(config)} lacks {missing}')
    return cls(family, **options)


def known_options(cls: type[Method]) -> tuple[list[str], bool]:
    """Names of the options that a method has, and whether it takes others as well."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]
    named = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
    return named, len(named) < len(parameters)
