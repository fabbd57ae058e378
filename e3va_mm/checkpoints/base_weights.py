"""Loading the weights of a frozen base, making sure that nothing stays unloaded."""

from __future__ import annotations

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from .errors import CheckpointMismatchError
from .fingerprint import named_tensors
from .reader import describe_misfit, first_few, read_weights

_served: dict[str, Tensor] = {}


def names_weights(backbone: nn.Module) -> bool:
    """Whether ``backbone`` has weights to load: those of its ``init_cfg``, or what it loads by itself."""
    if hasattr(backbone, 'load_weights'):
        return backbone.names_weights
    return _pretrained(backbone) is not None


def named_file(backbone: nn.Module) -> str | None:
    """The file that ``backbone`` loads its weights from, if it names one."""
    if hasattr(backbone, 'load_weights'):
        return backbone.checkpoint
    return (_pretrained(backbone) or {}).get('checkpoint')


def _pretrained(backbone: nn.Module) -> dict | None:
    """The part of a stock ``init_cfg``, a dict or a list of them, that names weights."""
    parts = backbone.init_cfg if isinstance(backbone.init_cfg, (list, tuple)) else [backbone.init_cfg]
    return next((part for part in parts if part and 'checkpoint' in part), None)


def weights_source(backbone: nn.Module) -> str:
    """Where the weights of ``backbone`` come from, as messages say it."""
    if hasattr(backbone, 'load_weights'):
        return backbone.weights_source
    return f'backbone.init_cfg={backbone.init_cfg}'


def load_base_weights(backbone: nn.Module, added: set[str]) -> None:
    """Loads ``backbone.init_cfg.checkpoint`` (a path, URL or any scheme that mmengine knows) into a stock backbone.

    A file in the backbone's own key names is loaded as it is. Any other is left to the stock loader, which converts key
    names and resizes position tables, but skips in silence what it does not find: so the weights are filled with NaN
    first, and whatever still is NaN afterwards was missing.

    Args:
        backbone: a stock module in fp32; changed in place.
        added: names of parameters that pre-trained weights need not have; they stay as they are, with a warning.

    Raises:
        FileNotFoundError, CheckpointMismatchError: see :func:`.reader.read_weights`; or the file lacks weights.
    """
    if hasattr(backbone, 'load_weights'):
        backbone.load_weights()
        return
    config = _pretrained(backbone)
    source = f'backbone.init_cfg.checkpoint={config["checkpoint"]!r}'
    weights = read_weights(backbone, config['checkpoint'], source, config.get('prefix'))
    tensors = named_tensors(backbone)
    absent = sorted(name for name in added if name not in weights)
    if absent:
        print_log(f'{source} has no {first_few(absent, tensors)}: they stay as they start', logger='current')
    required = list(required_tensors(backbone, added))
    if all(name in weights and weights[name].shape == tensors[name].shape for name in required):
        backbone.load_state_dict({name: weights[name] for name in weights.keys() & tensors.keys()}, strict=False)
        return
    missing = [name for name in required if name not in weights]
    # Some stock loaders know their names only behind a prefix, others only without.
    for prefix in ('', 'backbone.'):
        left = _load_by_stock(backbone, weights, prefix, required)
        if not left:
            return
        missing = min(missing, left, key=len)
    raise CheckpointMismatchError(describe_misfit(backbone, weights, missing, len(required), source))


def required_tensors(backbone: nn.Module, added: set[str]) -> dict[str, Tensor]:
    """The tensors of a stock backbone that a file of its weights must have, by name: all floats but those ``added``."""
    tensors = named_tensors(backbone).items()
    return {name: tensor for name, tensor in tensors if tensor.is_floating_point() and name not in added}


def _load_by_stock(backbone: nn.Module, weights: dict[str, Tensor], prefix: str, required: list[str]) -> list[str]:
    """Loads by the backbone's own ``init_weights``; returns what that did not find of the required."""
    tensors, config = named_tensors(backbone), backbone.init_cfg
    named = _pretrained(backbone)
    with torch.no_grad():
        for name in required:
            tensors[name].fill_(torch.nan)
    # mmdet's loader reads init_cfg by attribute, which a plain dict has not.
    backbone.init_cfg = ConfigDict(named, checkpoint=f'e3va-read://{named["checkpoint"]}')
    backbone.init_cfg.pop('prefix', None)
    _served.update({prefix + name: value for name, value in weights.items()})
    try:
        backbone.init_weights()
    except (AssertionError, IndexError, KeyError, RuntimeError, ValueError):
        return required
    finally:
        backbone.init_cfg = config
        _served.clear()
    return [name for name in required if tensors[name].isnan().any()]


@CheckpointLoader.register_scheme(prefixes='e3va-read://', force=True)
def load_from_memory(filename: str, map_location=None) -> dict:
    """What has been read already, for stock loaders: they would read the file again, and know fewer forms of it."""
    return {'state_dict': dict(_served)}
