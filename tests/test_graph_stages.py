"""Stages whose blocks run on the highway's state, and the highway as a whole against its definition."""

import pytest
import torch
from conftest import FAMILIES, Recorder, e3va, images, reference_delta, saved_bytes, stir, swin
from torch.testing import assert_close

from e3va_mm.families.base import listen

MIXED = dict(mixer=dict(width=4))
IN_GRAPH = dict(mixer=dict(width=4), graph_stages=2)
RESNETS = {
    'ResNet-18': dict(type='mmdet.ResNet', depth=18, base_channels=8, zero_init_residual=False),
    'ResNet-50': dict(type='mmdet.ResNet', depth=50, base_channels=8, zero_init_residual=False, out_indices=(1, 3)),
}
BACKBONES = {**FAMILIES, 'mmseg Swin': swin(), **RESNETS}
ENTERED = ('mmseg', 'swin', 'convnext', 'pvt', 'samvit')


def plain_outputs(model, batch):
    """The definition in plain autograd: frozen taps and levels, and a state with gradient."""
    heard, family, outputs, offset = Recorder(), model.family, [], 0
    with torch.no_grad(), listen(family, heard, len(family.stages)):
        model.backbone(batch)
    segments = iter(zip(model.highway, model.mixers))
    for index, stage in enumerate(family.stages):
        level, size = heard.levels[index]
        in_graph = index >= model._highway[0].num_heard
        if not in_graph:
            state = level + offset
            adapters, mixers = next(segments)
            if index in heard.taps:
                state = state + reference_delta(heard.taps[index], adapters.weights)
            for mixer in mixers:
                state = mixer(state, size)
        for number in range(len(stage.blocks) if in_graph else 0):
            state = family.run_block(index, number, state, size)
            _, (mixer,) = next(segments)
            state = mixer(state, size)
        if stage.norm is not None:
            outputs.append(family.module(stage.norm)(state).unflatten(1, size).permute(0, 3, 1, 2))
        if index + 1 < len(family.stages):
            next_size = heard.levels[index + 1][1]
            if family.pools:
                state, start = (family.pool(index, tokens, size, next_size) for tokens in (state, level))
            else:
                state, carried_size = family.carry(index, state, size)
                assert carried_size == next_size
                start, _ = family.carry(index, level, size)
            offset = state - start
    return outputs


def _can_be_entered(name):
    return any(name.startswith(family) for family in ENTERED)


@pytest.mark.parametrize(
    ('backbone', 'options'),
    [
        *(pytest.param(backbone, MIXED, id=name) for name, backbone in BACKBONES.items()),
        *(
            pytest.param(backbone, IN_GRAPH, id=f'{name}, in graph')
            for name, backbone in BACKBONES.items()
            if _can_be_entered(name)
        ),
    ],
)
def test_equals_its_definition(backbone, options):
    model = stir(e3va(backbone, **options)).double()
    model.family.remember()  # MiT's norms in double precision
    batch = images((64, 96)).double()

    def results(outputs):
        model.zero_grad()
        sum(output.square().mean() for output in outputs).backward()
        return list(outputs), [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    assert_close(results(model(batch)), results(plain_outputs(model, batch)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', [name for name in BACKBONES if not _can_be_entered(name)])
def test_backbones_whose_blocks_the_state_can_not_enter(name):
    with pytest.raises(ValueError, match='graph_stages=2: the blocks of this (TIMMFeatures|ResNet)'):
        e3va(BACKBONES[name], **IN_GRAPH)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(graph_stages=4), 'graph_stages must be an integer of 0 to 3, got 4'),
        (dict(graph_stages=True), 'got True'),
        (dict(mixer=None), 'graph_stages=2 needs a mixer'),
    ],
)
def test_bad_stages_in_the_graph(options, message):
    with pytest.raises(ValueError, match=message):
        e3va(**{**IN_GRAPH, **options})


def test_blocks_in_the_graph_are_computed_again():
    """What a stage in the graph keeps is the state at the start of each of its blocks."""
    batch = images((64, 96))
    plain, in_graph = (e3va(mixer=dict(width=4), graph_stages=number) for number in (0, 1))
    with torch.no_grad():
        expected = in_graph.backbone(batch)
    for _ in range(2):  # the frozen pass of the second one ends before the stage in the graph
        assert_close(list(in_graph(batch)), list(expected), rtol=0, atol=1e-5)
    plain(batch)
    block_input = 2 * 2 * 3 * 96 * 4  # the tiny Swin's last stage: 2 images of 2 x 3 tokens
    assert saved_bytes(in_graph, batch) - saved_bytes(plain, batch) < 2 * block_input + 40_000


@torch.no_grad()
def test_the_frozen_pass_ends_before_the_graph():
    model, calls = e3va(**IN_GRAPH), []
    model(images())
    model.backbone.stages[3].register_forward_hook(lambda *_: calls.append(3))
    model.backbone.stages[1].register_forward_hook(lambda *_: calls.append(1))
    model(images())
    assert calls == []  # it ends with the last block of stage 1, before the stage's own end
