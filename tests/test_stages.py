"""Every family of backbones behind the highway: timm's, mmseg's MiT, and taps named in the config."""

import copy

import mmdet.models  # noqa: F401  (registers ResNet)
import mmseg.models  # noqa: F401  (registers MiT)
import pytest
import timm
import torch
from conftest import TIMM_MODELS, e3va, stir, timm_features
from mmengine.registry import MODELS
from safetensors.torch import save_file
from torch.testing import assert_close

from e3va_mm import timm_stages
from e3va_mm.backbones import CheckpointMismatchError
from e3va_mm.taps import SwinTaps, build_taps

MIT = dict(type='mmseg.MixVisionTransformer', embed_dims=8, num_layers=[1, 2, 1, 1], num_heads=[1, 2, 4, 8])
FAMILIES = {**{name: timm_features(name) for name in TIMM_MODELS}, 'mmseg MiT': MIT}
RESNET = dict(type='mmdet.ResNet', depth=18, norm_eval=True, zero_init_residual=False)
RESNET_TAPS = [
    dict(taps=[f'layer{stage}.{block}.bn2' for block in range(2)], end=f'layer{stage}', dims=64 * 2 ** (stage - 1))
    for stage in range(1, 5)
]
SIZES = [(64, 96), (57, 83)]
every_family = pytest.mark.parametrize('backbone', FAMILIES.values(), ids=FAMILIES)


def images(size=(57, 83), batch=2):
    torch.manual_seed(3)
    return torch.randn(batch, 3, *size)


@every_family
@pytest.mark.parametrize('size', SIZES)
def test_starts_at_the_frozen_backbone(backbone, size):
    model = e3va(backbone).train()
    with torch.no_grad():
        expected = model.backbone(images(size))
    outputs = model(images(size))
    assert_close(list(outputs), list(expected), rtol=1e-5, atol=1e-5)
    assert [output.shape[1] for output in outputs] == [model.taps.embed_dims[index] for index in model.taps.out_indices]


@every_family
@torch.no_grad()
def test_taps_add_up_to_what_a_stage_does(backbone):
    """The highway's formula rests on this: a stage ends at its start plus its taps."""
    taps = e3va(backbone).taps
    tokens, size = taps.embed(images())
    for index in range(taps.num_stages):
        seen = []
        end = taps.run_stage(index, tokens, size, seen.append)
        assert len(seen) == taps.num_taps[index]
        assert_close(taps.patches(end), sum(seen, taps.patches(tokens)), rtol=1e-4, atol=1e-4)
        assert size[0] * size[1] == taps.patches(end).shape[1]
        if index + 1 < taps.num_stages:
            tokens, size, carried = taps.follow(index, end, size)
            assert carried.shape == taps.patches(tokens).shape


@every_family
def test_only_highway_and_norms_train(backbone):
    model = stir(e3va(backbone)).train()
    in_graph = []
    for blocks in model.taps.stages.blocks:
        for block in blocks:
            block.register_forward_hook(lambda module, args, output: in_graph.append(output.requires_grad))
    outputs = model(images())
    sum(output.square().mean() for output in outputs).backward()
    assert in_graph and not any(in_graph)
    norms = tuple(f'backbone.{name}.' for name in model.taps.norm_names)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(('highway.', *norms)), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


@every_family
def test_checkpoint_round_trip(backbone, tmp_path):
    model = stir(e3va(backbone)).eval()
    torch.save(model.state_dict(), tmp_path / 'adapter.pth')
    # The same seed gives the same random base.
    loaded = e3va(backbone).eval()
    loaded.load_state_dict(torch.load(tmp_path / 'adapter.pth', weights_only=True))
    assert_close(list(loaded(images())), list(model(images())))
    assert len(model.state_dict()) < len(model.backbone.state_dict())


def test_checkpoint_of_another_base(tmp_path):
    paths = [tmp_path / 'one.pth', tmp_path / 'other.pth']
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        torch.save(MODELS.build(timm_features()).model.state_dict(), path)
    one, other = (e3va(timm_features(checkpoint=str(path))) for path in paths)
    with pytest.raises(CheckpointMismatchError, match=r"another frozen base: .*backbone\.checkpoint='.*other\.pth'"):
        other.load_state_dict(one.state_dict())


