"""Segments of stages, and frozen blocks that go on from the highway's state."""

import pytest
import torch
from conftest import FAMILIES, e3va, images, stir, swin
from mmengine.registry import MODELS
from torch.testing import assert_close

EVERY_BLOCK = dict(mixer=dict(width=4, every=1), feedback=True)


def plain_outputs(model, batch):
    """The definition, block by block in plain autograd: a state with gradient, and tokens that are its value."""
    taps, outputs = model.taps, []
    with torch.no_grad():
        tokens, size = taps.embed(batch)
    state = taps.patches(tokens)
    for index, segment in enumerate(model.segments):
        seen = []
        tokens = taps.run_stage(segment.stage, tokens, size, seen.append, segment.blocks)
        record = model.highway[index].record() if seen else None
        for tap in seen:
            record.add(tap)
            state = state + tap
        if seen:
            state = state + model.highway[index](record, size)
        for mixer in model.mixers[index]:
            state = mixer(state, size)
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


@pytest.mark.parametrize('backbone', [*FAMILIES.values(), swin()], ids=[*FAMILIES, 'mmseg Swin'])
def test_equals_its_definition(backbone):
    model = stir(e3va(backbone, **EVERY_BLOCK)).double()
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
