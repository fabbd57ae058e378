#!/usr/bin/env python
"""Prints the tables of a result file from benchmarks/grid.py or benchmarks/cost.py."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy import format_runs, group_runs
from benchmarks.cost_tables import load_rows, report
from benchmarks.plots import draw_accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', type=Path, help='JSON file')
    parser.add_argument('--plot', type=Path, help='draw accuracy against memory of a grid into this file')
    args = parser.parse_args()
    content = json.loads(args.results.read_text())
    if 'cases' in content:
        print(report(load_rows(args.results)))
        return
    print(format_runs(group_runs(content)))
    if args.plot:
        draw_accuracy(group_runs(content), args.plot)


if __name__ == '__main__':
    main()
