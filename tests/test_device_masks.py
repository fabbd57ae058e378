"""Masks that are moved to the device once: targets, losses and checkpoints are stock's, and the flag turns it on."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT, swin
from mmdet.structures import DetDataSample, TrackDataSample
from mmdet.structures.mask import BitmapMasks, PolygonMasks, mask_target
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

import e3va_mm
from benchmarks.shapes import CLASSES
from e3va_mm.checkpoints.files import read_checkpoint
from e3va_mm.device_masks import DeviceMasks, move_masks_once
from e3va_mm.hooks.masks import listen_to_preprocessors
from e3va_mm.tune import find_config

SIZE = (57, 83)
HOOK = 'DeviceMasksHook'
MASK_RCNN = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco'
CASCADE = 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco'
CROPPING = [
    MASK_RCNN,
    CASCADE,
    'mmdet::ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco',
    'mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco',
    'mmdet::htc/htc-without-semantic_r50_fpn_1x_coco',
]
every_head = pytest.mark.parametrize('name', CROPPING, ids=[name.rpartition('/')[2] for name in CROPPING])


def bitmaps(number=5, dtype=np.uint8, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (number, *SIZE)).astype(dtype)


def boxes(number, seed=0) -> np.ndarray:
    """Of any size, none at all among them, and beyond the image."""
    corners = np.random.default_rng(seed).uniform(-9, 1.1 * max(SIZE), (number, 2, 2))
    corners[:1, 1] = corners[:1, 0]
    return np.concatenate([corners.min(1), corners.max(1)], 1).astype(np.float32)


@pytest.mark.parametrize('dtype', [np.uint8, bool, np.int64])
@pytest.mark.parametrize('binarize', [True, False])
@pytest.mark.parametrize('device', ['cpu', *(['cuda'] if torch.cuda.is_available() else [])])
def test_crops_are_the_stock_ones(dtype, binarize, device):
    """Twice, as a cascade crops; of more boxes than masks, of fewer, and of none."""
    given = bitmaps(dtype=dtype)
    stock, moved = BitmapMasks(given, *SIZE), DeviceMasks(given, *SIZE)
    for number in (40, 3, 1, 0):
        inds = np.random.default_rng(number).integers(0, len(given), number)
        crops = [
            each.crop_and_resize(boxes(number), (7, 9), inds, device, binarize=binarize) for each in (stock, moved)
        ]
        assert type(crops[1]) is BitmapMasks and len(crops[1]) == number and (crops[1].height, crops[1].width) == (7, 9)
        assert crops[0].masks.dtype == crops[1].masks.dtype
        np.testing.assert_array_equal(crops[0].masks, crops[1].masks)
    assert moved.masks is given and moved._moved.device.type == device


@pytest.mark.parametrize('kind', [torch.float32, torch.float64])
def test_boxes_may_be_tensors(kind):
    bboxes, inds = torch.from_numpy(boxes(20)).to(kind), torch.arange(20) % 5
    crops = [cls(bitmaps(), *SIZE).crop_and_resize(bboxes, (14, 14), inds) for cls in (BitmapMasks, DeviceMasks)]
    np.testing.assert_array_equal(crops[0].masks, crops[1].masks)
    assert 0 < crops[0].masks.mean() < 1


def test_targets_of_a_batch():
    """Images with many boxes, none, and no masks at all."""
    given = [bitmaps(4), bitmaps(3, seed=1), bitmaps(0)]
    numbers = (30, 0, 0)
    proposals = [torch.from_numpy(boxes(number, seed=2)) for number in numbers]
    assigned = [torch.arange(number) % 4 for number in numbers]
    cfg = Config(dict(mask_size=28))
    targets = [
        mask_target(proposals, assigned, [cls(each, *SIZE) for each in given], cfg)
        for cls in (BitmapMasks, DeviceMasks)
    ]
    assert targets[0].shape == (30, 28, 28) and torch.equal(*targets)


def test_copies_move_masks_themselves():
    masks = DeviceMasks(bitmaps(), *SIZE)
    masks.crop_and_resize(boxes(3), (7, 7), np.arange(3))
    assert masks._moved is not None
    for again in (copy.deepcopy(masks), pickle.loads(pickle.dumps(masks))):
        assert type(again) is DeviceMasks and again._moved is None
        np.testing.assert_array_equal(again.masks, masks.masks)


def test_the_rest_is_stock():
    stock, moved = BitmapMasks(bitmaps(), *SIZE), DeviceMasks(bitmaps(), *SIZE)
    for do in (
        lambda masks: masks[np.array([3, 1])],
        lambda masks: masks.pad((64, 96)),
        lambda masks: masks.flip(),
        lambda masks: InstanceData(masks=masks)[torch.tensor([4, 0])].masks,
        lambda masks: InstanceData.cat([InstanceData(masks=masks), InstanceData(masks=stock)]).masks,
    ):
        assert type(do(moved)) is BitmapMasks
        np.testing.assert_array_equal(do(moved).masks, do(stock).masks)
    assert torch.equal(moved.to_tensor(torch.bool, 'cpu'), stock.to_tensor(torch.bool, 'cpu'))
    assert (moved.areas == stock.areas).all()


def sample(**fields) -> DetDataSample:
    return DetDataSample(gt_instances=InstanceData(**fields))


def test_which_masks_are_replaced():
    class Others(BitmapMasks):
        pass

    polygons = PolygonMasks([[np.array([1.0, 1, 9, 1, 9, 9])]], *SIZE)
    kept = [polygons, Others(bitmaps(), *SIZE)]
    stock = BitmapMasks(bitmaps(), *SIZE)
    video = TrackDataSample(video_data_samples=[sample(masks=stock)])
    samples = [*(sample(masks=masks) for masks in kept), sample(labels=torch.ones(1)), DetDataSample(), video]
    samples.append(sample(masks=BitmapMasks([], *SIZE)))
    move_masks_once(samples)
    assert [each.gt_instances.masks for each in samples[:2]] == kept
    assert type(video[0].gt_instances.masks) is DeviceMasks and video[0].gt_instances.masks.masks is stock.masks
    assert 'masks' not in samples[2].gt_instances and 'gt_instances' not in samples[3]
    assert len(samples[5].gt_instances.masks) == 0


def tiny(config: Config, backbone: dict) -> Config:
    """With a small backbone and narrow heads."""
    text = config.pretty_text.replace('=256', '=16').replace('fc_out_channels=1024', 'fc_out_channels=16')
    config = Config.fromstring(text, '.py')
    config.model.backbone = backbone
    config.model.neck.in_channels = [12, 24, 48, 96]
    return config


def build(name: str) -> torch.nn.Module:
    """A tiny model of a stock config."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MODELS.build(tiny(Config.fromfile(find_config(name)), swin('mmdet')).model).train()


