"""The notebook of the demo: it runs, shortened, and what is committed was made by a whole run of the same cells."""

import base64
import json
import os
import re

import pytest
from conftest import ROOT

from benchmarks.tests.forked import environment

NOTEBOOK = ROOT / 'demo/quickstart.ipynb'
QUICK, WORK = 'QUICK = False', "Path('work_dirs/quickstart')"


def texts(cell: dict) -> str:
    """What a code cell has printed or shown, but for its pictures."""
    shown = [output.get('text') or output.get('data', {}).get('text/markdown', '') for output in cell['outputs']]
    return ''.join(''.join(text) for text in shown)


def pictures(cells: list[dict]) -> list[bytes]:
    data = [output.get('data', {}) for cell in cells for output in cell['outputs']]
    return [base64.b64decode(''.join(each['image/jpeg'])) for each in data if 'image/jpeg' in each]


@pytest.fixture(scope='module')
def committed() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text())['cells']
    return [cell for cell in cells if cell['cell_type'] == 'code']


def test_the_notebook_runs(tmp_path, monkeypatch, committed):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    monkeypatch.setenv('PYTHONPATH', str(ROOT), prepend=os.pathsep)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for old, new in (QUICK, 'QUICK = True'), (WORK, f"Path('{tmp_path}')"):
        assert sum(cell.source.count(old) for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    # A cell that fails raises here, unless its output is captured: then the next one does.
    nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(ROOT / 'demo')}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    printed = [texts(cell) for cell in cells]
    assert sum('step 2 of 2' in text for text in printed) == 2
    assert 'the same prediction: True' in ''.join(printed)
    assert len(pictures(cells)) == len(pictures(committed))


def test_the_committed_outputs_are_of_a_whole_run(committed):
    assert [cell['execution_count'] for cell in committed] == list(range(1, len(committed) + 1))
    assert not [output for cell in committed for output in cell['outputs'] if output['output_type'] == 'error']
    printed = ''.join(map(texts, committed))
    assert 'step 240 of 240' in printed and 'of 1,678' in printed and 'the same prediction: True' in printed


def test_the_committed_outputs_are_readable(committed):
    """Nothing of the machine, no warnings, no codes of a terminal."""
    outputs = json.dumps([cell['outputs'] for cell in committed])
    assert not [output for cell in committed for output in cell['outputs'] if output.get('name') == 'stderr']
    outside = re.findall(r'(?<![\w./])/(?:\w[\w.-]*/)+', re.sub(r'"image/jpeg": "[^"]*"', '', outputs))
    assert not outside and '\\u001b' not in outputs and '\\r' not in outputs and 'Warning' not in outputs
    assert len(pictures(committed)) == 3 and NOTEBOOK.stat().st_size < 400_000


def test_the_methods_are_those_of_the_demo(committed):
    """Their parts have as many parameters as in the table of the README, which the demo's results make."""
    rows = json.loads((ROOT / 'benchmarks/results/demo.json').read_text())['rows']
    shown = re.findall(r'^\| ([^|]+) \|.*\| ([\d,]+) \| [\d.]+ MiB', texts(committed[-1]), re.MULTILINE)
    assert shown == [(row['method'], f'{row["trained"]:,}') for row in rows]
