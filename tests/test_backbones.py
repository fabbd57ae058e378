import copy
import weakref

import pytest
import torch
from conftest import e3va, graph_nodes, outputs_of_stock, saved_bytes, stir, swin, timm_features
from mmengine.analysis import get_model_complexity_info
from mmengine.registry import MODELS
from torch.utils.flop_counter import FlopCounterMode

from e3va_mm.checkpoints.fingerprint import named_tensors
from e3va_mm.highway import tap_record

SIZES = [(64, 64), (37, 91), (1, 5)]
OPTIONS = [
    {},
    dict(frozen_dtype='bfloat16'),
    dict(saved_dtype='bfloat16'),
    dict(saved_dtype='float8_e4m3fn', saved_fraction=0.25),
    dict(mixer=dict(width=4)),
    dict(mixer=dict(), saved_dtype='bfloat16', frozen_dtype='bfloat16'),
    dict(mixer=dict(width=4), graph_stages=1),
    dict(mixer=dict(width=4), graph_stages=2, saved_dtype='bfloat16', frozen_dtype='bfloat16'),
]


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
@pytest.mark.parametrize('size', SIZES)
def test_zero_initialised_equals_the_frozen_backbone(scope, size):
    model = e3va(swin(scope))
    images = torch.randn(2, 3, *size)
    for output, stock in zip(model(images), outputs_of_stock(model, images)):
        assert (output.shape, output.dtype) == (stock.shape, stock.dtype)
        torch.testing.assert_close(output, stock, rtol=0, atol=1e-5)


def paper_outputs(model, images):
    """h_l = h_{l-1} + A(a_l) + A(m_l) block by block, with A(z) = z + delta(z), in plain autograd."""
    swin_module = model.backbone
    tokens, hw = swin_module.patch_embed(images)
    state, outputs = tokens, []
    for index, stage in enumerate(swin_module.stages[: len(model.highway)]):
        for number, block in enumerate(stage.blocks):
            attended = block.attn(block.norm1(tokens), hw)
            tokens = tokens + attended
            transformed = block.ffn.layers(block.norm2(tokens))
            tokens = tokens + transformed
            for tap, adapter in ((attended, 2 * number), (transformed, 2 * number + 1)):
                state = state + tap + single_adapter(model.highway[index], adapter, tap)
        if index in swin_module.out_indices:
            normed = getattr(swin_module, f'norm{index}')(state)
            outputs.append(normed.transpose(1, 2).unflatten(2, hw))
        if stage.downsample:
            state, _ = stage.downsample(state, hw)
            tokens, hw = stage.downsample(tokens, hw)
    return outputs


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2, 3), (0, 2)])
@pytest.mark.parametrize('size', SIZES)
def test_equals_the_recursion_of_the_paper(size, out_indices):
    """The batched stages and their hand-written backward against the definition: outputs and all gradients."""
    model = stir(e3va(swin(out_indices=out_indices))).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = []
    for outputs in (model(images), paper_outputs(model, images)):
        torch.manual_seed(3)
        # Not randn_like: it would draw in the order of the memory, which differs.
        loss = sum((output * torch.randn(output.shape, dtype=output.dtype)).sum() for output in outputs)
        gradients.append([*[output.detach() for output in outputs], *torch.autograd.grad(loss, trained)])
    torch.testing.assert_close(*gradients)


def single_adapter(highway, number, tap):
    """An adapter written out with its full matrices, as the paper defines it."""
    down_in = highway.down_in[number]
    weights = [field[number] for field in highway.weights.bottleneck]
    core, down_out, down_bias, up_in, up_out, up_bias = weights
    branches, rank, _ = core.shape

    def matrix(left, right):
        return sum(
            left[:, i * rank : (i + 1) * rank] @ core[i] @ right[i * rank : (i + 1) * rank] for i in range(branches)
        )

    hidden = torch.nn.functional.gelu(tap @ matrix(down_in, down_out) + down_bias)
    return hidden @ matrix(up_in, up_out) + up_bias


@pytest.mark.parametrize(
    ('embed_dims', 'num_heads', 'count'), [(128, (4, 8, 16, 32), 1_197_312), (192, (6, 12, 24, 48), 1_792_896)]
)
def test_parameter_count_of_the_paper(embed_dims, num_heads, count):
    model = MODELS.build(
        dict(type='E3VABackbone', backbone=swin(embed_dims=embed_dims, depths=(2, 2, 18, 2), num_heads=num_heads))
    )
    assert sum(parameter.numel() for parameter in model.adapter_parameters().values()) == count
    assert sum(value.nbytes for value in model.state_dict().values()) < 8e6


