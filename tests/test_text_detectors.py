"""GroundingDINO and GLIP as the toolbox's configs have them, with a tiny text encoder: what is repaired, and tuning."""

import pytest
import torch
from conftest import stir
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch.testing import assert_close

from e3va_mm.compat import repair_text_detectors
from e3va_mm.launch import read_config
from e3va_mm.tune import find_config

transformers = pytest.importorskip('transformers')
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', 'circle', 'square']
CHANNELS = {96: 12, 192: 24, 384: 48, 768: 96}


@pytest.fixture(scope='module')
def bert(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp('bert')
    (folder / 'vocab.txt').write_text('\n'.join(WORDS))
    transformers.BertTokenizer(str(folder / 'vocab.txt')).save_pretrained(folder)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    return str(folder)


def tuned(name: str, bert: str, tmp_path) -> Config:
    """A stock config under ``--tune e3va``, with small networks."""
    text = Config.fromfile(find_config(name)).pretty_text
    (tmp_path / 'stock.py').write_text(text.replace('bert-base-uncased', bert))
    config = read_config(tmp_path / 'stock.py', {'model.backbone.frozen_dtype': None}, 'e3va')
    model = config.model
    model.backbone.backbone.update(embed_dims=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], init_cfg=None)
    model.neck.in_channels = [CHANNELS[channels] for channels in model.neck.in_channels]
    if 'encoder' in model:
        model.encoder.update(num_layers=1, num_cp=0)
        model.decoder.num_layers = 1
        model.update(num_queries=20, test_cfg=dict(max_per_img=20))
    return config


def batch(model) -> dict:
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1, 1)))
    sample.set_metainfo(dict(text=('circle', 'square'), custom_entities=True))
    boxes = torch.tensor([[10.0, 10, 60, 50], [30, 20, 90, 60]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), True)


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco',
        'mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco',
    ],
)
def test_training_and_prediction(name, bert, tmp_path):
    config = tuned(name, bert, tmp_path)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()  # The toolbox builds some parameters from whatever lies in memory, NaN among it.
    model = stir(model, 0.01).train()
    loss, _ = model.parse_losses(model(**batch(model), mode='loss'))
    loss.backward()
    assert loss.isfinite()
    highway = {key: each.grad for key, each in model.backbone.named_parameters() if each.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in highway.values())
    assert max(grad.abs().max() for key, grad in highway.items() if key.startswith('highway.')) > 0
    with torch.no_grad():
        (prediction,) = model.eval()(**batch(model), mode='predict')
    assert prediction.pred_instances.bboxes.shape[1] == 4


def test_the_encoding_is_that_of_published_weights():
    """By the definition of mmdet 3.3, whose GroundingDINO was trained."""
    from mmdet.models.layers.transformer import coordinate_to_encoding
    from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerDecoder

    repair_text_detectors()
    attention = dict(embed_dims=32, num_heads=2)
    layer = dict(self_attn_cfg=attention, cross_attn_text_cfg=attention, cross_attn_cfg=attention,
                 ffn_cfg=dict(embed_dims=32, feedforward_channels=32))  # fmt: skip
    decoder = GroundingDinoTransformerDecoder(num_layers=1, layer_cfg=layer, post_norm_cfg=None)
    points = torch.rand(2, 5, 4)
    short, long = (coordinate_to_encoding(points, num_feats=number) for number in (16, 32))
    assert short.shape[-1] == decoder.ref_point_head.layers[0].in_features
    assert_close(decoder.ref_point_head(long), decoder.ref_point_head(short))
