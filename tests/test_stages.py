"""Every family of backbones behind the highway: timm's, mmseg's MiT, and taps named in the config."""

import copy

import mmdet.models  # noqa: F401  (registers ResNet)
import mmseg.models  # noqa: F401  (registers MiT)
import pytest
import timm
import torch
from conftest import MIT, TIMM_MODELS, e3va, every_family, images, saved_bytes, stir, timm_features
from mmengine.registry import MODELS
from torch.testing import assert_close

from e3va_mm.backbones.timm_features import TIMM_FAMILIES
from e3va_mm.taps import SwinTaps, build_taps

RESNET = dict(type='mmdet.ResNet', depth=18, norm_eval=True, zero_init_residual=False)
RESNET_TAPS = [
    dict(taps=[f'layer{stage}.{block}.bn2' for block in range(2)], end=f'layer{stage}', dims=64 * 2 ** (stage - 1))
    for stage in range(1, 5)
]
SIZES = [(64, 96), (57, 83)]


@every_family
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('options', [{}, dict(mixer=dict(width=4, every=1), feedback=True)], ids=['plain', 'feedback'])
def test_starts_at_the_frozen_backbone(backbone, size, options):
    model = e3va(backbone, **options).train()
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
    start = taps.patches(tokens)
    for index in range(taps.num_stages):
        seen = []
        end = taps.run_stage(index, tokens, size, seen.append)
        assert len(seen) == sum(taps.block_taps[index])
        assert_close(taps.patches(end), sum(seen, start), rtol=1e-4, atol=1e-4)
        assert size[0] * size[1] == taps.patches(end).shape[1]
        if index + 1 < taps.num_stages:
            tokens, size, carried = taps.follow(index, end, size)
            assert carried.shape[1] == size[0] * size[1]
            start = taps.patches(tokens)
            # Hiera pools in its first block.
            start = start if start.shape == carried.shape else carried


@every_family
def test_only_highway_and_norms_train(backbone):
    model = stir(e3va(backbone, mixer=dict(width=4))).train()
    in_graph = []
    for blocks in model.taps.stages.blocks:
        for block in blocks:
            block.register_forward_hook(lambda module, args, output: in_graph.append(output.requires_grad))
    outputs = model(images())
    sum(output.square().mean() for output in outputs).backward()
    assert in_graph and not any(in_graph)
    norms = tuple(f'backbone.{name}.' for name in model.taps.norm_names)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(('highway.', 'mixers.', *norms)), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


@every_family
def test_checkpoint_round_trip(backbone, tmp_path):
    model = stir(e3va(backbone, mixer=dict(width=4))).eval()
    torch.save(model.state_dict(), tmp_path / 'adapter.pth')
    # The same seed gives the same random base.
    loaded = e3va(backbone, mixer=dict(width=4)).eval()
    loaded.load_state_dict(torch.load(tmp_path / 'adapter.pth', weights_only=True))
    assert_close(list(loaded(images())), list(model(images())))
    norms = tuple(f'backbone.{name}.' for name in model.taps.norm_names)
    assert all(key.startswith(norms) for key in model.state_dict() if key.startswith('backbone.'))


def test_an_averaged_copy_runs_its_own_modules():
    model = stir(e3va(timm_features()))
    clone = copy.deepcopy(model)
    assert clone.taps.stages.model is clone.backbone.model is not model.backbone.model
    before = model(images())
    stir(clone)
    assert_close(list(model(images())), list(before))
    assert (clone(images())[0] - before[0]).abs().max() > 1e-3


def test_blocks_of_another_kind():
    with pytest.raises(ValueError, match='ParallelScalingBlock has not the two residual branches'):
        e3va(dict(type='TIMMFeatures', model_name='vit_base_patch16_xp_224', embed_dim=32, depth=4, num_heads=2))


def test_compilation_is_for_swin():
    with pytest.raises(ValueError, match='compile_frozen=True is for SwinTransformer only'):
        e3va(timm_features(), compile_frozen=True)


@pytest.mark.parametrize(
    'options', [dict(recompute_taps=True), dict(compile_frozen=True), dict(feedback=True), dict(mixer=dict(every=1))]
)
def test_options_that_taps_from_the_config_do_not_have(options):
    with pytest.raises(ValueError, match='recompute_taps, compile_frozen, .* need a listed family'):
        e3va(RESNET, taps=RESNET_TAPS, **options)


