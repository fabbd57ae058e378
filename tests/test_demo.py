"""The demo, shortened, as `make demo` runs it; and nuclei out of labels."""

import importlib.util
import json
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT, tool

sys.path.append(str(ROOT / 'demo'))
from nuclei_data import BORDER, NUCLEUS, count, labels_of, match, nuclei_of, true_nuclei
from pictures import IMAGES


def test_the_demo(tmp_path):
    log = tool('demo/run.py', '--quick', '--work-dir', tmp_path)
    rows = {row['method']: row for row in json.loads((tmp_path / 'results.json').read_text())['rows']}
    assert list(rows) == ['frozen backbone', 'E³VA', 'full fine-tuning']
    assert all(name in log for name in rows) and log.count('ms a step') == 3 and 'YOUR_CONFIG' in log
    trained = [row['trained'] for row in rows.values()]
    assert trained[0] < trained[1] < trained[2] / 10
    # Two steps find next to nothing, but each is counted over the four images, and all of them are drawn.
    truths = true_nuclei('val')
    assert {row['nuclei'] for row in rows.values()} == {sum(count(truths[name]) for name in IMAGES)}
    assert len(list((tmp_path / 'e3va/out').iterdir())) == len(IMAGES)
    assert cv2.imread(str(tmp_path / 'nuclei.png')).shape[1] > 1000


def test_the_same_schedule_for_all():
    spec = importlib.util.spec_from_file_location('demo_run', ROOT / 'demo/run.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keys = {option.split('=')[0] for _, _, options in module.METHODS.values() for option in options}
    assert keys == {module.RATE}


def test_touching_nuclei_are_told_apart():
    nuclei = np.zeros((40, 60), np.int32)
    nuclei[10:30, 10:30], nuclei[10:30, 30:50] = 7, 9
    labels = labels_of(nuclei)
    assert (labels[10:30, 29:31] == BORDER).all() and (labels[11:29, 11:29] == NUCLEUS).all()
    predicted = nuclei_of(labels)
    assert ((predicted > 0) == (nuclei > 0)).all() and count(predicted) == 2
    assert match(nuclei, predicted).keys() == {7, 9}
    merged = nuclei_of((nuclei > 0).astype(np.uint8))
    assert count(merged) == 1 and not match(nuclei, merged)


@pytest.mark.parametrize(('split', 'images', 'nuclei'), [('train', 120, 3604), ('val', 50, 1678)])
def test_labels_hold_the_nuclei(split, images, nuclei):
    """What a perfect model would find: nearly all; tiny nuclei have no inside."""
    truths = true_nuclei(split)
    assert len(truths) == images and abs(sum(map(count, truths.values())) - nuclei) < 0.01 * nuclei
    found = sum(len(match(truth, nuclei_of(labels_of(truth)))) for truth in truths.values())
    assert found > 0.95 * nuclei
