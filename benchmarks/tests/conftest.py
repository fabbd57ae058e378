"""Shared pieces: the scripts as one runs them, and the generated data set."""

from pathlib import Path

import pytest

from benchmarks.shapes import write_shapes
from benchmarks.training import ROOT

from .forked import environment, run_script


def script(*command, ok=True) -> str:
    """Runs a script of the repository; returns all that it printed."""
    code, output = run_script([*map(str, command)], ROOT, environment())
    assert (code == 0) == ok, output[-3000:]
    return output


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
