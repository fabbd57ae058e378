"""Files of whole stock models: detectors and segmentors that somebody has trained, backbone, neck and heads."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mmengine.runner import CheckpointLoader
from torch import Tensor

from .files import read_checkpoint, weights_only
from .fingerprint import FINGERPRINT

# Semi-supervised training keeps a detector twice.
_TWINS = ('teacher', 'student')


def state_keys(source: str, download: bool = False) -> list[str] | None:
    """The keys of the state dict in a file, as mmengine loads it; None where it is not here to be read.

    Args:
        source: a path, a URL or any scheme that mmengine knows.
        download: read what is no path as well.

    Raises:
        DamagedCheckpointError: the file can not be read.
    """
    if Path(source).is_file():
        content = read_checkpoint(source)
    elif download and '://' in source:
        with weights_only():
            content = CheckpointLoader.load_checkpoint(source, map_location='cpu', logger='silent')
    else:
        return None
    state = content.get('state_dict', content)
    return [key.removeprefix('module.') for key, value in state.items() if isinstance(value, Tensor)]


def backbone_prefix(keys: Collection[str] | None, path: tuple[str, ...]) -> str | None:
    """What the keys of a stock model's backbone begin with, in a file with these ``keys``.

    Args:
        keys: of the file; of one that is not here, it is taken for granted that it has the backbone.
        path: of the backbone in the model.

    Returns:
        None where the file is none of a stock model, or has no such backbone.
    """
    if keys is None:
        return f'{path[-1]}.'
    if any(key.endswith(FINGERPRINT) for key in keys):
        return None
    own = ['.'.join(path[start:]) for start in range(len(path))]
    candidates = [own[0], *(f'{twin}.{path[-1]}' for twin in _TWINS), *own[1:]]
    return next((f'{each}.' for each in candidates if any(key.startswith(f'{each}.') for key in keys)), None)
