"""Hooks inside a real Runner on a toy model."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from conftest import e3va
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from e3va_mm.checkpoints.errors import CheckpointMismatchError
from e3va_mm.checkpoints.files import restore_history, to_plain
from e3va_mm.checkpoints.latest import latest_checkpoint
from e3va_mm.hooks.amp import Float32OpsHook
from e3va_mm.hooks.report import (
    ResourceReportHook,
    count_parameters,
    describe_exchange,
    format_table,
    gradient_bytes,
    learning_rates,
    synchronized_parts,
)


@MODELS.register_module()
class ToyModel(BaseModel):
    """A random loss, so that the random state shows."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1)
        self.backbone.requires_grad_(False)

    def forward(self, inputs, mode='tensor'):
        inputs = torch.stack(inputs) if isinstance(inputs, list) else inputs
        noisy = nn.functional.dropout(self.backbone(inputs), 0.5)
        return {'loss': self.head(noisy).square().mean()} if mode == 'loss' else self.head(noisy)


@DATASETS.register_module()
class ToyData(Dataset):
    """Augmented at random, like real data."""

    metainfo = {'classes': ('a',), 'weights': np.ones(2)}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {'inputs': torch.randn(2) + np.random.rand() + index}


@HOOKS.register_module()
class LossLog(Hook):
    priority = 'LOWEST'

    def __init__(self, path, die_at=None):
        self.path, self.die_at = path, die_at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        with open(self.path, 'a') as file:
            file.write(f'{runner.iter} {outputs["loss"].item().hex()}\n')
        if runner.iter + 1 == self.die_at:
            raise KeyboardInterrupt


def run(work_dir, log, die_at=None, resume=False, paramwise_cfg=None, max_iters=8, **checkpoint):
    config = Config(
        dict(
            model=dict(type='ToyModel'),
            work_dir=str(work_dir),
            train_dataloader=dict(
                dataset=dict(type='ToyData'),
                batch_size=2,
                num_workers=0,
                sampler=dict(type='InfiniteSampler', shuffle=True),
            ),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=max_iters),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01), paramwise_cfg=paramwise_cfg),
            param_scheduler=[dict(type='PolyLR', end=8, by_epoch=False)],
            default_hooks=dict(
                checkpoint=dict(type='AdapterCheckpointHook', interval=2, by_epoch=False, **checkpoint),
                logger=dict(type='LoggerHook', interval=1),
            ),
            custom_hooks=[
                dict(type='ParameterTableHook'),
                dict(type='ResourceReportHook', warmup=2),
                dict(type='LossLog', path=str(log), die_at=die_at),
            ],
            log_processor=dict(by_epoch=False),
            resume=resume,
            load_from=str(latest_checkpoint(work_dir)) if resume else None,
            randomness=dict(seed=0),
            experiment_name=f'{work_dir}_{die_at}_{resume}_{max_iters}'.replace('/', '_'),
        )
    )
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def test_resume_is_bitwise(tmp_path):
    run(tmp_path / 'whole', tmp_path / 'whole.txt')
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'cut', tmp_path / 'cut.txt', die_at=5)
    torch.manual_seed(123)
    run(tmp_path / 'cut', tmp_path / 'resumed.txt', resume=True)
    whole = (tmp_path / 'whole.txt').read_text().splitlines()
    assert (tmp_path / 'cut.txt').read_text().splitlines() == whole[:5]
    assert (tmp_path / 'resumed.txt').read_text().splitlines() == whole[4:]


def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    forward, calls = ToyModel.forward, []

    def diverging(self, inputs, mode='tensor'):
        calls.append(mode)
        outputs = forward(self, inputs, mode)
        return {name: loss * float('nan') for name, loss in outputs.items()} if len(calls) == 5 else outputs

    monkeypatch.setattr(ToyModel, 'forward', diverging)
    with pytest.raises(
        FloatingPointError, match=r"\['loss'\] have not been finite for 50 steps, up to step 54; .*iter_4"
    ):
        run(tmp_path, tmp_path / 'log.txt', max_iters=100, max_keep_ckpts=1)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_4.pth']
    good = torch.load(latest_checkpoint(tmp_path), weights_only=True)['state_dict']
    assert all(value.isfinite().all() for value in good.values())


