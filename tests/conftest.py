"""Shared pieces: a tiny Swin, its weights on disk, a tiny data set, and the tools as a user runs them."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

import e3va_mm  # noqa: F401  (registers the backbones)
from benchmarks.shapes import write_shapes
from benchmarks.tests.forked import environment, run_process, run_script
from e3va_mm.highway.adapters import single_delta

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def pytest_collection_modifyitems(items) -> None:
    # The slowest file goes first: a worker takes a file at a time, and the other should not wait for it at the end.
    items.sort(key=lambda item: item.path.name != 'test_tools.py')


def swin(scope='mmseg', **overrides) -> dict:
    """Config of a stock Swin with 0.1 M parameters."""
    tiny = dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=7)
    return dict(type=f'{scope}.SwinTransformer', **{**tiny, **overrides})


VIT = dict(embed_dim=32, depth=4, num_heads=2)
SWIN = dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=4, img_size=64)
HIERA = dict(embed_dim=8, num_heads=1, stages=(1, 2, 1, 1), img_size=64)
# A tiny model of each of timm's families, by the name of a published one.
TIMM_MODELS = {
    'vit_tiny_patch16_224': VIT,
    'vit_large_patch14_dinov2': dict(VIT, init_values=0.5),
    'vit_giant_patch14_dinov2': dict(VIT, init_values=0.5),
    'vit_large_patch14_reg4_dinov2': dict(VIT, init_values=0.5),
    'vit_base_patch16_clip_224': VIT,
    'deit_tiny_distilled_patch16_224': VIT,
    'eva02_large_patch14_224': VIT,
    'vit_large_patch16_dinov3': VIT,
    'vit_7b_patch16_dinov3': VIT,
    'samvit_base_patch16': dict(VIT, window_size=3, global_attn_indexes=(1, 3), img_size=64),
    'swin_tiny_patch4_window7_224': SWIN,
    'swinv2_base_window12_192': SWIN,
    'hiera_tiny_224': HIERA,
    'hiera_small_abswin_256': HIERA,
    'convnext_base': dict(dims=(8, 12, 16, 24), depths=(2, 2, 2, 2)),
    'convnextv2_atto': dict(dims=(8, 12, 16, 24), depths=(2, 2, 2, 2)),
    'pvt_v2_b0': dict(embed_dims=(8, 12, 16, 24), num_heads=(1, 2, 4, 8)),
    'tf_efficientnet_lite0': {},
    'mobilenetv2_050': {},
    'mobilenetv3_small_050': {},
}


def timm_features(model_name='vit_tiny_patch16_224', **options) -> dict:
    """Config of a tiny timm model."""
    return dict(type='TIMMFeatures', model_name=model_name, **TIMM_MODELS[model_name.partition('.')[0]], **options)


MIT = dict(type='mmseg.MixVisionTransformer', embed_dims=8, num_layers=[1, 2, 1, 1], num_heads=[1, 2, 4, 8])
FAMILIES = {**{name: timm_features(name) for name in TIMM_MODELS}, 'mmseg MiT': MIT}
every_family = pytest.mark.parametrize('backbone', FAMILIES.values(), ids=FAMILIES)


def images(size=(57, 83)):
    """Two random images, of an odd size unless given another; always the same."""
    torch.manual_seed(3)
    return torch.randn(2, 3, *size)


def e3va(backbone=None, **options):
    """A built E3VABackbone with its (random or pre-trained) base in place, exact also where there is a GPU."""
    torch.manual_seed(0)
    model = MODELS.build(dict(dict(type='E3VABackbone', backbone=backbone or swin(), frozen_dtype=None), **options))
    model.init_weights()
    return model


def outputs_of_stock(model, images):
    """What the wrapped stock module returns by its own forward."""
    with torch.no_grad():
        return model.backbone(images)


def reference_delta(taps, weights):
    """Sum of the adapters' deltas in plain autograd, the definition of ``stage_delta``: taps (..., C) -> (..., C)."""
    return sum(single_delta(tap, *fields) for tap, *fields in zip(taps, weights.down_in, *weights.bottleneck))


