"""Starting from whole stock models, which the toolboxes' own tools have trained for two steps."""

import re
from pathlib import Path

import pytest
import torch
from conftest import tool
from mmengine.config import Config
from mmengine.registry import DefaultScope

import e3va_mm
from e3va_mm.checkpoints.files import read_checkpoint
from e3va_mm.tune import find_config

SWIN = dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), init_cfg=None)
RESNET = dict(base_channels=4, init_cfg=None)
UPERNET = dict(decode_head=dict(in_channels=[12, 24, 48, 96], channels=16, num_classes=6))
UPERNET['auxiliary_head'] = dict(in_channels=48, channels=8, num_classes=6)
MASK_RCNN = dict(
    roi_head=dict(bbox_head=dict(num_classes=5, fc_out_channels=32), mask_head=dict(num_classes=5)),
    train_cfg=dict(rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=10)),
)
MODELS = {
    'upernet_swin': ('mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512', SWIN, UPERNET),
    'mask_rcnn_swin': (
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco',
        SWIN,
        dict(MASK_RCNN, neck=dict(in_channels=[12, 24, 48, 96])),
    ),
    'mask_rcnn_r50': (
        'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
        RESNET,
        dict(MASK_RCNN, neck=dict(in_channels=[16, 32, 64, 128])),
    ),
}
DATA = ('train_cfg', *(f'{stage}_dataloader' for stage in ('train', 'val', 'test')), 'val_evaluator', 'test_evaluator')


def shrunk(name: str, data: Path, folder: Path) -> Path:
    """A stock config with a small model, on the data set of the config ``data``.

    The package is imported, since it makes torchvision importable beside a torch for CPUs; nothing of it is used.
    """
    stock, backbone, model = MODELS[name]
    config, small = Config.fromfile(find_config(stock)), Config.fromfile(data)
    config.model.pop('pretrained', None)
    config.merge_from_dict({'model': dict(model, backbone=backbone)})
    for key in DATA:
        config[key] = small[key]
    config.param_scheduler = None
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.checkpoint = dict(type='CheckpointHook', interval=2, by_epoch=False)
    config.default_hooks.logger.interval = 1
    if config.default_scope == 'mmdet':
        config.train_dataloader.dataset.pipeline[1] = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
        config.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    config.log_processor = dict(by_epoch=False)
    config.custom_imports = dict(imports=['e3va_mm'], allow_failed_imports=False)
    config.dump(folder / f'{name}.py')
    return folder / f'{name}.py'


def stock_tool(name: str) -> Path:
    """The train.py that the toolbox of a model brings."""
    return find_config(MODELS[name][0]).parents[2] / 'tools/train.py'


@pytest.fixture(scope='module')
def trained(seg_config, det_config, tmp_path_factory):
    """By name of a model, its stock config and a checkpoint of the toolbox's own tool."""
    known = {}

    def train(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            config = shrunk(name, seg_config if 'upernet' in name else det_config, folder)
            tool(stock_tool(name), config, '--work-dir', folder / 'run')
            known[name] = config, folder / 'run/iter_2.pth'
        return known[name]

    return train


def predictions(config: Config, checkpoint: Path, image: Path) -> list[torch.Tensor]:
    if config.default_scope == 'mmseg':
        from mmseg.apis import inference_model, init_model

        return [inference_model(init_model(config, str(checkpoint), 'cpu'), str(image)).seg_logits.data]
    from mmdet.apis import inference_detector, init_detector

    found = inference_detector(init_detector(config, str(checkpoint), device='cpu'), str(image)).pred_instances
    return [found.scores, found.bboxes, found.labels, found.masks]


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('method', ['e3va', 'frozen'])
def test_predictions_at_start_are_those_of_the_stock_model(trained, shapes, name, method):
    config, checkpoint = trained(name)
    stock, image = Config.fromfile(config), shapes / 'images/val/0000.png'
    expected = predictions(stock, checkpoint, image)
    found = predictions(e3va_mm.tune(stock, method), checkpoint, image)
    assert len(expected[0]) > 0
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    DefaultScope._instance_dict.clear()


def metric(log: str) -> str:
    return re.findall(r'(?:mIoU|segm_mAP|bbox_mAP): ([\d.-]+)', log)[-1]


def test_the_tools_start_from_a_whole_model_and_test_what_they_trained(trained, tmp_path):
    config, checkpoint = trained('upernet_swin')
    stock = tool('tools/test.py', config, checkpoint, '--work-dir', tmp_path / 'stock')
    tuned = tool('tools/test.py', config, checkpoint, '--tune', 'e3va', '--work-dir', tmp_path / 'tuned')
    assert metric(stock) == metric(tuned) and 'comes from the backbone of the stock model' in tuned
    options = [f'load_from={checkpoint}', 'train_cfg.max_iters=1', 'model.decode_head.channels=8']
    options += ['model.backbone.mixer.width=8', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1']
    log = tool('tools/train.py', config, '--tune', 'E3VA', '--work-dir', tmp_path / 'run', '--cfg-options', *options)
    assert 'size mismatch for decode_head.conv_seg.weight' in log and re.search(r'highway .* 6e-05', log)
    state = read_checkpoint(tmp_path / 'run/iter_1.pth')['state_dict']
    assert 'backbone.mixers.0.0.down.weight' in state and not any('stages' in key for key in state)
    # The work dir's config says all, the base included.
    again = tool(
        'tools/test.py', tmp_path / 'run' / config.name, tmp_path / 'run/iter_1.pth', '--work-dir', tmp_path / 'test'
    )
    assert metric(again) == metric(log)


FIVE_LINES = """
_base_ = '{base}'
custom_imports = dict(imports=['e3va_mm'], allow_failed_imports=False)
load_from = '{checkpoint}'
model = dict(backbone=dict(_delete_=True, type='E3VABackbone', backbone={{{{_base_.model.backbone}}}}))
custom_hooks = [dict(type='ParameterTableHook')]
"""


def test_five_lines_by_the_stock_tool(trained, shapes, tmp_path, error_of):
    """It starts from the stock model; later tests say what to write, and a slowed highway ends training."""
    config, checkpoint = trained('mask_rcnn_r50')
    mine = tmp_path / 'mine.py'
    mine.write_text(FIVE_LINES.format(base=config, checkpoint=checkpoint))
    command = [stock_tool('mask_rcnn_r50'), mine, '--work-dir', tmp_path / 'run']
    tool(*command)
    error = error_of('tools/test.py', mine, tmp_path / 'run/iter_2.pth', '--work-dir', tmp_path / 'test')
    assert (
        "name that file there: backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone.')" in error
    )
    named = dict(type='Pretrained', checkpoint=str(checkpoint), prefix='backbone.', _delete_=True)
    (tmp_path / 'named.py').write_text(
        f"_base_ = 'mine.py'\nmodel = dict(backbone=dict(backbone=dict(init_cfg={named})))"
    )
    image = shapes / 'images/val/0000.png'
    assert len(predictions(Config.fromfile(tmp_path / 'named.py'), tmp_path / 'run/iter_2.pth', image)[0])
    slowed = 'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult=0.1'
    log = tool(*command, '--cfg-options', slowed, ok=False)
    assert re.search(r"custom_keys\['backbone'\] is meant for the backbone, and gives the highway 0.1", log)
    assert re.search(r'highway .* 0.002', log)
