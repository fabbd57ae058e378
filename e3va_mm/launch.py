"""What the command-line tools share: one pair for all toolboxes, steered by the config's ``default_scope``."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, MODEL_WRAPPERS, MODELS, OPTIM_WRAPPERS, RUNNERS, Registry
from mmengine.runner import Runner

from .backbones.base import FrozenBackbone
from .checkpoints.base_weights import names_weights
from .checkpoints.comparison import check_fits
from .checkpoints.files import read_checkpoint, read_weights_only
from .checks import check_count
from .compat import repair_text_detectors
from .named_configs import find_config
from .tune import tune

# All but the first detect.
SCOPES = ('mmseg', 'mmdet', 'mmrotate')
# Options that say where the weights of a stock model are; a wrapped backbone is one level deeper.
_STOCK_WEIGHTS = re.compile(r'load_from$|model\.(?!.*backbone\.backbone\.)(.*\.)?(init_cfg|pretrained)(\.|$)')


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's DDP wrapper without the device ids that it always passes, and without SyncBN: torch refuses both."""

    def __init__(self, module, device_ids=None, **kwargs) -> None:
        # torch's and mmcv's have the same name.
        if any(type(layer).__name__ == 'SyncBatchNorm' for layer in module.modules()):
            message = 'SyncBN needs GPUs: on CPUs it becomes BN, and each process has the statistics of its own images'
            print_log(message, logger='current', level=logging.WARNING)
        super().__init__(revert_sync_batchnorm(module), **kwargs)


def add_config_arguments(parser: argparse.ArgumentParser, is_required: bool = True) -> None:
    """The config, and what changes it."""
    number = None if is_required else '?'
    parser.add_argument('config', nargs=number, help='config file, or the name of one: mmdet::…, mmseg::…, e3va_mm::…')
    parser.add_argument('--tune', metavar='METHOD', help='e3va or another method: wraps the backbone of a stock config')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='overrides of the (tuned) config, key=value; lists as key="[a,b]" or key=a,b, without spaces',
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that mmseg's and mmdet's own train and test tools both have."""
    parser.add_argument('--work-dir', help='folder for logs and results; default: ./work_dirs/CONFIG_NAME')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='job launcher')
    # torchrun sets the environment variable instead; torch.distributed.launch passes the flag.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def parse_checkpoint(parser: argparse.ArgumentParser, target: str | None = None) -> argparse.Namespace:
    """The command line, with a checkpoint behind the others: without a config, it stands for that as well.

    Args:
        parser: of what comes before.
        target: what the last argument is, where that is a file to write: ``args.target``.
    """
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; alone, without a config, it brings its own')
    if target:
        parser.add_argument('target', help=target)
    # Otherwise flags could not stand between the two.
    args = parser.parse_intermixed_args()
    args.checkpoint = args.checkpoint or args.config
    return args


def load_config(args: argparse.Namespace) -> Config:
    """The config of a tool run, with the command line's overrides, and its folders and devices checked.

    Raises:
        FileNotFoundError, ValueError: the config or the toolbox it asks for is missing.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = read_config(args.config, args.cfg_options, args.tune)
    config.launcher = args.launcher
    config.work_dir = args.work_dir or config.get('work_dir') or str(Path('work_dirs', Path(config.filename).stem))
    _protect_checkpoints(config)
    if args.launcher == 'pytorch' and not torch.cuda.is_available():
        _distribute_on_cpu(config)
    return config


def read_config(name: str, options: dict | None, method: str | None = None) -> Config:
    """:func:`open_config`; from here on, the process reads files of weights as weights only."""
    read_weights_only()
    return open_config(name, options, method)


def open_config(name: str, options: dict | None = None, method: str | None = None) -> Config:
    """A config with overrides and its toolbox.

    Args:
        name: path of a config, its name in a toolbox, or a checkpoint, which brings its config.
        options: overrides by their keys. They are of the tuned config, but for those that name weights of the stock
            model: with a ``method``, these count before it.
        method: to tune it by, see :func:`~e3va_mm.tune.tune`.

    Raises:
        FileNotFoundError, ValueError: the config or the toolbox it asks for is missing, or it can not be tuned so.
    """
    config, options = _load(name), dict(options or {})
    if method:
        named = {key: options.pop(key) for key in list(options) if _STOCK_WEIGHTS.match(key)}
        config.merge_from_dict(named)
        config = tune(config, method)
    config.merge_from_dict(options)
    _set_scope(config)
    if 'language_model' in config.get('model', {}):
        repair_text_detectors()
    return config


def load_model(config: Config, checkpoint: str, device: str) -> tuple[torch.nn.Module, Callable]:
    """A trained model, and the function of its toolbox that applies it to an image; for the config's ``default_scope``.

    Raises:
        FileNotFoundError, DamagedCheckpointError, CheckpointMismatchError: the checkpoint can not be read, or not fit.
    """
    content = read_checkpoint(checkpoint)  # Says clearly what is wrong with it before anything is built.
    if config.default_scope == 'mmseg':
        from mmseg.apis import inference_model, init_model

        model, infer = init_model(config, checkpoint, device), inference_model
    else:
        from mmdet.apis import inference_detector, init_detector

        model, infer = init_detector(config, checkpoint, device=device), inference_detector
    check_fits(model, content)
    return model, infer