class Recorder:
    """An ear that keeps all that it hears: taps and levels (with their sizes) by stage."""

    def __init__(self):
        self.taps, self.levels = {}, {}

    def tap(self, stage, tokens, size):
        self.taps.setdefault(stage, []).append(tokens.clone())

    def start(self, stage, tokens):
        pass

    def level(self, stage, tokens, size):
        self.levels[stage] = tokens.clone(), size


def saved_bytes(model, images) -> int:
    """Bytes that a forward pass keeps for the backward pass, the weights not counted."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    )
    with hooks:
        model(images)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in owned)


def stir(model, scale=0.1):
    """Moves the trained parameters away from their start, where the highway is still silent."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def graph_nodes(outputs) -> set:
    """All nodes of the autograd graph behind ``outputs``."""
    nodes, seen = [output.grad_fn for output in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    return seen


@pytest.fixture(scope='session')
def weights(tmp_path_factory) -> str:
    """A checkpoint of the tiny Swin, in its own key names."""
    torch.manual_seed(1)
    backbone = MODELS.build(swin())
    backbone.init_weights()
    path = tmp_path_factory.mktemp('weights') / 'swin_tiny.pth'
    torch.save({'state_dict': {f'backbone.{key}': value for key, value in backbone.state_dict().items()}}, path)
    return str(path)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory) -> Path:
    """The generated data set, 8 + 4 images of 64 x 64."""
    root = tmp_path_factory.mktemp('shapes')
    write_shapes(root, image_size=64, splits={'train': 8, 'val': 4})
    return root


_CONFIG = """
_base_ = '{base}'
data_root = '{data}/'
max_iters = 4
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
val_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2, max_keep_ckpts=2))
randomness = dict(seed=0)
model = dict(backbone=dict(backbone=dict(
    embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), init_cfg=dict(checkpoint='{weights}'))))
"""
_SEG = """
model['decode_head'] = dict(in_channels=[12, 24, 48, 96], channels=16)
model['auxiliary_head'] = dict(in_channels=48, channels=8)
"""
_DET = """
model['neck'] = dict(in_channels=[24, 48, 96], out_channels=16)
model['bbox_head'] = dict(in_channels=16, feat_channels=16, stacked_convs=1)
model['test_cfg'] = dict(score_thr=0.0, max_per_img=10)
test_evaluator = val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
"""


def _write_config(path: Path, base: str, task: str, data: Path, weights: str) -> Path:
    base = ROOT / 'configs' / 'shapes' / base
    path.write_text(_CONFIG.format(base=base, data=data, weights=weights) + task)
    return path


@pytest.fixture(scope='session')
def seg_config(tmp_path_factory, shapes, weights) -> Path:
    """E3VA for segmentation, shrunk to seconds, by a config as a user writes it."""
    path = tmp_path_factory.mktemp('configs') / 'seg.py'
    return _write_config(path, 'e3va-swin-nano_upernet_1xb8-600_shapes-96x96.py', _SEG, shapes, weights)


@pytest.fixture(scope='session')
def det_config(tmp_path_factory, shapes, weights) -> Path:
    path = tmp_path_factory.mktemp('configs') / 'det.py'
    return _write_config(path, 'retinanet_e3va-swin-nano_fpn_1xb8-800_shapes.py', _DET, shapes, weights)


def tool(*command, ok=True, with_peft=False, **variables) -> str:
    """Runs a script of the repository; returns all that it printed. peft needs transformers."""
    command = [*map(str, command)]
    start = run_process if with_peft or command[0] == '-c' else run_script
    code, output = start(command, ROOT, environment(with_transformers=with_peft, **variables))
    assert (code == 0) == ok, output[-3000:]
    return output


def pretrained(weights, **options):
    return dict(backbone=swin(init_cfg=dict(type='Pretrained', checkpoint=weights)), **options)


def build(**options):
    return MODELS.build(dict(dict(type='E3VABackbone', frozen_dtype=None), **options))


class Hostile:
    """Writes a file where it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), 'w'))


@pytest.fixture
def error_of(monkeypatch):
    """What a tool raises; in this process, since it takes seconds to import the toolboxes."""

    def run(name, *arguments) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        # The tools set it for their process, which is this one here.
        monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
        with pytest.raises(Exception) as raised:
            runpy.run_path(name, run_name='__main__')
        return str(raised.value)

    return run
