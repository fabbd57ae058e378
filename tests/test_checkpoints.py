import copy
import io
import logging

import pytest
import torch
from conftest import build, e3va, pretrained, stir, swin
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import _load_checkpoint_to_model, load_checkpoint, load_state_dict
from safetensors.torch import save_file

from e3va_mm.checkpoints.comparison import check_fits
from e3va_mm.checkpoints.errors import CheckpointMismatchError, DamagedCheckpointError
from e3va_mm.checkpoints.files import publish, read_checkpoint, unpublish


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
        (break_key, '1 keys missing: highway.1.core'),
        (add_key, '1 keys foreign: highway.9.core'),
        (reshape_key, r'another shape: highway.0.down_in \(4, 12, 8\) where the model has \(4, 12, 16\)'),
        (drop_fingerprint, 'base_fingerprint is missing'),
        (use_stock_names, 'keys foreign: stages.0.blocks.0.norm1.weight'),
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
    with pytest.raises(CheckpointMismatchError, match='does not fit this E3VABackbone'):
        deeper.load_state_dict(model.state_dict())


def test_init_cfg_of_the_wrapper_loads_an_adapter(model, weights, tmp_path):
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'adapter.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'adapter.pth'))
    fresh = build(**pretrained(weights, init_cfg=init_cfg))
    fresh.init_weights()
    assert torch.equal(fresh(IMAGES)[3], model(IMAGES)[3])


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


def test_publish_and_back(model, weights, tmp_path):
    checkpoint = tmp_path / 'iter_1.pth'
    cfg = "model = 1\nwork_dir = '/home/me/runs'\n"
    meta = {'cfg': cfg, 'dataset_meta': {'classes': ('a', 'b'), 'palette': [(1, 2, 3)]}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta, 'optimizer': {}}, checkpoint)
    publish(checkpoint, tmp_path / 'adapter.safetensors')
    modes = {path.stat().st_mode for path in (checkpoint, tmp_path / 'adapter.safetensors')}
    assert len(modes) == 1, 'those who may read the one may read the other'
    unpublish(tmp_path / 'adapter.safetensors', tmp_path / 'back.pth')
    for name in ('adapter.safetensors', 'back.pth'):
        fresh = build(**pretrained(weights))
        loaded = load_checkpoint(fresh, str(tmp_path / name))
        assert torch.equal(fresh(IMAGES)[0], model(IMAGES)[0])
        assert loaded['meta']['cfg'] == 'model = 1\n'
        assert loaded['meta']['dataset_meta']['classes'] == ['a', 'b']


def test_publish_in_half(model, weights, tmp_path):
    checkpoint, target = tmp_path / 'iter_1.pth', tmp_path / 'adapter.safetensors'
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    publish(checkpoint, tmp_path / 'whole.safetensors')
    publish(checkpoint, target, half=True)
    state = read_checkpoint(target)['state_dict']
    for key, value in model.state_dict().items():
        expected = value.half() if value.dim() > 1 and value.dtype == torch.float32 else value
        assert torch.equal(state[key], expected) and state[key].dtype == expected.dtype, key
    fresh = build(**pretrained(weights))
    load_checkpoint(fresh, str(target))
    torch.testing.assert_close(fresh(IMAGES)[0], model(IMAGES)[0], rtol=0.01, atol=0.01)
    assert all(parameter.dtype == torch.float32 for parameter in fresh.parameters())
    large = {'base_fingerprint': torch.zeros(1), 'head.weight': torch.full((1, 1), 1e5)}
    torch.save({'state_dict': large}, checkpoint)
    with pytest.raises(ValueError, match='head.weight has values up to 100000, too large for fp16'):
        publish(checkpoint, target, half=True)


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
    with pytest.raises(CheckpointMismatchError, match=r'1 keys of another shape: weight \(4, 3\) where .* \(2, 3\)'):
        check_fits(model, {'state_dict': state})
    model.register_buffer('base_fingerprint', torch.zeros(1))
    with pytest.raises(CheckpointMismatchError, match='1 keys missing: base_fingerprint'):
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


