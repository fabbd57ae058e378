"""Frozen blocks sharded over two processes (gloo): the same training as unsharded, with about half of the weights."""

import copy
import json
import os
import re
import runpy
import socket
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, e3va, images, pretrained, stir, swin, timm_features
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn
from torch.distributed.tensor import DTensor
from yapf.yapflib import yapf_api

from e3va_mm import launch, sharding
from e3va_mm.backbones.base import FrozenBackbone
from e3va_mm.checkpoints.files import read_checkpoint

GROUP_NORM = ('type=GN', 'num_groups=4')
E3VA, TUNED = dict(type='E3VABackbone', frozen_dtype=None), dict(type='TunedBackbone')
# Tokens ahead of patches; two dtypes in a block; the state run through blocks; a pass that ends early; layers called
# outside of blocks; gradient through blocks, and trained parameters in them.
MODELS_TRIED = {
    'ViT': dict(E3VA, backbone=timm_features('vit_large_patch16_dinov3')),
    'ViT in bf16': dict(E3VA, backbone=timm_features(), frozen_dtype='bfloat16'),
    'Swin, graph_stages': dict(E3VA, backbone=swin(), graph_stages=2, mixer=dict()),
    'Swin, two stages': dict(E3VA, backbone=swin(out_indices=(0, 1))),
    'Hiera': dict(E3VA, backbone=timm_features('hiera_tiny_224')),
    'LoRA': dict(TUNED, backbone=swin(), method=dict(type='LoRA')),
    'BitFit in bf16': dict(TUNED, backbone=swin(), method=dict(type='BitFit'), frozen_dtype='bfloat16'),
    'Partial': dict(TUNED, backbone=swin(), method=dict(type='Partial')),
}


def build(config) -> FrozenBackbone:
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    return stir(model).train()


def two_steps(model) -> tuple[list, dict]:
    """Outputs and gradients of the second of two steps; the first has checks of its own."""
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(2)
        outputs = model(images((64, 96)))
        sum(output.square().mean() for output in outputs).backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    return [output.detach() for output in outputs], gradients


def block_bytes(model) -> int:
    """What this process holds of the frozen parameters in blocks that can be sharded."""
    found = {each for block in sharding._blocks(model) for each in block.parameters() if not each.requires_grad}
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in found)


def compare_models() -> dict:
    """By name: whether outputs and gradients are as without sharding, and which share is left of the blocks' bytes."""
    results = {}
    for name, config in MODELS_TRIED.items():
        model = build(config)
        (outputs, gradients), before = two_steps(model), block_bytes(model)
        sharding.shard_frozen(nn.ModuleDict({'backbone': model}))
        sharded, sharded_gradients = two_steps(model)
        same = all(torch.equal(one, other) for one, other in zip(outputs, sharded))
        same_gradients = all(torch.equal(value, sharded_gradients[key]) for key, value in gradients.items())
        results[name] = same, same_gradients, block_bytes(model) / before
    return results


def most_unsharded_blocks() -> int:
    """How many whole blocks exist besides those that wait, while blocks are sharded one by one."""
    from torch.distributed import fsdp

    model, originals, most, real = build(MODELS_TRIED['Swin, two stages']), [], 0, fsdp.fully_shard

    def watched(module, **options):
        nonlocal most
        most = max(most, sum(any(each() is not None for each in block) for block in originals))
        originals.append([weakref.ref(each) for each in module.parameters(recurse=True)])
        return real(module, **options)

    fsdp.fully_shard = watched
    try:
        sharding.shard_frozen(nn.ModuleDict({'backbone': model}))
    finally:
        fsdp.fully_shard = real
    return most


def train(port: int, config: str, work_dir: str, *flags: str, options=()) -> None:
    """``tools/train.py`` in this process of several."""
    os.environ['MASTER_PORT'] = str(port)
    # Batch norm would have other statistics in each process.
    heads = [f'model.{head}.norm_cfg.{option}' for head in ('decode_head', 'auxiliary_head') for option in GROUP_NORM]
    flags = [*flags, '--launcher', 'pytorch', '--cfg-options', *heads, *options]
    sys.argv = ['tools/train.py', config, '--work-dir', work_dir, *flags]
    runpy.run_path(str(ROOT / 'tools/train.py'), run_name='__main__')


def end_run() -> None:
    dist.barrier()
    dist.destroy_process_group()


def work(rank: int, ports: list[int], config: str, folder: str) -> None:
    # A port a run: one process would still meet the other's store of the run before.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    os.environ['MASTER_PORT'] = str(ports[0])
    os.chdir(ROOT)
    torch.set_num_threads(1)
    # The tool's would end this process.
    launch.end_distributed_run = end_run
    # Configs as they are dumped: making them pretty takes longer than all the rest.
    yapf_api.FormatCode = lambda text, **style: (text, True)
    dist.init_process_group('gloo')
    results = {'models': compare_models(), 'most_unsharded_blocks': most_unsharded_blocks()}
    torch.save(results, f'{folder}/rank{rank}.pth')
    end_run()
    sharded = ['runner_type=ShardingRunner']
    train(ports[1], config, f'{folder}/ddp')
    train(ports[2], config, f'{folder}/sharded', options=sharded)
    train(ports[3], config, f'{folder}/resumed', '--resume', f'{folder}/sharded/iter_2.pth', options=sharded)
    os._exit(0)