def test_an_averaged_copy_runs_its_own_modules():
    model = stir(e3va(timm_features()))
    clone = copy.deepcopy(model)
    assert clone.taps.stages.model is clone.backbone.model is not model.backbone.model
    before = model(images())
    stir(clone)
    assert_close(list(model(images())), list(before))
    assert (clone(images())[0] - before[0]).abs().max() > 1e-3


FEATURES = {
    'convnext_base': lambda model, x: model.forward_intermediates(x, intermediates_only=True),
    'pvt_v2_b0': lambda model, x: model.forward_intermediates(x, intermediates_only=True),
    'samvit_base_patch16': lambda model, x: model.forward_intermediates(x, intermediates_only=True),
    'swin_tiny_patch4_window7_224': lambda model, x: model.forward_intermediates(x, intermediates_only=True),
    'swinv2_base_window12_192': lambda model, x: model.forward_intermediates(x, intermediates_only=True),
    'tf_efficientnet_lite0': lambda model, x: model.forward_intermediates(x, intermediates_only=True)[1:],
    'mobilenetv3_small_050': lambda model, x: model.forward_intermediates(x, intermediates_only=True)[1:],
    'vit_tiny_patch16_224': lambda model, x: model.forward_intermediates(x, norm=True, intermediates_only=True),
    'eva02_large_patch14_224': lambda model, x: model.forward_intermediates(x, intermediates_only=True),
    'vit_large_patch16_dinov3': lambda model, x: model.forward_intermediates(x, norm=True, intermediates_only=True),
}


@pytest.fixture
def published(tmp_path):
    """A complete timm model, and our backbone with its weights, read from a file."""

    def make(name):
        source = MODELS.build(timm_features(name)).create(pretrained=False).eval()
        torch.save(stir(source).state_dict(), tmp_path / 'weights.pth')
        backbone = MODELS.build(timm_features(name, checkpoint=str(tmp_path / 'weights.pth')))
        backbone.init_weights()
        return source, backbone.eval()

    return make


