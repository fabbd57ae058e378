"""timm models as backbones: their features are timm's, and their weights come from files."""

import pytest
import timm
import torch
from conftest import TIMM_MODELS, e3va, images, stir, timm_features
from mmengine.registry import MODELS
from safetensors.torch import save_file
from torch.testing import assert_close

from e3va_mm.checkpoints.errors import CheckpointMismatchError


def test_checkpoint_of_another_base(tmp_path):
    paths = [tmp_path / 'one.pth', tmp_path / 'other.pth']
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        torch.save(MODELS.build(timm_features()).model.state_dict(), path)
    one, other = (e3va(timm_features(checkpoint=str(path))) for path in paths)
    with pytest.raises(CheckpointMismatchError, match=r"another frozen base: .*backbone\.checkpoint='.*other\.pth'"):
        other.load_state_dict(one.state_dict())


FEATURES = {
    'convnext_base': lambda model, x: model.forward_intermediates(x, intermediates_only=True),
    'hiera_tiny_224': lambda model, x: model.forward_intermediates(x, intermediates_only=True),
    'hiera_small_abswin_256': lambda model, x: model.forward_intermediates(x, intermediates_only=True),
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
    # timm's Hiera is for one size.
    inputs = images((64, 64) if 'hiera' in name else (64, 96))
    # Patches of 14 are made to cover 16 pixels.
    resized = torch.nn.functional.interpolate(inputs, (56, 84), mode='bilinear', align_corners=False)
    found, expected = backbone(inputs), FEATURES[name](source, resized if 'patch14' in name else inputs)
    assert len(found) == len(expected) == 4
    timm_has_norm = name in ('vit_tiny_patch16_224', 'vit_large_patch16_dinov3', 'pvt_v2_b0')
    for norm, one, other in zip(backbone.family.norm_names, found, expected):
        other = other.permute(0, 2, 3, 1)
        normed = other if timm_has_norm else backbone.get_submodule(norm)(other)
        assert_close(one, normed.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_last_map_is_what_timm_returns(published):
    source, backbone = published('vit_tiny_patch16_224')
    expected = source.forward_features(images((64, 96)))[:, backbone.family.num_prefix :]
    assert_close(backbone(images((64, 96)))[-1].flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_weights_from_a_file(tmp_path, suffix):
    source = timm.create_model('vit_tiny_patch16_224', num_classes=7, **TIMM_MODELS['vit_tiny_patch16_224'])
    path = tmp_path / f'weights.{suffix}'
    save_file(source.state_dict(), path) if suffix == 'safetensors' else torch.save(source.state_dict(), path)
    model = e3va(timm_features(checkpoint=str(path)))
    assert_close(model.backbone.model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert_close(model.backbone.norm3.weight, source.norm.weight)


@pytest.mark.parametrize('nest', ['state_dict', 'model', 'teacher', 'state_dict_ema'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'teacher.backbone.', 'model.'])
def test_weights_under_any_prefix(tmp_path, prefix, nest):
    source = timm.create_model('vit_tiny_patch16_224', **TIMM_MODELS['vit_tiny_patch16_224'])
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({nest: weights}, tmp_path / 'weights.pth')
    model = e3va(timm_features(checkpoint=str(tmp_path / 'weights.pth')))
    assert_close(model.backbone.model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize('number', [1, 4])
@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'tf_efficientnet_lite0'])
def test_weights_for_rgb_are_adapted_as_timm_does(tmp_path, name, number):
    source = timm.create_model(name, **TIMM_MODELS[name])
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    model = e3va(timm_features(name, in_chans=number, checkpoint=str(tmp_path / 'weights.pth'))).backbone.model
    found, expected = (each.conv_stem if 'lite' in name else each.patch_embed.proj for each in (model, source))
    assert_close(found.weight, timm.models.adapt_input_conv(number, expected.weight))


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


def of_transformers(path):
    torch.save({'embeddings.patch_embeddings.weight': torch.zeros(2)}, path)


def of_openmmlab(path):
    torch.save({'backbone.stages.0.blocks.0.attn.w_msa.qkv.weight': torch.zeros(2)}, path)


def reshaped(path):
    weights = torch.load(path, weights_only=True)
    weights['blocks.2.attn.qkv.weight'] = torch.zeros(3, 3)
    torch.save(weights, path)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (damaged, 'may be damaged'),
        (partial, 'lacks 1 of the .* blocks.2.attn.qkv.weight'),
        (foreign, 'lacks .*; foreign are stem.0.weight'),
        (of_transformers, 'it is in the names of the transformers library'),
        (of_openmmlab, "it is in OpenMMLab's names, for a backbone of mmseg or mmdet"),
        (reshaped, r'does not fit VisionTransformer: blocks.2.attn.qkv.weight \(3, 3\) where the model has \(96, 32\)'),
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
