"""SharedInferencer and the tool: the results of each model alone, by one pass, in the memory of one base."""

import functools
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, stir, tool
from mmengine.registry import MODELS, DefaultScope
from torch.testing import assert_close

from e3va_mm.backbones.shared_pass import InputMismatchError
from e3va_mm.checkpoints.files import publish
from e3va_mm.launch import load_model, open_config
from e3va_mm.shared import SharedInferencer

_INSTANCES = """
_base_ = '{base}'
model = dict(
    backbone=dict(backbone=dict(
        embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), init_cfg=dict(checkpoint='{weights}'))),
    neck=dict(in_channels=[12, 24, 48, 96], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1)),
    test_cfg=dict(rpn=dict(nms_pre=20, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""


def write_checkpoint(config: Path, **options) -> Path:
    """Of a model whose trained parts are no longer as they start."""
    torch.manual_seed(len(config.stem))
    loaded = open_config(str(config), options)
    with DefaultScope.overwrite_default_scope(loaded.default_scope):
        model = MODELS.build(loaded.model)
    model.init_weights()
    stir(model, 0.05)
    meta = {'cfg': loaded.pretty_text, 'dataset_meta': {'classes': ('a',) * 6, 'palette': [[9, 9, 9]] * 6}}
    path = config.with_suffix('.pth')
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, path)
    return path


@pytest.fixture(scope='module')
def tasks(tmp_path_factory, seg_config, det_config, weights) -> dict[str, tuple[Path, Path]]:
    """Config and checkpoint of a segmentor, a detector and an instance segmentor."""
    folder = tmp_path_factory.mktemp('tasks')
    base = ROOT / 'configs/nuclei/mask-rcnn_e3va-swin-nano_fpn_1xb8-300_nuclei.py'
    texts = {
        'parts': f"_base_ = '{seg_config}'",
        'things': f"_base_ = '{det_config}'",
        'masks': _INSTANCES.format(base=base, weights=weights),
    }
    configs = {name: folder / f'{name}.py' for name in texts}
    for name, config in configs.items():
        config.write_text(texts[name])
    return {name: (config, write_checkpoint(config)) for name, config in configs.items()}


@pytest.fixture(scope='module')
def image(shapes) -> Path:
    return shapes / 'images/val/0000.png'


@functools.cache
def alone(task, image):
    config = open_config(str(task[0]))
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model, infer = load_model(config, str(task[1]), 'cpu')
        return infer(model, str(image))


def assert_same(sample, expected):
    if 'seg_logits' in expected:
        assert_close(sample.seg_logits.data, expected.seg_logits.data, rtol=0, atol=1e-5)
        return
    found, own = sample.pred_instances, expected.pred_instances
    assert len(own) and set(found.keys()) == set(own.keys())
    for key in own.keys():  # noqa: SIM118  (of InstanceData)
        if key == 'masks':
            assert np.array_equal(found.masks, own.masks)
        else:
            assert_close(found[key], own[key], rtol=1e-5, atol=1e-5)


def wrapper_of(infer, name):
    return infer.tasks[name].model.backbone


def count_passes(infer) -> list:
    """Filled with the name of each model whose own base runs, once a pass."""
    passes = []
    for name, task in infer.tasks.items():
        stem = task.model.backbone.backbone.patch_embed
        stem.register_forward_hook(lambda *_, name=name: passes.append(name))
    return passes


def test_results_are_those_of_each_model_alone(tasks, image):
    infer = SharedInferencer(tasks, device='cpu')
    assert [*infer.tasks] == ['parts', 'things', 'masks']
    passes = count_passes(infer)
    for given in (image, str(image), cv2.imread(str(image)), image):
        samples = infer(given)
        for name, task in tasks.items():
            assert_same(samples[name], alone(task, image))
    assert passes == ['parts'] * 4
    first, second = infer([image, image.with_name('0001.png')])
    assert_same(first['masks'], alone(tasks['masks'], image))
    assert_same(second['masks'], alone(tasks['masks'], image.with_name('0001.png')))


def test_one_base_in_memory(tasks):
    infer = SharedInferencer(tasks, device='cpu')
    frozen = [wrapper_of(infer, name)._frozen_tensors() for name in tasks]
    assert all(tensors[name] is frozen[0][name] for tensors in frozen for name in tensors)
    trained = [dict(wrapper_of(infer, name).named_parameters()) for name in tasks]
    trained = [{name for name in each.values() if name.requires_grad} for each in trained]
    assert all(trained) and not trained[0] & trained[1] and not trained[1] & trained[2]
    # mmdet's class and mmseg's have the same tensors.
    assert len({type(wrapper_of(infer, name).backbone) for name in tasks}) == 2


def test_models_come_and_go(tasks, image, tmp_path):
    infer = SharedInferencer([tasks['parts']], device='cpu')
    publish(tasks['things'][1], tmp_path / 'adapter.safetensors')
    assert infer.add(tmp_path / 'adapter.safetensors') == 'adapter'
    assert infer.add(*tasks['parts']) == 'parts-2'
    with pytest.raises(ValueError, match="there is a task 'parts' already"):
        infer.add(*tasks['masks'], name='parts')
    infer.remove('parts')  # whose base it was
    passes, samples = count_passes(infer), infer(image)
    assert [*samples] == ['adapter', 'parts-2'] and passes == ['adapter']
    assert_same(samples['adapter'], alone(tasks['things'], image))
    assert_same(samples['parts-2'], alone(tasks['parts'], image))
    assert [infer.add(*tasks['parts']), infer.add(*tasks['parts'])] == ['parts', 'parts-3']


def test_a_removed_model_works_by_itself(tasks, image):
    infer = SharedInferencer(tasks, device='cpu')
    model, config, apply, _ = infer.tasks['things']
    infer.remove('things')
    with DefaultScope.overwrite_default_scope(config.default_scope):
        assert_same(apply(model, str(image)), alone(tasks['things'], image))


def test_sliding_windows_go_in_step(tasks, image):
    """The backbone is called with each window; another model must have the same ones."""
    slide = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    configs = [open_config(str(tasks['parts'][0]), {'model.test_cfg': slide}) for _ in range(2)]
    infer = SharedInferencer(device='cpu')
    for number, config in enumerate(configs):
        infer.add(config, tasks['parts'][1], name=f'parts{number}')
    passes, samples = count_passes(infer), infer(image)
    assert passes == ['parts0'] * 4
    assert_close(samples['parts0'].seg_logits.data, samples['parts1'].seg_logits.data)
    infer.add(*tasks['things'])
    with pytest.raises(InputMismatchError, match=r'\(1, 3, 96, 96\), not \(1, 3, 64, 64\).*mode is whole, not slide'):
        infer(image)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'test_pipeline.1.scale': (64, 64)}, r'64, 64\), not .*96.* Resize is .*64, 64.*, not .*96, 96'),
        ({'model.data_preprocessor.mean': [0, 0, 0]}, r'other values. .*: data_preprocessor.mean is \[0, 0, 0\], not'),
        ({'model.data_preprocessor.bgr_to_rgb': False}, 'other values. .*bgr_to_rgb is False, not True'),
        ({'model.data_preprocessor.test_cfg.size_divisor': 80}, r'160, 160\), not .*96\).*test_cfg is .*80'),
    ],
)
def test_other_inputs_are_refused_with_what_differs(tasks, image, change, message):
    infer = SharedInferencer([tasks['parts']], device='cpu')
    infer.add(open_config(str(tasks['parts'][0]), change), tasks['parts'][1], name='other')
    with pytest.raises(InputMismatchError, match="'other' and 'parts' make other inputs.*" + message):
        infer(image)
    infer.remove('other')
    resized = {'test_dataloader.dataset.pipeline.1.scale': (64, 64)}
    infer.add(open_config(str(tasks['things'][0]), resized), tasks['things'][1])
    with pytest.raises(InputMismatchError, match=r'64, 64\), not .*96, 96.* Resize is .*64, 64.*, not .*96, 96'):
        infer(image)
    infer.remove('things')
    assert_same(infer(image)['parts'], alone(tasks['parts'], image))


def test_what_shares_no_base_is_refused(tasks, tmp_path):
    infer = SharedInferencer([tasks['parts']], device='cpu')
    stock = tmp_path / 'full.py'
    backbone = open_config(str(tasks['parts'][0])).model.backbone.backbone.to_dict()
    for name, given, found in (
        ('full', backbone, '0 of them'),
        ('lora', dict(type='TunedBackbone', backbone=backbone, method=dict(type='Mona')), 'one tuned by Mona'),
    ):
        stock = tmp_path / f'{name}.py'
        wrapped = dict(given, _delete_=True)
        stock.write_text(f"_base_ = '{tasks['parts'][0]}'\nmodel = dict(backbone={wrapped})")
        with pytest.raises(ValueError, match=f"needs one backbone that is an E3VABackbone; '{name}' has {found}"):
            infer.add(stock, write_checkpoint(stock))
    assert [*infer.tasks] == ['parts']


def test_the_page_runs(tasks, image, tmp_path, monkeypatch):
    """Its blocks of Python, one behind the other, with files of the names that they have."""
    for path in (path for task in tasks.values() for path in task):
        shutil.copy(path, tmp_path)
    publish(tasks['masks'][1], tmp_path / 'masks.safetensors')
    shutil.copy(image, tmp_path / 'image.png')
    monkeypatch.chdir(tmp_path)
    code = re.findall(r'^```python\n(.*?)^```$', (ROOT / 'docs/shared.md').read_text(), re.MULTILINE | re.DOTALL)
    namespace = {}
    for block in code[:2]:
        exec(block, namespace)
    assert [*namespace['samples']] == ['parts', 'things'] and [*namespace['infer'].tasks] == ['parts', 'masks']


def test_the_tool_takes_several_models(tasks, shapes, tmp_path):
    publish(tasks['masks'][1], tmp_path / 'masks.safetensors')
    models = ['--model', *tasks['parts'], '--model', *tasks['things'], '--model', tmp_path / 'masks.safetensors']
    out = tmp_path / 'out'
    tool('tools/infer.py', shapes / 'images/val', *models, '--out-dir', out, '--score-thr', '0', '--device', 'cpu')
    pictures = {str(path.relative_to(out)) for path in out.rglob('*.png')}
    assert pictures == {f'{name}/{number:04d}.png' for name in tasks for number in range(4)}
    tool('tools/infer.py', shapes / 'images/val/0000.png', *tasks['parts'], '--out-dir', tmp_path / 'one')
    assert np.array_equal(cv2.imread(str(tmp_path / 'one/0000.png')), cv2.imread(str(out / 'parts/0000.png')))
    wrong = tool('tools/infer.py', shapes, *tasks['parts'], *models[:3], '--out-dir', out, ok=False)
    assert 'give CONFIG CHECKPOINT, or --model' in wrong
