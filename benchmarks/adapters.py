#!/usr/bin/env python
"""Tests the published adapters, each file as it is, and writes what they reach into a result file.

The data lie where the adapters' configs say: those of CamVid in data/camvid, the demo's where `make demo` writes them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.training import ROOT, provenance

FOLDER = ROOT / 'adapters'


def metrics_of(adapter: Path, *options: str) -> dict[str, float]:
    """What ``tools/test.py`` says of a file.

    Args:
        options: for ``--cfg-options``.

    Raises:
        RuntimeError: the tool failed; the message holds the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, 'tools/test.py', adapter, '--work-dir', folder]
        command += ['--cfg-options', *options] if options else []
        call = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if call.returncode:
            raise RuntimeError(f'{adapter.name} can not be tested:\n{call.stdout[-1000:]}{call.stderr[-1000:]}')
        (path,) = Path(folder).glob('*/*.json')
        metrics = json.loads(path.read_text())
    return {key: metrics[key] for key in ('mIoU', 'mAcc', 'aAcc')}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default='benchmarks/results/adapters.json')
    parser.add_argument('--commit', help='recorded in the results; default: asked of git')
    args = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', str(os.cpu_count()))
    rows = []
    for path in sorted(FOLDER.glob('*.safetensors')):
        # The first ten alone are what the tests have time for.
        first_ten = metrics_of(path, 'test_dataloader.dataset.indices=10')['mIoU']
        rows.append({'adapter': path.name, 'bytes': path.stat().st_size, **metrics_of(path), 'first_ten': first_ten})
        print(rows[-1], flush=True)
    Path(args.out).write_text(json.dumps({**provenance(args.commit), 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
