"""What one model of a stock config is put through: built, a training step, predictions, a round trip of its weights."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from benchmarks.coverage_data import IMAGES, dicts_of, make_batch
from e3va_mm.backbones.base import FrozenBackbone
from e3va_mm.optim import ADAMW_SHARE, fan_ins, highway_rate

POOL = 2**18


class TooSlow(Exception):
    """A model that takes longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_) -> None:
        raise TooSlow(f'takes more than {seconds} s')

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def attempt(*steps: Callable[[], Any], seconds: int = 120) -> dict[str, str]:
    """Takes steps in turn; the first that fails, and the first and last line of its error. Nothing if none does."""
    for step in steps:
        try:
            with time_limit(seconds):
                step()
        # mmdet asserts and exits where an option is wrong, and none of it ends the other models' turn.
        except (Exception, SystemExit) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ['']
            message = ' … '.join(dict.fromkeys([lines[0], lines[-1]]))
            return {'fails_at': step.__name__, 'error': f'{type(error).__name__}: {message}'[:300]}
    return {}


@contextlib.contextmanager
def quick_draws() -> Iterator[None]:
    """Tensors are filled from numbers that have been drawn once: to draw millions anew takes most of a trial's time."""
    normal, uniform = torch.randn(POOL), torch.rand(POOL)

    def filled(tensor: Tensor, pool: Tensor, scale: float, offset: float) -> Tensor:
        pool.copy_(pool.roll(997))  # so that no two weights are the same
        flat = pool.repeat(-(-tensor.numel() // POOL))[: tensor.numel()]
        with torch.no_grad():
            return tensor.copy_(flat.view(tensor.shape)).mul_(scale).add_(offset)

    def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, **_) -> Tensor:
        return filled(tensor, normal, std, mean)

    def uniform_(tensor: Tensor, low: float = 0.0, high: float = 1.0, **_) -> Tensor:
        return filled(tensor, uniform, high - low, low)

    with patch.object(Tensor, 'normal_', normal_), patch.object(Tensor, 'uniform_', uniform_):
        yield


def wrappers(model: nn.Module) -> dict[str, FrozenBackbone]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenBackbone)}