def test_exactly_adapters_and_output_norms_are_trained():
    model = e3va()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = {f'backbone.norm{index}.{kind}' for index in range(4) for kind in ('weight', 'bias')}
    fields = ('down_in', 'core', 'down_out', 'down_bias', 'up_in', 'up_out', 'up_bias')
    assert trained == norms | {f'highway.{index}.{field}' for index in range(4) for field in fields}
    assert trained - norms == set(model.adapter_parameters())


@pytest.mark.parametrize('options', OPTIONS)
def test_gradients_reach_what_is_trained_and_nothing_else(options):
    model = stir(e3va(**options)).train()
    sum(output.square().sum() for output in model(torch.randn(1, 3, 50, 70))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize('out_indices', [(1, 2, 3), (0, 2), (1,)])
def test_no_trained_parameter_is_idle_under_fewer_outputs(out_indices):
    """DDP without find_unused_parameters waits for every gradient."""
    model = stir(e3va(swin(out_indices=out_indices)))
    outputs = model(torch.randn(1, 3, 64, 64))
    assert len(outputs) == len(out_indices)
    sum(output.square().sum() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize('options', [{}, dict(mixer=dict(width=4))], ids=['plain', 'mixer'])
def test_no_block_is_in_the_graph(options):
    model = stir(e3va(**options))
    names = [type(node).__name__ for node in graph_nodes(model(torch.randn(1, 3, 64, 64)))]
    assert names.count('RankExpansionBackward') == 4
    assert not [name for name in names if 'Softmax' in name or 'Gelu' in name or 'Bmm' in name]


def test_backward_costs_less_than_the_frozen_forward():
    model = stir(e3va(swin(embed_dims=48, num_heads=(3, 6, 12, 24))))
    images = torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as forward:
        outputs = model(images)
    with FlopCounterMode(display=False) as backward:
        sum(output.sum() for output in outputs).backward()
    with FlopCounterMode(display=False) as stock:
        trainable = copy.deepcopy(model.backbone).requires_grad_(True)
        sum(output.sum() for output in trainable(images)).backward()
    assert backward.get_total_flops() < 0.5 * forward.get_total_flops()
    # A full backward is two thirds of a stock step; here it is gone but for the highway.
    assert backward.get_total_flops() < 0.3 * stock.get_total_flops()


def test_saves_a_fraction_of_what_full_backpropagation_saves(monkeypatch):
    monkeypatch.setattr(tap_record, '_FEWEST_TOKENS', 1)
    images = torch.randn(1, 3, 112, 112)
    backbone = swin(embed_dims=48, num_heads=(3, 6, 12, 24))
    full = saved_bytes(MODELS.build(backbone), images)
    plain = saved_bytes(e3va(backbone), images)
    float8 = saved_bytes(e3va(backbone, saved_dtype='float8_e4m3fn'), images)
    assert plain < 0.14 * full
    assert float8 < 0.06 * full
    sampled = saved_bytes(e3va(backbone, saved_dtype='float8_e4m3fn', saved_fraction=0.25), images)
    assert sampled < 0.04 * full


@pytest.mark.parametrize('backbone', [swin(), timm_features('convnext_base')], ids=['mm', 'timm'])
def test_no_frozen_tokens_outlive_the_forward_pass(backbone, monkeypatch):
    """What closures keep alive costs memory as well, but no hook for saved tensors sees it."""
    model, references = e3va(backbone), []
    level = model.family.level

    def watched(*args):
        tokens, size = level(*args)
        references.append(weakref.ref(tokens))
        return tokens, size

    model(torch.randn(1, 3, 64, 64))
    monkeypatch.setattr(model.family, 'level', watched)
    outputs = model(torch.randn(1, 3, 64, 64))
    assert outputs[0].requires_grad and len(references) == 4
    assert [reference() for reference in references] == [None] * 4


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_trains_after_a_forward_without_gradient(mode):
    """Of the same image size, so that what is cached is used again."""
    model, images = stir(e3va(mixer=dict(width=4), graph_stages=1)), torch.randn(1, 3, 64, 64)
    with mode():
        expected = model(images)
    outputs = model(images)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected))
    sum(output.square().sum() for output in outputs).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize('options', [{}, dict(mixer=dict(width=4), graph_stages=1)], ids=['plain', 'graph'])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@torch.no_grad()
def test_can_be_traced_and_its_operations_counted(options):
    """By what knows no autograd functions, nor fused attention: sums are in another order."""
    model, images = stir(e3va(**options)).eval(), torch.randn(1, 3, 64, 64)
    expected = model(images)
    traced = torch.jit.trace(model, images, check_trace=False)
    torch.testing.assert_close(traced(images), expected, rtol=0, atol=1e-5)
    assert get_model_complexity_info(model, (3, 64, 64))['flops'] > 1e6


def test_train_leaves_the_frozen_part_in_eval():
    model = e3va(swin('mmdet', drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5))
    assert model.train() is model
    assert model.training and model.highway.training
    assert not any(module.training for module in model.backbone.modules())
    images = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(first, second) for first, second in zip(model(images), model(images)))