def batch() -> dict:
    return demo_mm_inputs(2, (3, *SIZE), [6, 4], 80, with_mask=True)


def losses(model, given: dict) -> tuple[dict[str, torch.Tensor], list]:
    """Of a step as mmengine does it, and the masks that the model was given."""
    torch.manual_seed(0)
    np.random.seed(0)
    data = model.data_preprocessor(given, True)
    found = model(**data, mode='loss')
    named = ((key, value if isinstance(value, list) else [value]) for key, value in found.items())
    return {key: torch.stack(parts) for key, parts in named}, [each.gt_instances.masks for each in data['data_samples']]


@every_head
def test_losses_are_the_stock_ones(name, monkeypatch):
    """To the bit. The masks of an image are taken from the host once, by stock as often as there are stages."""
    model, given = build(name), batch()
    taken, from_numpy = [], torch.from_numpy
    monkeypatch.setattr(torch, 'from_numpy', lambda array: taken.append(array.shape) or from_numpy(array))

    def run(kind):
        taken.clear()
        found, masks = losses(model, given)
        assert {type(each) for each in masks} == {kind}
        return found, sum(shape in [each.masks.shape for each in masks] for shape in taken)

    keys = model.state_dict().keys()
    expected, often = run(BitmapMasks)
    listen_to_preprocessors(model)
    found, once = run(DeviceMasks)
    assert model.state_dict().keys() == keys
    assert found.keys() == expected.keys() and any('mask' in key for key in found)
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert (often, once) == (2 * getattr(model.roi_head, 'num_stages', 1), 2)
    # What the loader brought stays as it was.
    assert all(type(sample.gt_instances.masks) is BitmapMasks for sample in given['data_samples'])


