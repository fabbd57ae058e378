"""Any stock config, tuned by one call: what is wrapped, and where its weights come from."""

import re

import pytest
import torch
from conftest import e3va, swin
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import e3va_mm
from e3va_mm import launch
from e3va_mm.tune import find_config, name_bases

SWIN = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512'
OPTIMIZER = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.1))


def config(backbone=None, scope='mmseg', optim_wrapper=None, **settings) -> Config:
    """A stock config by its essentials."""
    model = dict(type='EncoderDecoder', backbone=backbone or swin())
    return Config(
        dict(
            model=dict(model, **settings.pop('model', {})), default_scope=scope, optim_wrapper=optim_wrapper, **settings
        )
    )


def test_the_stock_config_stays_and_the_tuned_one_reads_back(tmp_path):
    stock = Config.fromfile(find_config(SWIN))
    before = stock.pretty_text
    tuned = e3va_mm.tune(stock, mixer=dict(width=8), frozen_dtype=None)
    assert stock.pretty_text == before
    assert tuned.model.backbone.backbone == dict(stock.model.backbone)
    assert tuned.model.decode_head == stock.model.decode_head and tuned.default_scope == 'mmseg'
    tuned.dump(tmp_path / 'tuned.py')
    again = Config.fromfile(tmp_path / 'tuned.py')
    assert again.to_dict() == tuned.to_dict() and again.custom_imports.imports == ['e3va_mm']
    init_default_scope('mmseg')
    assert MODELS.build(again.model.backbone).mixers[0] is not None


@pytest.mark.parametrize('name', [SWIN, f'{SWIN}.py', str(find_config(SWIN))])
def test_names_and_paths_of_configs(name):
    assert find_config(name).name == 'swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'


def test_configs_that_are_not_there():
    with pytest.raises(
        FileNotFoundError, match=r'mmdet::retinanet/retinanet_r50_fpn_1x_coc does not exist; .*1x_coco.py'
    ):
        find_config('mmdet::retinanet/retinanet_r50_fpn_1x_coc')
    with pytest.raises(FileNotFoundError, match='mmdte:: names no installed toolbox'):
        e3va_mm.tune('mmdte::retinanet/retinanet_r50_fpn_1x_coco')
    with pytest.raises(FileNotFoundError, match='config nowhere.py does not exist$'):
        e3va_mm.tune('nowhere.py')


@pytest.mark.parametrize(
    ('method', 'options', 'wrapper'),
    [
        ('e3va-paper', {}, dict(type='E3VABackbone')),
        ('E3VA-paper', dict(adapter=dict(rank=4)), dict(type='E3VABackbone', adapter=dict(rank=4))),
        ('e3va', {}, dict(type='E3VABackbone', adapter=dict(rank=4), mixer=dict(width=96))),
        (
            'e3va',
            dict(adapter=dict(branches=1), mixer=dict(width=8), init='kaiming'),
            dict(type='E3VABackbone', adapter=dict(rank=4, branches=1), mixer=dict(width=8), init='kaiming'),
        ),
        ('e3va', dict(mixer=None), dict(type='E3VABackbone', adapter=dict(rank=4), mixer=None)),
        ('Frozen', {}, dict(type='TunedBackbone', method=dict(type='Frozen'))),
        ('lora', dict(r=4, use_dora=True), dict(type='TunedBackbone', method=dict(type='LoRA', r=4, use_dora=True))),
        (
            'PARTIAL',
            dict(num_blocks=2, frozen_dtype='bfloat16'),
            dict(type='TunedBackbone', method=dict(type='Partial', num_blocks=2), frozen_dtype='bfloat16'),
        ),
    ],
)
def test_methods_and_their_options(method, options, wrapper):
    tuned = e3va_mm.tune(config(), method, **options).model.backbone
    assert tuned == dict(wrapper, backbone=swin())
    assert MODELS.build(tuned).freezes_base


def test_full_leaves_the_config_as_it_is():
    stock = config(model=dict(pretrained='a.pth'))
    assert e3va_mm.tune(stock, 'full').to_dict() == stock.to_dict()


