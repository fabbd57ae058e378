"""The commands of tools/reproduce.sh name what exists, and it stops in time."""

import os
import subprocess
import sys
from pathlib import Path

import benchmark
import benchmark_steps
import run_grid
from conftest import ROOT


def call_reproduce(tmp_path, *args):
    """The commands that tools/reproduce.sh runs, and its own result."""
    stub = tmp_path / 'python'
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    stub.chmod(0o755)
    environment = {**os.environ, 'PYTHON': str(stub), 'COMMIT': 'abc'}
    call = subprocess.run(['tools/reproduce.sh', *args], cwd=ROOT, env=environment, capture_output=True, text=True)
    calls = tmp_path / 'calls'
    return call, [line.split() for line in calls.read_text().splitlines()] if calls.is_file() else []


def test_what_reproduce_runs_exists(tmp_path, monkeypatch):
    call, commands = call_reproduce(tmp_path)
    assert call.returncode == 0 and 'results/ is complete' in call.stdout
    benchmarks = {'tools/benchmark.py': benchmark.parse_args, 'tools/benchmark_steps.py': benchmark_steps.parse_args}
    assert {command[0] for command in commands} == {'tools/run_grid.py', *benchmarks}
    for command in commands:
        monkeypatch.setattr(sys, 'argv', command)
        if command[0] in benchmarks:
            cases = benchmark.plan(benchmarks[command[0]]())
            assert all(Path(ROOT, case['config']).is_file() for case in cases.values())
            continue
        args = run_grid.parse_args()
        assert args.commit == 'abc'
        args.held_out, args.rates_from = False, None
        assert run_grid.plan(args)


def test_reproduce_in_no_time(tmp_path):
    call, commands = call_reproduce(tmp_path, '0')
    assert (call.returncode, commands) == (1, []) and 'run this again' in call.stdout
