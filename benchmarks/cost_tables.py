"""Tables of what benchmarks/cost.py has measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.formats import memory, milliseconds, ratio, table
from benchmarks.methods import label

# Names of the tasks of benchmarks/cost.py in tables for people, and of configs; others have their own.
MODELS = {
    'upernet swin-l': 'UPerNet Swin-L, 512²',
    'retinanet swin-l': 'RetinaNet Swin-L, 800 × 1344',
    'cascade-mask-rcnn swin-l': 'Cascade Mask R-CNN Swin-L, 800 × 1344',
    'cascade-mask-rcnn swin-b': 'Cascade Mask R-CNN Swin-B, 800 × 1344',
}
CONFIGS = {
    'dinov2-l_upernet_8xb2-160k_ade20k-512x512': 'UPerNet DINOv2-L',
    'dinov2-g_upernet_8xb2-160k_ade20k-512x512': 'UPerNet DINOv2-g',
    'dinov3-7b_upernet_8xb2-160k_ade20k-512x512': 'UPerNet DINOv3-7B',
}


def load_rows(path: str | Path) -> list[dict]:
    """A row a case: its settings, and medians over its runs."""
    rows = []
    for case in json.loads(Path(path).read_text())['cases'].values():
        runs = [run for run in case['runs'] if not run.get('out_of_memory')]
        if not runs:
            rows.append({**case, 'batch_size': 0})
            continue
        keys = (key for key, value in runs[0].items() if key != 'batch_size' and not isinstance(value, dict))
        rows.append({**case, **{key: _median([run[key] for run in runs]) for key in keys}, 'runs': runs})
    return rows


def _median(values: list):
    return [statistics.median(of) for of in zip(*values)] if isinstance(values[0], list) else statistics.median(values)


def group_rows(rows: list[dict], *keys: str) -> list[list[dict]]:
    """Rows that have the same of all keys together, in their order."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(str([row.get(key) for key in keys]), []).append(row)
    return list(groups.values())


def model_of(row: dict) -> str:
    size = 'real images' if row['data'] == 'real' else '×'.join(map(str, row['image_size']))
    return MODELS.get(row['model'], f'{CONFIGS.get(row["model"], row["model"])}, {size}')


def format_costs(rows: list[dict]) -> str:
    """A table a setting; ratios are to its rows full and frozen."""
    parts = []
    keys = ('model', 'image_size', 'data', 'precision', 'batch_size', 'memory_cap', 'device')
    for group in group_rows(rows, *keys):
        row = group[0]
        place = f'({row["device"]}' + (f', {row["memory_cap"]} GiB)' if row.get('memory_cap') else ')')
        if row['batch_size']:
            setting = f'{model_of(row)}, batch {row["batch_size"]}, {row["precision"]}'
            parts.append(f'**{setting}** {place}\n\n{format_setting(group)}')
        else:
            parts += [f'{model_of(row)}, {label(row["method"])}: does not train {place}' for row in group]
    return '\n\n'.join(parts)


def format_setting(group: list[dict]) -> str:
    """A row a method (and package); all of one setting."""
    references = [next((row for row in group if row['method'] == name), None) for name in ('full', 'frozen')]
    lines = []
    for row in group:
        name = ', '.join(filter(None, [label(row['method']), row.get('package')]))
        peaks, steps = ([ratio(row, other, key) for other in references] for key in ('peak_memory_mib', 'step_seconds'))
        kept, time = memory(row['saved_in_backbone_mib']), with_quartiles(row, 'step_seconds')
        lines.append([name, memory(row['peak_memory_mib']), *peaks, kept, time, *steps])
    titles = ['method', 'peak memory', 'of full', 'of frozen', 'kept in backbone', 'step (quartiles)']
    return table([*titles, 'of full', 'of frozen'], lines)


def with_quartiles(row: dict, key: str) -> str:
    """A row's median time and the quartiles around it; nothing if it has none."""
    if key not in row:
        return ''
    low, high = row[f'{key}_quartiles']
    return f'{milliseconds(row[key])} ({1000 * low:.0f}–{1000 * high:.0f})'