class Trial:
    """One shrunk model, stock or tuned, and the steps that it is put through in turn.

    Args:
        model: the shrunk config.
        optim_wrapper: the config's own, as far as it says at which rates parameters train.
        pixels: of an image's side.

    Attributes:
        report: ``without_gradient``, the modules that are trained but have none.
    """

    def __init__(self, model: dict, toolbox: str, optim_wrapper: dict, pixels: int) -> None:
        self.config, self.toolbox, self.optim_wrapper, self.pixels = model, toolbox, optim_wrapper, pixels
        self.report: dict[str, Any] = {}

    def stock_steps(self) -> tuple[Callable[[], None], ...]:
        return self.build, self.initialise, self.loss, self.backward, self.predict

    def steps(self) -> tuple[Callable[[], None], ...]:
        first = self.build, self.rates, self.initialise, self.copy
        return *first, self.loss, self.backward, self.update, self.predict, self.round_trip

    @torch.no_grad()
    def wrap(self) -> None:
        """Each wrapped backbone, without the model around it, gives maps as its stock backbone does."""
        configs = [config for config in dicts_of(self.config) if config.get('type') == 'E3VABackbone']
        assert configs, 'nothing is wrapped'
        for config in configs:
            torch.manual_seed(0)
            with quick_draws():
                wrapper = revert_sync_batchnorm(MODELS.build(copy.deepcopy(config)))
                wrapper.init_weights()
            images = torch.rand(IMAGES, 3, self.pixels, self.pixels)
            found, expected = (list(tensors_of(module(images))) for module in (wrapper.eval(), wrapper.backbone))
            if [one.shape for one in found] != [one.shape for one in expected]:
                raise ValueError('the maps have other shapes than those of the stock backbone')

    def build(self) -> None:
        torch.manual_seed(0)
        # As the runner does: without a process group there is nothing to synchronise.
        with quick_draws():
            self.model = revert_sync_batchnorm(MODELS.build(copy.deepcopy(self.config)))

    def rates(self) -> None:
        """The optimizer of the tuned config gives what wrappers train its base rate, or AdamW's share of that, and
        adapters and mixers the highway's."""
        with contextlib.redirect_stdout(io.StringIO()):  # some constructors print every parameter
            self.optimizer = build_optim_wrapper(self.model, copy.deepcopy(self.optim_wrapper))
        rate_of, base_of, sums = {}, {}, fan_ins(self.model)
        for group in self.optimizer.param_groups:
            base = self.optimizer.optimizer.defaults['lr'] * (ADAMW_SHARE if group.get('adaptive') else 1)
            for parameter in group['params']:
                rate_of[id(parameter)], base_of[id(parameter)] = group['lr'], base
        for path, wrapper in wrappers(self.model).items():
            for name, key in [(name, id(p)) for name, p in wrapper.named_parameters() if p.requires_grad]:
                if key not in rate_of:
                    raise ValueError(f'{name} of {path} is not in the optimizer')
                expected = highway_rate(base_of[key], sums[key]) if key in sums else base_of[key]
                if not math.isclose(rate_of[key], expected):
                    raise ValueError(f'{name} of {path} trains at {rate_of[key]}, not at {expected}')

    def initialise(self) -> None:
        with quick_draws():
            self.model.init_weights()

    def copy(self) -> None:
        self.untrained = copy.deepcopy(self.model)

    def loss(self) -> None:
        self.model.train()
        # Heads ask for the progress of training, which loops say.
        MessageHub.get_current_instance().update_info_dict({'epoch': 0, 'iter': 0, 'max_iters': 1000})
        torch.manual_seed(1)
        batch = make_batch(self.config, self.toolbox, self.pixels, training=True)
        data = self.model.data_preprocessor(batch, True)
        self.total, parts = self.model.parse_losses(self.model._run_forward(data, mode='loss'))
        if not torch.isfinite(self.total):
            raise ValueError(f'the loss is not finite: { {key: float(value) for key, value in parts.items()} }')

    def backward(self) -> None:
        self.total.backward()
        del self.total
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        without = {name for name, p in trained.items() if p.grad is None}
        self.report['without_gradient'] = sorted({name.rsplit('.', 1)[0] for name in without})
        for path, wrapper in wrappers(self.model).items():
            self._check_gradients(path, wrapper, without)

    def update(self) -> None:
        # Base rates are for weights that have been trained: with random ones, such a step may end in infinity.
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()

    def _check_gradients(self, path: str, wrapper: FrozenBackbone, without: set[str]) -> None:
        own = {f'{path}.{name}': p for name, p in wrapper.named_parameters()}
        missing = sorted(without & set(own))
        if missing:
            raise ValueError(f'{len(missing)} trained parameters have no gradient, such as {missing[0]}')
        frozen = [name for name, p in own.items() if not p.requires_grad and p.grad is not None]
        if frozen:
            raise ValueError(f'{len(frozen)} frozen parameters have a gradient, such as {frozen[0]}')
        gradients = [p.grad for p in own.values() if p.grad is not None]
        if gradients and not any(gradient.any() for gradient in gradients):
            raise ValueError(f'all gradients of {path} are zero')

    def predict(self) -> None:
        self.predictions = self._predict(self.model)

    @torch.no_grad()
    def _predict(self, model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        model.eval()
        return list(tensors_of(model.test_step(make_batch(self.config, self.toolbox, self.pixels, training=False))))

    def round_trip(self) -> None:
        """What a checkpoint holds, loaded into a model on the same base, predicts the same."""
        # As runners load; wrappers check their own part.
        self.untrained.load_state_dict(copy.deepcopy(self.model.state_dict()), strict=False)
        found = self._predict(self.untrained)
        same = len(found) == len(self.predictions) and all(map(equal, found, self.predictions))
        if not same:
            raise ValueError('predictions differ after weights were saved and loaded')


def equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(torch.nan_to_num(one.float()), torch.nan_to_num(other.float()))


def tensors_of(node: Any) -> Iterator[Tensor]:
    """All tensors in predictions, in order."""
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, BaseDataElement):
        for _, value in sorted(node.items()):
            yield from tensors_of(value)
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from tensors_of(item)
    elif isinstance(node, dict):
        for _, value in sorted(node.items()):
            yield from tensors_of(value)
