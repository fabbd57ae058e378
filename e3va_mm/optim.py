"""The optimizer's parameter groups, and the learning rate of what a wrapper adds."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator

from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .highway.mixer import StateMixer
from .highway.stage_adapters import StageAdapters

# What an entry of custom_keys has to name to be meant for the highway.
_PARTS = ('highway', 'mixers')
# Where constructors note the factor of a group: mmengine's for custom_keys, those of layer decay.
_FACTORS = ('lr_mult', 'lr_scale')
# Of SGD's rate, for what AdamW trains beside: 0.001 where heads learn at 0.02.
ADAMW_SHARE = 0.05
# The rate of a highway with mixers: how many times the config's, the most, and the fan-in behind which it falls.
FACTOR, HIGHEST, WIDEST = 10, 0.005, 256


@OPTIMIZERS.register_module()
class SGDWithAdamW(SGD):
    """SGD, but groups that are marked ``adaptive`` are stepped by AdamW; :class:`MergedGroupsConstructor` marks them.

    What is added to a frozen backbone starts at zero, with small gradients, and SGD hardly moves it at rates that suit
    heads. Schedulers, clipping, AMP and checkpoints see one optimizer. Arguments are those of :class:`torch.optim.SGD`.
    """

    def __init__(self, params, *args, **kwargs) -> None:
        super().__init__(params, *args, **kwargs)
        # With fused=True, SGD would undo AMP's scaling within its own step, for its own groups alone.
        self._step_supports_amp_scaling = False

    def step(self, closure=None):
        groups = self.param_groups
        adaptive = [group for group in groups if group.get('adaptive')]
        self.param_groups = [group for group in groups if not group.get('adaptive')]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        if adaptive:
            # Not in __init__: a copied optimizer has its groups and state alone.
            if '_adamw' not in self.__dict__:
                self._adamw = AdamW(adaptive)
            self._adamw.param_groups, self._adamw.state = adaptive, self.state
            self._adamw.step()
        return loss


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedGroupsConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, but what a wrapper adds to a backbone learns at the base rate, and groups are merged.

    An entry of ``custom_keys`` that matches parameters of the stock backbone, such as ``backbone``, is meant for these:
    highway, mixers and output norms, and what a comparison method adds, keep their ``weight_decay`` from it, but learn
    at the optimizer's own ``lr``. An entry that matches nothing stock, such as ``backbone.highway``, holds.
    Where the optimizer is SGD, what is added is trained by AdamW, at a twentieth of SGD's rate: :class:`SGDWithAdamW`.

    With a ``paramwise_cfg`` mmengine makes a group of each parameter. An optimizer updates group by group, and adapters
    are many small parameters: their update is then hundreds of tiny kernels. So parameters of the same settings share
    a group; the update itself is the same. A run resumes from the optimizer state of the same constructor only, and
    AdapterCheckpointHook says so.
    """

    def __call__(self, model: nn.Module):
        added, stock = parameters_by_origin(model)
        named = self.optimizer_cfg.get('type')
        self._is_sgd = (OPTIMIZERS.get(named) if isinstance(named, str) else named) in (SGD, SGDWithAdamW)
        if self._is_sgd and added.keys() - stock:
            self.optimizer_cfg = {**self.optimizer_cfg, 'type': SGDWithAdamW}
            # Without settings for single parameters, mmengine makes one group of all.
            self.paramwise_cfg = self.paramwise_cfg or dict(custom_keys={})
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        with _without_lines_a_parameter():
            super().add_params(params, module, prefix, is_dcn_module)
        if self.base_lr is not None:
            self._restore_rates(params, module)
        params[:] = merge_groups(params)
        for group in params:
            settings = ', '.join(f'{key}={value}' for key, value in group.items() if key != 'params')
            print_log(f'{len(group["params"])} parameters: {settings or "as the optimizer has it"}', logger='current')

    def _restore_rates(self, params: list[dict], model: nn.Module) -> None:
        """Sets the base rate in the groups, of one parameter each, of what wrappers of ``model`` have added."""
        added, stock = parameters_by_origin(model)
        names = {id(parameter): name for name, parameter in added.items()}
        entries = self.paramwise_cfg.get('custom_keys', {})
        # mmengine takes the longest entry that is a part of a name: of what is added, often one for the backbone.
        meant = [key for key in sorted(entries, key=len, reverse=True) if not any(key in name for name in stock)]
        for group in params:
            name = names.get(id(group['params'][0]))
            if name:
                key = next((key for key in meant if key in name and name not in stock), None)
                group.pop('lr_mult', None)
                factor = entries[key].get('lr_mult') if key else None
                is_adaptive = self._is_sgd and name not in stock
                base = self.base_lr * (ADAMW_SHARE if is_adaptive else 1)
                group['lr'] = self._rate(group['params'][0], base) if factor is None else base * factor
                if factor not in (None, 1):
                    group['lr_mult'] = factor
                if is_adaptive:
                    group['adaptive'] = True

    def _rate(self, parameter: nn.Parameter, base: float) -> float:
        """The learning rate of a parameter that a wrapper has added, where no entry is meant for it."""
        return base


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class HighwayRatesConstructor(MergedGroupsConstructor):
    """:class:`MergedGroupsConstructor`, but a highway with mixers learns at a rate of its own, by Adam.

    It is ten times the optimizer's own, at most 0.005, and falls behind more than 256 elements:
    ``min(10 lr, 0.005) * min(1, 256 / fan_in)``. Output norms keep the optimizer's. An entry of ``custom_keys`` with an
    ``lr_mult`` that names a part is a factor of the optimizer's rate, and holds.

    Adam moves each element by about the rate, whatever its gradient, and a product by the rate times the number of
    elements that it sums: 8 in a core, 1536 in the input basis of Swin-L's last stage. Rates that fall with the fan-in
    are those of "Tensor Programs V" (arXiv 2203.03466).
    """

    def __call__(self, model: nn.Module):
        has_mixers = any(isinstance(module, StateMixer) for module in model.modules())
        self._fan_ins = fan_ins(model) if has_mixers else {}
        # Without settings for single parameters, mmengine makes one group of all.
        self.paramwise_cfg = self.paramwise_cfg or dict(custom_keys={})
        return super().__call__(model)

    def _rate(self, parameter: nn.Parameter, base: float) -> float:
        fan_in = self._fan_ins.get(id(parameter))
        return base if fan_in is None else highway_rate(base, fan_in)


