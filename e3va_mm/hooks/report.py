"""What a run costs: trainable parameters by part, peak memory and step time."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from torch import nn
from torch.optim import Optimizer

from ..checkpoints.files import to_plain

MIB = 2**20


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Trainable and frozen parameters by part.

    Returns:
        ``{part: {'trainable': n, 'frozen': n}}`` for the parts backbone, highway (adapters and mixers), neck and head.
    """
    counts, adapters = {}, _adapters(model)
    for name, parameter in model.named_parameters():
        part = counts.setdefault(_part(name, parameter, adapters), {'trainable': 0, 'frozen': 0})
        part['trainable' if parameter.requires_grad else 'frozen'] += parameter.numel()
    for name, module in model.named_modules():
        if getattr(module, 'num_quantised', 0):
            counts[_part(name, None, adapters)]['frozen'] += module.num_quantised
    return counts


def _adapters(model: nn.Module) -> set[int]:
    """Ids of the parameters that are a part of their own, the highway."""
    wrappers = (module for module in model.modules() if hasattr(module, 'adapter_parameters'))
    return {id(parameter) for wrapper in wrappers for parameter in wrapper.adapter_parameters().values()}


def _part(name: str, parameter: nn.Parameter | None, adapters: set[int]) -> str:
    top = name.partition('.')[0]
    return 'highway' if id(parameter) in adapters else top if top in ('backbone', 'neck') else 'head'


def learning_rates(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, set[float]]:
    """By part, the learning rates that its parameters reach once warm-up is over."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {id(each): group.get('initial_lr', group.get('lr')) for group in groups for each in group['params']}
    adapters, by_part = _adapters(model), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and rates.get(id(parameter)) is not None:
            by_part.setdefault(_part(name, parameter, adapters), set()).add(rates[id(parameter)])
    return by_part


def format_table(counts: dict[str, dict[str, int]], rates: dict[str, set[float]] | None = None) -> str:
    """The counts as an aligned table with a row a part, with its least and its highest rate, and a total."""
    total = {kind: sum(part[kind] for part in counts.values()) for kind in ('trainable', 'frozen')}
    lines = [f'{"part":<10}{"trainable":>14}{"frozen":>14}{"trainable %":>13}' + (f'  {"rate":>8}' if rates else '')]
    for part, count in [*counts.items(), ('total', total)]:
        share = 100 * count['trainable'] / max(1, count['trainable'] + count['frozen'])
        of_part = sorted((rates or {}).get(part, ()))
        rate = ' to '.join(f'{each:g}' for each in dict.fromkeys([*of_part[:1], *of_part[-1:]]))
        row = f'{part:<10}{count["trainable"]:>14,}{count["frozen"]:>14,}{share:>13.2f}  {rate:>8}'
        lines.append(row.rstrip())
    return '\n'.join(lines)


def gradient_bytes(model: nn.Module) -> int:
    """Size of a step's gradients, each in the dtype of its parameter: what several processes exchange in every step."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(parameter.numel() * parameter.element_size() for parameter in trained)


def synchronized_parts(model: nn.Module) -> list[str]:
    """The children of a model, such as ``decode_head``, in which SyncBN takes the statistics of all processes."""
    norms = (
        name
        for name, module in model.named_modules()
        # torch's and mmcv's have the same name. Those of a frozen backbone are in eval, and wait for nobody.
        if type(module).__name__ == 'SyncBatchNorm' and module.training
    )
    return list(dict.fromkeys(name.partition('.')[0] for name in norms))


def describe_exchange(model: nn.Module, num_processes: int) -> list[str]:
    """What a step of several processes exchanges, and what of that can be spared; of one process nothing."""
    if num_processes == 1:
        return []
    lines = [f'Each of {num_processes} processes exchanges {gradient_bytes(model) / MIB:.1f} MiB of gradients a step']
    parts = synchronized_parts(model)
    if parts:
        lines.append(
            f'SyncBN in {", ".join(parts)} waits for all processes at every norm: with 4 images a GPU or more try '
            "norm_cfg=dict(type='BN') there, or GN; docs/several_gpus.md has what it costs"
        )
    return lines


