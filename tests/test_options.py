"""Random options: a model that trains, or an error that names the option and its value."""

import random
from collections.abc import Iterator

import pytest
import torch
from conftest import swin
from mmengine.registry import MODELS

VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        -1,
        0.0,
        0.5,
        1.5,
        float('inf'),
        float('nan'),
        b'x',
        torch.bfloat16,
        {1, 2},
    ),
    *('', 'zero', 'kaiming', 'bfloat16', 'float8_e4m3fn', 'float16', 'auto', 'maybe', '3'),
    *([], [1], [3, 5], (3,), [None], [[3]], [{}], {}, {'a': 1}, [{'taps': ['x'], 'end': 'y', 'dims': 3}]),
    *([{'taps': 1, 'end': 2, 'dims': 3}], [{'taps': ['norm0'], 'end': 'norm0', 'dims': '3'}]),
]
OPTIONS = {
    'adapter': ('rank', 'branches', 'hidden_ratio'),
    'mixer': ('width', 'kernel_sizes'),
    **dict.fromkeys(('frozen_dtype', 'saved_dtype', 'saved_fraction', 'graph_stages', 'init', 'taps')),
}
METHODS = {
    'Partial': ('num_blocks',),
    'Adapter': ('width',),
    'AdaptFormer': ('width', 'scale', 'attention'),
    'LoRand': ('rank', 'branches', 'hidden_ratio', 'init', 'shared_core'),
    'Mona': ('width', 'kernel_sizes'),
    'LoRA': ('r', 'lora_alpha', 'target_modules'),
    'PEFT': ('peft_type', 'target_modules', 'r'),
    'LST': ('reduction',),
    'DTL': ('rank', 'beta', 'kernel_size', 'first_stage', 'num_fed_blocks'),
}


def drawn(rng, names, nested=None) -> dict:
    """Some of the options, each at one of ``VALUES``, or a dict of its own options."""
    chosen = [name for name in names if rng.random() < 0.35] or [rng.choice(list(names))]
    inner = nested or {}
    return {
        name: drawn(rng, inner[name]) if inner.get(name) and rng.random() < 0.8 else rng.choice(VALUES)
        for name in chosen
    }


def leaves(options: dict) -> Iterator[tuple[str, object]]:
    """Options and their values, nested ones and entries of lists included."""
    for key, value in options.items():
        yield key, value
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            yield key, entry
            if isinstance(entry, dict):
                yield from leaves(entry)


def trains(config: dict) -> bool:
    """Whether a model comes of it in which the highway, or what the method adds or trains, gets gradients."""
    model = MODELS.build(config).train()
    sum(output.sum() for output in model(torch.randn(1, 3, 32, 32))).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return bool(trained) and all(parameter.grad is not None for parameter in trained)


def verdict(config: dict, options: dict) -> str:
    """'trains', or 'refused' by a message with one of the options and its value; anything else is what is wrong."""
    try:
        return 'trains' if trains(config) else f'{options} leaves parameters without gradient'
    except ValueError as error:
        message = str(error)
        is_named = any(key in message and str(value) in message for key, value in leaves(options))
        return 'refused' if is_named else f'{options}: {message}'


@pytest.mark.parametrize('seed', range(4))
def test_of_the_wrapper(seed):
    rng = random.Random(seed)
    sets = [{}, *(drawn(rng, OPTIONS, OPTIONS) for _ in range(50))]
    verdicts = [verdict(dict(type='E3VABackbone', backbone=swin(), **options), options) for options in sets]
    assert set(verdicts) == {'trains', 'refused'}


@pytest.mark.parametrize('method', METHODS)
def test_of_a_method(method):
    if method in ('LoRA', 'PEFT'):
        pytest.importorskip('peft')
    # At the defaults this Swin is too narrow for LST, and PEFT has none.
    needed = {'LST': dict(reduction=4), 'PEFT': dict(peft_type='LORA', target_modules=['qkv'])}.get(method, {})
    rng = random.Random(0)
    sets = [needed, *({**needed, **drawn(rng, METHODS[method])} for _ in range(20))]
    methods = [dict(type='TunedBackbone', backbone=swin(), method=dict(type=method, **options)) for options in sets]
    assert set(map(verdict, methods, sets)) == {'trains', 'refused'}