@pytest.mark.parametrize('name', FEATURES)
@torch.no_grad()
def test_agrees_with_timm(name, published):
    """Norms aside, where timm's features have none: ours are applied to what timm returns."""
    source, backbone = published(name)
    inputs = images((64, 96))
    # Patches of 14 are made to cover 16 pixels.
    resized = torch.nn.functional.interpolate(inputs, (56, 84), mode='bilinear', align_corners=False)
    found, expected = backbone(inputs), FEATURES[name](source, resized if 'patch14' in name else inputs)
    assert len(found) == len(expected) == 4
    timm_has_norm = name in ('vit_tiny_patch16_224', 'vit_large_patch16_dinov3', 'pvt_v2_b0')
    for norm, one, other in zip(backbone.norm_names, found, expected):
        other = other.permute(0, 2, 3, 1)
        normed = other if timm_has_norm else backbone.get_submodule(norm)(other)
        assert_close(one, normed.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_last_map_is_what_timm_returns(published):
    source, backbone = published('vit_tiny_patch16_224')
    expected = source.forward_features(images((64, 96)))[:, backbone.stages.num_prefix :]
    assert_close(backbone(images((64, 96)))[-1].flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_weights_from_a_file(tmp_path, suffix):
    source = timm.create_model('vit_tiny_patch16_224', num_classes=7, **TIMM_MODELS['vit_tiny_patch16_224'])
    path = tmp_path / f'weights.{suffix}'
    save_file(source.state_dict(), path) if suffix == 'safetensors' else torch.save(source.state_dict(), path)
    model = e3va(timm_features(checkpoint=str(path)))
    assert_close(model.backbone.model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert_close(model.backbone.norm3.weight, source.norm.weight)


def test_weights_for_another_image_size(tmp_path):
    source = timm.create_model('vit_tiny_patch16_224', img_size=64, **TIMM_MODELS['vit_tiny_patch16_224'])
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    model = e3va(timm_features(checkpoint=str(tmp_path / 'weights.pth')))
    assert model.backbone.model.pos_embed.shape[1] == 1 + 14 * 14


def test_weights_in_the_names_of_the_other_port(tmp_path):
    source = timm.create_model('tf_efficientnet_lite0')
    weights = {f'_blocks.{number}.w': value for number, value in enumerate(source.state_dict().values())}
    weights = dict(zip(['_conv_stem.weight', *list(weights)[1:]], weights.values()))
    torch.save(weights, tmp_path / 'weights.pth')
    model = e3va(timm_features('tf_efficientnet_lite0', checkpoint=str(tmp_path / 'weights.pth')))
    assert_close(model.backbone.model.blocks[6][0].conv_pwl.weight, source.blocks[6][0].conv_pwl.weight)


def damaged(path):
    path.write_bytes(path.read_bytes()[:1000])


def partial(path):
    weights = torch.load(path, weights_only=True)
    del weights['blocks.2.attn.qkv.weight']
    torch.save(weights, path)


def foreign(path):
    torch.save(timm.create_model('convnext_base', dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)).state_dict(), path)


def reshaped(path):
    weights = torch.load(path, weights_only=True)
    weights['blocks.2.attn.qkv.weight'] = torch.zeros(3, 3)
    torch.save(weights, path)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (damaged, 'may be damaged'),
        (partial, 'lacks 1 of the .* blocks.2.attn.qkv.weight'),
        (foreign, 'lacks'),
        (reshaped, 'does not fit VisionTransformer'),
    ],
)
def test_wrong_files_are_refused(tmp_path, change, message):
    path = tmp_path / 'weights.pth'
    torch.save(MODELS.build(timm_features()).model.state_dict(), path)
    change(path)
    with pytest.raises(CheckpointMismatchError, match=message):
        e3va(timm_features(checkpoint=str(path)))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"backbone\.checkpoint='nowhere\.pth'"):
        e3va(timm_features(checkpoint='nowhere.pth'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(model_name='vit_tny_patch16_224'),
            "no model_name='vit_tny_patch16_224'; similar: .*vit_tiny_patch16_224",
        ),
        (dict(model_name='resnet18'), "family 'resnet'; supported are"),
        (dict(model_name='vit_tiny_patch16_224', out_indices=(0, 4)), r'out_indices=\(0, 4\)'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='TIMMFeatures', **options))


def test_compilation_is_for_swin():
    with pytest.raises(ValueError, match='compile_frozen=True is for SwinTransformer only'):
        e3va(timm_features(), compile_frozen=True)


@pytest.mark.parametrize('option', ['recompute_taps', 'compile_frozen'])
def test_options_that_taps_from_the_config_do_not_have(option):
    with pytest.raises(ValueError, match='recompute_taps and compile_frozen need a listed family'):
        e3va(RESNET, taps=RESNET_TAPS, **{option: True})


@pytest.mark.parametrize(
    'options',
    [
        dict(saved_dtype='bfloat16'),
        dict(saved_dtype='float8_e4m3fn', saved_fraction=0.5),
        dict(recompute_taps=True),
        dict(adapter=dict(mixing=3)),
        dict(adapter=dict(basis='pca')),
    ],
    ids=str,
)
def test_options_on_a_vit(options):
    """A rectangular image, so that mixing would fail on transposed or prefixed tokens."""
    model = stir(e3va(timm_features('vit_large_patch14_reg4_dinov2'), **options)).train()
    outputs = model(images((64, 96)))
    sum(output.square().mean() for output in outputs).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    assert all(output.isfinite().all() and output.shape[2:] == (4, 6) for output in outputs)


@pytest.mark.parametrize('backbone', [timm_features(), MIT], ids=['ViT', 'MiT'])
def test_reduced_frozen_precision(backbone):
    model, exact = e3va(backbone, frozen_dtype='bfloat16'), e3va(backbone)
    for one, other in zip(model(images()), exact(images())):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_mit_goes_on_from_its_untrained_norm():
    model = e3va(MIT)
    with torch.no_grad():
        model.backbone.layers[0][2].weight.mul_(3)
        expected, outputs = e3va(MIT)(images()), model(images())
    assert (outputs[0] - expected[0]).abs().max() > 0.1
    assert_close(list(outputs[1:]), list(expected[1:]))


