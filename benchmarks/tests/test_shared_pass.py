"""The benchmark of many tasks by one pass, on the smallest image, and what is made of its results."""

import json
import sys

from benchmarks import shared_pass
from benchmarks.pages import format_shared, shared_rows
from benchmarks.plots import draw_shared


def test_one_pass_against_a_pass_each(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'shared.json'
    command = ['--out', str(out), '--image-sizes', '64x64', '--tasks', '1', '2', '--rounds', '2', '--warmup', '1']
    monkeypatch.setattr(sys, 'argv', ['benchmarks/shared_pass.py', *command])
    shared_pass.main()
    content = json.loads(out.read_text())
    assert {'device', 'torch', 'commit', 'command'} <= set(content) and len(content['rows']) == 4
    one, two = shared_rows(out)
    for part in ('backbones', 'models'):
        assert one[part]['memory_of_one'] == one[part]['memory_of_separate'] == 1
        assert two[part]['seconds'] > 0 and two[part]['of_separate'] > 0
    # Of the second task a highway is added, and of separate ones a base as well.
    assert 1 < two['backbones']['memory_of_one'] < 1.1 and 0.5 < two['backbones']['memory_of_separate'] < 0.55
    assert 0.55 < two['models']['memory_of_separate'] < 0.9
    assert capsys.readouterr().out.count('| Swin-T, 64 × 64, E³VA | ') == 2
    monkeypatch.delattr(shared_pass, 'measure')  # All is there.
    shared_pass.main()
    assert json.loads(out.read_text()) == content
    draw_shared([one, two], tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 5000
    assert format_shared(tmp_path / 'absent.json') == ''