@pytest.mark.parametrize(
    'options',
    [
        dict(saved_dtype='bfloat16'),
        dict(saved_dtype='float8_e4m3fn', saved_fraction=0.5),
        dict(recompute_taps=True),
        dict(adapter=dict(mixing=3)),
        dict(mixer=dict(width=8)),
        dict(adapter=dict(basis='pca')),
        dict(mixer=dict(width=8), feedback=True),
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


@every_family
def test_reduced_frozen_precision(backbone):
    """What a GPU runs by default. CNNs have no residual stream in fp32, and here random weights."""
    model, exact = e3va(backbone, frozen_dtype='bfloat16'), e3va(backbone)
    tolerance = 0.06 if 'net' in backbone.get('model_name', '') else 0.025
    for one, other in zip(model(images()), exact(images())):
        assert one.dtype == torch.float32
        assert (one - other).norm() < tolerance * other.norm()


def test_taps_behind_a_layer_scale_are_kept_in_reduced_precision():
    """The scales are in fp32, and so is what they return."""
    backbone = timm_features('vit_large_patch14_dinov2')
    exact, reduced, float8 = (
        saved_bytes(e3va(backbone, **options), images())
        for options in ({}, dict(frozen_dtype='bfloat16'), dict(frozen_dtype='bfloat16', saved_dtype='float8_e4m3fn'))
    )
    assert float8 < 0.8 * reduced and reduced < 0.8 * exact


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
    assert model.taps.block_taps == [[2]] * 4


@pytest.mark.parametrize(
    'change',
    [dict(dims=32), dict(end='layer2'), dict(taps=['layer1.0.bn2', 'layer2.0.bn2'])],
    ids=['channels', 'another size', 'a tap of another stage'],
)
def test_taps_in_the_config_that_do_not_fit(change):
    model = e3va(RESNET, taps=[{**RESNET_TAPS[0], **change}])
    with pytest.raises(ValueError, match=r'taps\[0\] should give 2 taps and an end of'):
        model(images())


ANYWHERE = [dict(type=name) for name in ('Full', 'Frozen', 'BitFit', 'NormTuning', 'Partial')]
TRANSFORMERS = [dict(type='Adapter'), dict(type='AdaptFormer'), dict(type='LoRand'), dict(type='LoRA', r=2)]


def tuned(backbone, method):
    torch.manual_seed(0)
    return MODELS.build(dict(type='TunedBackbone', backbone=backbone, method=method))


@every_family
def test_comparison_methods(backbone):
    torch.manual_seed(0)
    expected = MODELS.build(backbone).eval()(images())
    name = str(backbone)
    pools = 'hiera' in name
    methods = ANYWHERE + TRANSFORMERS * (pools or 'patch' in name or 'pvt_v2_b0' in name)
    for method in methods:
        if pools and method['type'] == 'AdaptFormer':
            method = dict(method, attention=False)
        model = tuned(backbone, method).train()
        outputs = model(images())
        if method['type'] != 'Full':  # its batch norms and dropout are those of training
            assert_close(list(outputs), list(expected))
        if method['type'] != 'Frozen':
            sum(output.square().mean() for output in stir(model)(images())).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, (method, name)
        assert any(parameter.requires_grad for parameter in model.parameters()) == (method['type'] != 'Frozen')


@every_family
def test_no_norm_of_bitfit_has_its_stock_backward(backbone):
    """CUDA's fails where the bias is trained and the weight is not."""
    for name, module in tuned(backbone, dict(type='BitFit')).backbone.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and module.bias is not None:
            assert type(module).__name__.endswith('WithFreeBias') and not module.weight.requires_grad, name


def test_lora_where_it_would_do_nothing():
    with pytest.raises(ValueError, match=r"target_modules has \['qkv'\], but this backbone uses"):
        tuned(timm_features('swinv2_base_window12_192'), dict(type='LoRA'))
    with pytest.raises(ValueError, match=r"target_modules has \['qkv'\]"):
        tuned(timm_features('swinv2_base_window12_192'), dict(type='LoRA', target_modules=r'.*\.qkv'))
    tuned(timm_features('swinv2_base_window12_192'), dict(type='LoRA', target_modules=['proj']))


@pytest.mark.parametrize('method', ['Mona', 'LST', 'DTL'])
def test_methods_that_need_a_swin(method):
    with pytest.raises(ValueError, match=f'{method} is defined for SwinTransformer only, not for TIMMFeatures'):
        tuned(timm_features(), dict(type=method))


def test_methods_that_need_attention():
    with pytest.raises(ValueError, match='needs blocks with attn and mlp, and InvertedResidual has not both'):
        tuned(timm_features('mobilenetv2_050'), dict(type='Adapter'))
    with pytest.raises(ValueError, match='attention=True does not fit HieraBlock, whose attention pools'):
        tuned(timm_features('hiera_tiny_224'), dict(type='AdaptFormer'))


def test_families_of_the_table_are_those_of_the_code():
    assert isinstance(
        build_taps(
            MODELS.build(dict(type='mmseg.SwinTransformer', embed_dims=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)))
        ),
        SwinTaps,
    )
    assert set(TIMM_FAMILIES) == {
        timm.models.model_entrypoint(name).__module__.rpartition('.')[2] for name in TIMM_MODELS
    }
