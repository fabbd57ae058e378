"""Which checkpoint a run goes on from."""

import os

import torch
from mmengine.runner import find_latest_checkpoint

from e3va_mm.checkpoints.latest import latest_checkpoint, mark_fresh_run


def test_latest_checkpoint_skips_damaged_ones(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 10):
        torch.save({'state_dict': {}}, tmp_path / f'iter_{step}.pth')
    torch.save({'state_dict': {}}, tmp_path / 'best_mIoU_iter_10.pth')
    assert latest_checkpoint(tmp_path).name == 'iter_10.pth'
    (tmp_path / 'iter_10.pth').write_bytes(b'')
    assert latest_checkpoint(tmp_path).name == 'iter_2.pth'


def test_latest_checkpoint_is_of_the_last_run(tmp_path):
    """In a folder where an older run went further; the pointer is as mmengine's hook writes it."""
    for age, step in enumerate((300, 1, 2)):
        torch.save({'state_dict': {}}, tmp_path / f'iter_{step}.pth')
        os.utime(tmp_path / f'iter_{step}.pth', (age, age))
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text(str(tmp_path / 'iter_2.pth'))
    assert latest_checkpoint(tmp_path).name == 'iter_2.pth'
    pointer.write_text('moved/from/here/iter_2.pth')
    assert latest_checkpoint(tmp_path).name == 'iter_2.pth'
    (tmp_path / 'iter_2.pth').write_bytes(b'')
    assert latest_checkpoint(tmp_path).name == 'iter_1.pth'
    (tmp_path / 'iter_1.pth').unlink()
    assert latest_checkpoint(tmp_path) is None


def test_a_fresh_run_has_no_checkpoint_of_an_older_one(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'iter_300.pth')
    os.utime(tmp_path / 'iter_300.pth', (1, 1))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_300.pth'))
    mark_fresh_run(tmp_path)
    assert latest_checkpoint(tmp_path) is None and find_latest_checkpoint(str(tmp_path)) is None
    torch.save({'state_dict': {}}, tmp_path / 'iter_2.pth')  # and the run dies before it notes that
    assert latest_checkpoint(tmp_path).name == 'iter_2.pth'


def test_no_older_run_stands_in_for_a_damaged_checkpoint(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'iter_1.pth')
    os.utime(tmp_path / 'iter_1.pth', (1, 1))
    mark_fresh_run(tmp_path)
    (tmp_path / 'iter_2.pth').write_bytes(b'')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    assert latest_checkpoint(tmp_path) is None


def test_latest_checkpoint_in_another_folder(tmp_path):
    (tmp_path / 'out').mkdir()
    torch.save({'state_dict': {}}, tmp_path / 'out/iter_4.pth')
    assert latest_checkpoint(tmp_path, tmp_path / 'out').name == 'iter_4.pth'
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/iter_4.pth')
    assert latest_checkpoint(tmp_path) == 's3://bucket/iter_4.pth'
