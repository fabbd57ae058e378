"""Recognising a frozen module again without storing it."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

# Its key in a wrapper's state dict.
FINGERPRINT = 'base_fingerprint'


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name: the live tensors, in the order of ``state_dict``."""
    return dict(module.state_dict(keep_vars=True))


def frozen_tensors(module: nn.Module, trained: set[str] = frozenset()) -> dict[str, Tensor]:
    """:func:`named_tensors` without those in ``trained``."""
    return {name: tensor for name, tensor in named_tensors(module).items() if name not in trained}


def fingerprint(tensors: dict[str, Tensor]) -> Tensor:
    """One 64-bit hash a tensor, over its name, shape and values (in fp32).

    Returns:
        (len(tensors),) int64 on the CPU. Being a tensor, it passes through every way of saving a state dict.
    """
    # Hashing leaves the interpreter to the other threads; of giants it would take most of a minute.
    with ThreadPoolExecutor() as pool:
        return torch.tensor(list(pool.map(_hash, tensors.keys(), tensors.values())), dtype=torch.int64)


def _hash(name: str, tensor: Tensor) -> int:
    digest = hashlib.blake2b(f'{name} {tuple(tensor.shape)}'.encode(), digest_size=8)
    values = tensor.detach().cpu().flatten()
    digest.update((values.float() if values.is_floating_point() else values).numpy())
    return int.from_bytes(digest.digest(), 'little', signed=True)


def describe_difference(found: Tensor, expected: Tensor, names: list[str], most: int = 3) -> str:
    """In words, how two fingerprints of modules with the tensors ``names`` differ; '' where they do not."""
    if len(found) != len(expected):
        return f'the checkpoint was trained on a base of {len(found)} tensors, this model has {len(expected)}'
    differing = [name for name, one, other in zip(names, found.tolist(), expected.tolist()) if one != other]
    if not differing:
        return ''
    listed = ', '.join(differing[:most]) + (', …' if len(differing) > most else '')
    return f'{len(differing)} of {len(names)} base tensors differ from those trained on: {listed}'