def test_resume_with_other_parameter_groups_says_so(tmp_path):
    run(tmp_path, tmp_path / 'log.txt')
    with pytest.raises(
        CheckpointMismatchError, match='4 parameters in 1 groups, .* 2 in 2: .*optim_wrapper.constructor'
    ):
        run(tmp_path, tmp_path / 'log.txt', resume=True, paramwise_cfg=dict(bias_lr_mult=2))


def test_checkpoint_loads_as_weights_only_and_keeps_the_history(tmp_path):
    run(tmp_path, tmp_path / 'log.txt')
    content = torch.load(tmp_path / 'iter_8.pth', weights_only=True)
    assert {'meta', 'state_dict', 'optimizer', 'param_schedulers', 'message_hub', 'random_state'} <= set(content)
    restore_history(content['message_hub'])
    hub = MessageHub.get_instance('restored')
    hub.load_state_dict(content['message_hub'])
    assert len(hub.get_scalar('train/loss').data[0]) == 8


def test_old_checkpoints_go_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    """A write that dies half-way leaves the one before, and nothing under the new name."""
    from e3va_mm.hooks import checkpoint

    replace, calls = os.replace, []

    def die_at_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, 'replace', die_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / 'log.txt', max_keep_ckpts=1)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_2.pth']
    monkeypatch.setattr(checkpoint.os, 'replace', replace)
    run(tmp_path, tmp_path / 'log.txt', resume=True, max_keep_ckpts=1)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_8.pth']
    assert not list(tmp_path.glob('*.partial'))


def test_a_new_best_under_the_old_name_stays(tmp_path):
    """As where validation runs several times an epoch, and names the file by the epoch."""
    runner = run(tmp_path, tmp_path / 'log.txt', save_best='acc')
    hook = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    for score in (1.0, 2.0):
        hook._save_best_checkpoint(runner, {'acc': score})
        assert (tmp_path / 'best_acc_iter_8.pth').is_file()


def test_a_fresh_run_in_a_used_folder_is_what_resumes(tmp_path):
    run(tmp_path, tmp_path / 'old.txt')
    for path in tmp_path.glob('*.pth'):
        os.utime(path, (1, 1))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / 'new.txt', die_at=1)
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / 'new.txt', die_at=3)
    assert latest_checkpoint(tmp_path).name == 'iter_2.pth'


def test_report(tmp_path):
    runner = run(tmp_path, tmp_path / 'log.txt')
    report = json.loads((tmp_path / 'run_report.json').read_text())
    assert report['num_steps'] == 8
    low, high = report['step_seconds_spread']
    assert 0 < low <= report['step_seconds_median'] <= high
    assert report['peak_memory_mib'] > 10
    assert report['parameters'] == {
        'backbone': {'trainable': 0, 'frozen': 6},
        'head': {'trainable': 3, 'frozen': 0},
    }
    assert report['gradient_bytes'] == 3 * 4
    assert report['checkpoint_bytes'] == (tmp_path / 'iter_8.pth').stat().st_size
    history, _ = runner.message_hub.get_scalar('train/peak_memory_mib').data
    assert len(history) == 8 and (np.diff(history) >= 0).all()


def test_batch_size_of_a_batch_sampler(tmp_path):
    """As detection configs group images by their aspect ratio: the loader itself then has no batch size."""
    runner = run(tmp_path, tmp_path / 'log.txt')
    data = runner.train_dataloader.dataset
    sampler = BatchSampler(SequentialSampler(data), batch_size=4, drop_last=False)
    runner._train_loop.dataloader = DataLoader(data, batch_sampler=sampler)
    for report in (hook for hook in runner.hooks if isinstance(hook, ResourceReportHook)):
        report.after_train(runner)
    assert json.loads((tmp_path / 'run_report.json').read_text())['batch_size'] == 4


@pytest.mark.parametrize('max_iters', [8, 10])
def test_resuming_past_the_schedule_says_so(tmp_path, max_iters):
    run(tmp_path, tmp_path / 'log.txt')
    run(tmp_path, tmp_path / 'log.txt', resume=True, max_iters=max_iters)
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert ('param_scheduler of the checkpoint ends at 8: ' in log) == (max_iters > 8)