@HOOKS.register_module()
class ParameterTableHook(Hook):
    """Logs one table of trainable and frozen parameters, and their learning rates, by part when training starts.

    Where several processes train, it also logs how much they exchange in a step, and names heads that use SyncBN.
    """

    def before_train(self, runner) -> None:
        model, wrapper = _unwrap(runner.model), runner.optim_wrapper
        wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        rates = learning_rates(model, [each.optimizer for each in wrappers])
        runner.logger.info(f'Parameters by part\n{format_table(count_parameters(model), rates)}')
        for line in describe_exchange(model, runner.world_size):
            runner.logger.info(line)


@HOOKS.register_module()
class ResourceReportHook(Hook):
    """Logs peak memory and step time as scalars, and writes ``run_report.json`` beside the checkpoints.

    The report also holds the parameters by part, the bytes of their gradients (what each of several processes exchanges
    in a step; one alone exchanges none), and the metrics of the last validation.

    Memory is the peak of allocated CUDA memory since the start of training; without CUDA, the peak resident set of
    the process. A step is forward, backward and optimizer, without the wait for data.

    Args:
        warmup: steps at the start that the report's step time leaves out.
    """

    # Before LoggerHook (BELOW_NORMAL): mmengine resets CUDA's peak at every log.
    priority = 'NORMAL'

    def __init__(self, warmup: int = 10) -> None:
        self.warmup = warmup
        self.peak_bytes = 0
        self.step_seconds: list[float] = []
        self.metrics: dict[str, float] = {}

    def before_train(self, runner) -> None:
        self.peak_bytes, self.step_seconds = 0, []
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._started = time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        # RuntimeInfoHook has just read the losses, and with that has waited for the device.
        self.step_seconds.append(time.perf_counter() - self._started)
        self.peak_bytes = max(self.peak_bytes, process_peak_bytes())
        runner.message_hub.update_scalar('train/peak_memory_mib', self.peak_bytes / MIB)
        runner.message_hub.update_scalar('train/step_seconds', self.step_seconds[-1])

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.metrics = metrics or {}

    def after_train(self, runner) -> None:
        peak = torch.tensor(float(self.peak_bytes))
        all_reduce(peak, op='max')
        if is_main_process() and self.step_seconds:
            path = Path(runner.work_dir, 'run_report.json')
            path.write_text(json.dumps(self._report(runner, peak.item()), indent=2) + '\n')
            runner.logger.info(f'Peak memory and step time are in {path}')

    def _report(self, runner, peak_bytes: float) -> dict:
        steps = self.step_seconds[self.warmup :] or self.step_seconds
        cuda = torch.cuda.is_available()
        return {
            'config': Path(runner.cfg.filename or '').name,
            'device': torch.cuda.get_device_name() if cuda else 'cpu',
            'num_devices': runner.world_size,
            'torch': torch.__version__,
            'batch_size': getattr(runner.train_dataloader.batch_sampler, 'batch_size', None),
            'num_steps': len(self.step_seconds),
            'peak_memory_mib': round(peak_bytes / MIB, 1),
            'peak_memory_kind': 'cuda allocated' if cuda else 'process resident set',
            'step_seconds_median': round(statistics.median(steps), 5),
            'step_seconds_spread': [round(min(steps), 5), round(max(steps), 5)],
            'parameters': count_parameters(_unwrap(runner.model)),
            'gradient_bytes': gradient_bytes(_unwrap(runner.model)),
            'checkpoint_bytes': _last_checkpoint_bytes(runner),
            'metrics': to_plain(self.metrics),
        }


def process_peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def _last_checkpoint_bytes(runner) -> int | None:
    path = runner.message_hub.get_info('last_ckpt') if 'last_ckpt' in runner.message_hub.runtime_info else None
    return Path(path).stat().st_size if path and Path(path).is_file() else None


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
