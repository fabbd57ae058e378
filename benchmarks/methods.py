"""What a method's name on the command line stands for, as changes to a stock config's backbone, and its name in tables.

A name is a method with any options appended: ``full+checkpointed``, ``adapter``, ``e3va+bf16+taps-float8``.
"""

from __future__ import annotations

import re

TUNED = ('BitFit', 'NormTuning', 'Partial', 'Adapter', 'AdaptFormer', 'LoRA', 'LoRand', 'Mona', 'LST', 'DTL')
# By default E³VA's precision depends on the device; rows of a table should not.
METHODS = {
    'full': {},
    'frozen': {'type': 'TunedBackbone', 'method.type': 'Frozen'},
    'e3va': {'type': 'E3VABackbone', 'frozen_dtype': None},
    **{name.lower(): {'type': 'TunedBackbone', 'method.type': name} for name in TUNED},
}
# What an option is called in tables and changes in the backbone; ``N`` is the number that its name ends in.
OPTIONS = {
    'checkpointed': ('activation checkpointing', {'with_cp': True}),
    'bf16': ('bf16', {'frozen_dtype': 'bfloat16'}),
    'fp16': ('fp16', {'frozen_dtype': 'float16'}),
    'int8': ('int8 weights', {'frozen_dtype': 'int8'}),
    'nf4': ('NF4 weights', {'frozen_dtype': 'nf4'}),
    'taps-bf16': ('bf16 taps', {'saved_dtype': 'bfloat16'}),
    'taps-float8': ('float8 taps', {'saved_dtype': 'float8_e4m3fn'}),
    'sampled': ('an eighth of the tokens', {'saved_fraction': 0.125}),
    'kaiming': ('Kaiming init', {'init': 'kaiming'}),
    'mixer': ('mixers of width 32', {'mixer.width': 32}),
    'mixerN': ('mixers of width {}', {'mixer.width': 'N'}),
    'rankN': ('rank {}', {'adapter.rank': 'N'}),
    'graphN': ('{} stage(s) in the graph', {'graph_stages': 'N'}),
    # Not of the backbone's config: see below and benchmarks/bench.py.
    'ownrate': ('a rate of its own', {}),
    'allsgd': ('all by SGD', {}),
    'masks': ('masks moved once', {}),
    'sharded': ('frozen blocks sharded', {}),
    'bn': ('BN in heads', {}),
}
# What options change in the rest of the config.
BESIDE = {
    'ownrate': ('optim_wrapper.constructor', 'HighwayRatesConstructor'),
    'allsgd': ('optim_wrapper.constructor', 'DefaultOptimWrapperConstructor'),
}
# Parts of E³VA whose learning rate an option multiplies, in units of the head's: ``rate3`` by 3, ``rate03`` by 0.3.
RATES = {'rateN': ('rate × {}', ('highway', 'mixers')), 'mixrateN': ("mixers' rate × {}", ('mixers',))}
METHODS_HELP = f'any of {", ".join(METHODS)}; options, appended with +: {", ".join([*OPTIONS, *RATES])} (those of E³VA)'

# Names in tables for people; what a variant is called there is said once, here.
LABELS = {
    'full': 'full fine-tuning',
    'full+checkpointed': 'full, activation checkpointing',
    'frozen': 'frozen backbone',
    'partial': 'Partial (last block)',
    **{name.lower(): name for name in TUNED if name != 'Partial'},
    'e3va': 'E³VA',
    'e3va+bf16+rank4+mixer96': 'E³VA + mixers, bf16',
    'e3va+bf16+rank4+mixer96+graph1': 'E³VA, extended, bf16',
    'e3va+bf16+taps-float8+sampled': 'E³VA, smallest',
    'e3va+rank4+mixer96': 'E³VA + mixers',
    'e3va+rank4+mixer96+graph1': 'E³VA, extended',
    'e3va+rank4+mixer96+ownrate': 'E³VA, recommended',
}


def label(method: str) -> str:
    """How tables call a method."""
    if method in LABELS:
        return LABELS[method]
    name, *options = method.split('+')
    plain = without_rates(method)
    named = [key for key in options if plain not in LABELS or _pattern(key)[0] in RATES]
    parts = [{**OPTIONS, **RATES}[key][0].format(number) for key, number in map(_pattern, named)]
    return ', '.join([LABELS.get(plain, LABELS[name]), *parts])


def backbone_of(method: str) -> dict[str, object]:
    """What a method changes in the config's backbone, by dotted keys: with a ``type`` it wraps the stock one.

    Raises:
        ValueError: an unknown method or option; the message lists the known ones.
    """
    name, *options = method.split('+')
    patterns = [(key, number) for key, number in map(_pattern, options) if name != 'e3va' or key not in RATES]
    unknown = [name] * (name not in METHODS) + [key for key, _ in patterns if key not in OPTIONS]
    if unknown:
        raise ValueError(f'{unknown} in method {method!r}; known are {METHODS_HELP}')
    changes = dict(METHODS[name])
    for key, number in patterns:
        changes.update((part, number if value == 'N' else value) for part, value in OPTIONS[key][1].items())
    return changes


def _pattern(option: str) -> tuple[str, float | None]:
    """An option as :data:`OPTIONS` and :data:`RATES` spell it, and its number; a leading 0 is one before the point."""
    match = re.fullmatch('([a-z]+)([0-9]+)', option)
    if option in OPTIONS or match is None:
        return option, None
    return f'{match[1]}N', float(f'0.{match[2][1:]}') if match[2].startswith('0') else int(match[2])


def without_rates(method: str) -> str:
    """The method that costs the same and trains at one rate."""
    return '+'.join(part for part in method.split('+') if _pattern(part)[0] not in RATES)


def config_prefix(method: str) -> str:
    """How the configs that a method starts from begin: '', 'frozen-' or 'e3va-'."""
    return {None: '', 'TunedBackbone': 'frozen-', 'E3VABackbone': 'e3va-'}[backbone_of(method).get('type')]


def tune_flags(method: str) -> tuple[str, ...]:
    """Flags that turn a stock config into the method's, before :func:`cfg_options`."""
    name = method.partition('+')[0]
    return () if name == 'full' else ('--tune', 'e3va-paper' if name == 'e3va' else name)


def cfg_options(method: str) -> list[str]:
    """Overrides that turn the config with :func:`config_prefix` into the method's, as ``--cfg-options`` takes them."""
    changes = {f'model.backbone.{key}': value for key, value in backbone_of(method).items() if key != 'type'}
    if method == 'frozen':
        changes = {}
    for key, factor in map(_pattern, method.split('+')):
        parts = RATES[key][1] if key in RATES else ()
        changes.update((f'optim_wrapper.paramwise_cfg.custom_keys.{part}.lr_mult', factor) for part in parts)
    changes.update(change for option, change in BESIDE.items() if option in method.split('+'))
    return [f'{key}={value}' for key, value in changes.items()]