@pytest.mark.parametrize(
    ('method', 'options', 'message'),
    [
        ('lorra', {}, r"unknown method 'lorra' for tune; did you mean \['lora'\]\?"),
        (None, {}, 'unknown method None for tune'),
        ('e3va', dict(adaptor=dict(rank=4)), r"unknown option \['adaptor'\] in tune .*did you mean \['adapter'\]"),
        ('partial', dict(blocks=1), r"unknown option \['blocks'\] in tune by Partial .*did you mean \['num_blocks'\]"),
    ],
)
def test_unknown_methods_and_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        e3va_mm.tune(config(), method, **options)


@pytest.mark.parametrize('named', ['E3VABackbone', 'mmengine.TunedBackbone', MODELS.get('E3VABackbone')])
def test_what_is_wrapped_is_not_wrapped_again(named):
    with pytest.raises(ValueError, match='model.backbone is wrapped already, by (E3VA|Tuned)Backbone'):
        e3va_mm.tune(config(dict(type=named, backbone=swin())))


def test_a_model_without_a_backbone():
    with pytest.raises(ValueError, match='finds no backbone in config.model'):
        e3va_mm.tune(Config(dict(model=dict(type='D2Wrapper', backbone=dict(name='a')))))
    with pytest.raises(ValueError, match='finds no backbone in config.model'):
        e3va_mm.tune(Config(dict(default_scope='mmdet')))


def test_every_backbone_of_a_model_is_wrapped():
    detector = dict(type='FasterRCNN', backbone=swin(), neck=dict(type='FPN', backbone=3))
    model = dict(detector=detector, reid=dict(type='BaseReID', backbone=swin()), teacher_backbone=swin())
    model.update(heads=[dict(type='Head', image_encoder=swin())])
    tuned = e3va_mm.tune(config(model=model), 'frozen').model
    found = (tuned.backbone, tuned.detector.backbone, tuned.reid.backbone, tuned.teacher_backbone)
    assert all(each.type == 'TunedBackbone' and each.backbone == swin() for each in found)
    assert tuned.heads[0].image_encoder.type == 'TunedBackbone' and tuned.detector.neck.backbone == 3


def test_types_as_classes_and_lazy_configs(tmp_path, monkeypatch):
    """A config in pure Python: the same, and what the run's work dir holds of it can be read by name."""
    (tmp_path / 'base.py').write_text(
        'from mmseg.models import EncoderDecoder, SwinTransformer\nfrom mmengine.optim import AmpOptimWrapper\n'
        'from torch.optim import AdamW\nfrom mmengine.optim import DefaultOptimWrapperConstructor\n'
        'model = dict(type=EncoderDecoder, backbone=dict(type=SwinTransformer, embed_dims=12, depths=(1, 1, 1, 1),\n'
        "    num_heads=(1, 2, 4, 8), pretrained='swin.pth'))\n"
        'optim_wrapper = dict(type=AmpOptimWrapper, optimizer=dict(type=AdamW, lr=1e-3),\n'
        '    constructor=DefaultOptimWrapperConstructor)\n'
    )
    (tmp_path / 'lazy.py').write_text(
        'from mmengine.config import read_base\nwith read_base():\n    from .base import *\nmodel.update(neck=None)\n'
    )
    tuned = e3va_mm.tune(tmp_path / 'lazy.py')
    assert tuned.optim_wrapper.constructor == 'HighwayRatesConstructor'
    tuned.dump(tmp_path / 'tuned.py')
    for each in (tuned, Config.fromfile(tmp_path / 'tuned.py')):
        backbone = MODELS.build(each.model.backbone)
        assert type(backbone.backbone).__module__ == 'mmseg.models.backbones.swin'
        assert backbone.backbone.init_cfg['checkpoint'] == 'swin.pth'
    with pytest.raises(ValueError, match='wrapped already'):
        e3va_mm.tune(tmp_path / 'tuned.py')


def test_imports_of_the_config_stay():
    given = dict(imports='mmpretrain.models', allow_failed_imports=True)
    imports = e3va_mm.tune(config(custom_imports=given)).custom_imports
    assert imports == dict(imports=['mmpretrain.models', 'e3va_mm'], allow_failed_imports=True)
    twice = dict(imports=['e3va_mm'], allow_failed_imports=False)
    assert e3va_mm.tune(config(custom_imports=twice)).custom_imports == twice


