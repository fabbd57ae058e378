#!/usr/bin/env python
"""The embedded demo: trains frozen and E³VA (with mixers, an extension) on generated data, tests and compares them.

Needs no download; everything is written to work_dirs/demo.
"""

import argparse
import json
import os
import time
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from experiments import ROOT, Run, call_tool, provenance, run_all, shorten
from method_specs import cfg_options, config_prefix
from mmengine.config import Config
from summarize import trained_parameters

from e3va_mm.datasets.shapes import write_shapes

matplotlib.use('Agg')
import matplotlib.pyplot as plt

DATA = 'data/shapes'
METHODS = {'frozen': 'frozen', 'E3VA + mixer': 'e3va+mixer'}
TASKS = {
    'segmentation': ('configs/shapes/{}swin-nano_upernet_1xb8-600_shapes-96x96.py', 'mIoU', 1),
    'detection': ('configs/shapes/retinanet_{}swin-nano_fpn_1xb8-800_shapes.py', 'coco/bbox_mAP', 100),
}
SCHEDULE = 0.75  # of the configs' iterations
PICTURES, ZOOM = 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/demo', help='folder for runs, table and pictures')
    work_dir = ROOT / parser.parse_args().work_dir
    started = time.monotonic()
    os.chdir(ROOT)
    print(f'writing the data set to {DATA}', flush=True)
    write_shapes(DATA)
    runs = {(task, method): run_of(task, method) for task in TASKS for method in METHODS}
    print(f'{len(runs)} trainings, two at a time; logs: {work_dir}/*/train.log', flush=True)
    enlarged, metrics = enlarge_images(work_dir / 'images'), {}

    def evaluate(run: Run, _) -> None:
        metrics[run.name] = test(run, work_dir)
        predict(run, work_dir, enlarged)

    # The longest first, so that both processors are busy to the end.
    longest_first = sorted(runs.values(), key=lambda run: run.method == 'frozen')
    results = run_all(longest_first, work_dir, 2, evaluate)
    rows = [make_row(*key, metrics[run.name], results[run.name]) for key, run in runs.items()]
    (work_dir / 'results.json').write_text(json.dumps({**provenance(), 'rows': rows}, indent=1) + '\n')
    table = format_table(rows)
    (work_dir / 'table.md').write_text(table + '\n')
    draw_bars(rows, work_dir / 'bars.png')
    for task in TASKS:
        draw_overlays(task, work_dir, enlarged)
    print(f'\n{table}\n\npictures: {work_dir}/*.png; {time.monotonic() - started:.0f} s in all')


def run_of(task: str, method: str) -> Run:
    name = METHODS[method]
    config = TASKS[task][0].format(config_prefix(name))
    return Run(config, name, cfg_options=(*cfg_options(name), *shorten(config, SCHEDULE)))


def make_row(task: str, method: str, metrics: dict, result: dict) -> dict:
    """The metric that ``tools/test.py`` found, and the costs that the training reported."""
    (_, metric, scale), report = TASKS[task], result['report']
    return {
        'task': task,
        'method': method,
        'metric': metric.removeprefix('coco/bbox_'),
        'value': round(scale * metrics[metric], 1),
        'trained_in_backbone': trained_parameters(result),
        'peak_memory_mib': report['peak_memory_mib'],
        'step_seconds': report['step_seconds_median'],
        'checkpoint_mib': round(report['checkpoint_bytes'] / 2**20, 1),
    }


def call_with_checkpoint(tool: list[str], run: Run, work_dir: Path, options: list[str]) -> None:
    """Calls a tool with the config that the run was trained with, and its last checkpoint."""
    folder = work_dir / run.name
    config, checkpoint = folder / Path(run.config).name, (folder / 'last_checkpoint').read_text()
    call_tool([*tool, str(config), checkpoint, *options], folder / f'{Path(tool[0]).stem}.log')


def test(run: Run, work_dir: Path) -> dict:
    """The metrics that ``tools/test.py`` finds for the run's last checkpoint."""
    target = work_dir / run.name / 'test'
    call_with_checkpoint(['tools/test.py'], run, work_dir, ['--work-dir', str(target)])
    return json.loads(max(target.glob('*/*.json'), key=os.path.getmtime).read_text())