def test_branches_of_semi_supervised_training():
    """A preprocessor within a preprocessor, of a copy such as the average of a model has it."""
    inner = build(MASK_RCNN).data_preprocessor
    model = MODELS.build(dict(type='MultiBranchDataPreprocessor', data_preprocessor=dict(type=lambda: inner)))
    keys = model.state_dict().keys()
    listen_to_preprocessors(model)
    model = copy.deepcopy(model)
    data = {key: dict(sup=[values[0], None], student=[None, values[1]]) for key, values in batch().items()}
    found = model(data, True)['data_samples']
    assert all(type(found[branch][0].gt_instances.masks) is DeviceMasks for branch in ('sup', 'student'))
    assert model.state_dict().keys() == keys


WITHOUT = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
    'mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance',
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512',
]


def hooks(config: Config) -> list[str]:
    return [hook['type'] for hook in config.get('custom_hooks') or []]


@pytest.mark.parametrize('name', [*CROPPING, *WITHOUT], ids=lambda name: name.rpartition('/')[2])
def test_the_flag_turns_it_on_where_heads_crop_masks(name, monkeypatch):
    said = []
    monkeypatch.setitem(e3va_mm.tune.__globals__, '_say', said.append)
    stock, crops = Config.fromfile(find_config(name)), name in CROPPING
    tuned = e3va_mm.tune(stock, 'frozen')
    assert (hooks(tuned).count(HOOK), sum(HOOK in line for line in said)) == (crops, crops)
    assert HOOK not in hooks(stock) + hooks(e3va_mm.tune(stock, 'full'))


def test_heads_at_any_depth_and_hooks_that_are_there():
    roi_heads = [dict(type='A'), dict(type='B', mask_head=[dict(type='C')])]
    model = dict(detector=dict(backbone=swin('mmdet'), roi_head=roi_heads))
    tuned = e3va_mm.tune(Config(dict(model=model, custom_hooks=[dict(type=HOOK)])))
    assert hooks(tuned).count(HOOK) == hooks(e3va_mm.tune(Config(dict(model=model)))).count(HOOK) == 1
    roi_heads[1].update(mask_head=None)
    assert HOOK not in hooks(e3va_mm.tune(Config(dict(model=model))))


def nuclei(shapes, name: str) -> Config:
    """A config of the nuclei, tiny, on the generated shapes."""
    config = Config.fromfile(ROOT / f'configs/nuclei/mask-rcnn_{name}_fpn_1xb8-300_nuclei.py')
    backbone = dict(type='E3VABackbone', backbone=swin('mmdet')) if 'e3va' in name else swin('mmdet')
    config = tiny(config, backbone)
    for head in ('bbox_head', 'mask_head'):
        config.model.roi_head[head].num_classes = len(CLASSES)
    config.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    config.train_dataloader.dataset.update(data_root=f'{shapes}/', metainfo=dict(classes=CLASSES))
    config.train_dataloader.dataset.pipeline[2].update(scale=(96, 96))
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator', 'test_dataloader', 'test_cfg', 'test_evaluator'):
        config.pop(key)
    config.update(train_cfg=dict(type='IterBasedTrainLoop', max_iters=2), param_scheduler=[], randomness=dict(seed=0))
    return config


@pytest.mark.parametrize('name', ['swin-nano', 'e3va-swin-nano'])
def test_training_by_the_config(name, shapes, tmp_path, monkeypatch):
    """Our configs have the hook, others by the flag; it changes no weight and no key of the checkpoint."""
    config = nuclei(shapes, name)
    if name == 'swin-nano':
        config.custom_hooks = []
        config = e3va_mm.tune(config)
    without = copy.deepcopy(config)
    without.custom_hooks = [hook for hook in config.custom_hooks if hook.type != HOOK]
    cropped, crop = [], DeviceMasks.crop_and_resize
    monkeypatch.setattr(DeviceMasks, 'crop_and_resize', lambda self, *a, **b: cropped.append(1) or crop(self, *a, **b))
    states = []
    for number, each in enumerate((without, config)):
        each.work_dir = str(tmp_path / str(number))
        each.dump(tmp_path / 'mine.py')
        Runner.from_cfg(Config.fromfile(tmp_path / 'mine.py')).train()
        assert bool(cropped) == (number == 1)
        states.append(read_checkpoint(tmp_path / f'{number}/iter_2.pth')['state_dict'])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert HOOK in (tmp_path / '1/mine.py').read_text()
