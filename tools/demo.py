#!/usr/bin/env python
"""The embedded demo: trains frozen and E³VA (with mixers, an extension) on generated data, tests and compares them.

Needs no download; everything is written to work_dirs/demo.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from mmengine.config import Config

from e3va_mm.datasets.shapes import write_shapes

matplotlib.use('Agg')
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
DATA = 'data/shapes'
# Prefix of the config, and what is changed in it.
METHODS = {'frozen': ('frozen-', []), 'E3VA + mixer': ('e3va-', ['model.backbone.mixer.width=32'])}
# Config, iterations (three quarters of the config's), metric and its factor.
TASKS = {
    'segmentation': ('configs/shapes/{}swin-nano_upernet_1xb8-600_shapes-96x96.py', 450, 'mIoU', 1),
    'detection': ('configs/shapes/retinanet_{}swin-nano_fpn_1xb8-800_shapes.py', 600, 'coco/bbox_mAP', 100),
}
PICTURES, ZOOM = 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/demo', help='folder for runs, table and pictures')
    work_dir = ROOT / parser.parse_args().work_dir
    started = time.monotonic()
    os.chdir(ROOT)
    # Every process would otherwise start a thread on every core.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // 2)))
    print(f'writing the data set to {DATA}', flush=True)
    write_shapes(DATA)
    enlarged = enlarge_images(work_dir / 'images')
    # The longest first, so that both processors are busy to the end.
    pairs = [(task, method) for method in reversed(METHODS) for task in TASKS]
    print(f'{len(pairs)} trainings, two at a time; logs: {work_dir}/*/train.log', flush=True)
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda pair: run(*pair, work_dir, enlarged), pairs))
    rows.sort(key=lambda row: (list(TASKS).index(row['task']), list(METHODS).index(row['method'])))
    (work_dir / 'results.json').write_text(json.dumps({'rows': rows}, indent=1) + '\n')
    table = format_table(rows)
    (work_dir / 'table.md').write_text(table + '\n')
    for task in TASKS:
        draw_overlays(task, work_dir, enlarged)
    print(f'\n{table}\n\npictures: {work_dir}/*.png; {time.monotonic() - started:.0f} s in all')


def folder_of(task: str, method: str, work_dir: Path) -> Path:
    return work_dir / f'{task}-{METHODS[method][0].strip("-")}'


def run(task: str, method: str, work_dir: Path, images: list[Path]) -> dict:
    """Trains a method for a task, tests it and draws its predictions, by the tools; a row of the table."""
    (config, iterations, metric, scale), (prefix, options) = TASKS[task], METHODS[method]
    config, folder = config.format(prefix), folder_of(task, method, work_dir)
    lengths = ('train_cfg.max_iters', 'train_cfg.val_interval', 'param_scheduler.1.end')
    options = ['randomness.seed=0', *options, *(f'{key}={iterations}' for key in lengths)]
    call_tool(folder, 'tools/train.py', config, '--work-dir', folder, '--cfg-options', *options)
    trained = folder / Path(config).name, (folder / 'last_checkpoint').read_text()
    call_tool(folder, 'tools/test.py', *trained, '--work-dir', folder / 'test')
    pictures = ['--out-dir', folder / 'predictions', '--score-thr', 0.4, '--device', 'cpu']
    call_tool(folder, 'tools/infer.py', images[0].parent, *trained, *pictures)
    report = json.loads((folder / 'run_report.json').read_text())
    metrics = json.loads(max((folder / 'test').glob('*/*.json'), key=os.path.getmtime).read_text())
    parts = [report['parameters'].get(part, {}) for part in ('backbone', 'highway')]
    return {
        'task': task,
        'method': method,
        'metric': metric.removeprefix('coco/bbox_'),
        'value': round(scale * metrics[metric], 1),
        'trained_in_backbone': sum(part.get('trainable', 0) for part in parts),
        'peak_memory_mib': report['peak_memory_mib'],
        'step_seconds': report['step_seconds_median'],
        'checkpoint_mib': round(report['checkpoint_bytes'] / 2**20, 1),
    }


def call_tool(folder: Path, tool: str, *arguments) -> None:
    """Calls a tool; what it prints goes into a log of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f'{Path(tool).stem}.log'
    with log.open('w') as file:
        command = [sys.executable, tool, *map(str, arguments)]
        if subprocess.call(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT):
            tail = '\n'.join(log.read_text(errors='replace').splitlines()[-15:])
            raise RuntimeError(f'{tool} failed, log in {log}:\n{tail}')


def format_table(rows: list[dict]) -> str:
    titles = 'task', 'method', 'mIoU / mAP', 'trained in the backbone', 'peak memory (process)', 'step', 'checkpoint'
    lines = [' | '.join(titles), ' | '.join(['---'] * len(titles))]
    for row in rows:
        accuracy, size = f'{row["value"]:.1f} {row["metric"]}', f'{row["trained_in_backbone"]:,}'
        memory, step = f'{row["peak_memory_mib"]:.0f} MiB', f'{1000 * row["step_seconds"]:.0f} ms'
        cells = (row['task'], row['method'], accuracy, size, memory, step, f'{row["checkpoint_mib"]:.1f} MiB')
        lines.append(' | '.join(cells))
    return '\n'.join(f'| {line} |' for line in lines)


def draw_overlays(task: str, work_dir: Path, enlarged: list[Path]) -> None:
    """A row an image: the image, the truth, and what each method predicts."""
    palette = Config.fromfile(TASKS[task][0].format('')).test_dataloader.dataset.metainfo.palette
    columns = {'image': [_read(path) for path in enlarged]}
    columns['truth'] = [TRUTHS[task](path, palette) for path in enlarged]
    for method in METHODS:
        out = folder_of(task, method, work_dir) / 'predictions'
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
