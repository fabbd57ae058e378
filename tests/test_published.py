"""The adapters in the repository: their size, their pages, and that they reach what these say."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.adapters import FOLDER, metrics_of
from benchmarks.tests.forked import environment
from benchmarks.training import ROOT
from e3va_mm.checkpoints.files import read_checkpoint

sys.path.append(str(ROOT / 'demo'))

FILES = sorted(FOLDER.glob('*.safetensors'))
ROWS = {row['adapter']: row for row in json.loads((ROOT / 'benchmarks/results/adapters.json').read_text())['rows']}
CAMVID = next((path for path in (ROOT / 'data/camvid', ROOT.parent / 'shared/data/camvid') if path.is_dir()), None)


def test_they_are_small_and_measured():
    sizes = {path.name: path.stat().st_size for path in FILES}
    assert sizes and sizes == {name: row['bytes'] for name, row in ROWS.items()}
    assert max(sizes.values()) <= 15e6 and sum(sizes.values()) <= 40e6


@pytest.mark.parametrize('path', FILES, ids=[path.stem for path in FILES])
def test_they_say_nothing_of_a_machine(path):
    config = read_checkpoint(path)['meta']['cfg']
    assert 'work_dir =' not in config and "'/" not in config


def test_metafiles_name_them():
    models = [m for path in ROOT.glob('configs/*/metafile.yml') for m in yaml.safe_load(path.read_text())['Models']]
    weights = {model['Name']: model['Weights'] for model in models if 'Weights' in model}
    assert weights and all(Path(file).stem == name and (ROOT / file).is_file() for name, file in weights.items())
    assert {path.stem for path in FILES} - set(weights) == {'e3va-swin-nano_fcn_nuclei'}  # the demo's


@pytest.mark.parametrize('path', FILES, ids=[path.stem for path in FILES])
def test_they_reach_what_their_table_says(path, tmp_path, monkeypatch):
    """On the first ten validation images; benchmarks/adapters.py tests on all."""
    monkeypatch.setenv('PYTHONPATH', environment()['PYTHONPATH'])
    if 'nuclei' in path.stem:
        from nuclei_data import write_nuclei

        data = tmp_path / 'data'
        write_nuclei(data)
    else:
        data = CAMVID or pytest.skip('needs data/camvid')
    metrics = metrics_of(path, 'test_dataloader.dataset.indices=10', f'test_dataloader.dataset.data_root={data}')
    assert metrics['mIoU'] == pytest.approx(ROWS[path.name]['first_ten'], abs=0.1)
