"""Checks of options; what they raise names the option and its value."""

from __future__ import annotations

from collections.abc import Sequence


def check_count(option: str, value) -> None:
    """Raises a ValueError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'{option} must be an integer of at least 1, got {value!r}')


def check_kernel_sizes(option: str, sizes) -> None:
    """Raises a ValueError unless ``sizes`` is a list of odd integers above 0."""
    are_odd = isinstance(sizes, Sequence) and all(isinstance(size, int) and size > 0 and size % 2 for size in sizes)
    if not are_odd or not sizes:
        raise ValueError(f'{option} must be a list of odd integers, got {sizes!r}')