def whole_model(**options):
    """A segmentor whose backbone is wrapped, or stock where no type is named."""
    backbone = dict(swin(), **options) if 'type' not in options else dict(options, backbone=swin())
    torch.manual_seed(len(options))
    head = dict(type='mmseg.FCNHead', in_channels=96, in_index=3, channels=4, num_classes=2, norm_cfg=dict(type='BN'))
    model = MODELS.build(dict(type='mmseg.EncoderDecoder', backbone=backbone, decode_head=head))
    return stir(model.eval()) if 'type' not in options else model


WRAPPERS = {
    'e3va': dict(type='E3VABackbone', frozen_dtype=None),
    'mixers': dict(type='E3VABackbone', frozen_dtype=None, mixer=dict(width=8), graph_stages=1),
    'frozen': dict(type='TunedBackbone', method=dict(type='Frozen')),
    'lora': dict(type='TunedBackbone', method=dict(type='LoRA', r=2)),
    'mona': dict(type='TunedBackbone', method=dict(type='Mona', width=4)),
    'partial': dict(type='TunedBackbone', method=dict(type='Partial')),
    'bitfit': dict(type='TunedBackbone', method=dict(type='BitFit')),
}


@pytest.mark.parametrize('wrapper', WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(('prefix', 'is_initialised'), [('', True), ('module.', False)])
def test_a_whole_stock_model_brings_base_and_heads(wrapper, prefix, is_initialised):
    """As load_from in training, once weights are drawn, and in tests, where none are: the same predictions."""
    stock, model = whole_model(), whole_model(**wrapper)
    if is_initialised:
        model.init_weights()
    state = {prefix + key: value for key, value in stock.state_dict().items()}
    check_fits(model, {'state_dict': state})
    _load_checkpoint_to_model(model, {'state_dict': state})
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IMAGES), stock(IMAGES), atol=1e-5, rtol=1e-4)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    # What is saved then belongs to that base.
    again = whole_model(**wrapper)
    again.load_state_dict(stock.state_dict(), strict=False)
    again.load_state_dict(stir(model).state_dict())
    torch.testing.assert_close(again.eval()(IMAGES), model(IMAGES))
    with pytest.raises(
        CheckpointMismatchError, match='If training began by load_from of a stock model, name that file'
    ):
        whole_model(**wrapper).load_state_dict(model.state_dict())


@pytest.mark.parametrize('frozen_dtype', [None, 'bfloat16'])
def test_an_averaged_copy_takes_the_base_of_a_stock_model_too(frozen_dtype):
    stock, model = whole_model(), whole_model(type='E3VABackbone', frozen_dtype=frozen_dtype)
    average = ExponentialMovingAverage(model)
    model.init_weights()
    for each in (average.module, model):
        load_state_dict(each, copy.deepcopy(stock.state_dict()))
    assert torch.equal(average.module.backbone.base_fingerprint(), model.backbone.base_fingerprint())
    reference = build(backbone=stock.backbone)
    assert torch.equal(model.backbone.base_fingerprint(), reference.base_fingerprint())


def test_what_of_a_stock_model_does_not_fit_is_listed_or_refused(caplog, monkeypatch):
    said = []
    monkeypatch.setattr('e3va_mm.backbones.base.print_log', lambda text, *options: said.append(text))
    stock, model = whole_model().state_dict(), whole_model(type='E3VABackbone')
    stock['backbone.cls_token'] = stock.pop('decode_head.conv_seg.bias')
    load_state_dict(model, stock, logger=logging.getLogger())
    assert "differs from the model in ['cls_token']" in said[0]
    assert 'missing keys in source state_dict: decode_head.conv_seg.bias' in caplog.text
    check_fits(model, {'state_dict': stock})
    stock['decode_head.conv_seg.weight'] = torch.zeros(5, 4, 1, 1)
    with pytest.raises(CheckpointMismatchError, match=r'of another shape: decode_head.conv_seg.weight \(5, 4, 1, 1\)'):
        check_fits(model, {'state_dict': stock})
    del stock['backbone.stages.2.blocks.1.norm1.weight']
    with pytest.raises(CheckpointMismatchError, match='keys missing: backbone.'):
        check_fits(model, {'state_dict': stock})
    with pytest.raises(CheckpointMismatchError, match='does not fit this E3VABackbone'):
        load_state_dict(model, stock)
