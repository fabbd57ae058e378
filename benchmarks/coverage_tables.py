"""Tables of docs/coverage.md, made from what benchmarks/coverage.py has written."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.formats import table

TITLES = {'mmdet': 'MMDetection', 'mmseg': 'MMSegmentation'}
# Words in errors that tell what is missing here: a package, a file to download, or a GPU.
MISSING_HERE = (
    'install',
    'No module named',
    'mmpretrain',
    'offline',
    'internet',
    'URLError',
    'for device cpu',
    'CUDA',
    'is_cuda',
)


class Outcome:
    """What came of one config.

    Attributes:
        accepted: it is tuned, and its wrapped backbone gives maps.
        stock_trains, trains: every step passes, of the stock model and of the tuned one.
        rates: all that is added trains at the config's own rate; None where the model can not be built.
        failure: whose fault the first failure is, at which step it came, and the error; None where all passes.
    """

    def __init__(self, name: str, record: dict, content: dict) -> None:
        trial = content['trials'].get(record.get('trial'), {})
        rates = content['rates'].get(record.get('rates'), {'fails_at': 'build'})
        self.name, self.toolbox = name, name.split('::')[0]
        self.backbone, self.model = record.get('backbone', 'unknown'), record.get('model', 'unknown')
        self.loads = record.get('fails_at') != 'load'
        self.accepted = bool(trial) and 'error' not in trial.get('wrapped', trial['e3va'])
        self.stock_trains = bool(trial) and 'error' not in trial['stock']
        self.trains = self.stock_trains and 'error' not in trial['e3va']
        self.rates = None if rates.get('fails_at') == 'build' else 'error' not in rates
        self.failure = _failure(record, trial, rates)


def _failure(record: dict, trial: dict, rates: dict) -> tuple[str, str, str] | None:
    for part, fault in ((record, 'toolbox'), (trial.get('stock', {}), 'toolbox'), (trial.get('e3va', {}), 'e3va_mm')):
        if 'error' in part:
            here = fault == 'toolbox' and any(word in part['error'] for word in MISSING_HERE)
            own = part is record and part['fails_at'] != 'load'
            fault = (
                'not tried'
                if 'NoDataError' in part['error']
                else 'this machine'
                if here
                else 'e3va_mm'
                if own
                else fault
            )
            return fault, part['fails_at'], part['error']
    return ('e3va_mm', rates['fails_at'], rates['error']) if 'error' in rates else None


def outcomes(path: Path) -> list[Outcome]:
    content = json.loads(path.read_text())
    return [Outcome(name, record, content) for name, record in sorted(content['configs'].items())]


def _share(part: int, whole: int) -> str:
    return f'{part} ({100 * part / whole:.1f} %)' if whole else '0'


def _row(of: list[Outcome]) -> list[str]:
    accepted, stock = [one for one in of if one.accepted], [one for one in of if one.stock_trains]
    known = [one for one in accepted if one.rates is not None]
    return [
        str(len(of)),
        _share(len(accepted), len(of)),
        _share(sum(one.rates for one in known), len(known)),
        str(len(stock)),
        _share(sum(one.trains for one in stock), len(stock)),
    ]


def _grouped(of: Iterable[Outcome], *keys: str) -> dict[tuple, list[Outcome]]:
    groups: dict[tuple, list[Outcome]] = defaultdict(list)
    for one in of:
        groups[tuple(getattr(one, key) for key in keys)].append(one)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))))


COLUMNS = ['configs', 'accepted', 'rates right', 'stock trains here', 'with E³VA, of these']


def format_toolboxes(path: Path) -> str:
    """The shares of each toolbox, of its configs with a model."""
    content = json.loads(path.read_text())
    groups = _grouped(outcomes(path), 'toolbox')
    lines = [[TITLES[toolbox], *_row(own)] for (toolbox,), own in groups.items()]
    source = f'Measured on {content["device"]}, {content["date"]}, by `python benchmarks/coverage.py`.'
    return table(['toolbox', *COLUMNS], lines) + '\n\n' + source


def format_backbones(path: Path) -> str:
    groups = _grouped(outcomes(path), 'toolbox', 'backbone')
    lines = [[TITLES[toolbox], f'`{backbone}`', *_row(own)] for (toolbox, backbone), own in groups.items()]
    return table(['toolbox', 'backbone', *COLUMNS], lines)


def format_failures(path: Path) -> str:
    """All that fails, by whose fault it is, the step, and the error; with an example."""
    groups: dict[tuple, list[Outcome]] = defaultdict(list)
    for one in outcomes(path):
        if one.failure:
            fault, step, error = one.failure
            groups[fault, step, _readable(error)].append(one)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]), item[0]))
    lines = [
        [fault, len(own), step.replace('_', ' '), error, f'`{own[0].name}`'] for (fault, step, error), own in ordered
    ]
    return table(['whose', 'configs', 'step', 'error', 'for example'], lines)


def _readable(error: str) -> str:
    """An error as a cell of a table: no folders of one machine, no numbers of one model."""
    error = re.sub(r"/[^\s'\"]*/", '', error)
    error = re.sub(r'\d+', 'N', error).replace('|', '/').replace('`', "'")
    return f'`{error[:160]}`'
