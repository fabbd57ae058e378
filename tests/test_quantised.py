"""Frozen linear layers in 8 and 4 bits, by torchao."""

import copy
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import MIT, e3va, images, stir, swin, timm_features
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from torch import nn

from e3va_mm.backbones.shared_pass import SharedPass
from e3va_mm.hooks.report import count_parameters

TYPES = ('int8', 'nf4')
# Of the norm of the maps, for random weights; and bytes a weight, at most.
ERROR = {'int8': 0.04, 'nf4': 0.35}
BYTES = {'int8': 1.2, 'nf4': 0.6}
VIT = dict(embed_dims=64, num_layers=2, num_heads=2, img_size=64)
BACKBONES = {
    'mm Swin': swin(embed_dims=32),
    # Attention of torch's, whose weights stay as they are; the MLP's are quantised.
    'mm ViT': dict(type='mmseg.VisionTransformer', **VIT, out_indices=[1]),
    # The weights of qkv are read without calling it.
    'mm BEiT': dict(type='mmseg.BEiT', **VIT, out_indices=[0, 1]),
    **{
        name: timm_features(name)
        for name in (
            'vit_tiny_patch16_224',
            'vit_large_patch16_dinov3',
            'eva02_large_patch14_224',
            'samvit_base_patch16',
            'swin_tiny_patch4_window7_224',
            'swinv2_base_window12_192',
            'hiera_tiny_224',
            'convnext_base',
            'pvt_v2_b0',
        )
    },
}  # fmt: skip
needs_torchao = pytest.mark.skipif(find_spec('torchao') is None, reason='needs torchao')
every_type = pytest.mark.parametrize('frozen_dtype', TYPES)


def linears(model) -> dict[str, nn.Linear]:
    return {name: each for name, each in model.backbone.named_modules() if isinstance(each, nn.Linear)}


def num_bytes(weight) -> int:
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


def wrapper(weights, frozen_dtype, **options) -> dict:
    backbone = swin(embed_dims=32, init_cfg=dict(type='Pretrained', checkpoint=weights))
    return dict(dict(type='E3VABackbone', backbone=backbone, frozen_dtype=frozen_dtype), **options)


def pretrained(weights, frozen_dtype=None, **options) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS.build(wrapper(weights, frozen_dtype, **options))
    model.init_weights()
    return model


def error(outputs, expected) -> float:
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(outputs, expected))


@pytest.fixture(scope='module')
def wide_weights(tmp_path_factory) -> str:
    """A checkpoint of a Swin whose layers have whole blocks of NF4."""
    torch.manual_seed(1)
    backbone = MODELS.build(swin(embed_dims=32))
    backbone.init_weights()
    path = tmp_path_factory.mktemp('weights') / 'swin.pth'
    torch.save(backbone.state_dict(), path)
    return str(path)


@needs_torchao
@every_type
@pytest.mark.parametrize('backbone', BACKBONES.values(), ids=BACKBONES)
def test_families(backbone, frozen_dtype):
    exact, model = (e3va(backbone, frozen_dtype=each) for each in ('bfloat16', frozen_dtype))
    quantised = [each.weight for each in linears(model).values() if hasattr(each.weight, '__tensor_flatten__')]
    assert model.num_quantised == sum(weight.numel() for weight in quantised) > 0
    shape = images((64, 64))
    outputs = model(shape)
    assert all(output.dtype == torch.float32 for output in outputs)
    assert error(outputs, exact(shape)) < ERROR[frozen_dtype]
    sum(output.square().sum() for output in stir(model)(shape)).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)


@needs_torchao
@every_type
def test_weights(wide_weights, frozen_dtype):
    """Norms, embeddings, biases and all that is trained are as with bfloat16, and the base is the published one."""
    exact, model = (pretrained(wide_weights, frozen_dtype=each) for each in ('bfloat16', frozen_dtype))
    for name, layer in linears(model).items():
        own, weight = layer.weight, linears(exact)[name].weight
        assert own.shape == weight.shape and not isinstance(own, nn.Parameter)
        assert num_bytes(own) <= BYTES[frozen_dtype] * weight.numel()
        wide = own.get_original_weight() if frozen_dtype == 'nf4' else own.dequantize()
        assert (wide - weight).norm() < 0.12 * weight.norm()
        assert not torch.equal(wide, weight)
    parameters = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameters[name].dtype and parameter.requires_grad == parameters[name].requires_grad
    left = {f'backbone.{name}.weight' for name in linears(model)}
    assert parameters.keys() - dict(model.named_parameters()).keys() == left
    assert torch.equal(model.base_fingerprint(), pretrained(wide_weights).base_fingerprint())
    counts = [count_parameters(nn.ModuleDict(dict(backbone=each))) for each in (model, exact)]
    assert counts[0] == counts[1]