def test_hooks_of_the_config_stay():
    given = [dict(type='EMAHook'), dict(type='ResourceReportHook', warmup=3)]
    hooks = e3va_mm.tune(config(custom_hooks=given)).custom_hooks
    assert hooks == [*given, dict(type='ParameterTableHook')]


@pytest.mark.parametrize('holder', ['model', 'backbone'])
def test_pretrained_becomes_the_init_cfg_of_the_backbone(holder, weights):
    stock = config(swin(pretrained=weights)) if holder == 'backbone' else config(model=dict(pretrained=weights))
    tuned = e3va_mm.tune(stock)
    assert 'pretrained' not in tuned.model and 'pretrained' not in tuned.model.backbone.backbone
    wrapper = MODELS.build(tuned.model.backbone)
    wrapper.init_weights()
    expected = e3va(swin(init_cfg=dict(type='Pretrained', checkpoint=weights)))
    assert torch.equal(wrapper.base_fingerprint(), expected.base_fingerprint())


def test_an_image_encoder_shares_its_file_with_text_encoder_and_head():
    model = dict(image_encoder=swin(), text_encoder=dict(type='T'), decode_head=dict(type='H'), pretrained='clip.pth')
    stock = Config(dict(model=dict(type='MultimodalEncoderDecoder', **model)))
    tuned = e3va_mm.tune(stock).model
    parts = (tuned.image_encoder.backbone, tuned.text_encoder, tuned.decode_head)
    assert all(each.init_cfg == dict(type='Pretrained_Part', checkpoint='clip.pth') for each in parts)
    assert 'pretrained' not in tuned


def save(path, *prefixes, **others) -> str:
    """A file of a whole model, with the backbone's keys behind each of the prefixes."""
    state = {f'{prefix}norm3.weight': torch.ones(96) for prefix in prefixes}
    torch.save({'state_dict': {**state, 'decode_head.weight': torch.ones(1), **others}}, path)
    return str(path)


WHOLE = {
    ('backbone.',): 'backbone.',
    ('module.backbone.',): 'backbone.',
    ('detector.backbone.', 'backbone.'): 'detector.backbone.',
    ('student.backbone.', 'teacher.backbone.'): 'teacher.backbone.',
}


@pytest.mark.parametrize(('prefixes', 'expected'), WHOLE.items())
def test_load_from_of_a_whole_model_names_the_base(tmp_path, prefixes, expected):
    source = save(tmp_path / 'whole.pth', *prefixes)
    model = dict(type='SoftTeacher', detector=dict(type='FasterRCNN', backbone=swin()))
    tuned = e3va_mm.tune(Config(dict(model=model, load_from=source)))
    init_cfg = tuned.model.detector.backbone.backbone.init_cfg
    assert init_cfg == dict(type='Pretrained', checkpoint=source, prefix=expected) and tuned.load_from == source


def test_what_load_from_does_not_bring_stays(tmp_path):
    """An adapter, or a model without such a backbone; a file at a URL is taken for a whole model by its name."""
    own = dict(type='Pretrained', checkpoint='own.pth')
    adapter = save(tmp_path / 'adapter.pth', 'backbone.', **{'backbone.base_fingerprint': torch.zeros(1)})
    for source in (adapter, save(tmp_path / 'other.pth', 'encoder.'), None):
        tuned = e3va_mm.tune(config(swin(init_cfg=own), load_from=source))
        assert tuned.model.backbone.backbone.init_cfg == own
    url = 'https://example.invalid/mask_rcnn.pth'
    tuned = e3va_mm.tune(config(swin(init_cfg=own), load_from=url))
    assert tuned.model.backbone.backbone.init_cfg == dict(type='Pretrained', checkpoint=url, prefix='backbone.')


