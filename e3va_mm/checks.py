"""Checks of options; what they raise names the option and its value."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def check_count(option: str, value) -> None:
    """Raises a ValueError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'{option} must be an integer of at least 1, got {value!r}')


def check_number(option: str, value) -> None:
    """Raises a ValueError unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f'{option} must be a finite number, got {value!r}')


def check_switch(option: str, value) -> None:
    """Raises a ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f'{option} must be True or False, got {value!r}')


def check_names(option: str, value) -> None:
    """Raises a ValueError unless ``value`` is a list of strings, with one at least."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f'{option} must be a list of names, got {value!r}')


def check_positive(option: str, value, most: float = math.inf) -> None:
    """Raises a ValueError unless ``value`` is a finite number above 0 and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most or value == math.inf:
        limit = '' if most == math.inf else f' and at most {most}'
        raise ValueError(f'{option} must be a number above 0{limit}, got {value!r}')


def check_choice(option: str, value, choices: Sequence) -> None:
    """Raises a ValueError unless ``value`` is one of ``choices``."""
    if value not in list(choices):
        raise ValueError(f'{option} must be one of {list(choices)}, got {value!r}')


def check_kernel_sizes(option: str, sizes) -> None:
    """Raises a ValueError unless ``sizes`` is a list of odd integers above 0."""
    are_listed = isinstance(sizes, (list, tuple)) and sizes and all(type(size) is int for size in sizes)
    if not are_listed or not all(size > 0 and size % 2 for size in sizes):
        raise ValueError(f'{option} must be a list of odd integers, got {sizes!r}')


def check_target(option: str, target: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raises a ValueError where writing ``target`` would overwrite one of ``inputs``, links followed."""
    for source in inputs:
        if os.path.realpath(target) == os.path.realpath(source):
            raise ValueError(f'{option} {target} would overwrite the input {source}: choose another')


def check_options(option: str, given, known: Sequence[str]) -> dict:
    """``given`` as a dict (empty for None); raises a ValueError unless it has no keys but ``known``."""
    if not isinstance(given, (dict, type(None))):
        raise ValueError(f'{option} must be a dict with options of {list(known)}, or None, got {given!r}')
    unknown = sorted(set(given or {}) - set(known))
    if unknown:
        found = ', '.join(f'{key}={given[key]!r}' for key in unknown)
        near = [name for key in unknown for name in difflib.get_close_matches(key, known, 1)]
        hint = f'did you mean {near}? ' if near else ''
        raise ValueError(f'unknown option {unknown} in {option} ({found}); {hint}known are {list(known)}')
    return dict(given or {})


def checks_options(cls: type) -> type:
    """Class decorator: an option that the constructor does not have raises as in :func:`check_options`."""
    construct = cls.__init__
    known = list(inspect.signature(construct).parameters)[1:]

    @functools.wraps(construct)
    def checked(self, *args, **options) -> None:
        check_options(cls.__name__, options, known)
        construct(self, *args, **options)

    cls.__init__ = checked
    return cls
