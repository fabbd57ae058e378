"""The commands of benchmarks/reproduce.sh name what exists, and it stops in time."""

import os
import subprocess
import sys

from benchmarks import cost, grid, latency, shared_pass
from benchmarks.training import ROOT
from e3va_mm.tune import find_config


def call_reproduce(tmp_path, *parts, **variables):
    """The commands that benchmarks/reproduce.sh runs, and its own result."""
    stub = tmp_path / 'python'
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    stub.chmod(0o755)
    environment = {**os.environ, 'PYTHON': str(stub), 'COMMIT': 'abc', **variables}
    command = ['benchmarks/reproduce.sh', *parts]
    call = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    calls = tmp_path / 'calls'
    return call, [line.split() for line in calls.read_text().splitlines()] if calls.is_file() else []


def test_what_reproduce_runs_exists(tmp_path, monkeypatch):
    call_reproduce(tmp_path, 'several')
    call, commands = call_reproduce(tmp_path)
    assert call.returncode == 0 and 'results are complete' in call.stdout and not call.stderr
    scripts = {f'benchmarks/{name}.py' for name in ('grid', 'cost', 'shared_pass', 'latency')}
    assert {command[0] for command in commands} == scripts
    for command in commands:
        monkeypatch.setattr(sys, 'argv', command)
        if command[0] == 'benchmarks/cost.py':
            for args in cost.parse_args():
                assert args.commit == 'abc'
                assert all(find_config(case['config']).is_file() for case in cost.plan(args).values())
            continue
        if command[0] == 'benchmarks/shared_pass.py':
            assert shared_pass.parse_args().sizes == ['l']
            continue
        if command[0] == 'benchmarks/latency.py':
            assert latency.parse_args().commit == 'abc'
            continue
        for args in grid.parse_args():
            assert args.commit == 'abc'
            args.held_out, args.rates_from = False, None
            assert grid.plan(args)


def test_a_part_of_it(tmp_path):
    call, commands = call_reproduce(tmp_path, 'fits')
    assert call.returncode == 0 and len(commands) == 2 and all('benchmarks/results/fits.json' in c for c in commands)
    assert call_reproduce(tmp_path, 'everything')[0].returncode == 2


def test_reproduce_in_no_time(tmp_path):
    call, commands = call_reproduce(tmp_path, LIMIT='0')
    assert (call.returncode, commands) == (1, []) and 'run this again' in call.stdout