def test_init_cfg_of_a_model_names_the_base(tmp_path):
    """Outermost first, as mmengine lets it win; load_from comes after both."""
    sources = [save(tmp_path / f'{number}.pth', 'detector.backbone.', 'backbone.') for number in range(3)]
    inner, outer = ([dict(type='Pretrained', checkpoint=source)] for source in sources[:2])
    detector = dict(type='FasterRCNN', backbone=swin(), init_cfg=inner)
    found = []
    for settings in (dict(), dict(model=dict(init_cfg=outer)), dict(model=dict(init_cfg=outer), load_from=sources[2])):
        model = dict(type='SORT', detector=detector, **settings.pop('model', {}))
        init_cfg = e3va_mm.tune(Config(dict(model=model, **settings))).model.detector.backbone.backbone.init_cfg
        found.append((init_cfg.checkpoint, init_cfg.prefix))
    assert found == [(sources[0], 'backbone.'), (sources[1], 'detector.backbone.'), (sources[2], 'detector.backbone.')]


def test_five_lines_get_their_base_named_too(tmp_path):
    source = save(tmp_path / 'whole.pth', 'backbone.')
    mine = config(dict(type='E3VABackbone', backbone=swin()), load_from=source)
    name_bases(mine)
    assert mine.model.backbone.backbone.init_cfg.prefix == 'backbone.'
    stock = config(load_from=source)
    name_bases(stock)
    assert 'init_cfg' not in stock.model.backbone


def options_of(*pairs):
    return dict(pair.split('=') for pair in pairs)


def test_options_count_after_tuning_and_weights_of_the_stock_model_before(tmp_path):
    source = save(tmp_path / 'whole.pth', 'backbone.')
    options = options_of('model.backbone.saved_dtype=bfloat16', f'load_from={source}', 'optim_wrapper.constructor=Mine')
    tuned = launch.read_config(SWIN, options, 'e3va')
    assert tuned.model.backbone.saved_dtype == 'bfloat16' and tuned.optim_wrapper.constructor == 'Mine'
    assert tuned.model.backbone.backbone.init_cfg.checkpoint == tuned.load_from == source
    for option, read in {
        'model.pretrained': 'a.pth',
        'model.backbone.init_cfg.checkpoint': 'b.pth',
        'model.backbone.backbone.init_cfg.checkpoint': 'c.pth',
    }.items():
        tuned = launch.read_config(SWIN, {option: read}, 'frozen')
        assert tuned.model.backbone.backbone.init_cfg.checkpoint == read
        assert 'init_cfg' not in tuned.model.backbone and tuned.model.get('pretrained') is None


def test_a_frozen_base_without_weights_is_refused():
    model = nn.Module()
    for method in ('e3va', 'frozen', 'lora', 'bitfit'):
        model.backbone = MODELS.build(e3va_mm.tune(config(), method).model.backbone)
        with pytest.raises(
            ValueError, match=r'model\.backbone\.backbone names no weights.*load_from=FILE; --random-base'
        ):
            launch.check_base_weights(model)
        model.backbone.backbone.init_cfg = [dict(type='Pretrained', checkpoint='a.pth')]
        launch.check_base_weights(model)
    model.backbone = MODELS.build(dict(type='TunedBackbone', backbone=swin(), method=dict(type='Full')))
    launch.check_base_weights(model)


def test_the_tools_refuse_a_random_base(seg_config, tmp_path, error_of):
    options = ['--cfg-options', 'model.backbone.backbone.init_cfg=None']
    error = error_of('tools/train.py', seg_config, '--work-dir', tmp_path, *options)
    assert re.search('model.backbone.backbone names no weights', error), error


def test_a_decoder_that_is_called_a_backbone_trains_beside_the_one_in_it():
    config = e3va_mm.tune('mmseg::bisenetv1/bisenetv1_r18-d32-in1k-pre_4xb4-160k_cityscapes-1024x1024.py')
    assert config.model.backbone.type == 'BiSeNetV1'
    inner = config.model.backbone.backbone_cfg
    assert inner.type == 'E3VABackbone' and inner.backbone.init_cfg.checkpoint == 'open-mmlab://resnet18_v1c'
    icnet = e3va_mm.tune('mmseg::icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832.py').model.backbone
    assert icnet.type == 'E3VABackbone' and icnet.backbone.backbone_cfg.type == 'ResNetV1c'