@pytest.fixture(scope='module')
def folder(seg_config, tmp_path_factory):
    """Of what two processes have found, and of their runs."""
    folder = tmp_path_factory.mktemp('sharded')
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(4)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    torch.multiprocessing.spawn(work, (ports, str(seg_config), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize('name', MODELS_TRIED)
def test_same_maps_and_gradients_with_half_of_the_weights(folder, name):
    for rank in range(2):
        same, same_gradients, share = torch.load(folder / f'rank{rank}.pth')['models'][name]
        assert same and same_gradients
        assert 0.45 < share < 0.55


def test_blocks_reach_the_device_one_at_a_time(folder):
    assert torch.load(folder / 'rank0.pth')['most_unsharded_blocks'] == 0


def state_of(path) -> dict:
    return read_checkpoint(path)['state_dict']


def test_training_is_that_of_ddp(folder):
    ddp, sharded = (state_of(folder / name / 'iter_4.pth') for name in ('ddp', 'sharded'))
    assert list(ddp) == list(sharded)
    assert all(torch.allclose(ddp[key], value, rtol=1e-5, atol=1e-6) for key, value in sharded.items())
    log = next((folder / 'sharded').glob('*/*.log')).read_text()
    whole, held = re.search(r'8 blocks are sharded over 2 .* of ([\d.]+) MiB .* holds ([\d.]+)', log).groups()
    assert 0.45 < float(held) / float(whole) < 0.6


def test_resumed(folder):
    whole, resumed = (state_of(folder / name / 'iter_4.pth') for name in ('sharded', 'resumed'))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_its_checkpoint_on_one_device(folder, monkeypatch):
    """With the config of the sharded run, as it is."""
    config = Config.fromfile(folder / 'sharded/seg.py')
    config.update(launcher='none', load_from=str(folder / 'sharded/iter_4.pth'), work_dir=str(folder / 'test'))
    runner = launch.build_runner(config)
    metrics = runner.test()
    assert type(runner).__name__ == 'ShardingRunner'
    assert metrics['mIoU'] == json.loads((folder / 'sharded/run_report.json').read_text())['metrics']['mIoU']


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_backbones_stay_as_they_are(alone, weights):
    model = nn.ModuleDict({'backbone': e3va(**pretrained(weights), frozen_dtype='bfloat16')})
    expected = model.backbone(images())
    stock = {key.removeprefix('backbone.'): value for key, value in torch.load(weights)['state_dict'].items()}
    sharding.shard_frozen(model)
    # As load_from of a stock model does, whose backbone the config names.
    model.backbone.load_state_dict(dict(stock))
    assert all(torch.equal(one, other) for one, other in zip(model.backbone(images()), expected))
    stock['stages.1.blocks.0.norm1.weight'] += 1
    with pytest.raises(RuntimeError, match='a sharded backbone can not take another base'):
        model.backbone.load_state_dict(stock)
    with pytest.raises(ValueError, match='a sharded backbone can not be copied: take EMAHook out of custom_hooks'):
        copy.deepcopy(model)


def test_the_runner_shards_before_the_model_goes_to_the_device(alone, monkeypatch):
    monkeypatch.setattr(sharding.Runner, 'wrap_model', lambda self, config, model: model.backbone.is_sharded)
    runner = object.__new__(sharding.ShardingRunner)
    runner.cfg, runner._distributed = Config(), True
    assert runner.wrap_model(None, nn.ModuleDict({'backbone': e3va()}))
    runner._distributed = False
    assert not runner.wrap_model(None, nn.ModuleDict({'backbone': e3va()}))


def test_what_can_not_be_sharded(alone):
    def error_of(backbone) -> str:
        with pytest.raises(ValueError) as raised:
            sharding.shard_frozen(nn.ModuleDict({'backbone': MODELS.build(backbone)}))
        return str(raised.value)

    assert 'this model has none: wrap one (--tune)' in error_of(swin())
    full = dict(TUNED, backbone=swin(), method=dict(type='Full'))
    assert 'model.backbone: this SwinTransformer has no frozen blocks to shard' in error_of(full)
    resnet = dict(E3VA, backbone=dict(type='mmseg.ResNet', depth=18))
    assert 'model.backbone: this ResNet can not be sharded, because its kernels have channels last' in error_of(resnet)
    pytest.importorskip('torchao')
    message = "model.backbone.frozen_dtype='int8' can not be sharded: take 'bfloat16'"
    assert message in error_of(dict(E3VA, backbone=swin(), frozen_dtype='int8'))


def test_passes_that_processes_would_not_share():
    loader = dict(sampler=dict(type='DefaultSampler', round_up=False))
    with pytest.raises(ValueError, match='val_dataloader.sampler.round_up=False gives some processes fewer batches'):
        sharding.check_in_step(Config(dict(val_dataloader=loader)), nn.Identity())
    model = nn.Sequential(nn.Identity())
    model[0].test_cfg = dict(mode='slide')
    with pytest.raises(ValueError, match="model.test_cfg.mode='slide' takes more forward passes .* take 'whole'"):
        sharding.check_in_step(Config(), model)
    model[0].test_cfg = dict(mode='whole')
    sharding.check_in_step(Config(dict(val_dataloader=None)), model)