def highway_rate(base: float, fan_in: int) -> float:
    """The rate of an adapter's or mixer's parameter beside mixers: see :class:`HighwayRatesConstructor`."""
    return min(FACTOR * base, HIGHEST) * min(1, WIDEST / fan_in)


def fan_ins(model: nn.Module) -> dict[int, int]:
    """By the id of each matrix and bias of adapters and mixers: how many elements an output sums.

    A bias has that of the narrowest matrix beside it, or of its own layer.
    """
    found = {}
    for module in model.modules():
        if isinstance(module, StageAdapters):
            for name, factor in module.named_parameters(recurse=False):
                is_bias = name.endswith('bias')
                found[id(factor)] = module.up_out.shape[-2] if is_bias else factor.shape[-2]
        elif isinstance(module, StateMixer):
            layers = (layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
            found.update({id(each): layer.weight[0].numel() for layer in layers for each in layer.parameters()})
    return found


@contextlib.contextmanager
def _without_lines_a_parameter() -> Iterator[None]:
    """Keeps mmengine's lines for each parameter out of the log: settings, which may not be the last word, and warnings
    that what is frozen is skipped."""
    logger = MMLogger.get_current_instance()

    def is_other(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message.startswith('paramwise_options') or message.endswith('since its requires_grad=False'))

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def parameters_by_origin(model: nn.Module) -> tuple[dict[str, nn.Parameter], set[str]]:
    """Those in ``model`` that learn at the base rate, by name, and the names of all that wrapped backbones bring.

    Output norms are in both.
    """
    added, stock = {}, set()
    for path, module in model.named_modules():
        if hasattr(module, 'base_rate_parameters'):
            prefix = f'{path}.' if path else ''
            added.update({prefix + name: value for name, value in module.base_rate_parameters().items()})
            stock.update(f'{prefix}{name}' for name in module.stock_names())
    return added, stock


def merge_groups(groups: list[dict]) -> list[dict]:
    """The groups, those that differ in nothing but their ``params`` as one; in the order of their first parameters."""
    merged: list[dict] = []
    for group in groups:
        settings = {**group, 'params': None}
        for known in merged:
            if {**known, 'params': None} == settings:
                known['params'] = [*known['params'], *group['params']]
                break
        else:
            merged.append(dict(group))
    return merged


def check_highway_rate(highway: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Makes sure that no setting meant for the backbone slows, or speeds, the highway.

    Args:
        highway: its parameters by name.
        optimizer: that was built from the running config.

    Raises:
        ValueError: ``custom_keys`` or a layer decay has a factor for them, and no entry names them.
    """
    ours = {id(parameter) for parameter in highway.values()}
    for group in optimizer.param_groups:
        factor = next((group[key] for key in _FACTORS if key in group), 1)
        if factor != 1 and any(id(parameter) in ours for parameter in group['params']):
            causes = _causes(factor)
            if causes is not None and not any(part in key for key in causes for part in _PARTS):
                raise ValueError(_advice(causes, factor))


def warn_of_sgd(highway: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Says so where plain SGD trains the highway."""
    ours = {id(parameter) for parameter in highway.values()}
    if isinstance(optimizer, SGD) and any(
        id(parameter) in ours and not group.get('adaptive')
        for group in optimizer.param_groups
        for parameter in group['params']
    ):
        message = (
            'SGD hardly moves the highway at rates that suit heads: set '
            "optim_wrapper.constructor='MergedGroupsConstructor', which trains it by AdamW beside SGD"
        )
        print_log(message, logger='current', level=logging.WARNING)


def _causes(factor: float) -> list[str] | None:
    """Entries of ``custom_keys`` with that factor in the running config; None where code runs without a config."""
    text = MessageHub.get_current_instance().get_info('cfg')
    # A config in pure Python may hold what its text does not bring back.
    with contextlib.suppress(AttributeError, NameError, SyntaxError, TypeError):
        custom_keys = (Config.fromstring(text, '.py').optim_wrapper.get('paramwise_cfg') or {}).get('custom_keys', {})
        return [key for key, entry in custom_keys.items() if entry.get('lr_mult') == factor]
    return None


def _advice(causes: list[str], factor: float) -> str:
    source = f'optim_wrapper.paramwise_cfg.custom_keys[{causes[0]!r}]' if causes else 'layer decay in optim_wrapper'
    return (
        f'{source} is meant for the backbone, and gives the highway {factor:g} of the learning rate. Add to '
        "custom_keys 'backbone.highway': dict(lr_mult=1), 'backbone.mixers': dict(lr_mult=1); or set "
        "optim_wrapper.constructor='MergedGroupsConstructor', which leaves the highway out of such entries"
    )


_wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def check_at_first_step(wrapper: nn.Module) -> None:
    """Has :func:`check_highway_rate` done when an optimizer takes its first step, whichever tool runs it."""
    _wrappers.add(wrapper)


def _check_first_step(optimizer: Optimizer, args, kwargs) -> None:
    if optimizer not in _checked:
        _checked.add(optimizer)
        for wrapper in list(_wrappers):
            check_highway_rate(wrapper.adapter_parameters(), optimizer)
            warn_of_sgd(wrapper.adapter_parameters(), optimizer)


# Of all hooks that a config of five lines runs by, with the toolbox's own tool, this one alone sees the optimizer.
register_optimizer_step_pre_hook(_check_first_step)
