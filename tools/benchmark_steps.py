#!/usr/bin/env python
"""Compares how long methods take for a training step: in one process, a step of each in turn.

Steps of small models wait for the processor, whose speed differs from process to process by more than the methods do.
Measured is the ratio to the first method in the same round. Each repeat has a process of its own. Memory is measured by
``tools/benchmark.py``. A model all of whose methods are in the file is not measured again;
``tools/summarize_benchmark.py`` makes a table of it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmark import add_case_arguments, load, plan, save
from benchmark_case import Bench, load_libraries, quartiles
from experiments import provenance
from mmengine.logging import MMLogger
from summarize_benchmark import group_rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.set_defaults(memory_cap=None, profile=False)
    args = parser.parse_args()
    if 'largest' in args.batch_sizes:
        parser.error("--batch-sizes: 'largest' differs from method to method, whose steps are compared at one size")
    return args


def main() -> None:
    args, started = parse_args(), time.monotonic()
    out, cases = Path(args.out), plan(args)
    content = load(out, cases)
    named = [{'name': name, **case} for name, case in cases.items()]
    groups = group_rows(named, 'model', 'image_size', 'precision', 'batch_size').values()
    for repeat, group in itertools.product(range(args.repeats), groups):
        if all(len(content['cases'][case['name']]['runs']) > repeat for case in group):
            continue
        if time.monotonic() - started > args.time_limit:
            sys.exit('--time-limit is over; not all cases have been measured')
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            runs = pool.submit(measure_in_turn, group).result()
        for case, run in zip(group, runs):
            content['cases'][case['name']]['runs'].append(run)
            content['cases'][case['name']].update(provenance(args.commit))
            print(
                f'{case["name"]}: {1000 * run["step_seconds"]:.1f} ms, {run["of_first"]:.2f} of the first', flush=True
            )
        save(content, out)


def measure_in_turn(cases: list[dict]) -> list[dict]:
    """Median and quartiles of each case's steps (seconds), and of their ratio to the first case's in the same round.

    Args:
        cases: of one model, image size, precision and batch size, see :func:`benchmark.plan`.
    """
    MMLogger.get_instance('benchmark', log_level='ERROR')
    load_libraries(cases[0])
    benches = [Bench(case) for case in cases]
    for bench, case in zip(benches, cases):
        bench.to_device()
        bench.load_batch(case['batch_size'])
        for _ in range(case['warmup']):
            bench.step()
    order, draw = list(range(len(benches))), random.Random(0)
    seconds = [[] for _ in benches]
    for _ in range(cases[0]['steps']):
        # Each method behind any other: what one leaves in caches is not always the same one's gain.
        draw.shuffle(order)
        for index in order:
            seconds[index].append(benches[index].timed_step())
    return [
        {
            'batch_size': case['batch_size'],
            **quartiles('step_seconds', own),
            **quartiles('of_first', [one / first for one, first in zip(own, seconds[0])]),
        }
        for case, own in zip(cases, seconds)
    ]


if __name__ == '__main__':
    main()