def test_taps_from_the_config():
    model = stir(e3va(RESNET, taps=RESNET_TAPS), 0.0).train()
    with torch.no_grad():
        expected = model.backbone(images())
    outputs = model(images())
    assert_close(list(outputs), list(expected))
    sum(output.square().mean() for output in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(('highway.', 'backbone.e3va_norm')), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert model.taps.num_taps == [2, 2, 2, 2]


ANYWHERE = [dict(type=name) for name in ('Full', 'Frozen', 'BitFit', 'NormTuning', 'Partial')]
TRANSFORMERS = [dict(type='Adapter'), dict(type='AdaptFormer'), dict(type='LoRand'), dict(type='LoRA', r=2)]


def tuned(backbone, method):
    torch.manual_seed(0)
    return MODELS.build(dict(type='TunedBackbone', backbone=backbone, method=method))


@every_family
def test_comparison_methods(backbone):
    torch.manual_seed(0)
    expected = MODELS.build(backbone).eval()(images())
    is_transformer = 'patch' in str(backbone) or backbone.get('model_name') == 'pvt_v2_b0'
    for method in ANYWHERE + TRANSFORMERS * is_transformer:
        model = tuned(backbone, method).train()
        outputs = model(images())
        if method['type'] != 'Full':  # its batch norms and dropout are those of training
            assert_close(list(outputs), list(expected))
        if method['type'] != 'Frozen':
            sum(output.square().mean() for output in stir(model)(images())).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, (method, name)
        assert any(parameter.requires_grad for parameter in model.parameters()) == (method['type'] != 'Frozen')


def test_lora_where_it_would_do_nothing():
    with pytest.raises(ValueError, match=r"target_modules has \['qkv'\], but SwinTransformerV2 uses"):
        tuned(timm_features('swinv2_base_window12_192'), dict(type='LoRA'))
    tuned(timm_features('swinv2_base_window12_192'), dict(type='LoRA', target_modules=['proj']))


@pytest.mark.parametrize('method', ['Mona', 'LST', 'DTL'])
def test_methods_that_need_a_swin(method):
    with pytest.raises(ValueError, match=f'{method} is defined for SwinTransformer only, not for TIMMFeatures'):
        tuned(timm_features(), dict(type=method))


def test_methods_that_need_attention():
    with pytest.raises(ValueError, match='needs blocks with attn and mlp, and InvertedResidual has not both'):
        tuned(timm_features('mobilenetv2_050'), dict(type='Adapter'))


PYRAMID = dict(type='SimpleFeaturePyramid', in_channels=[32] * 4, out_channels=16, num_outs=5)


@pytest.mark.parametrize('given', [1, 4])
def test_pyramid(given):
    neck = MODELS.build({**PYRAMID, 'in_channels': [32] * given})
    levels = neck([torch.randn(2, 32, 5, 7, requires_grad=True) for _ in range(given)])
    assert [tuple(level.shape) for level in levels] == [
        (2, 16, 20, 28), (2, 16, 10, 14), (2, 16, 5, 7), (2, 16, 3, 4), (2, 16, 2, 2)
    ]  # fmt: skip
    sum(level.sum() for level in levels).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(scales=(3, 1)), 'scales must be'),
        (dict(in_channels=[32] * 3), 'one entry or 4'),
        (dict(num_outs=2), 'num_outs=2'),
    ],
)
def test_bad_pyramids(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build({**PYRAMID, **options})


def test_families_of_the_table_are_those_of_the_code():
    assert isinstance(
        build_taps(
            MODELS.build(dict(type='mmseg.SwinTransformer', embed_dims=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)))
        ),
        SwinTaps,
    )
    assert set(timm_stages.TIMM_FAMILIES) == {
        timm.models.model_entrypoint(name).__module__.rpartition('.')[2] for name in TIMM_MODELS
    }