def test_stages_that_stock_code_freezes_have_their_output_norms_trained():
    model = e3va(swin('mmdet', frozen_stages=1))
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for undo in (model.train, model.requires_grad_, model.backbone.train):
        undo()
        sum(output.square().sum() for output in model(torch.randn(1, 3, 64, 64))).backward()
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
        assert not any(module.training for module in model.backbone.modules())
    model.requires_grad_(False)
    assert not any(output.requires_grad for output in model(torch.randn(1, 3, 64, 64)))


@pytest.mark.parametrize('frozen_dtype', [None, 'bfloat16'])
def test_writes_to_a_copy_leave_the_model_as_it_is(frozen_dtype):
    """As averages of weights write, in place, into every parameter and buffer."""
    model = e3va(frozen_dtype=frozen_dtype)
    before = {name: tensor.clone() for name, tensor in named_tensors(model.backbone).items()}
    clone = copy.deepcopy(model)
    sources = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for averaged, source in zip([*clone.parameters(), *clone.buffers()], sources):
            if averaged.is_floating_point():
                averaged.mul_(0.5).add_(source, alpha=0.5)
                assert torch.equal(averaged, source)
            averaged.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model.backbone).items())
    assert torch.equal(model.base_fingerprint(), clone.base_fingerprint())


def test_a_copy_made_before_the_base_is_loaded_has_the_base():
    """EMAHook copies ahead of init_weights; of a random base, the copy has the same one."""
    model = MODELS.build(dict(type='E3VABackbone', backbone=swin(), frozen_dtype=None))
    clone = copy.deepcopy(model)
    model.init_weights()
    for name, tensor in named_tensors(model.backbone).items():
        assert torch.equal(tensor, named_tensors(clone.backbone)[name])
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images)[0], clone(images)[0])
    assert not torch.equal(model(images)[0], stir(clone)(images)[0])


def test_frozen_method():
    model = MODELS.build(dict(type='TunedBackbone', backbone=swin(), method=dict(type='Frozen')))
    model.init_weights()
    images = torch.randn(1, 3, 64, 64)
    outputs = model.train()(images)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(output.requires_grad for output in outputs)
    torch.testing.assert_close(outputs, tuple(outputs_of_stock(model, images)))
    assert list(model.state_dict()) == ['base_fingerprint']


@pytest.mark.parametrize(
    ('config', 'error', 'message'),
    [
        (dict(backbone=dict(type='mmseg.SwinTransfomer')), KeyError, "SwinTransfomer.*similar are.*'SwinTransformer'"),
        (dict(adapter=dict(rank=0)), ValueError, 'adapter.rank .* got 0'),
        (dict(adapter=dict(rank=-1)), ValueError, 'adapter.rank .* got -1'),
        (dict(adapter=dict(rnak=8)), ValueError, r"unknown option \['rnak'\].*known are \['rank'"),
        (dict(adapter=8), ValueError, 'adapter must be a dict .* got 8'),
        (dict(mixer=dict(widht=8)), ValueError, r"unknown option \['widht'\] in mixer.*known are \['width'"),
        (dict(mixer=True), ValueError, 'mixer must be a dict .* got True'),
        (dict(mixer=dict(width=0)), ValueError, 'mixer.width .* got 0'),
        (dict(mixer=dict(depth=2)), ValueError, r"unknown option \['depth'\] in mixer"),
        (dict(mixer=dict(kernel_sizes=(3, 4))), ValueError, r'mixer.kernel_sizes .* got \(3, 4\)'),
        (dict(frozen_dtype='int3'), ValueError, "frozen_dtype must be one of .* got 'int3'"),
        (dict(saved_dtype='float4'), ValueError, "saved_dtype must be one of .* got 'float4'"),
        (dict(saved_fraction=0), ValueError, 'saved_fraction must be a number above 0 and at most 1, got 0'),
        (dict(init='ones'), ValueError, "init must be one of .* got 'ones'"),
    ],
)
def test_bad_options(config, error, message):
    with pytest.raises(error, match=message):
        MODELS.build(dict(dict(type='E3VABackbone', backbone=swin()), **config))


@pytest.mark.parametrize('wrapper', [dict(type='E3VABackbone'), dict(type='TunedBackbone', method=dict(type='Full'))])
def test_a_misspelt_option_names_the_nearest(wrapper):
    message = r"unknown option \['frozen_dtpye'\] in \w+ \(frozen_dtpye='auto'\); did you mean \['frozen_dtype'\]"
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(wrapper, backbone=swin(), frozen_dtpye='auto'))


def test_synchronised_norms_that_would_lose_their_activation():
    model = e3va(timm_features('tf_efficientnet_lite0'))
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(ValueError, match=r"sync_bn='torch' has replaced \d+ BatchNormAct2d of backbone, such as model"):
        converted.train()
