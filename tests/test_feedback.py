"""Segments of stages, and blocks that go on from the highway's state, outside of the graph or in it."""

import pytest
import torch
from conftest import FAMILIES, e3va, images, saved_bytes, stir, swin
from mmengine.registry import MODELS
from torch.testing import assert_close

EVERY_BLOCK = dict(mixer=dict(width=4, every=1), feedback=True)
IN_GRAPH = dict(mixer=dict(width=4), graph_stages=2)
BACKBONES = {**FAMILIES, 'mmseg Swin': swin()}
ENTERED = ('mmseg', 'swin', 'convnext', 'pvt', 'samvit')


def plain_outputs(model, batch):
    """The definition, block by block in plain autograd: a state with gradient, and frozen tokens."""
    taps, outputs = model.taps, []
    with torch.no_grad():
        tokens, size = taps.embed(batch)
    state = taps.patches(tokens)
    for index, segment in enumerate(model.segments):
        seen = []
        if segment.in_graph:
            state = taps.run_blocks(segment.stage, state, size, segment.blocks)
        else:
            tokens = taps.run_stage(segment.stage, tokens, size, seen.append, segment.blocks)
        record = model.highway[index].record() if seen else None
        for tap in seen:
            record.add(tap)
            state = state + tap
        if seen:
            state = state + model.highway[index](record, size)
        for mixer in model.mixers[index]:
            state = mixer(state, size)
        if model.feedback or segment.in_graph:
            tokens = taps.with_patches(tokens, state.detach())
        if not segment.ends_stage:
            continue
        if segment.stage in model.norms:
            outputs.append(model.norms[segment.stage](state).unflatten(1, size).permute(0, 3, 1, 2))
        if index + 1 < len(model.segments):
            with torch.no_grad():
                following = taps.follow(segment.stage, tokens, size)
            state = taps.carry(segment.stage, state, size, following.size) - following.carried
            tokens, size = following.tokens, following.size
            patches = taps.patches(tokens)
            # Hiera pools in its first block.
            state = state + (patches if patches.shape == state.shape else following.carried)
    return outputs


def _can_be_entered(name):
    return any(name.startswith(family) for family in ENTERED)


@pytest.mark.parametrize(
    ('backbone', 'options'),
    [
        *(pytest.param(backbone, EVERY_BLOCK, id=name) for name, backbone in BACKBONES.items()),
        *(
            pytest.param(backbone, IN_GRAPH, id=f'{name}, in graph')
            for name, backbone in BACKBONES.items()
            if _can_be_entered(name)
        ),
        pytest.param(swin(), dict(IN_GRAPH, feedback=True), id='both'),
    ],
)
def test_equals_its_definition(backbone, options):
    model = stir(e3va(backbone, **options)).double()
    model.taps.remember()  # MiT's norms in double precision
    batch = images((64, 96)).double()

    def results(outputs):
        model.zero_grad()
        sum(output.square().mean() for output in outputs).backward()
        return list(outputs), [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    assert_close(results(model(batch)), results(plain_outputs(model, batch)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('feedback', [False, True])
@torch.no_grad()
def test_who_reads_adapted_tokens(feedback, monkeypatch):
    model, starts = e3va(feedback=feedback), []
    run_stage = model.taps.run_stage

    def watched(stage, tokens, *args, **kwargs):
        starts.append(tokens.clone())
        return run_stage(stage, tokens, *args, **kwargs)

    monkeypatch.setattr(model.taps, 'run_stage', watched)
    model(images())
    model.highway[0].up_bias.add_(1)
    model(images())
    changed = [not torch.equal(before, after) for before, after in zip(starts[:4], starts[4:])]
    assert changed == [False] + [feedback] * 3


@pytest.mark.parametrize(
    ('mixer', 'taps', 'number'),
    [
        (dict(every=6), [4, 4, 12, 12, 12, 4], 1_411_264),
        (dict(width=48, every=6), [4, 4, 12, 12, 12, 4], 1_513_824),
        (dict(every=5), [4, 4, 10, 10, 10, 6, 4], 1_448_352),
        (dict(width=48, depth=2), [4, 4, 36, 4], 1_610_880),
    ],
)
def test_segments_of_swin_b(mixer, taps, number):
    backbone = swin(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    model = MODELS.build(dict(type='E3VABackbone', backbone=backbone, mixer=mixer))
    assert [segment.num_taps for segment in model.segments] == taps
    assert sum(parameter.numel() for parameter in model.adapter_parameters().values()) == number


@pytest.mark.parametrize('name', [name for name in BACKBONES if not _can_be_entered(name)])
def test_backbones_whose_blocks_the_state_can_not_enter(name):
    with pytest.raises(ValueError, match='graph_stages=2: the blocks of this TIMMFeatures'):
        e3va(BACKBONES[name], **IN_GRAPH)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(graph_stages=4), 'graph_stages must be an integer of 0 to 3, got 4'),
        (dict(graph_stages=True), 'got True'),
        (dict(mixer=None), 'graph_stages=2 needs a mixer'),
        (dict(compile_frozen=True), 'such as mixer=dict.., and compile_frozen=False'),
    ],
)
def test_bad_stages_in_the_graph(options, message):
    with pytest.raises(ValueError, match=message):
        e3va(**{**IN_GRAPH, **options})


def test_blocks_in_the_graph_are_computed_again():
    """What a stage in the graph keeps is the state at the start of each of its blocks."""
    batch = images((64, 96))
    plain, in_graph = (e3va(mixer=dict(width=4, every=1), graph_stages=number) for number in (0, 1))
    assert saved_bytes(in_graph, batch) < saved_bytes(plain, batch)
    with torch.no_grad():
        expected = in_graph.backbone(batch)
    assert_close(list(in_graph(batch)), list(expected), rtol=0, atol=1e-5)
