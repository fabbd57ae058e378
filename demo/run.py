#!/usr/bin/env python
"""The demo: finds nuclei in microscopy with a frozen backbone, with E³VA and by full fine-tuning, and compares them.

Needs no download and no GPU; everything is written to work_dirs/demo.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))

from nuclei_data import count, match, nuclei_of, true_nuclei, write_nuclei
from pictures import IMAGES, draw

from benchmarks.pages import DEMO, demo_cells
from benchmarks.training import ROOT, provenance

CONFIG = 'demo/nuclei.py'
RATE = 'optim_wrapper.optimizer.lr'
# Folder, flags of tools/train.py, and options. Rates are the best of three on a fifth of the training images
# (benchmarks/results/demo_rates.json).
METHODS = {
    'frozen backbone': ('frozen', ['--tune', 'frozen'], [f'{RATE}=0.01']),
    'E³VA': ('e3va', ['--tune', 'e3va'], [f'{RATE}=0.01']),
    'full fine-tuning': ('full', [], [f'{RATE}=0.003']),
}
LINE = re.compile(r'Iter\((?:train|test)\) \[ *(\d+)/(\d+)\](?:.*peak_memory_mib: ([\d.]+)  step_seconds: ([\d.]+))?')
NEXT = """
What you see: {picture}
All methods had the same schedule; rates were chosen on held-out training images, not on these validation images.

Your own data, with the config that you have (MMSegmentation's or MMDetection's):
  source .venv/bin/activate
  python tools/train.py YOUR_CONFIG.py --tune e3va            # on a GPU, add --amp
  python tools/train.py mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512 --tune e3va
What to change in a config for your images and classes: docs/your_config.md"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), help='for runs, table and picture')
    parser.add_argument('--quick', action='store_true', help='two steps and four images, to see that all runs')
    args = parser.parse_args()
    started, console = time.monotonic(), Console(width=None if sys.stdout.isatty() else 120)
    work_dir = args.work_dir.resolve()
    os.chdir(ROOT)
    # Two trainings at a time: every process would otherwise start a thread on every core.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // 2)))
    write_nuclei(work_dir / 'data')
    console.print('Finding nuclei: 120 training and 50 validation images, three ways to train the same Swin-nano')
    with live_progress(console) as progress, ThreadPoolExecutor(2) as pool:
        # The longest first, so that both processors are busy to the end.
        runs = [Run(name, work_dir, args.quick, progress) for name in reversed(METHODS)]
        rows = list(pool.map(Run.result, runs))[::-1]
    truths = true_nuclei('val')
    truths = {name: truths[name] for name in (IMAGES if args.quick else truths)}
    predictions = {run.name: run.predictions(truths) for run in reversed(runs)}
    for row in rows:
        row.update(score(truths, predictions[row['method']]))
    draw(truths, predictions, work_dir / 'nuclei.png')
    console.print(table_of(rows, len(truths)))
    console.print(NEXT.format(picture=work_dir / 'nuclei.png'), highlight=False, soft_wrap=True)
    results = {**provenance(), 'seconds': round(time.monotonic() - started), 'rows': rows}
    (work_dir / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    console.print(f'{results["seconds"]} s in all')


def live_progress(console: Console) -> Progress:
    return Progress(
        TextColumn('{task.description:<16} {task.fields[phase]:<8}'),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('{task.fields[cost]}'),
        console=console,
    )


def places() -> list[int]:
    """Where the pictured images are among the validation images."""
    names = sorted(true_nuclei('val'))
    return [names.index(name) for name in IMAGES]


class Run:
    """One training and its test, by the tools, with a bar of its own in ``progress``."""

    def __init__(self, name: str, work_dir: Path, quick: bool, progress: Progress) -> None:
        folder, self.flags, self.options = METHODS[name]
        self.name, self.folder, self.progress = name, work_dir / folder, progress
        loaders = (f'{split}_dataloader.dataset' for split in ('train', 'test'))
        self.options = [*self.options, *(f'{loader}.data_root={work_dir / "data"}' for loader in loaders)]
        if quick:
            pictured = str(places()).replace(' ', '')
            self.options += ['train_cfg.max_iters=2', f'test_dataloader.dataset.indices={pictured}']
        self.task = progress.add_task(name, start=False, total=None, phase='waits', cost='')

    def result(self) -> dict:
        """Trains and tests; a row of the table."""
        command = CONFIG, *self.flags, '--work-dir', self.folder, '--cfg-options', *self.options
        self.call('trains', 'tools/train.py', *command)
        trained = self.folder / Path(CONFIG).name, (self.folder / 'last_checkpoint').read_text()
        self.call('tests', 'tools/test.py', *trained, '--work-dir', self.folder / 'test', '--out', self.folder / 'out')
        self.progress.update(self.task, phase='done')
        metrics = json.loads(max((self.folder / 'test').glob('*/*.json'), key=os.path.getmtime).read_text())
        return {'method': self.name, 'mIoU': metrics['mIoU'], **costs(self.folder)}

    def call(self, phase: str, tool: str, *arguments) -> None:
        """Calls a tool; what it prints goes into a log of its name, from which the bar is moved on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.progress.start_task(self.task)
        self.progress.update(self.task, phase=phase)
        log = self.folder / f'{Path(tool).stem}.log'
        with log.open('w') as file:
            command = [sys.executable, tool, *map(str, arguments)]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            while process.poll() is None:
                self.show(log.read_text(errors='replace'))
                time.sleep(0.5)
        text = log.read_text(errors='replace')
        self.show(text)
        if process.returncode:
            tail = '\n'.join(text.splitlines()[-15:])
            raise RuntimeError(f'{tool} failed, log in {log}:\n{tail}')

    def show(self, log: str) -> None:
        """Moves the bar to the last step of the log."""
        if steps := LINE.findall(log):
            step, total, memory, seconds = steps[-1]
            self.progress.update(self.task, completed=int(step), total=int(total))
            if memory:
                cost = f'{float(memory):,.0f} MiB, {1000 * float(seconds):.0f} ms a step'
                self.progress.update(self.task, cost=cost)

    def predictions(self, truths: dict) -> dict:
        """Predicted nuclei by image, as numbers of pixels."""
        return read_predictions(self.folder / 'out', truths)


def costs(folder: Path) -> dict:
    """What a training took, out of its report."""
    report = json.loads((folder / 'run_report.json').read_text())
    return {
        'trained': sum(part['trainable'] for part in report['parameters'].values()),
        'peak_memory_mib': report['peak_memory_mib'],
        'step_seconds': report['step_seconds_median'],
        'checkpoint_mib': round(report['checkpoint_bytes'] / 2**20, 1),
    }


def read_predictions(folder: Path, names: Iterable[str]) -> dict:
    """Predicted nuclei by image, as numbers of pixels, out of the labels that a test has written."""
    paths = {name: folder / f'{name}.png' for name in names}
    return {name: nuclei_of(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) for name, path in paths.items()}


def score(truths: dict, predictions: dict) -> dict:
    """How many nuclei there are, how many were found, and how many predicted ones are none."""
    found = sum(len(match(truth, predictions[name])) for name, truth in truths.items())
    return {
        'nuclei': sum(map(count, truths.values())),
        'found': found,
        'wrong': sum(map(count, predictions.values())) - found,
    }


def table_of(rows: list[dict], num_images: int) -> Table:
    table = Table(title=f'{num_images} validation images')
    for title in DEMO:
        table.add_column(title, justify='left' if title == 'method' else 'right')
    for row in rows:
        table.add_row(*demo_cells(row))
    return table


if __name__ == '__main__':
    main()
