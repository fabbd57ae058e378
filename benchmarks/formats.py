"""How tables are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A Markdown table."""
    lines = ['| ' + ' | '.join(map(str, row)) + ' |' for row in [titles, *rows]]
    return '\n'.join([lines[0], '|---' * len(titles) + '|', *lines[1:]])


def memory(mebibytes: float) -> str:
    return f'{mebibytes / 1024:.1f} GiB' if mebibytes >= 4096 else f'{mebibytes:.0f} MiB'


def milliseconds(seconds: float) -> str:
    return f'{1000 * seconds:.0f} ms'


def ratio(row: dict, reference: dict | None, key: str) -> str:
    return f'{row[key] / reference[key]:.2f}' if reference else ''


def span(values: Iterable[float]) -> str:
    """The least and the largest, once if they read alike."""
    values = list(values)
    low, high = (f'{bound:.2f}' for bound in (min(values), max(values)))
    return low if low == high else f'{low}–{high}'