@needs_torchao
@every_type
@pytest.mark.parametrize('other', [None, 'int8', 'nf4'])
def test_checkpoints_fit_every_type(wide_weights, frozen_dtype, other):
    model, fresh = (pretrained(wide_weights, frozen_dtype=each) for each in (frozen_dtype, other))
    state = stir(model).state_dict()
    assert state.keys() == fresh.state_dict().keys()
    assert not any(name.startswith('backbone.stages') for name in state)
    fresh.load_state_dict(state)
    assert error(fresh(images()), model(images())) < 2 * ERROR['nf4']
    # Where the base has not been loaded before, it comes with the checkpoint.
    again = MODELS.build(wrapper(wide_weights, frozen_dtype))
    again.load_state_dict(fresh.state_dict())
    assert torch.equal(again(images())[3], model(images())[3])


@needs_torchao
@every_type
def test_nothing_wide_is_held(wide_weights, frozen_dtype):
    """Before the base is loaded, the model has no weights there at all; the first forward loads it at the latest."""
    model = MODELS.build(wrapper(wide_weights, frozen_dtype))
    assert all(layer.weight is None for layer in linears(model).values())
    held = sum(each.nbytes for each in [*model.parameters(), *model.buffers()])
    model(images())
    assert model._quantised.stock is None
    assert held == sum(each.nbytes for each in [*model.parameters(), *model.buffers()])


@needs_torchao
@every_type
def test_gradient_through_quantised_blocks(wide_weights, frozen_dtype):
    """As of the same weights in bfloat16."""
    options = dict(mixer=dict(width=8), graph_stages=2)
    model, exact = (pretrained(wide_weights, each, **options) for each in (frozen_dtype, 'bfloat16'))
    with torch.no_grad():
        for name, layer in linears(model).items():
            weight = layer.weight
            wide = weight.get_original_weight() if frozen_dtype == 'nf4' else weight.dequantize()
            linears(exact)[name].weight.copy_(wide)
    for each in (model, exact):
        torch.manual_seed(1)
        sum(output.square().sum() for output in stir(each)(images())).backward()
    others = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert error([parameter.grad], [others[name].grad]) < 0.05


@needs_torchao
@every_type
def test_copies(wide_weights, frozen_dtype):
    model = stir(pretrained(wide_weights, frozen_dtype))
    expected = model(images())[3]
    assert torch.equal(copy.deepcopy(model)(images())[3], expected)
    average = ExponentialMovingAverage(model)
    for _ in range(2):
        average.update_parameters(model)
    assert torch.allclose(average.module(images())[3], expected)
    # A copy's weights may move, and do not take those of the model with them.
    average.module.to('meta')
    assert torch.equal(model(images())[3], expected)


