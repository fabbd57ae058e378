"""Loading the weights of a frozen base, making sure that nothing stays unloaded."""

from __future__ import annotations

import pickle

import torch
from mmengine.config import ConfigDict
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from .errors import CheckpointMismatchError
from .fingerprint import named_tensors


def names_weights(backbone: nn.Module) -> bool:
    """Whether ``backbone`` has weights to load: those of its ``init_cfg``, or what it loads by itself."""
    if hasattr(backbone, 'load_weights'):
        return backbone.names_weights
    return bool(backbone.init_cfg) and 'checkpoint' in backbone.init_cfg


def weights_source(backbone: nn.Module) -> str:
    """Where the weights of ``backbone`` come from, as messages say it."""
    if hasattr(backbone, 'load_weights'):
        return backbone.weights_source
    return f'backbone.init_cfg={backbone.init_cfg}'


def load_base_weights(backbone: nn.Module, optional: set[str]) -> None:
    """Loads ``backbone.init_cfg.checkpoint`` (a path, URL or any scheme that mmengine knows) into a stock backbone.

    A file in the backbone's own key names, with or without a ``backbone.`` prefix, is loaded as it is. Any other is
    left to the stock loader, which converts key names and resizes position tables, but skips in silence what it does
    not find: so the weights are filled with NaN first, and whatever still is NaN afterwards was missing.

    Args:
        backbone: a stock module in fp32; changed in place.
        optional: names of submodules that pre-trained weights need not have (output norms).

    Raises:
        FileNotFoundError: the file is missing.
        CheckpointMismatchError: the file is damaged, or lacks weights of the backbone.
    """
    if hasattr(backbone, 'load_weights'):
        backbone.load_weights()
        return
    source = f'backbone.init_cfg.checkpoint={backbone.init_cfg["checkpoint"]!r}'
    weights = _read(backbone.init_cfg['checkpoint'], source)
    required = {
        name: tensor
        for name, tensor in named_tensors(backbone).items()
        if tensor.is_floating_point() and name.rpartition('.')[0] not in optional
    }
    if all(name in weights and weights[name].shape == tensor.shape for name, tensor in required.items()):
        known = {name: weights[name] for name in weights.keys() & named_tensors(backbone).keys()}
        backbone.load_state_dict(known, strict=False)
        return
    with torch.no_grad():
        for tensor in required.values():
            tensor.fill_(torch.nan)
    # mmdet's loader reads init_cfg by attribute, which a plain dict has not.
    backbone.init_cfg = ConfigDict(backbone.init_cfg)
    try:
        backbone.init_weights()
    except (IndexError, KeyError, RuntimeError) as error:
        raise CheckpointMismatchError(f'{source} does not fit {type(backbone).__name__}: {error}') from error
    missing = [name for name, tensor in required.items() if tensor.isnan().any()]
    if missing:
        raise CheckpointMismatchError(describe_missing(source, missing, len(required), backbone))


def describe_missing(source: str, missing: list[str], number: int, backbone: nn.Module) -> str:
    listed = ', '.join(missing[:3]) + (', …' if len(missing) > 3 else '')
    return f'{source} lacks {len(missing)} of the {number} weights of {type(backbone).__name__}: {listed}'


def _read(path: str, source: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint, stripped of the prefixes that OpenMMLab's tools add."""
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{source}: there is no such file; give the path or URL of its weights') from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointMismatchError(f'{source} can not be read, it may be damaged: {error}') from error
    weights = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
    for prefix in ('module.', 'backbone.'):
        if any(key.startswith(prefix) for key in weights):
            weights = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    return weights