def test_parameter_table():
    table = format_table(count_parameters(ToyModel())).splitlines()
    assert table[1].split() == ['backbone', '0', '6', '0.00']
    assert table[2].split() == ['head', '3', '0', '100.00']
    assert table[3].split() == ['total', '3', '6', '33.33']


def test_learning_rates_by_part():
    """Those that warm-up leads to; what no optimizer has is left out."""
    model = ToyModel()
    model.backbone.weight.requires_grad_(True)
    groups = [dict(params=[model.head.weight], lr=0.5), dict(params=[model.head.bias, model.backbone.weight])]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    optimizer.param_groups[0].update(lr=1e-6, initial_lr=0.5)
    rates = learning_rates(model, [optimizer])
    assert rates == {'head': {0.1, 0.5}, 'backbone': {0.1}}
    table = format_table(count_parameters(model), rates).splitlines()
    assert table[1].split()[-1] == '0.1' and table[2].endswith('0.1 to 0.5') and table[3].split()[-1] == '77.78'


def test_gradients_count_in_the_dtype_of_their_parameters():
    model = nn.ModuleDict({'frozen': nn.Linear(64, 64), 'head': nn.Linear(256, 512, bias=False)})
    model['frozen'].requires_grad_(False)
    model['mask_head'] = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
    model['shared'] = model['mask_head']  # exchanged once
    assert gradient_bytes(model) == 256 * 512 * (4 + 2)
    assert describe_exchange(model, 8) == ['Each of 8 processes exchanges 0.8 MiB of gradients a step']
    assert describe_exchange(model, 1) == []


def test_heads_that_wait_for_other_processes_are_named():
    norm, stock = nn.SyncBatchNorm(2), dict(type='mmdet.ResNet', depth=18, norm_cfg=dict(type='SyncBN'))
    model = nn.ModuleDict({'backbone': e3va(stock), 'neck': nn.BatchNorm2d(2), 'heads': nn.ModuleList([norm, norm])})
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model['backbone'].modules())
    assert synchronized_parts(model) == ['heads']
    assert describe_exchange(model, 1) == []
    assert 'SyncBN in heads waits' in describe_exchange(model, 2)[1]
    model['backbone'] = MODELS.build(stock)
    assert synchronized_parts(model) == ['backbone', 'heads']


def test_to_plain_and_back():
    buffer = HistoryBuffer([1.0, 2.0], [1, 3], max_length=10)
    plain = to_plain(
        {'log_scalars': {'loss': buffer}, 'score': np.float64(0.5), 'sizes': (np.arange(2), [np.int64(3)])}
    )
    assert type(plain['score']) is float and plain['sizes'][0].tolist() == [0, 1] and plain['sizes'][1] == [3]
    restore_history(plain)
    restored = plain['log_scalars']['loss']
    assert [part.tolist() for part in restored.data] == [[1, 2], [1, 3]] and restored.max_length == 10


class RoIAlign(nn.Module):
    """Stands for mmcv's: knows no bfloat16."""

    def forward(self, features, rois):
        assert features.dtype == rois.dtype == torch.float32
        return features * rois


class MultiScaleDeformableAttention(nn.Linear):
    """Stands for mmcv's: a matrix, then a kernel that knows no bfloat16."""

    def forward(self, query):
        values = super().forward(query)
        assert values.dtype == torch.float32
        return values


class Deformed(MultiScaleDeformableAttention):
    """A subclass needs it as well."""


def test_float32_ops():
    model = nn.ModuleList([RoIAlign(), Deformed(3, 3)])
    Float32OpsHook().before_train(type('Runner', (), {'model': model}))
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    for align, attend in (model, copy.deepcopy(model)):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert align(half, rois=torch.ones(2, 3)).dtype == torch.bfloat16
            assert attend(half).dtype == attend(query=half).dtype == torch.bfloat16
        # Validation runs without autocast.
        assert align(half.float(), rois=torch.ones(2, 3)).dtype == attend(half.float()).dtype == torch.float32


def test_a_copy_runs_its_own_weights():
    model = nn.ModuleList([Deformed(3, 3)])
    Float32OpsHook().before_train(type('Runner', (), {'model': model}))
    clone = copy.deepcopy(model)
    nn.init.zeros_(clone[0].weight)
    assert torch.equal(clone[0](torch.ones(1, 3))[0], clone[0].bias)
