#!/usr/bin/env python
"""Writes the tables in README.md and docs/ anew from the result files; what is around them is written by hand.

A table lies between ``<!-- NAME -->`` and ``<!-- end of NAME -->``; :data:`SECTIONS` says what it is made of.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import demo
import summarize
import summarize_benchmark
from experiments import ROOT


def _demo(path: Path) -> str:
    return demo.format_table(json.loads(path.read_text())['rows'])


def _accuracy(path: Path) -> str:
    return summarize.summarize(json.loads(path.read_text()))


def _dinov2(path: Path) -> str:
    return summarize_benchmark.format_one_setting(path, 'dinov2-g_upernet_8xb2-160k_ade20k-512x512', (896, 896))


# Page, name, what makes the table, and the result files it is made of.
SECTIONS: list[tuple[str, str, Callable[..., str], tuple[str, ...]]] = [
    ('README.md', 'demo table', _demo, ('demo',)),
    ('README.md', 'performance table', summarize_benchmark.format_overview, ('benchmark_gpu', 'benchmark_cascade')),
    ('README.md', 'dinov2 table', _dinov2, ('benchmark_dinov2',)),
    ('README.md', 'results table', _accuracy, ('small_sets',)),
    ('docs/methods.md', 'shapes methods', _accuracy, ('shapes_methods_cpu',)),
    ('docs/methods.md', 'camvid cpu', _accuracy, ('camvid_cpu',)),
    ('docs/methods.md', 'rates', _accuracy, ('rates',)),
    ('docs/backbones.md', 'backbones', _accuracy, ('backbones',)),
    ('docs/performance.md', 'guard', _accuracy, ('guard',)),
    (
        'docs/performance.md',
        'of frozen',
        summarize_benchmark.format_ratios,
        ('benchmark_gpu', 'benchmark_cascade', 'benchmark_compiled'),
    ),
    *(
        ('docs/benchmarks.md', name, summarize_benchmark.report, (name,))
        for name in (
            'benchmark_gpu',
            'benchmark_cascade',
            'benchmark_compiled',
            'benchmark_dinov2',
            'benchmark_cpu',
            'benchmark_cpu_sizes',
            'benchmark_cpu_mixer',
        )
    ),
]


def replace_section(text: str, name: str, content: str) -> str:
    """``text`` with another section.

    Raises:
        ValueError: there is no such section, or more than one.
    """
    start, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f'expected {start} and {end} once each')
    before, _, rest = text.partition(start)
    return f'{before}{start}\n{content}\n{end}{rest.partition(end)[2]}'


def updated_pages() -> dict[str, str]:
    """The pages by their path, with all tables as the result files have them."""
    pages: dict[str, str] = {}
    for page, name, make, files in SECTIONS:
        text = pages.get(page) or (ROOT / page).read_text()
        pages[page] = replace_section(text, name, make(*(ROOT / 'results' / f'{file}.json' for file in files)))
    return pages


def main() -> None:
    if sys.argv[1:]:
        sys.exit(f'usage: python tools/update_docs.py\n\n{__doc__}')
    for page, text in updated_pages().items():
        if (ROOT / page).read_text() != text:
            (ROOT / page).write_text(text)
            print(f'{page} has changed')


if __name__ == '__main__':
    main()
