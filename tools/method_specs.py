"""What a method's name on the command line stands for: a row of a table, as changes to a stock config's backbone.

A name is a method with any options appended: ``full+checkpointed``, ``adapter``, ``e3va+bf16+taps-float8``.
"""

from __future__ import annotations

import copy
import re

TUNED = ('BitFit', 'NormTuning', 'Partial', 'Adapter', 'AdaptFormer', 'LoRA', 'LoRand', 'Mona', 'LST', 'DTL')
# By default its precision depends on the device; rows of a table should not.
METHODS = {
    'full': {},
    'frozen': dict(type='TunedBackbone', method=dict(type='Frozen')),
    'e3va': dict(type='E3VABackbone', frozen_dtype=None),
    **{name.lower(): dict(type='TunedBackbone', method=dict(type=name)) for name in TUNED},
}
OPTIONS = {
    'checkpointed': dict(with_cp=True),
    'bf16': dict(frozen_dtype='bfloat16'),
    'fp16': dict(frozen_dtype='float16'),
    'taps-bf16': dict(saved_dtype='bfloat16'),
    'taps-float8': dict(saved_dtype='float8_e4m3fn'),
    'sampled': dict(saved_fraction=0.125),
    'recomputed': dict(recompute_taps=True),
    'pca': dict(adapter=dict(basis='pca')),
    'mixer': dict(mixer=dict(width=32)),
    'feedback': dict(feedback=True),
    'kaiming': dict(init='kaiming'),
    'compiled': dict(compile_frozen=True),
}
# Options that end in numbers: which keys of which dict these are (None: of the backbone itself). ``mixer96x2`` has two
# mixers of width 96 in a row.
NUMBERED = {
    'graph': (None, ('graph_stages',)),
    'mixer': ('mixer', ('width', 'depth')),
    'every': ('mixer', ('every',)),
    'mixing': ('adapter', ('mixing',)),
    'rank': ('adapter', ('rank',)),
}
# Parts of E³VA whose learning rate an option multiplies, in units of the head's: ``rate3`` by 3, ``rate03`` by 0.3.
RATES = {'rate': ('highway', 'mixers'), 'mixrate': ('mixers',)}
_RATES_OF_E3VA = ', '.join(f'{name}N' for name in RATES) + ' (E³VA alone)'
OPTION_NAMES = [*OPTIONS, *(f'{name}N' for name in NUMBERED), 'mixerNxN', _RATES_OF_E3VA]
METHODS_HELP = f'any of {", ".join(METHODS)}; options for some of them, appended with +: {", ".join(OPTION_NAMES)}'


def backbone_of(method: str) -> dict:
    """What a method changes in the config's backbone: with a ``type`` it wraps the stock one, else it updates it.

    Raises:
        ValueError: an unknown method or option; the message lists the known ones.
    """
    name, *options = method.split('+')
    changes = {option: _changes(option) for option in options if name != 'e3va' or not _rates(option)}
    unknown = [name] * (name not in METHODS) + [option for option, change in changes.items() if change is None]
    if unknown:
        raise ValueError(f'{unknown} in method {method!r}; methods are {list(METHODS)}, options {OPTION_NAMES}')
    backbone = copy.deepcopy(METHODS[name])
    for change in changes.values():
        for key, value in change.items():
            backbone[key] = {**backbone.get(key, {}), **value} if isinstance(value, dict) else value
    return backbone


def _changes(option: str) -> dict | None:
    """What an option changes in the backbone; None for one that does not exist."""
    if option in OPTIONS:
        return OPTIONS[option]
    match = re.fullmatch('([a-z]+)([0-9]+)(?:x([0-9]+))?', option)
    if match is None:
        return None
    part, keys = NUMBERED.get(match[1], ('', ()))
    numbers = [int(number) for number in match.groups()[1:] if number]
    if len(numbers) > len(keys):
        return None
    change = dict(zip(keys, numbers))
    return change if part is None else {part: change}


def _rates(option: str) -> dict[str, dict[str, float]]:
    """What an option of :data:`RATES` sets in ``paramwise_cfg.custom_keys``; nothing for other options."""
    match = re.fullmatch(f'({"|".join(RATES)})(0?)([0-9]+)', option)
    if match is None:
        return {}
    factor = float(f'0.{match[3]}') if match[2] else int(match[3])
    return {part: dict(lr_mult=factor) for part in RATES[match[1]]}


def without_rates(method: str) -> str:
    """The method that costs the same and trains at one rate."""
    return '+'.join(part for part in method.split('+') if not _rates(part))


def config_prefix(method: str) -> str:
    """How the configs that a method starts from begin: '', 'frozen-' or 'e3va-'."""
    return {None: '', 'TunedBackbone': 'frozen-', 'E3VABackbone': 'e3va-'}[backbone_of(method).get('type')]


def cfg_options(method: str) -> list[str]:
    """Overrides that turn the config with :func:`config_prefix` into the method's, as ``--cfg-options`` takes them."""
    backbone = backbone_of(method)
    backbone.pop('type', None)
    if backbone.get('method') == dict(type='Frozen'):
        del backbone['method']
    rates = {part: change for option in method.split('+') for part, change in _rates(option).items()}
    return [*_flatten(backbone, 'model.backbone'), *_flatten(rates, 'optim_wrapper.paramwise_cfg.custom_keys')]


def _flatten(value, key: str):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f'{key}.{name}')
    else:
        yield f'{key}={value}'
