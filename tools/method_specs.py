"""What a method's name on the command line stands for: a row of a table, as changes to a stock config's backbone.

A name is a method with any options appended: ``full+checkpointed``, ``adapter``, ``e3va+bf16+taps-float8``.
"""

from __future__ import annotations

import copy

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
    'mixing3': dict(adapter=dict(mixing=3)),
    'mixing7': dict(adapter=dict(mixing=7)),
    'mixer': dict(mixer=dict(width=32)),
    'mixer64': dict(mixer=dict(width=64)),
    'mixer48x2': dict(mixer=dict(width=48, depth=2)),
    'mixer48': dict(mixer=dict(width=48)),
    'mixer96': dict(mixer=dict(width=96)),
    'mixer192': dict(mixer=dict(width=192)),
    'mixer96x2': dict(mixer=dict(width=96, depth=2)),
    'every2': dict(mixer=dict(every=2)),
    'every6': dict(mixer=dict(every=6)),
    'feedback': dict(feedback=True),
    'rank4': dict(adapter=dict(rank=4)),
    'rank16': dict(adapter=dict(rank=16)),
    'kaiming': dict(init='kaiming'),
    'compiled': dict(compile_frozen=True),
}
# Options of E³VA that change the optimizer: learning rates of parts of the backbone, in units of the head's.
RATES = {
    name: dict(highway=factor, mixers=factor)
    for name, factor in (('rate03', 0.3), ('rate3', 3), ('rate10', 10), ('rate30', 30))
}
OPTION_NAMES = [*OPTIONS, *RATES]
METHODS_HELP = f'any of {", ".join(METHODS)}; options for some of them, appended with +: {", ".join(OPTION_NAMES)}'


def backbone_of(method: str) -> dict:
    """What a method changes in the config's backbone: with a ``type`` it wraps the stock one, else it updates it.

    Raises:
        ValueError: an unknown method or option; the message lists the known ones.
    """
    name, *options = method.split('+')
    known = OPTION_NAMES if name == 'e3va' else list(OPTIONS)
    unknown = [name] * (name not in METHODS) + [option for option in options if option not in known]
    if unknown:
        raise ValueError(f'{unknown} in method {method!r}; methods are {list(METHODS)}, options {known}')
    backbone = copy.deepcopy(METHODS[name])
    for option in options:
        for key, value in OPTIONS.get(option, {}).items():
            backbone[key] = {**backbone.get(key, {}), **value} if isinstance(value, dict) else value
    return backbone


def without_rates(method: str) -> str:
    """The method that costs the same and trains at one rate."""
    return '+'.join(part for part in method.split('+') if part not in RATES)


def config_prefix(method: str) -> str:
    """How the configs that a method starts from begin: '', 'frozen-' or 'e3va-'."""
    return {None: '', 'TunedBackbone': 'frozen-', 'E3VABackbone': 'e3va-'}[backbone_of(method).get('type')]


def cfg_options(method: str) -> list[str]:
    """Overrides that turn the config with :func:`config_prefix` into the method's, as ``--cfg-options`` takes them."""
    backbone = backbone_of(method)
    backbone.pop('type', None)
    if backbone.get('method') == dict(type='Frozen'):
        del backbone['method']
    rates = {
        part: dict(lr_mult=factor) for option in method.split('+')[1:] for part, factor in RATES.get(option, {}).items()
    }
    return [*_flatten(backbone, 'model.backbone'), *_flatten(rates, 'optim_wrapper.paramwise_cfg.custom_keys')]


def _flatten(value, key: str):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f'{key}.{name}')
    else:
        yield f'{key}={value}'
