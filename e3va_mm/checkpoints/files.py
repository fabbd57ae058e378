"""Reading and publishing checkpoints: as weights only, and never trusting that a file is whole."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader, load_from_local
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .errors import DamagedCheckpointError
from .fingerprint import FINGERPRINT

# What reading a file raises that is damaged, or not what it should be.
UNREADABLE = (RuntimeError, EOFError, KeyError, OSError, ValueError, pickle.UnpicklingError)
_FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
_EMBEDDED = Path(__file__).parents[1] / 'weights'
_WORK_DIR = re.compile(r'^work_dir = .*\n?', re.MULTILINE)


def read_checkpoint(path: str | Path) -> dict:
    """Loads a checkpoint, or a file from :func:`publish`, onto the CPU without running any code from it.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedCheckpointError: the file can not be read, or holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    try:
        with weights_only():
            checkpoint = torch.load(path, map_location='cpu')
    except UNREADABLE as error:
        raise DamagedCheckpointError(
            f'checkpoint {path} ({path.stat().st_size} bytes) is damaged or unsafe to load: {reason(error)}'
        ) from error
    if not isinstance(checkpoint, dict):
        raise DamagedCheckpointError(f'checkpoint {path} holds a {type(checkpoint).__name__}, not a state dict')
    return checkpoint


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """While this lasts, no call of ``torch.load`` runs code of a file, whatever it is called with.

    mmengine's loaders ask for weights only, and where that fails for anything; from URLs they do not even ask.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = '1'
    try:
        with torch.serialization.safe_globals(_mmengine_types()):
            yield
    finally:
        os.environ.pop(_FORCE)
        if before is not None:
            os.environ[_FORCE] = before


def reason(error: Exception) -> str:
    """Why a file could not be read, in one line."""
    unsafe = re.search(r'GLOBAL (\S+)', str(error))
    if unsafe:
        return f'it holds {unsafe[1]} beside tensors and numbers, and nothing of it was run; save a state_dict() alone'
    return (str(error) or type(error).__name__).splitlines()[0]


def read_weights_only() -> None:
    """:func:`weights_only` for the rest of the process, which is a tool's: whatever a toolbox reads there, and when."""
    os.environ[_FORCE] = '1'
    torch.serialization.add_safe_globals(_mmengine_types())


def _mmengine_types() -> list:
    """With these, stock checkpoints load too: they hold NumPy arrays in mmengine's HistoryBuffer."""
    try:
        from mmengine.runner.checkpoint import get_torch_safe_globals
    except ImportError:
        return []
    return get_torch_safe_globals()


def to_plain(value):
    """``value`` with NumPy types and mmengine's HistoryBuffers as tensors and numbers, which load as weights only."""
    if isinstance(value, HistoryBuffer):
        log, counts = (torch.as_tensor(np.asarray(part, dtype=np.float64)) for part in value.data)
        return {'history_buffer': log, 'counts': counts, 'max_length': value.max_length}
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value) if value.dtype.kind in 'biuf' else value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return type(value)((key, to_plain(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(to_plain(item) for item in value)
    return value


def restore_history(message_hub: dict) -> None:
    """Rebuilds, in place, the HistoryBuffers that :func:`to_plain` took apart."""
    scalars = message_hub.get('log_scalars', {})
    for name, value in scalars.items():
        if isinstance(value, dict) and 'history_buffer' in value:
            log, counts = value['history_buffer'].tolist(), value['counts'].tolist()
            scalars[name] = HistoryBuffer(log, counts, value['max_length'])


def publish(checkpoint: str | Path, target: str | Path, half: bool = False) -> None:
    """Writes the trained weights of a checkpoint, its fingerprint and its config as one safetensors file.

    The config is without its ``work_dir``: a folder of this machine, in which others would write.

    Args:
        half: matrices and kernels in fp16; biases, norms and running statistics stay as they are.

    Raises:
        ValueError: the checkpoint holds no fingerprint, so it is no adapter checkpoint; a weight is too large for fp16.
    """
    content = read_checkpoint(checkpoint)
    state = content.get('state_dict', {})
    if not any(key.endswith(FINGERPRINT) for key in state):
        raise ValueError(f'{checkpoint} is no adapter checkpoint: it has no {FINGERPRINT}')
    meta = content.get('meta', {})
    metadata = {
        'format': 'pt',
        'config': _WORK_DIR.sub('', meta.get('cfg', '')),
        'dataset_meta': json.dumps(to_plain(meta.get('dataset_meta')), default=list),
    }
    # Heads may have one tensor under several keys, which safetensors refuses: each key gets a copy.
    copies = {key: _halved(key, value) if half else value.clone() for key, value in state.items()}
    # Not by save_file: what that writes, nobody else may read.
    Path(target).write_bytes(save({key: value.contiguous() for key, value in copies.items()}, metadata))


def _halved(key: str, value: torch.Tensor) -> torch.Tensor:
    """A copy, in fp16 where it is a matrix or more."""
    if value.dim() < 2 or value.dtype != torch.float32:
        return value.clone()
    halved = value.half()
    if halved.isinf().any() and not value.isinf().any():
        raise ValueError(f'{key} has values up to {value.abs().max():g}, too large for fp16: publish without --half')
    return halved


def unpublish(published: str | Path, target: str | Path) -> None:
    """Writes a file from :func:`publish` as a ``.pth`` checkpoint, for code that does not import this package.

    Raises:
        FileNotFoundError, DamagedCheckpointError: the file is missing, or no whole safetensors file.
    """
    torch.save(read_checkpoint(published), target)


def _read_safetensors(path: Path) -> dict:
    try:
        with safe_open(path, framework='pt') as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise DamagedCheckpointError(f'checkpoint {path} can not be read: {error}') from error
    # Where nothing is known, there is no entry: toolboxes then take what the config says.
    known = {'cfg': metadata.get('config'), 'dataset_meta': json.loads(metadata.get('dataset_meta', 'null'))}
    return {'state_dict': state, 'meta': {key: value for key, value in known.items() if value}}


# The prefixes are regular expressions, so that other files stay with mmengine's own loader. What comes after
# `load_from_` is the backend's name in mmengine's log.
@CheckpointLoader.register_scheme(prefixes=r'[^:]*\.safetensors$', force=True)
def load_from_safetensors(filename: str, map_location=None) -> dict:
    """Files from :func:`publish`, for ``load_from``, ``init_cfg`` and ``init_model``."""
    return read_checkpoint(Path(filename).expanduser())


@CheckpointLoader.register_scheme(prefixes='e3va://', force=True)
def load_from_package(filename: str, map_location=None) -> dict:
    """``e3va://NAME``: weights that ship inside the package, whatever the working directory."""
    return load_from_local(str(_EMBEDDED / filename.removeprefix('e3va://')), map_location)
