import copy
import io
import os

import pytest
import torch
from conftest import e3va, stir, swin, timm_features
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict
from safetensors.torch import save_file

from e3va_mm.checkpoints.errors import CheckpointMismatchError, DamagedCheckpointError
from e3va_mm.checkpoints.files import check_fits, latest_checkpoint, mark_fresh_run, publish, read_checkpoint, unpublish


def pretrained(weights, **options):
    return dict(backbone=swin(init_cfg=dict(type='Pretrained', checkpoint=weights)), **options)


def build(**options):
    return MODELS.build(dict(dict(type='E3VABackbone', frozen_dtype=None), **options))


@pytest.fixture
def model(weights):
    return stir(e3va(**pretrained(weights)))


IMAGES = torch.linspace(-1, 1, 3 * 40 * 56).view(1, 3, 40, 56)


def test_state_dict_holds_what_is_trained(model):
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(model.state_dict()) == trained | {'base_fingerprint'}
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer, weights_only=True)) == trained | {'base_fingerprint'}


@pytest.mark.parametrize('loader', [lambda fresh, state: fresh.load_state_dict(state), load_state_dict])
def test_round_trip_loads_the_base_too(model, weights, loader):
    """As in Runner.test and init_model: init_weights is never called."""
    fresh = build(**pretrained(weights))
    loader(fresh, model.state_dict())
    for output, expected in zip(fresh(IMAGES), model(IMAGES)):
        assert torch.equal(output, expected)


def test_frozen_dtype_does_not_change_the_base(model, weights):
    reduced = build(**pretrained(weights, frozen_dtype='bfloat16'))
    reduced.load_state_dict(model.state_dict())
    assert torch.equal(reduced.highway[1].core, model.highway[1].core)
    model.load_state_dict(stir(reduced).state_dict())
    assert torch.equal(reduced.highway[1].core, model.highway[1].core)


def break_key(state):
    del state['highway.1.core']


def add_key(state):
    state['highway.9.core'] = torch.zeros(1)


def reshape_key(state):
    state['highway.0.down_in'] = torch.zeros(4, 12, 8)


def drop_fingerprint(state):
    del state['base_fingerprint']


def use_stock_names(state):
    state.clear()
    state.update({'stages.0.blocks.0.norm1.weight': torch.zeros(12), 'norm0.weight': torch.zeros(12)})


@pytest.mark.parametrize('loader', [lambda fresh, state: fresh.load_state_dict(state), load_state_dict])
@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (break_key, 'highway.1.core is missing'),
        (add_key, 'highway.9.core is foreign'),
        (reshape_key, r'highway.0.down_in is \(4, 12, 8\) in the checkpoint, \(4, 12, 16\) in this model'),
        (drop_fingerprint, 'base_fingerprint is missing'),
        (use_stock_names, 'stages.0.blocks.0.norm1.weight is foreign'),
    ],
)
def test_what_does_not_fit_raises(model, loader, spoil, message):
    state = model.state_dict()
    spoil(state)
    with pytest.raises(CheckpointMismatchError, match=message):
        loader(model, state)


def test_another_base_raises(model, weights, tmp_path):
    content = torch.load(weights, weights_only=True)
    content['state_dict']['backbone.stages.1.blocks.0.norm1.bias'] += 1e-3
    torch.save(content, tmp_path / 'other.pth')
    other = build(**pretrained(str(tmp_path / 'other.pth')))
    with pytest.raises(CheckpointMismatchError, match=r'another frozen base: 1 of \d+ .*stages.1.blocks.0.norm1.bias'):
        other.load_state_dict(model.state_dict())
    deeper = build(backbone=swin(depths=(2, 2, 4, 2)))
    with pytest.raises(CheckpointMismatchError, match='differences'):
        deeper.load_state_dict(model.state_dict())


def test_init_cfg_of_the_wrapper_loads_an_adapter(model, weights, tmp_path):
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'adapter.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'adapter.pth'))
    fresh = build(**pretrained(weights, init_cfg=init_cfg))
    fresh.init_weights()
    assert torch.equal(fresh(IMAGES)[3], model(IMAGES)[3])


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
    message = (
        r'does not fit SwinTransformer: patch_embed.projection.weight is \(12, 3, 4, 4\) in the file, \(24, 3, 4, 4\)'
    )
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


