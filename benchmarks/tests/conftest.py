"""Shared pieces: the scripts as one runs them, and the generated data set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.shapes import write_shapes
from benchmarks.training import ROOT


def script(*command, ok=True) -> str:
    """Runs a script of the repository; returns all that it printed."""
    call = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (call.returncode == 0) == ok, call.stdout[-3000:]
    return call.stdout


SHAPES = 'configs/shapes/swin-nano_upernet_1xb8-600_shapes-96x96.py'


def result(method, value, config=SHAPES, seed=0) -> dict:
    """A run as a grid records it."""
    parameters = {'highway': {'trainable': 7, 'frozen': 0}, 'head': {'trainable': 9, 'frozen': 0}}
    costs = dict(peak_memory_mib=100, checkpoint_bytes=2**21, peak_memory_kind='cuda allocated')
    report = dict(metrics={'mIoU': value}, parameters=parameters, **costs)
    return dict(config=config, method=method, seed=seed, jobs=1, report=report)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory) -> Path:
    """8 + 4 images of 64 x 64."""
    root = tmp_path_factory.mktemp('shapes')
    write_shapes(root, image_size=64, splits={'train': 8, 'val': 4})
    return root
