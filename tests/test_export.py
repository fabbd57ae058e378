"""Models go to where there is no Python: traced, exported, as ONNX, by the tool, and counted."""

import runpy
from importlib.util import find_spec
from types import SimpleNamespace

import mmdet.models  # noqa: F401  (registers ResNet)
import mmseg.models  # noqa: F401  (registers MiT)
import pytest
import torch
from conftest import FAMILIES, ROOT, build, e3va, pretrained, stir, swin
from mmengine.analysis import get_model_complexity_info
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from torch import nn
from torch.testing import assert_close

from e3va_mm.launch import read_config
from e3va_mm.tune import tune

# One of each row of the table of families, and Hiera's other position embedding.
LISTED = (
    'vit_tiny_patch16_224',
    'vit_large_patch16_dinov3',
    'samvit_base_patch16',
    'swinv2_base_window12_192',
    'hiera_tiny_224',
    'hiera_small_abswin_256',
    'convnextv2_atto',
    'pvt_v2_b0',
    'mobilenetv3_small_050',
    'mmseg MiT',
)
BACKBONES = {
    'mm Swin': swin(depths=(2, 1, 1, 1)),
    'ResNet': dict(type='mmdet.ResNet', depth=18),
    'found': dict(type='mmdet.MobileNetV2', out_indices=(1, 2)),
    **{name: FAMILIES[name] for name in LISTED},
}
BACKBONES['swinv2_base_window12_192'] = dict(BACKBONES['swinv2_base_window12_192'], depths=(2, 1, 1, 1))
every_listed = pytest.mark.parametrize('name', BACKBONES)
# Whose way to ONNX has something of its own (Swin's is tried with open sizes); for the others it would take long.
OWN_WAY = ('ResNet', 'vit_tiny_patch16_224', 'samvit_base_patch16', 'hiera_tiny_224')
# Those of which heights and widths may stay open are tried with one that needs most care.
SIZE, OTHER = (64, 96), (96, 64)


class Maps(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image):
        return tuple(self.backbone(image))


def trained(backbone, **options) -> Maps:
    model = Maps(stir(e3va(backbone, **options)).eval())
    with torch.no_grad():
        model(torch.randn(1, 3, *SIZE))
    return model


def onnx_maps(program, path, *images):
    """What onnxruntime makes of each image."""
    runtime = pytest.importorskip('onnxruntime')
    program.save(path)
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return [[torch.from_numpy(found) for found in session.run(None, {'image': image.numpy()})] for image in images]


def assert_near(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


@every_listed
@torch.no_grad()
def test_families_are_exported(name, tmp_path):
    """By ``torch.export``, and from there to ONNX; another image than the traced one gives what the model gives."""
    model, image = trained(BACKBONES[name]), torch.randn(1, 3, *SIZE)
    expected = model(image)
    program = torch.export.export(model, (torch.randn(1, 3, *SIZE),), strict=False)
    assert_near(program.module()(image), expected)
    assert_close(model(image), expected, rtol=0, atol=0)  # It has left nothing behind in the model.
    if name not in OWN_WAY:
        return
    pytest.importorskip('onnxscript')
    onnx = torch.onnx.export(program, dynamo=True, input_names=['image'], verbose=False)
    assert_near(onnx_maps(onnx, tmp_path / 'maps.onnx', image)[0], expected)


@every_listed
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@torch.no_grad()
def test_families_are_traced(name):
    model = trained(BACKBONES[name])
    traced = torch.jit.trace(model, torch.randn(1, 3, *SIZE), check_trace=False)
    image = torch.randn(1, 3, *SIZE)
    assert_near(traced(image), model(image))


@pytest.mark.parametrize(
    'options',
    [dict(mixer=dict(width=4)), dict(mixer=dict(width=4), graph_stages=1), dict(backbone=swin(out_indices=(0, 1)))],
    ids=['mixers', 'graph', 'ends early'],
)
def test_options_are_exported(options):
    """With gradient enabled too: a graph has none."""
    model, image = trained(**{'backbone': BACKBONES['mm Swin'], **options}), torch.randn(1, 3, *SIZE)
    program = torch.export.export(model, (torch.randn(1, 3, *SIZE),), strict=False)
    assert_near(program.module()(image), model(image))


@torch.no_grad()
def test_sizes_stay_open(tmp_path):
    """Of Swin, whose windows depend on them."""
    pytest.importorskip('onnxscript')
    backbone = swin(depths=(2, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1))
    model, images = trained(backbone), [torch.randn(1, 3, *size) for size in (SIZE, OTHER)]
    sizes = {2: 32 * torch.export.Dim('h'), 3: 32 * torch.export.Dim('w')}
    options = dict(dynamo=True, input_names=['image'], verbose=False, dynamic_shapes=(sizes,))
    onnx = torch.onnx.export(model, (torch.randn(1, 3, 128, 96),), **options)
    for found, image in zip(onnx_maps(onnx, tmp_path / 'maps.onnx', *images), images):
        assert_near(found, model(image))


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_operations_of_the_highway_are_counted(weights):
    """The stock backbone's, and beside them those of each tap: its products with P, Q, P' and Q'."""
    stock, model = MODELS.build(swin()), build(**pretrained(weights))
    own = 0
    for stage, adapters in enumerate(model.highway):
        tokens, (number, dims, width) = (56 // 2**stage) ** 2, adapters.down_in.shape
        own += tokens * number * width * (2 * dims + 2 * adapters.up_in.shape[1])
    flops = [
        get_model_complexity_info(each, (3, 224, 224), show_table=False)['flops']
        for each in map(in_eval, (stock, model))
    ]
    assert own < flops[1] - flops[0] < 1.3 * own


ADDING = {name: dict(method=name) for name in ('e3va', 'lora', 'mona', 'adapter', 'adaptformer')}
ADDING['mixers'] = dict(method='e3va', mixer=dict(width=8))
COUNTED = [
    *(('mmseg', name) for name in ('e3va', 'lora', 'adapter', 'partial', 'bitfit')),
    *(('mmdet', name) for name in ('e3va', 'mixers', 'mona', 'adaptformer', 'frozen')),
]


@pytest.fixture(scope='module')
def stock_configs(seg_config, det_config):
    """By toolbox, a stock config, and what the toolbox's tool counts of it."""
    configs = {}
    for toolbox, path in (('mmseg', seg_config), ('mmdet', det_config)):
        config = read_config(str(path), {})
        config.model.backbone = dict(config.model.backbone.backbone, depths=(1, 1, 1, 1))
        config.val_dataloader.update(num_workers=0, persistent_workers=False)
        configs[toolbox] = config, counted(toolbox, config, path.with_name(f'stock_{toolbox}.py'))
    return configs


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(('toolbox', 'name'), COUNTED)
def test_get_flops_of_the_toolboxes_counts_every_method(stock_configs, tmp_path, toolbox, name):
    config, of_stock = stock_configs[toolbox]
    of_tuned = counted(toolbox, tune(config, **ADDING.get(name, dict(method=name))), tmp_path / 'tuned.py')
    if name in ADDING:
        assert of_tuned['flops'] > of_stock['flops'] and of_tuned['params'] > of_stock['params']
    else:
        assert of_tuned == of_stock


def counted(toolbox: str, config, path) -> dict[str, float]:
    """Operations of an image, and parameters, by the toolbox's own tool."""
    # Config.dump takes seconds to format it.
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in config.to_dict().items()))
    tool = find_spec(toolbox).submodule_search_locations[0] + '/.mim/tools/analysis_tools/get_flops.py'
    args = SimpleNamespace(config=str(path), cfg_options=None, shape=[64], num_images=1)
    found = runpy.run_path(tool)['inference'](args, MMLogger.get_instance('flops'))
    return {key: float(found[key][:-1]) * {'K': 1e3, 'M': 1e6}[found[key][-1]] for key in ('flops', 'params')}