def _load(name: str) -> Config:
    if Path(name).suffix not in ('.safetensors', '.pth'):
        return Config.fromfile(find_config(name))
    text = read_checkpoint(name).get('meta', {}).get('cfg')
    if not text:
        raise ValueError(f'{name} holds no config: give the one that it was trained with')
    # By its file name, work dirs are called after it.
    return Config(Config.fromstring(text, '.py').to_dict(), text, filename=f'{Path(name).stem}.py')


def _set_scope(config: Config) -> None:
    """Where the config has no ``default_scope``, as those in pure Python, takes the toolbox that its model is from.

    Raises:
        ValueError: the toolbox is none of ``SCOPES``.
    """
    if config.get('default_scope') is None:
        model = resolve_type(MODELS, config.get('model', {}).get('type'))
        roots = [cls.__module__.partition('.')[0] for cls in getattr(model, '__mro__', ())]
        config.default_scope = next((root for root in roots if root in SCOPES), None)
    if config.default_scope not in SCOPES:
        raise ValueError(f'default_scope must be one of {SCOPES}, {config.filename} has {config.default_scope!r}')


def resolve_type(registry: Registry, named, scope: str | None = None):
    """What a config's ``type`` stands for: a name, seen from ``scope``, or the class itself. None: not registered."""
    if not isinstance(named, str):
        return named
    with registry.switch_scope_and_registry(scope) as scoped:
        return scoped.get(named)


def build_runner(config: Config) -> Runner:
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def check_base_weights(model: torch.nn.Module) -> None:
    """Makes sure that what is frozen has weights: on random features, nothing is learned.

    Raises:
        ValueError: names the backbone that has none.
    """
    for path, module in model.named_modules():
        if isinstance(module, FrozenBackbone) and module.freezes_base and not names_weights(module.backbone):
            raise ValueError(
                f'model.{path.removeprefix("module.")}.backbone names no weights, and beside a frozen random backbone '
                "nothing is learned: give them by its init_cfg=dict(type='Pretrained', checkpoint=FILE), or a whole "
                'trained model by load_from=FILE; --random-base trains nevertheless'
            )


def end_distributed_run() -> None:
    """Ends a distributed run, once all ranks are here: the last statement of a tool. On CPUs it does not return.

    Threads of gloo that outlive the interpreter at times abort the process, which turns a good run into a failed one;
    ending the process group alone does not prevent it. So the process ends without the interpreter's teardown.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()
    if torch.distributed.get_backend() != 'gloo':
        torch.distributed.destroy_process_group()
        return
    atexit._run_exitfuncs()  # Ends data workers, flushes logs and visualizers.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def enable_amp(config: Config) -> None:
    """Switches the optimizer wrapper to AMP; its dtype (fp16 by default) is ``optim_wrapper.dtype``.

    Raises:
        ValueError: no CUDA device, or the config's wrapper is of a type that can not be switched.
    """
    wrapper = config.optim_wrapper
    if not torch.cuda.is_available():
        raise ValueError(
            '--amp needs a CUDA device; on the CPU, model.backbone.frozen_dtype=bfloat16 runs the backbone in bf16'
        )
    named = resolve_type(OPTIM_WRAPPERS, wrapper.get('type', 'OptimWrapper'), config.get('default_scope'))
    if named not in (OptimWrapper, AmpOptimWrapper):
        raise ValueError(f"--amp can not change optim_wrapper.type={wrapper.type!r}; use 'OptimWrapper'")
    wrapper.type = 'AmpOptimWrapper'
    wrapper.setdefault('loss_scale', 'dynamic')


def run_float32_ops(config: Config) -> None:
    """Adds the hook that heads need under bfloat16 autocast, where the config asks for that."""
    if config.optim_wrapper.get('dtype') in ('bfloat16', torch.bfloat16):
        config.custom_hooks = [*config.get('custom_hooks', []), dict(type='Float32OpsHook')]


def leaf_datasets(dataset: dict, key: str):
    """Config key and config of each data set inside wrappers such as RepeatDataset and ConcatDataset."""
    if 'dataset' in dataset:
        yield from leaf_datasets(dataset['dataset'], f'{key}.dataset')
    elif 'datasets' in dataset:
        for index, child in enumerate(dataset['datasets']):
            yield from leaf_datasets(child, f'{key}.datasets[{index}]')
    else:
        yield key, dataset


def check_data(config: Config, *loaders: str) -> None:
    """Makes sure that the named dataloaders have a batch size, and that their data folders exist.

    Raises:
        FileNotFoundError, ValueError: names the config key and the folder or the number.
    """
    for loader in filter(config.get, loaders):
        if 'batch_size' in config[loader]:
            check_count(f'{loader}.batch_size', config[loader].batch_size)
        for key, dataset in leaf_datasets(config[loader].dataset, f'{loader}.dataset'):
            root = dataset.get('data_root')
            if root and '://' not in root and not dataset.get('backend_args') and not Path(root).is_dir():
                raise FileNotFoundError(f'{key}.data_root={root!r} is no folder (working directory: {Path.cwd()})')


def _protect_checkpoints(config: Config) -> None:
    """Puts AdapterCheckpointHook, a superset of it, in the place of the stock checkpoint hook."""
    hook = config.setdefault('default_hooks', {}).setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    if hook and resolve_type(HOOKS, hook.get('type'), config.default_scope) is CheckpointHook:
        hook['type'] = 'AdapterCheckpointHook'


def _distribute_on_cpu(config: Config) -> None:
    """mmengine's launchers assume an accelerator; on CPUs the process group (gloo) is set up here."""
    torch.distributed.init_process_group('gloo')
    config.model_wrapper_cfg = dict(type='CPUDistributedDataParallel', broadcast_buffers=False)
