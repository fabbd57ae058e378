"""Any stock config, tuned: its backbone wrapped, and what the wrapping would break in silence put right."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from .backbones.e3va import E3VABackbone
from .backbones.tuned import TunedBackbone
from .checkpoints.whole_model import backbone_prefix, state_keys
from .checks import check_options
from .methods import METHODS, known_options
from .named_configs import find_config
from .optim import ADAMW_SHARE, FACTOR, HIGHEST

# What is wrapped: dicts with a type under these keys, at any depth of a model.
KEYS = ('backbone', 'teacher_backbone', 'image_encoder')
# Decoders that are called backbones (BiSeNetV1, STDC) have the one with weights under this key, and train themselves;
# not so those that run its layers one by one.
_INNER, _ENTERS_INNER = 'backbone_cfg', ('ICNet',)
_WRAPPERS = {cls.__name__: cls for cls in (E3VABackbone, TunedBackbone)}
_E3VA_OPTIONS = list(inspect.signature(E3VABackbone.__init__).parameters)[2:]
_TUNED_OPTIONS = ['frozen_dtype', 'init_cfg']
# What is recommended, and the paper's method.
_RECIPES = {'e3va': dict(adapter=dict(rank=4), mixer=dict(width=96)), 'e3va-paper': {}}
_MERGED, _HIGHWAY_RATES = 'MergedGroupsConstructor', 'HighwayRatesConstructor'
_STOCK_CONSTRUCTORS = ('DefaultOptimWrapperConstructor', 'ForceDefaultOptimWrapperConstructor')
_HOOKS = ('ParameterTableHook', 'ResourceReportHook')
_MASKS_HOOK = 'DeviceMasksHook'
_LAYER_DECAY = ('num_layers', 'decay_rate', 'decay_type', 'layer_decay_rate')


def tune(config: Config | str | Path, method: str = 'e3va', **options) -> Config:
    """A stock config, made to tune its backbone by ``method``. The log says what was changed; ``config`` stays.

    - Each backbone of the model (also ``detector.backbone``, ``image_encoder``, a teacher's) is wrapped.
    - ``pretrained``, a ``load_from`` and the ``init_cfg`` of a whole model become the ``init_cfg`` of the backbone.
    - What is trained beside the backbone learns at the optimizer's own rate, see
      :class:`~e3va_mm.optim.MergedGroupsConstructor`, or, with mixers, at one that suits these, see
      :class:`~e3va_mm.optim.HighwayRatesConstructor`; layer decay ends, since nothing is left to decay.
    - ``custom_imports`` name this package, so that any program can load the result, and hooks report what is trained,
      at which rates, and what a step costs. Where heads crop ground-truth masks, one moves these to the device once.

    Args:
        config: a config, its path, or its name in a toolbox or here, such as
            ``'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco'``.
        method: 'e3va', which is E³VA as we recommend it (rank 4, mixers of width 96), 'e3va-paper', or one of
            :mod:`e3va_mm.methods`, in any case; 'full' leaves the config as it is.
        **options: of :class:`~e3va_mm.backbones.e3va.E3VABackbone`, or of the method; for methods ``frozen_dtype`` and
            ``init_cfg`` go to :class:`~e3va_mm.backbones.tuned.TunedBackbone`.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: ``method`` or an option is unknown, or the model has no backbone, or one that is wrapped already.
    """
    wrapper = _wrapper(method, options)
    config = copy.deepcopy(config) if isinstance(config, Config) else Config.fromfile(find_config(config))
    if wrapper.get('method', {}).get('type') == 'Full':
        _say('method full is what the config does as it is')
        return config
    _wrap(config, wrapper)
    name_bases(config)
    _set_rates(config.get('optim_wrapper'), _HIGHWAY_RATES if wrapper.get('mixer') is not None else _MERGED)
    _add_package(config)
    return config


def _wrapper(method: str, options: dict) -> dict:
    """The config of the wrapper, but for the backbone in it."""
    names = {**dict.fromkeys(_RECIPES), **{name.lower(): name for name in METHODS}}
    if str(method).lower() not in names:
        near = difflib.get_close_matches(str(method).lower(), names, 1)
        hint = f'did you mean {near}? ' if near else ''
        raise ValueError(f'unknown method {method!r} for tune; {hint}known are {list(names)}')
    name = names[method.lower()]
    if name is None:
        options = check_options('tune', options, _E3VA_OPTIONS)
        return dict(type='E3VABackbone', **_with_options(_RECIPES[method.lower()], options))
    known, takes_any = known_options(METHODS[name])
    if not takes_any:
        check_options(f'tune by {name}', options, [*known, *_TUNED_OPTIONS])
    outer = {key: options[key] for key in _TUNED_OPTIONS if key in options}
    inner = {key: value for key, value in options.items() if key not in outer}
    return dict(type='TunedBackbone', method=dict(type=name, **inner), **outer)


def _with_options(recipe: dict, options: dict) -> dict:
    """A recipe with options, which take the place of its own one by one, within ``adapter`` and ``mixer`` too."""
    within = {key: {**recipe[key], **options[key]} for key in recipe if isinstance(options.get(key), dict)}
    return copy.deepcopy({**recipe, **options, **within})


def find_backbones(model: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[dict]]]:
    """Key path of each backbone in a model's config, and the dicts that lead there, from the model to its parent."""
    for key, value in list(model.items()):
        children = value if isinstance(value, (list, tuple)) else [value]
        for child in (each for each in children if isinstance(each, dict)):
            if key in KEYS and 'type' in child:
                inner = isinstance(child.get(_INNER), dict) and _type_name(child['type']) not in _ENTERS_INNER
                yield ((*path, key, _INNER), [model, child]) if inner else ((*path, key), [model])
            else:
                for found, parents in find_backbones(child, (*path, key)):
                    yield found, [model, *parents]


def is_wrapped(backbone: dict) -> bool:
    """Whether the config of a backbone is that of a wrapper of this package, by its name or class."""
    return _type_name(backbone['type']) in _WRAPPERS


def _type_name(named) -> str:
    return (named if isinstance(named, str) else getattr(named, '__name__', str(named))).rpartition('.')[2]


def _wrap(config: Config, wrapper: dict) -> None:
    found = list(find_backbones(config.get('model') or {}))
    if not found:
        raise ValueError(f'tune finds no backbone in config.model: it looks for dicts with a type under {KEYS}')
    for path, parents in found:
        name, backbone = '.'.join(('model', *path)), parents[-1][path[-1]]
        if is_wrapped(backbone):
            raise ValueError(f'{name} is wrapped already, by {_type_name(backbone["type"])}: tune takes stock configs')
        _move_pretrained(name, path[-1], parents, backbone)
        parents[-1][path[-1]] = ConfigDict(copy.deepcopy(wrapper), backbone=backbone)
        _say(f'{name}: {_type_name(backbone["type"])} is frozen and wrapped by {wrapper["type"]}')


def _move_pretrained(name: str, key: str, parents: list[dict], backbone: dict) -> None:
    """Makes ``pretrained`` of the backbone, or of what contains it, the backbone's ``init_cfg``."""
    holders = [each for each in (backbone, *reversed(parents)) if isinstance(each.get('pretrained'), str)]
    if not holders or key == 'teacher_backbone':
        return
    checkpoint, receivers, kind = holders[0]['pretrained'], [backbone], 'Pretrained'
    if key == 'image_encoder':
        # One file of CLIP is for all of these, each takes its part.
        receivers += [parents[-1][part] for part in ('text_encoder', 'decode_head') if part in parents[-1]]
        kind = 'Pretrained_Part'
    for receiver in receivers:
        receiver['init_cfg'] = ConfigDict(type=kind, checkpoint=checkpoint)
    for holder in holders:
        del holder['pretrained']
    _say(f'{name}: pretrained={checkpoint!r} becomes the init_cfg of the backbone')


def name_bases(config: Config, download: bool = False) -> None:
    """Where a whole stock model brings the base of a wrapped backbone, writes so into that backbone's ``init_cfg``.

    Such a model is named by ``load_from``, or by the ``init_cfg`` of what contains the backbone. Without this, tests of
    the run's checkpoints would look for the base where the stock config has it.

    Args:
        config: changed in place.
        download: read a file at a URL too; otherwise it is taken for a whole model, by its name.
    """
    for path, parents in find_backbones(config.get('model') or {}):
        wrapper = parents[-1][path[-1]]
        sources = [(config.get('load_from'), path)]
        sources += [(_pretrained(parent), path[depth:]) for depth, parent in enumerate(parents)]
        for source, below in sources if is_wrapped(wrapper) else ():
            prefix = source and backbone_prefix(state_keys(source, download), below)
            if prefix:
                _name_base('.'.join(('model', *path)), wrapper['backbone'], source, prefix)
                break


def _name_base(name: str, backbone: dict, source: str, prefix: str) -> None:
    init_cfg = ConfigDict(type='Pretrained', checkpoint=source, prefix=prefix)
    if backbone.get('init_cfg') != init_cfg:
        backbone['init_cfg'] = init_cfg
        _say(f'{name}: the base is {prefix}* of {source}')


def _pretrained(module: dict) -> str | None:
    """The file that the ``init_cfg`` of a model or detector names."""
    parts = module.get('init_cfg') or []
    parts = parts if isinstance(parts, (list, tuple)) else [parts]
    return next((part['checkpoint'] for part in parts if 'checkpoint' in part and 'prefix' not in part), None)


def _set_rates(optim_wrapper: dict | None, constructor: str) -> None:
    if not optim_wrapper:
        return
    given = _type_name(optim_wrapper.get('constructor') or _STOCK_CONSTRUCTORS[0])
    paramwise = dict(optim_wrapper.get('paramwise_cfg') or {})
    if any(key in paramwise for key in _LAYER_DECAY):
        paramwise = {key: value for key, value in paramwise.items() if key not in _LAYER_DECAY}
        # What the constructors of layer decay do beside.
        paramwise.update(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
        _say(f'{given}: a frozen backbone has no layer decay; norms and biases stay without weight decay')
    elif given not in (*_STOCK_CONSTRUCTORS, _MERGED, _HIGHWAY_RATES):
        _say(f'optim_wrapper.constructor={given} stays: see that what is trained in the backbone has the right rate')
        return
    # What this one of mmseg's forces on entries of custom_keys, all for the backbone, has no effect on a frozen one.
    paramwise.pop('force_default_settings', None)
    if paramwise:
        optim_wrapper['paramwise_cfg'] = ConfigDict(paramwise)
    optim_wrapper['constructor'] = constructor
    factors = sum(entry.get('lr_mult', 1) != 1 for entry in paramwise.get('custom_keys', {}).values())
    rest = f', whatever {factors} entries of custom_keys say of the backbone' if factors else ''
    is_sgd = _type_name(optim_wrapper.get('optimizer', {}).get('type')) == 'SGD'
    base = f"{ADAMW_SHARE:g} of SGD's rate, by AdamW" if is_sgd else 'the base rate'
    rate = f'{FACTOR} times {base}, at most {HIGHEST:g}' if constructor == _HIGHWAY_RATES else base
    _say(f'optim_wrapper.constructor={constructor}: what is added learns at {rate}{rest}')


def _add_package(config: Config) -> None:
    given = config.get('custom_imports') or {}
    imports = given.get('imports', [])
    imports = [imports] if isinstance(imports, str) else list(imports)
    if 'e3va_mm' not in imports:
        allowed = given.get('allow_failed_imports', False)
        config.custom_imports = ConfigDict(imports=[*imports, 'e3va_mm'], allow_failed_imports=allowed)
    hooks = list(config.get('custom_hooks') or [])
    names = [*_HOOKS, _MASKS_HOOK] if _crops_masks(config.model) else _HOOKS
    missing = [name for name in names if name not in {_type_name(hook['type']) for hook in hooks}]
    if _MASKS_HOOK in missing:
        _say(f'custom_hooks: by {_MASKS_HOOK} ground-truth masks go to the device once a step, not at each crop')
    config.custom_hooks = [*hooks, *(ConfigDict(type=name) for name in missing)]


def _crops_masks(part, in_roi_head: bool = False) -> bool:
    """Whether a RoI head, at any depth of a model's config, has a mask head: it crops the masks of the ground truth."""
    if isinstance(part, (list, tuple)):
        return any(_crops_masks(each, in_roi_head) for each in part)
    if not isinstance(part, dict):
        return False
    if in_roi_head and part.get('mask_head'):
        return True
    return any(_crops_masks(value, key == 'roi_head') for key, value in part.items())


def _say(change: str) -> None:
    print_log(f'tune: {change}', logger='current')