@pytest.mark.parametrize('frozen_dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('update_buffers', [False, True])
def test_averaged_copy(weights, frozen_dtype, update_buffers):
    """EMAHook copies the model before the base is loaded, and saves the copy's state in the model's place."""
    model = build(**pretrained(weights, frozen_dtype=frozen_dtype))
    average = ExponentialMovingAverage(model, update_buffers=update_buffers)
    model.init_weights()
    for _ in range(2):
        average.update_parameters(stir(model))
    assert average.module(IMAGES)[0].isfinite().all()
    fresh = build(**pretrained(weights, frozen_dtype=frozen_dtype))
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(fresh(IMAGES)[1], average.module(IMAGES)[1])
    resumed = ExponentialMovingAverage(build(**pretrained(weights, frozen_dtype=frozen_dtype)))
    resumed.load_state_dict(copy.deepcopy(average.state_dict()))
    assert torch.equal(resumed.module(IMAGES)[1], average.module(IMAGES)[1])


def test_read_checkpoint_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.pth does not exist'):
        read_checkpoint(tmp_path / 'nothing.pth')
    whole = tmp_path / 'whole.pth'
    torch.save({'state_dict': {'weight': torch.zeros(9000)}}, whole)
    assert read_checkpoint(whole)['state_dict']['weight'].shape == (9000,)
    content = whole.read_bytes()
    for size in (0, 10, 5000, len(content) - 1):
        whole.write_bytes(content[:size])
        with pytest.raises(DamagedCheckpointError, match=rf'whole.pth \({size} bytes\) is damaged'):
            read_checkpoint(whole)


def test_weights_named_in_a_list_of_init_cfg(weights, model):
    parts = [dict(type='TruncNormal', layer='Linear', std=0.02), dict(type='Pretrained', checkpoint=weights)]
    listed = build(backbone=swin(init_cfg=parts))
    listed.init_weights()
    assert torch.equal(listed.base_fingerprint(), model.base_fingerprint())


class Boom:
    def __reduce__(self):
        return (open, ('boom.txt', 'w'))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': Boom()}, 'evil.pth')
    with pytest.raises(DamagedCheckpointError, match=r'unsafe to load: it holds io\.open beside tensors'):
        read_checkpoint('evil.pth')
    assert not (tmp_path / 'boom.txt').exists()


@pytest.mark.parametrize('kind', ['base', 'adapter', 'url', 'timm'])
def test_no_config_makes_a_file_run_code(weights, tmp_path, monkeypatch, kind):
    """The loaders of the toolboxes would fall back to running it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cached = tmp_path / 'hub' / 'checkpoints' / 'evil.pth'
    cached.parent.mkdir(parents=True)
    torch.save({'state_dict': Boom()}, cached)
    init_cfg = dict(type='Pretrained', checkpoint='http://localhost/evil.pth' if kind == 'url' else str(cached))
    config = pretrained(weights, init_cfg=init_cfg)
    if kind != 'adapter':
        config = dict(backbone=timm_features(init_cfg=init_cfg) if kind == 'timm' else swin(init_cfg=init_cfg))
    with pytest.raises(CheckpointMismatchError, match=r'evil\.pth.* unsafe: it holds io\.open beside tensors'):
        build(**config).init_weights()
    assert not (tmp_path / 'boom.txt').exists()


def test_latest_checkpoint_skips_damaged_ones(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 10):
        torch.save({'state_dict': {}}, tmp_path / f'iter_{step}.pth')
    torch.save({'state_dict': {}}, tmp_path / 'best_mIoU_iter_10.pth')
    assert latest_checkpoint(tmp_path).name == 'iter_10.pth'
    (tmp_path / 'iter_10.pth').write_bytes(b'')
    assert latest_checkpoint(tmp_path).name == 'iter_2.pth'


def test_latest_checkpoint_is_of_the_last_run(tmp_path):
    """In a folder where an older run went further; the pointer is as mmengine's hook writes it."""
    for age, step in enumerate((300, 1, 2)):
        torch.save({'state_dict': {}}, tmp_path / f'iter_{step}.pth')
        os.utime(tmp_path / f'iter_{step}.pth', (age, age))
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text(str(tmp_path / 'iter_2.pth'))
    assert latest_checkpoint(tmp_path).name == 'iter_2.pth'
    pointer.write_text('moved/from/here/iter_2.pth')
    assert latest_checkpoint(tmp_path).name == 'iter_2.pth'
    (tmp_path / 'iter_2.pth').write_bytes(b'')
    assert latest_checkpoint(tmp_path).name == 'iter_1.pth'
    (tmp_path / 'iter_1.pth').unlink()
    assert latest_checkpoint(tmp_path) is None


def test_a_fresh_run_has_no_checkpoint_of_an_older_one(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'iter_300.pth')
    os.utime(tmp_path / 'iter_300.pth', (1, 1))
    mark_fresh_run(tmp_path)
    assert latest_checkpoint(tmp_path) is None
    torch.save({'state_dict': {}}, tmp_path / 'iter_2.pth')  # and the run dies before it notes that
    assert latest_checkpoint(tmp_path).name == 'iter_2.pth'


def test_latest_checkpoint_in_another_folder(tmp_path):
    (tmp_path / 'out').mkdir()
    torch.save({'state_dict': {}}, tmp_path / 'out/iter_4.pth')
    assert latest_checkpoint(tmp_path, tmp_path / 'out').name == 'iter_4.pth'
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/iter_4.pth')
    assert latest_checkpoint(tmp_path) == 's3://bucket/iter_4.pth'


def test_publish_and_back(model, weights, tmp_path):
    checkpoint = tmp_path / 'iter_1.pth'
    meta = {'cfg': 'model = 1', 'dataset_meta': {'classes': ('a', 'b'), 'palette': [(1, 2, 3)]}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta, 'optimizer': {}}, checkpoint)
    publish(checkpoint, tmp_path / 'adapter.safetensors')
    unpublish(tmp_path / 'adapter.safetensors', tmp_path / 'back.pth')
    for name in ('adapter.safetensors', 'back.pth'):
        fresh = build(**pretrained(weights))
        loaded = load_checkpoint(fresh, str(tmp_path / name))
        assert torch.equal(fresh(IMAGES)[0], model(IMAGES)[0])
        assert loaded['meta']['cfg'] == 'model = 1'
        assert loaded['meta']['dataset_meta']['classes'] == ['a', 'b']


