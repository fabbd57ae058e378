"""Every family of backbones behind the highway: timm's, mmseg's MiT, and taps named in the config."""

import copy
from functools import partial

import mmdet.models  # noqa: F401  (registers ResNet)
import mmseg.models  # noqa: F401  (registers MiT)
import pytest
import timm
import torch
from conftest import MIT, TIMM_MODELS, Recorder, e3va, every_family, images, saved_bytes, stir, swin, timm_features
from mmengine.registry import MODELS
from torch.testing import assert_close

from e3va_mm.families.base import listen
from e3va_mm.families.registry import find_family, timm_modules
from e3va_mm.families.swin import SwinFamily

RESNET = dict(type='mmdet.ResNet', depth=18, norm_eval=True, zero_init_residual=False)
RESNET_TAPS = [
    dict(taps=[f'layer{stage}.{block}.bn2' for block in range(2)], end=f'layer{stage}', dims=64 * 2 ** (stage - 1))
    for stage in range(1, 5)
]


@every_family
@pytest.mark.parametrize(('size', 'options'), [((64, 96), {}), ((57, 83), dict(mixer=dict(width=4)))], ids=str)
def test_starts_at_the_frozen_backbone(backbone, size, options):
    model = e3va(backbone, **options).train()
    with torch.no_grad():
        expected = model.backbone(images(size))
    for _ in range(2):  # the first pass, which is checked, and another
        outputs = model(images(size))
        assert_close(list(outputs), list(expected), rtol=1e-5, atol=1e-5)
    assert [output.shape[1] for output in outputs] == [stage.embed_dims for stage in model.family.stages if stage.norm]


@every_family
@torch.no_grad()
def test_taps_add_up_to_what_a_stage_does(backbone):
    """The highway's formula rests on this: a stage ends at its start plus its taps."""
    family, heard, starts, grid = e3va(backbone).family, Recorder(), {}, []

    def hear_start(block, args, index):
        starts[index] = args, args[0].clone()

    for index, stage in enumerate(family.stages):
        if stage.blocks:
            block = family.module(stage.blocks[0].name)
            block.register_forward_pre_hook(partial(hear_start, index=index))
    if family.grid:
        module = family.module(family.grid)
        module.register_forward_hook(lambda module, args, output: grid.append(tuple(output.shape[1:3])))
    with listen(family, heard, len(family.stages)):
        family.backbone(images())
    for index, stage in enumerate(family.stages):
        level, size = heard.levels[index]
        assert size[0] * size[1] == level.shape[1]
        taps = heard.taps.get(index, [])
        assert len(taps) == sum(len(block.taps) for block in stage.blocks)
        if taps and stage.blocks[0].pools:  # Hiera's frozen stream enters a stage through its first block's branch
            start, _ = family.carry(index - 1, *heard.levels[index - 1])
        elif taps:
            args, tokens = starts[index]
            start, _ = family.level(index, args, tokens, *(grid or [None]))
        if taps:
            assert_close(level, sum(taps, start), rtol=1e-4, atol=1e-4)


@every_family
def test_only_highway_and_norms_train(backbone):
    model = stir(e3va(backbone, mixer=dict(width=4))).train()
    in_graph = []
    for block in model.family.blocks():
        model.family.module(block.name).register_forward_hook(
            lambda module, args, output: in_graph.append(output.requires_grad)
        )
    outputs = model(images())
    sum(output.square().mean() for output in outputs).backward()
    assert in_graph and not any(in_graph)
    norms = tuple(f'backbone.{name}.' for name in model.family.norm_names)
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
    norms = tuple(f'backbone.{name}.' for name in model.family.norm_names)
    assert all(key.startswith(norms) for key in model.state_dict() if key.startswith('backbone.'))


def test_an_averaged_copy_runs_its_own_modules():
    model = stir(e3va(timm_features()))
    clone = copy.deepcopy(model)
    assert clone.family.backbone is clone.backbone is not model.backbone
    assert clone._highway[0].adapters is clone.highway and clone._highway[0].route is clone.family
    before = model(images())
    stir(clone)
    assert_close(list(model(images())), list(before))
    assert (clone(images())[0] - before[0]).abs().max() > 1e-3


def test_blocks_of_another_kind():
    with pytest.raises(ValueError, match='ParallelScalingBlock has not the two residual branches'):
        e3va(dict(type='TIMMFeatures', model_name='vit_base_patch16_xp_224', embed_dim=32, depth=4, num_heads=2))


@pytest.mark.parametrize(
    'options',
    [
        dict(saved_dtype='bfloat16'),
        dict(saved_dtype='float8_e4m3fn', saved_fraction=0.5),
        dict(mixer=dict(width=8)),
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


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(dims=32), r'a module of taps\[0\].taps should put out \(B, 32, H, W\)'),
        (dict(end='layer2'), r'should put out \(B, 64, H, W\)'),
        (
            dict(end='layer1.0', taps=['layer1.0.bn2']),
            "stage 0 of this ResNet: .* at 'layer1.0', behind the norm, differ from its own",
        ),
        (dict(taps=['layer1.0.bn2', 'layer2.0.bn2']), 'stage 0 has 2 taps of shape .*, but heard 1 of shape'),
        (dict(taps=['conv1', 'layer1.0.bn2']), '2 taps of shape .* fit, got'),
    ],
    ids=[
        'channels',
        'another stage',
        'the middle of a stage',
        'a tap of another stage',
        'a tap of another size',
    ],
)
def test_taps_in_the_config_that_do_not_fit(change, message):
    model = e3va(RESNET, taps=[{**RESNET_TAPS[0], **change}, *RESNET_TAPS[1:]])
    with pytest.raises(ValueError, match=message):
        model(images())


def test_taps_in_the_config_that_are_too_few():
    with pytest.raises(ValueError, match='it returns 4 maps, not 3'):
        e3va(RESNET, taps=RESNET_TAPS[:3])(images())


def test_taps_in_the_config_out_of_order():
    """What ends in a returned map ends behind all modules."""
    ending = [{key: value for key, value in stage.items() if key != 'end'} for stage in RESNET_TAPS]
    message = r"taps\[2\].end='layer3' comes before the end of taps\[1\].*name taps\[1\].end too"
    with pytest.raises(ValueError, match=message):
        e3va(RESNET, taps=[RESNET_TAPS[0], ending[1], *RESNET_TAPS[2:]])
    assert len(e3va(RESNET, taps=[*RESNET_TAPS[:2], *ending[2:]])(images())) == 4


def test_every_family_of_the_table_is_tested():
    modules = {timm.models.model_entrypoint(name).__module__.rpartition('.')[2] for name in TIMM_MODELS}
    assert set(timm_modules()) == modules
    assert isinstance(find_family(MODELS.build(swin())), SwinFamily)


def test_replaced_modules_are_found_anew():
    """What inferencers do to batch norms, for instance."""
    model = e3va(RESNET, taps=RESNET_TAPS)
    with torch.no_grad():
        expected = model(images())
        for block in model.backbone.layer1:
            block.bn2 = copy.deepcopy(block.bn2)
        assert_close(list(model(images())), list(expected))


@torch.no_grad()
def test_a_backbone_that_goes_on_behind_the_last_output():
    model, calls = e3va(swin(out_indices=(0, 1))), []
    expected = model(images())
    model.backbone.stages[2].register_forward_hook(lambda *_: calls.append(2))
    assert_close(list(model(images())), list(expected))
    assert not calls
