"""Weights of a frozen base, in the forms that others publish them in."""

import pytest
import torch
from conftest import build, e3va, pretrained, swin

from e3va_mm.checkpoints.errors import CheckpointMismatchError


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
@pytest.mark.parametrize('nest', [None, 'model', 'teacher', 'state_dict_ema'])
@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.backbone.', 'teacher.backbone.', 'model.'])
def test_base_weights_under_any_prefix(weights, tmp_path, scope, prefix, nest):
    content = torch.load(weights, weights_only=True)['state_dict']
    renamed = {key.replace('backbone.', prefix, 1): value for key, value in content.items()}
    renamed[('student.' if 'teacher' in prefix else prefix) + 'head.fc.weight'] = torch.zeros(2, 2)
    torch.save({nest: renamed, 'epoch': 3} if nest else renamed, tmp_path / 'weights.pth')
    model = e3va(swin(scope, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))))
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, content[f'backbone.{key}']), key


def in_original_names(content):
    """As Microsoft's repository has them, but for the order in patch merging."""
    original = {}
    for key, value in content.items():
        key = key.removeprefix('backbone.').replace('stages', 'layers').replace('attn.w_msa', 'attn')
        key = key.replace('ffn.layers.0.0', 'mlp.fc1').replace('ffn.layers.1', 'mlp.fc2').replace('projection', 'proj')
        original[key] = value
    return original


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_base_weights_of_the_original_repository(weights, tmp_path, prefix):
    """Stock conversion of key names (`convert_weights`), as stock mmdet configs use it."""
    content = torch.load(weights, weights_only=True)['state_dict']
    original = {prefix + key: value for key, value in in_original_names(content).items()}
    torch.save({'model': original}, tmp_path / 'original.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'original.pth'))
    model = e3va(swin('mmdet', convert_weights=True, init_cfg=init_cfg))
    key = 'stages.2.blocks.1.ffn.layers.1.weight'
    assert torch.equal(model.backbone.get_parameter(key), content[f'backbone.{key}'])


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
@pytest.mark.parametrize('prefix', ['', 'backbone.', 'model.'])
def test_resized_windows_interpolate_the_position_tables(weights, tmp_path, scope, prefix):
    content = torch.load(weights, weights_only=True)['state_dict']
    content = {key.replace('backbone.', prefix, 1): value for key, value in content.items() if 'index' not in key}
    torch.save(content, tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    model = e3va(swin(scope, window_size=5, init_cfg=init_cfg))
    assert all(parameter.isfinite().all() for parameter in model.backbone.parameters())


def test_incomplete_base_weights_raise(weights, tmp_path):
    content = torch.load(weights, weights_only=True)
    del content['state_dict']['backbone.stages.0.blocks.1.norm2.weight']
    torch.save(content, tmp_path / 'partial.pth')
    for scope in ('mmseg', 'mmdet'):
        model = build(backbone=swin(scope, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'partial.pth'))))
        with pytest.raises(CheckpointMismatchError, match='lacks 1 of the .* stages.0.blocks.1.norm2.weight'):
            model.init_weights()


def test_missing_and_damaged_base_weights_raise(weights, tmp_path):
    model = build(**pretrained('nowhere/swin.pth'))
    with pytest.raises(FileNotFoundError, match="backbone.init_cfg.checkpoint='nowhere/swin.pth'"):
        model.init_weights()
    damaged = tmp_path / 'damaged.pth'
    damaged.write_bytes(open(weights, 'rb').read()[:5000])
    with pytest.raises(CheckpointMismatchError, match='damaged.pth.*can not be read'):
        build(**pretrained(str(damaged))).init_weights()


def test_weights_of_another_size_raise(weights):
    model = build(backbone=swin(embed_dims=24, init_cfg=dict(type='Pretrained', checkpoint=weights)))
    message = r'does not fit SwinTransformer: patch_embed.projection.weight \(12, 3, 4, 4\) where the model has \(24'
    with pytest.raises(CheckpointMismatchError, match=message):
        model.init_weights()


FOREIGN = {
    'Microsoft': (
        in_original_names,
        r'foreign are patch_embed.proj.weight .12, 3, 4, 4.*; it is in the names of Microsoft.*convert_weights=True',
    ),
    'transformers': (
        lambda content: {f'dinov2.embeddings.patch_embeddings.{key}': value for key, value in content.items()},
        'foreign are dinov2.*; it is in the names of the transformers library',
    ),
    'adapter': (
        lambda content: {'highway.0.core': torch.zeros(1), 'base_fingerprint': torch.zeros(2, dtype=torch.int64)},
        'it is a checkpoint of this package, which has no base in it: name it in load_from',
    ),
    'list': (lambda content: [*content.values()], 'holds a list without weights by name'),
    'numbers': (lambda content: {'state_dict': {'epoch': 3}}, 'holds a dict without weights by name'),
    'module': (lambda content: torch.nn.Linear(2, 2), r'it holds torch\.nn\.modules\.linear\.Linear beside tensors'),
}


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
@pytest.mark.parametrize(('change', 'message'), FOREIGN.values(), ids=FOREIGN)
def test_base_weights_in_another_form_say_what_they_are(weights, tmp_path, scope, change, message):
    torch.save(change(torch.load(weights, weights_only=True)['state_dict']), tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    with pytest.raises(CheckpointMismatchError, match=r"init_cfg.checkpoint='.*weights.pth' .*" + message):
        e3va(swin(scope, init_cfg=init_cfg))


@pytest.mark.parametrize('number', [1, 4])
def test_base_weights_for_rgb_are_adapted_to_other_channels(weights, tmp_path, number):
    """Images that hold the same in all channels give the same maps."""
    init_cfg = dict(type='Pretrained', checkpoint=weights)
    grey = torch.randn(1, 1, 64, 64)
    expected = e3va(swin('mmdet', init_cfg=init_cfg))(grey.expand(-1, 3, -1, -1))
    original = in_original_names(torch.load(weights, weights_only=True)['state_dict'])
    stem = original['patch_embed.proj.weight']
    found = e3va(swin('mmdet', in_channels=number, init_cfg=init_cfg))
    if number == 4:
        rows = found.backbone.patch_embed.projection.weight
        torch.testing.assert_close(rows, torch.cat([stem, stem[:, :1]], 1) * 0.75)
    else:
        torch.testing.assert_close(found(grey), expected)


def test_weights_named_in_a_list_of_init_cfg(weights):
    parts = [dict(type='TruncNormal', layer='Linear', std=0.02), dict(type='Pretrained', checkpoint=weights)]
    listed, alone = (e3va(swin(init_cfg=init_cfg)) for init_cfg in (parts, parts[1]))
    assert torch.equal(listed.base_fingerprint(), alone.base_fingerprint())


def test_weights_that_can_not_be_fetched():
    backbone = swin(init_cfg=dict(type='Pretrained', checkpoint='http://localhost:9/swin.pth'))
    with pytest.raises(CheckpointMismatchError, match=r'swin.pth. can not be fetched .*: download it elsewhere'):
        build(backbone=backbone).init_weights()