def format_steps(rows: list[dict]) -> str:
    """Steps in turn; a row a case, with quartiles over the rounds."""
    lines = []
    for row in rows:
        low, high = row['of_first_quartiles']
        of_first = f'{row["of_first"]:.2f} ({low:.2f}–{high:.2f})' if row['of_first'] != 1 else '1'
        lines.append((model_of(row), label(row['method']), milliseconds(row['step_seconds']), of_first))
    return table(('', '', 'step', 'of the first'), lines)


def format_fits(rows: list[dict]) -> str:
    """The largest batch that trains in the memory of a card, and the cost of the smallest; a row a model and method."""
    runs = [row['runs'][0] for row in rows]
    titles = [f'{card} GB' for card in runs[0]['largest']]
    has_costs = any('cost' in run for run in runs)
    lines = []
    for row, run in zip(rows, runs):
        cells = [f'{count}+' if count == run['most_images'] else count or '–' for count in run['largest'].values()]
        if has_costs:
            cost = run.get('cost')
            cells += [memory(cost['peak_memory_mib']), milliseconds(cost['step_seconds'])] if cost else ['', '']
        lines.append([model_of(row), label(row['method']), *cells])
    return table(['', 'largest batch', *titles, *(['memory of the smallest', 'step'] if has_costs else [])], lines)


def format_gradients(rows: list[dict]) -> str:
    """What each of several processes exchanges in a step, and the backbone's part of it; a row a method."""
    cells = {(row['method'], model_of(row)): f'{row["gradients_mib"]:.0f} / {row["backbone_mib"]:.1f}' for row in rows}
    methods, models = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    lines = [[label(method), *(cells[method, model] for model in models)] for method in methods]
    return table(['MiB a step / of the backbone', *models], lines)


def format_scaling(rows: list[dict]) -> str:
    """Steps (quartiles) of a GPU alone, of all without exchange, and of all together; a row a setting and method."""
    lines = []
    for row in (row for row in rows if row['gpus'] > 1):
        setting = f'{model_of(row)}, batch {row["batch_size"]} a GPU'
        cells = [with_quartiles(row, f'{key}_seconds') for key in ('alone', 'apart', 'step')]
        cells += [f'{row["alone_seconds"] / row["step_seconds"]:.2f}' if row.get('alone_seconds') else '']
        lines.append([setting, label(row['method']), row['gpus'], memory(row['peak_memory_mib']), *cells])
    return table(['', '', 'GPUs', 'memory of each', 'step of one', 'of each, apart', 'together', 'efficiency'], lines)


def format_packages(rows: list[dict]) -> str:
    """What two checkouts cost; a row a setting and method that both have, and ratios to the first of them."""
    first, *others = dict.fromkeys(row['package'] for row in rows)
    lines = []
    for group in group_rows(rows, 'model', 'image_size', 'data', 'precision', 'batch_size', 'method'):
        by_package = {row['package']: row for row in group}
        if first not in by_package:
            continue
        row = by_package[first]
        cells = [memory(row['peak_memory_mib']), milliseconds(row['step_seconds'])]
        for other in filter(by_package.get, others):
            cells += [f'{by_package[other][key] / row[key]:.3f}' for key in ('peak_memory_mib', 'step_seconds')]
        lines.append([f'{model_of(row)}, batch {row["batch_size"]}, {row["precision"]}', label(row['method']), *cells])
    ratios = [f'{what} of {other}' for other in others for what in ('memory', 'step')]
    return table(['', '', f'memory of {first}', 'step', *ratios], lines)


def report(rows: list[dict]) -> str:
    """All tables of a result file."""
    if 'of_first' in rows[0]:
        return format_steps(rows)
    if any(row.get('gpus', 1) > 1 for row in rows):
        return format_scaling(rows)
    if 'gradients_mib' in rows[0]:
        return format_gradients(rows)
    if 'largest' in rows[0]['runs'][0]:
        return format_fits(rows)
    return (format_packages(rows) + '\n\n' if rows[0].get('package') else '') + format_costs(rows)