def predict(run: Run, work_dir: Path, images: list[Path]) -> None:
    """Pictures with the run's predictions, as drawn by ``tools/infer.py``, in its folder ``predictions``."""
    out = str(work_dir / run.name / 'predictions')
    options = ['--out-dir', out, '--score-thr', '0.4', '--device', 'cpu']
    call_with_checkpoint(['tools/infer.py', str(images[0].parent)], run, work_dir, options)


def format_table(rows: list[dict]) -> str:
    lines = [
        '| task | method | mIoU / mAP | trained in the backbone | peak memory (process) | step | checkpoint |',
        '|---|---|---|---|---|---|---|',
    ]
    lines += [
        f'| {row["task"]} | {row["method"]} | {row["value"]:.1f} {row["metric"]} | {row["trained_in_backbone"]:,} | '
        f'{row["peak_memory_mib"]:.0f} MiB | {1000 * row["step_seconds"]:.0f} ms | {row["checkpoint_mib"]:.1f} MiB |'
        for row in rows
    ]
    return '\n'.join(lines)


def draw_bars(rows: list[dict], target: Path) -> None:
    """Accuracy, memory and step time of the methods, a panel each; hatches tell them apart in black and white."""
    panels = (('value', 'mIoU or mAP (%)'), ('peak_memory_mib', 'peak memory (MiB)'), ('step_seconds', 'step time (s)'))
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3.2), layout='constrained')
    for axis, (key, label) in zip(axes, panels):
        for offset, (method, hatch) in enumerate(zip(METHODS, ('', '//'))):
            heights = [row[key] for row in rows if row['method'] == method]
            positions = np.arange(len(heights)) + 0.38 * offset - 0.19
            bars = axis.bar(positions, heights, 0.36, label=method, hatch=hatch, edgecolor='black')
            axis.bar_label(bars, fmt='%.3g', fontsize=8)
        axis.set_xticks(range(len(TASKS)), TASKS)
        axis.set_ylabel(label)
        axis.margins(y=0.15)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=len(METHODS))
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_overlays(task: str, work_dir: Path, enlarged: list[Path]) -> None:
    """A row an image: the image, the truth, and what each method predicts."""
    palette = Config.fromfile(TASKS[task][0].format('')).test_dataloader.dataset.metainfo.palette
    columns = {'image': [_read(path) for path in enlarged]}
    columns['truth'] = [TRUTHS[task](path, palette) for path in enlarged]
    for method in METHODS:
        out = work_dir / run_of(task, method).name / 'predictions'
        columns[method] = [_read(out / path.name) for path in enlarged]
    figure, axes = plt.subplots(PICTURES, len(columns), figsize=(2 * len(columns), 2 * PICTURES), layout='constrained')
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].set_axis_off()
    figure.savefig(work_dir / f'{task}.png', dpi=90)
    plt.close(figure)


def enlarge_images(folder: Path) -> list[Path]:
    """Copies of the first validation images, large enough to draw boxes and their names on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f'{index:04d}.png' for index in range(PICTURES)]
    for path in paths:
        image = cv2.imread(f'{DATA}/images/val/{path.name}')
        cv2.imwrite(str(path), cv2.resize(image, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_LINEAR))
    return paths


def draw_true_masks(path: Path, palette: list) -> np.ndarray:
    labels = cv2.imread(f'{DATA}/masks/val/{path.name}', cv2.IMREAD_GRAYSCALE)
    labels = cv2.resize(labels, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_NEAREST)
    return (0.5 * _read(path) + 0.5 * np.array(palette)[labels]).astype(np.uint8)


def draw_true_boxes(path: Path, palette: list) -> np.ndarray:
    picture = np.ascontiguousarray(_read(path))
    content = json.loads(Path(DATA, 'annotations/instances_val.json').read_text())
    for annotation in content['annotations']:
        if annotation['image_id'] == int(path.stem):
            x, y, width, height = (ZOOM * side for side in annotation['bbox'])
            colour = tuple(palette[annotation['category_id'] - 1])
            cv2.rectangle(picture, (x, y), (x + width, y + height), colour, 3)
    return picture


TRUTHS = {'segmentation': draw_true_masks, 'detection': draw_true_boxes}


def _read(path: str | Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


if __name__ == '__main__':
    main()