def test_publish_tied_weights(tmp_path):
    """As detection heads have them, where levels share their convolutions."""
    whole = torch.arange(6.0)
    tied = {'head.0.weight': whole, 'head.1.weight': whole, 'head.2.weight': whole[:3]}
    torch.save({'state_dict': {'base_fingerprint': torch.zeros(1), **tied}}, tmp_path / 'iter_1.pth')
    publish(tmp_path / 'iter_1.pth', tmp_path / 'adapter.safetensors')
    state = read_checkpoint(tmp_path / 'adapter.safetensors')['state_dict']
    assert all(torch.equal(state[key], value) for key, value in tied.items())


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_check_fits(prefix):
    model = torch.nn.Linear(3, 2)
    state = {f'{prefix}{key}': value for key, value in model.state_dict().items()}
    check_fits(model, {'state_dict': state})
    check_fits(model, {'state_dict': {**state, 'foreign': torch.zeros(1)}})  # A stock model may leave keys out.
    state[f'{prefix}weight'] = torch.zeros(4, 3)
    with pytest.raises(CheckpointMismatchError, match=r"1 keys of another shape \['weight \(4, 3\), .* \(2, 3\)"):
        check_fits(model, {'state_dict': state})
    model.register_buffer('base_fingerprint', torch.zeros(1))
    with pytest.raises(CheckpointMismatchError, match=r"1 keys missing \['base_fingerprint'\]"):
        check_fits(model, {'state_dict': state})


def test_safetensors_of_others(tmp_path):
    """Plain weights without metadata, as base weights may be given."""
    save_file({'weight': torch.ones(2, 3), 'bias': torch.ones(2)}, tmp_path / 'base.safetensors')
    linear = torch.nn.Linear(3, 2)
    assert load_checkpoint(linear, str(tmp_path / 'base.safetensors'))['meta'] == {}
    assert torch.equal(linear.weight, torch.ones(2, 3))
    with pytest.raises(FileNotFoundError, match='nothing.safetensors'):
        load_checkpoint(linear, str(tmp_path / 'nothing.safetensors'))


def test_publish_refuses_what_is_no_adapter(tmp_path):
    torch.save({'state_dict': {'weight': torch.zeros(1)}}, tmp_path / 'full.pth')
    with pytest.raises(ValueError, match='no adapter checkpoint'):
        publish(tmp_path / 'full.pth', tmp_path / 'full.safetensors')
    (tmp_path / 'bad.safetensors').write_bytes(b'12345678901')
    with pytest.raises(DamagedCheckpointError, match='bad.safetensors'):
        unpublish(tmp_path / 'bad.safetensors', tmp_path / 'back.pth')