def in_eval(model: nn.Module) -> nn.Module:
    model.eval()  # mmdet's and mmseg's SwinTransformer return None.
    return model


def saved(config_path, path):
    """A checkpoint of a config as training writes it."""
    config = read_config(str(config_path), {'model.backbone.backbone.depths': (1, 1, 1, 1)})
    with MODELS.switch_scope_and_registry(config.default_scope) as registry:
        model = registry.build(config.model)
    model.init_weights()
    meta = {'cfg': config.pretty_text, 'dataset_meta': {'classes': ('disc', 'box')}}
    torch.save({'state_dict': stir(model, 0.02).state_dict(), 'meta': meta}, path)
    return path


@pytest.fixture
def run_tool(monkeypatch, capsys):
    def run(*arguments) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr('sys.argv', ['tools/export.py', *map(str, arguments)])
        monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
        runpy.run_path('tools/export.py', run_name='__main__')
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_the_tool_writes_what_onnxruntime_repeats(task, request, run_tool, tmp_path):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    checkpoint = saved(request.getfixturevalue(f'{task}_config'), tmp_path / 'trained.pth')
    printed = run_tool(checkpoint, tmp_path / 'model.onnx', '--size', 64, 64)
    assert 'onnxruntime differs from torch by' in printed
    model = onnx.load(tmp_path / 'model.onnx')
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert '0..255' in notes['image'] and notes['classes'] == '["disc", "box"]'
    names = [output.name for output in model.graph.output]
    kinds = [f'{kind}_{level}' for kind in ('cls_scores', 'bbox_preds') for level in range(5)]
    assert names == (['logits'] if task == 'seg' else kinds)


def test_without_its_packages_the_tool_says_what_to_install(seg_config, error_of, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'onnxscript' else find_spec(name))
    assert "pip install 'e3va_mm[onnx]'" in error_of('tools/export.py', seg_config, tmp_path / 'model.onnx')


def test_detectors_of_several_parts_are_refused_by_name():
    tool = runpy.run_path(ROOT / 'tools/export.py')
    with pytest.raises(ValueError, match='FasterRCNN can not be exported, only segmentors and'):
        tool['Deployed'](type('FasterRCNN', (nn.Module,), {})())


def test_open_sizes_are_refused_where_windows_are_prepared():
    tool = runpy.run_path(ROOT / 'tools/export.py')
    model = nn.Module()
    model.backbone, deployed = e3va(FAMILIES['hiera_tiny_224']), nn.Module()
    deployed.model = model
    with pytest.raises(ValueError, match='--dynamic does not go with HieraFamily'):
        tool['to_onnx'](deployed, torch.randn(1, 3, *SIZE), [], dynamic=True)