@needs_torchao
@pytest.mark.parametrize('is_loaded', [False, True])
def test_distributed(wide_weights, tmp_path, is_loaded):
    """Parameters are broadcast when the wrapper is made: before weights are loaded by mmengine's Runner, or after."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        for frozen_dtype in TYPES:
            model = MODELS.build(wrapper(wide_weights, frozen_dtype))
            if is_loaded:
                model.init_weights()
            distributed = nn.parallel.DistributedDataParallel(model)
            model.init_weights()
            sum(output.square().sum() for output in distributed(images())).backward()
            assert torch.equal(model(images())[3], pretrained(wide_weights, frozen_dtype)(images())[3])
    finally:
        torch.distributed.destroy_process_group()


@needs_torchao
@every_type
def test_conversions(wide_weights, frozen_dtype):
    """Devices are followed, types are not."""
    model = pretrained(wide_weights, frozen_dtype)
    layers = linears(model)
    kinds, sizes = {type(each.weight) for each in layers.values()}, [num_bytes(each.weight) for each in layers.values()]
    expected = model(images())[3]
    assert torch.equal(model.half().float()(images())[3].isfinite(), expected.isfinite())
    assert {type(each.weight) for each in layers.values()} == kinds
    assert [num_bytes(each.weight) for each in layers.values()] == sizes
    assert {each.weight.device.type for each in linears(model.to('meta')).values()} == {'meta'}


@needs_torchao
@every_type
def test_under_autocast(wide_weights, frozen_dtype):
    model = stir(pretrained(wide_weights, frozen_dtype))
    expected = model(images())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = model(images())
    assert error(outputs, expected) < 0.05


@needs_torchao
@every_type
def test_base_of_a_stock_model(wide_weights, frozen_dtype):
    """``load_from`` of a whole one brings weights when others have been quantised already."""
    stock = MODELS.build(swin(embed_dims=32))
    stock.init_weights()
    model, fresh = pretrained(wide_weights, frozen_dtype), e3va(swin(embed_dims=32), frozen_dtype=frozen_dtype)
    model.load_state_dict(stock.state_dict())
    fresh.load_state_dict(stock.state_dict())
    assert torch.equal(model.base_fingerprint(), fresh.base_fingerprint())
    assert torch.equal(model(images())[3], fresh(images())[3])


@needs_torchao
@every_type
@pytest.mark.parametrize('method', ['Frozen', 'Partial', 'Mona'])
def test_methods(wide_weights, frozen_dtype, method):
    config = wrapper(wide_weights, frozen_dtype, type='TunedBackbone', method=dict(type=method))
    model, exact = (MODELS.build(dict(config, frozen_dtype=each)) for each in (frozen_dtype, 'bfloat16'))
    for each in (model, exact):
        torch.manual_seed(1)
        each.init_weights()
    trained = {name for name, each in exact.named_parameters() if each.requires_grad}
    assert {name for name, each in model.named_parameters() if each.requires_grad} == trained
    assert error(model(images()), exact(images())) < ERROR[frozen_dtype]
    if trained:
        sum(output.square().sum() for output in model(images())).backward()
        assert all(each.grad is not None for name, each in model.named_parameters() if name in trained)


@needs_torchao
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(backbone=MIT), 'linear layers, and this MixVisionTransformer has none'),
        (dict(backbone=dict(type='mmseg.ResNet', depth=18)), 'linear layers, and this ResNet has none'),
        (dict(type='TunedBackbone', method=dict(type='Full')), 'linear layers, and this SwinTransformer has none'),
        (dict(type='TunedBackbone', method=dict(type='LoRA')), "frozen_dtype='nf4' is not for LoRA"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(dict(type='E3VABackbone', backbone=swin(), frozen_dtype='nf4'), **options))


@needs_torchao
def test_device_without_the_type(monkeypatch, wide_weights):
    def fail(weight):
        raise TypeError('Trying to convert to what this backend has not')

    monkeypatch.setitem(sys.modules['e3va_mm.backbones.quantised'].QUANTISED, 'int8', fail)
    message = "frozen_dtype='int8' does not run on cpu: take 'bfloat16' .Trying to convert"
    with pytest.raises(ValueError, match=message):
        pretrained(wide_weights, 'int8')


@every_type
def test_without_torchao(monkeypatch, frozen_dtype):
    monkeypatch.setitem(sys.modules, 'torchao', None)
    message = f"frozen_dtype='{frozen_dtype}' needs torchao .*: pip install 'e3va_mm.quant.'"
    with pytest.raises(ImportError, match=message):
        MODELS.build(dict(type='E3VABackbone', backbone=swin(), frozen_dtype=frozen_dtype))


@needs_torchao
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@every_type
def test_on_cuda(frozen_dtype):
    """Nothing wide but one layer is on the device while weights are loaded; the maps are those of the CPU."""
    backbone = dict(timm_features(), embed_dim=512, depth=8, num_heads=8)
    model = MODELS.build(dict(type='E3VABackbone', backbone=backbone, frozen_dtype=frozen_dtype)).cuda()
    # cuBLAS takes its workspace with the first product.
    nn.functional.linear(*2 * [torch.eye(64, dtype=torch.bfloat16, device='cuda')])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.init_weights()
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert held < BYTES[frozen_dtype] * model.num_quantised
    assert peak < held + 2**27
    assert error([each.cpu() for each in model(images().cuda())], model.cpu()(images())) < 0.05
    with torch.autocast('cuda', dtype=torch.float16):
        outputs = stir(model.cuda())(images().cuda())
    sum(output.float().square().sum() for output in outputs).backward()
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.requires_grad)


@needs_torchao
def test_highways_share_a_quantised_base(wide_weights):
    kinds = ('int8', 8), ('int8', 4), ('nf4', 8)
    one, two, other = (stir(pretrained(wide_weights, dtype, adapter=dict(rank=rank))).eval() for dtype, rank in kinds)
    expected, shared = two(images()), SharedPass('cpu')
    shared.join('one', one)
    shared.join('two', two)
    assert all(layer.weight is linears(one)[name].weight for name, layer in linears(two).items())
    with shared.one_image(), torch.no_grad():
        maps = [model(images()) for model in (one, two)]
    assert error(maps[1], expected) < 1e-2 and error(maps[0], expected) > 0.1
    assert error(two(images()), expected) == 0  # and by itself
    with pytest.raises(ValueError, match="of 'other' is not that of 'one': frozen_dtype is nf4, not int8"):
        shared.join('other', other)
