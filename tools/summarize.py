#!/usr/bin/env python
"""Prints the Markdown table of a result file from tools/run_grid.py: mean ± standard deviation over the seeds."""

import argparse
import json
import statistics
from pathlib import Path

# Data set, the metric that is shown, and the factor that makes it a percentage.
METRICS = {'camvid': ('mIoU', 1), 'bccd': ('pascal_voc/mAP', 100), 'nuclei': ('coco/segm_mAP', 100)}
METHODS = {'frozen-': 'frozen', 'e3va-': 'E³VA', '': 'full'}


def summarize(content: dict) -> str:
    """The table as text; a row a data set and method, with the number of seeds behind it."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in content['runs'].values():
        folder, name = Path(run['config']).parent.name, Path(run['config']).name
        method = next(method for prefix, method in METHODS.items() if prefix in name)
        groups.setdefault((folder, method), []).append(run)
    lines = [
        '| data set | method | metric (%) | seeds | trained in the backbone | peak memory | checkpoint |',
        '|---|---|---|---|---|---|---|',
    ]
    for folder in METRICS:
        lines += [
            _row(folder, method, groups[folder, method]) for method in METHODS.values() if (folder, method) in groups
        ]
    return '\n'.join(lines)


def _row(folder: str, method: str, runs: list[dict]) -> str:
    metric, scale = METRICS[folder]
    values = [scale * run['report']['metrics'][metric] for run in runs]
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    report = runs[0]['report']
    parts = report['parameters']
    trained = sum(parts[part]['trainable'] for part in ('backbone', 'highway') if part in parts)
    memory = statistics.median(run['report']['peak_memory_mib'] for run in runs)
    return (
        f'| {folder} | {method} | {metric.split("/")[-1]} {statistics.mean(values):.1f}{spread} | {len(values)} | '
        f'{trained:,} | {memory:.0f} MiB | {report["checkpoint_bytes"] / 2**20:.0f} MiB |'
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', nargs='?', default='results/small_sets.json')
    print(summarize(json.loads(Path(parser.parse_args().results).read_text())))
