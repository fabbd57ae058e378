"""Training many configs: each run is ``tools/train.py`` in a process of its own."""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import platform
import queue
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mmengine
import torch
from mmengine.config import Config

import e3va_mm  # noqa: F401  (makes configs that derive from `mmseg::` loadable)

ROOT = Path(__file__).resolve().parent.parent


class Run(NamedTuple):
    """One training: a config, the name of its method, a seed, and what is passed on to ``tools/train.py``.

    ``learning_rate`` is None for the config's own, ``fold`` is of a cross-validation.
    """

    config: str
    method: str
    seed: int = 0
    train_args: tuple[str, ...] = ()
    cfg_options: tuple[str, ...] = ()
    learning_rate: float | None = None
    fold: int | None = None

    @property
    def name(self) -> str:
        # Methods that have configs of their own are named by these.
        has_own = self.method in ('full', 'frozen', 'e3va') and '--tune' not in self.train_args
        variant = '' if has_own else f'_{self.method}'
        rate = '' if self.learning_rate is None else f'_lr{self.learning_rate:g}'
        fold = '' if self.fold is None else f'_fold{self.fold}'
        return f'{Path(self.config).stem}{variant}{rate}{fold}_seed{self.seed}'


def parse_parts(parser: argparse.ArgumentParser) -> list[argparse.Namespace]:
    """The command line, once for each set of options after an ``--and``, before which those of all stand."""
    parts = [[]]
    for argument in sys.argv[1:]:
        parts.append([]) if argument == '--and' else parts[-1].append(argument)
    common, *others = parts
    return [parser.parse_args(common + other) for other in others or [[]]]


def run_all(
    runs: list[Run],
    work_dir: Path,
    jobs: int = 1,
    done: Callable[[Run, dict], None] = lambda run, result: None,
    time_limit: float = float('inf'),
    home: Path = ROOT,
) -> None:
    """Trains, ``jobs`` at a time and each on one GPU, in folders of ``work_dir``; what is there is not repeated.

    Args:
        done: called with each run and its result, which holds the ``report`` of ResourceReportHook, as soon as it ends.
        time_limit: seconds after which no further run is started.
        home: the checkout whose tools, configs and data train.

    Raises:
        RuntimeError: once all have run, if some failed; the message holds the ends of their logs.
    """
    started, failures = time.monotonic(), []
    # Every process would otherwise start a thread on every core.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // jobs)))
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for _, variables in zip(range(jobs), itertools.cycle(_one_gpu_each())):
        slots.put(variables)

    def work(run: Run) -> None:
        if time.monotonic() - started > time_limit:
            return
        variables = slots.get()
        try:
            done(run, run_one(run, work_dir / run.name, variables, home))
        except (RuntimeError, ValueError) as error:
            failures.append(str(error))
        finally:
            slots.put(variables)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, runs))
    if failures:
        raise RuntimeError('\n\n'.join(failures))


def _one_gpu_each() -> list[dict[str, str]]:
    """The environment variables that give a process one of the GPUs; a single empty dict if there is no choice."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    gpus = visible.split(',') if visible else [str(index) for index in range(torch.cuda.device_count())]
    return [{'CUDA_VISIBLE_DEVICES': gpu} for gpu in gpus] if len(gpus) > 1 else [{}]


def run_one(run: Run, work_dir: Path, variables: dict[str, str], home: Path = ROOT) -> dict:
    """Trains one config with ``variables`` in its environment, resuming if that was interrupted.

    Raises:
        ValueError: ``work_dir`` is that of a run with other settings.
    """
    result, started = work_dir / 'result.json', work_dir / 'settings.json'
    settings = json.loads(json.dumps(run._asdict()))
    # Another schedule or other data do not change a run's name, and its results are not this one's.
    for found in (json.loads(path.read_text()) for path in (started, result) if path.is_file()):
        other = [
            f'{name}={found.get(name)!r}, not {value!r}' for name, value in settings.items() if found.get(name) != value
        ]
        if other:
            raise ValueError(f'{work_dir} has a run with {"; ".join(other)}: use another --work-dir, or delete it')
    if result.is_file():
        return json.loads(result.read_text())
    work_dir.mkdir(parents=True, exist_ok=True)
    started.write_text(json.dumps(settings, indent=2))
    command = ['tools/train.py', run.config, '--work-dir', str(work_dir.resolve()), '--resume', *run.train_args]
    options = [f'randomness.seed={run.seed}', *run.cfg_options]
    if run.learning_rate is not None:
        options.append(f'optim_wrapper.optimizer.lr={run.learning_rate:g}')
    call_tool([*command, '--cfg-options', *options], work_dir / 'train.log', variables, home)
    if run.fold is None:
        del settings['fold']
    content = {**settings, 'report': json.loads((work_dir / 'run_report.json').read_text())}
    result.write_text(json.dumps(content, indent=2))
    return content


@functools.cache
def shorten(config: str, share: float) -> list[str]:
    """Overrides that train for a share of the config's iterations.

    Raises:
        ValueError: the share ends within the warm-up.
    """
    if share == 1:
        return []
    loaded = Config.fromfile(ROOT / config)
    iterations, warm_up = round(share * loaded.train_cfg.max_iters), loaded.param_scheduler[1].begin
    if iterations <= warm_up:
        raise ValueError(f'{share} of {config} are {iterations} iterations, but its warm-up alone takes {warm_up}')
    keys = ('train_cfg.max_iters', 'train_cfg.val_interval', 'param_scheduler.1.end')
    return [f'{key}={iterations}' for key in keys]


def call_tool(tool: list[str], log: Path, variables: dict[str, str], home: Path) -> None:
    """Calls a tool of a checkout, with the package beside it."""
    environment = {**os.environ, **variables, 'PYTHONPATH': python_path(home)}
    with log.open('w') as file:
        command = [sys.executable, *tool]
        code = subprocess.call(command, cwd=home, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if code:
        tail = '\n'.join(log.read_text(errors='replace').splitlines()[-15:])
        raise RuntimeError(f'{" ".join(tool)} failed with exit code {code}, log in {log}:\n{tail}')


def python_path(folder: str | Path) -> str:
    """``PYTHONPATH`` with a folder before what it holds."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get('PYTHONPATH')])])


def provenance(commit: str | None = None) -> dict:
    """What a result file says of where its numbers come from."""
    git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    # Folders of the machine say nothing to others.
    arguments = (re.sub('(^|=)/(.*/)?', r'\1', argument) for argument in sys.argv)
    return {
        'date': datetime.date.today().isoformat(),
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else f'cpu ({platform.machine()})',
        'python': platform.python_version(),
        'torch': torch.__version__,
        'mmengine': mmengine.__version__,
        'commit': commit or git.stdout.strip() or 'unknown',
        'command': ' '.join(['python', *arguments]),
    }
