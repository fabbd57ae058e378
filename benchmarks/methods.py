"""What a method's name on the command line stands for, as changes to a stock config's backbone, and its name in tables.

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
# What an option changes in the backbone; ``N`` stands for the number that its name ends in.
OPTIONS = {
    'checkpointed': dict(with_cp=True),
    'bf16': dict(frozen_dtype='bfloat16'),
    'fp16': dict(frozen_dtype='float16'),
    'taps-bf16': dict(saved_dtype='bfloat16'),
    'taps-float8': dict(saved_dtype='float8_e4m3fn'),
    'sampled': dict(saved_fraction=0.125),
    'kaiming': dict(init='kaiming'),
    'mixer': dict(mixer=dict(width=32)),
    'mixerN': dict(mixer=dict(width='N')),
    'rankN': dict(adapter=dict(rank='N')),
    'graphN': dict(graph_stages='N'),
}
# Parts of E³VA whose learning rate an option multiplies, in units of the head's: ``rate3`` by 3, ``rate03`` by 0.3.
RATES = {'rateN': ('highway', 'mixers'), 'mixrateN': ('mixers',)}
METHODS_HELP = f'any of {", ".join(METHODS)}; options, appended with +: {", ".join([*OPTIONS, *RATES])} (those of E³VA)'

# Names in tables for people; what a variant is called there is said once, here.
LABELS = {
    'full': 'full fine-tuning',
    'full+checkpointed': 'full, activation checkpointing',
    'frozen': 'frozen backbone',
    'partial': 'Partial (last block)',
    **{name.lower(): name for name in TUNED if name != 'Partial'},
    'e3va': 'E³VA',
    'e3va+bf16': 'E³VA, as it comes',
    'e3va+bf16+taps-float8+sampled': 'E³VA, smallest',
    'e3va+rank4+mixer96': 'E³VA + mixers',
    'e3va+rank4+mixer96+graph1': 'E³VA + mixers, last stage in the graph',
}
OPTION_LABELS = {
    'bf16': 'bf16',
    'fp16': 'fp16',
    'taps-bf16': 'bf16 taps',
    'taps-float8': 'float8 taps',
    'sampled': 'an eighth of the tokens',
    'kaiming': 'Kaiming init',
    'mixer': 'mixers of width 32',
    'mixerN': 'mixers of width {}',
    'rankN': 'rank {}',
    'graphN': '{} stage(s) in the graph',
    'rateN': 'rate × {}',
    'mixrateN': "mixers' rate × {}",
}


def label(method: str, rates: bool = True) -> str:
    """How tables call a method; ``rates=False`` leaves out by what it multiplies the learning rate."""
    if method in LABELS:
        return LABELS[method]
    name, *options = method.split('+')
    shown = [option for option in options if rates or _pattern(option)[0] not in RATES]
    if not shown:
        return LABELS[name]
    if len(shown) < len(options):
        return label('+'.join([name, *shown]))
    parts = (OPTION_LABELS[key].format(number) for key, number in map(_pattern, options))
    return ', '.join([LABELS[name], *parts])


def backbone_of(method: str) -> dict:
    """What a method changes in the config's backbone: with a ``type`` it wraps the stock one, else it updates it.

    Raises:
        ValueError: an unknown method or option; the message lists the known ones.
    """
    name, *options = method.split('+')
    patterns = [(key, number) for key, number in map(_pattern, options) if name != 'e3va' or key not in RATES]
    unknown = [name] * (name not in METHODS) + [key for key, _ in patterns if key not in OPTIONS]
    if unknown:
        raise ValueError(f'{unknown} in method {method!r}; known are {METHODS_HELP}')
    backbone = copy.deepcopy(METHODS[name])
    for key, number in patterns:
        for part, value in OPTIONS[key].items():
            if isinstance(value, dict):
                backbone.setdefault(part, {}).update({inner: _number(it, number) for inner, it in value.items()})
            else:
                backbone[part] = _number(value, number)
    return backbone


def _pattern(option: str) -> tuple[str, float | None]:
    """An option as :data:`OPTIONS` and :data:`RATES` spell it, and its number; a leading 0 is one before the point."""
    match = re.fullmatch('([a-z]+)([0-9]+)', option)
    if option in OPTIONS or match is None:
        return option, None
    return f'{match[1]}N', float(f'0.{match[2][1:]}') if match[2].startswith('0') else int(match[2])


def _number(value, number: float | None):
    return number if value == 'N' else value


def without_rates(method: str) -> str:
    """The method that costs the same and trains at one rate."""
    return '+'.join(part for part in method.split('+') if _pattern(part)[0] not in RATES)


def config_prefix(method: str) -> str:
    """How the configs that a method starts from begin: '', 'frozen-' or 'e3va-'."""
    return {None: '', 'TunedBackbone': 'frozen-', 'E3VABackbone': 'e3va-'}[backbone_of(method).get('type')]


def cfg_options(method: str) -> list[str]:
    """Overrides that turn the config with :func:`config_prefix` into the method's, as ``--cfg-options`` takes them."""
    backbone = backbone_of(method)
    backbone.pop('type', None)
    if backbone.get('method') == dict(type='Frozen'):
        del backbone['method']
    options = list(_flatten(backbone, 'model.backbone'))
    for key, factor in map(_pattern, method.split('+')):
        options += [f'optim_wrapper.paramwise_cfg.custom_keys.{part}.lr_mult={factor}' for part in RATES.get(key, ())]
    return options


def _flatten(value, key: str):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f'{key}.{name}')
    else:
        yield f'{key}={value}'
