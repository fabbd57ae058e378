"""Frozen backbones that are larger than a GPU: their blocks sharded by torch's FSDP2 (arXiv 2304.11277).

Each process keeps its share of every frozen weight; a block is gathered when it is called, and given up behind that.
All that is trained stays whole in every process, and DDP averages its gradients, as without sharding. FSDP1, which is
what mmengine wraps, renames modules and wants one dtype a block; ``fully_shard`` does neither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .backbones.base import FrozenBackbone

_MIB = 2**20


@RUNNERS.register_module()
class ShardingRunner(Runner):
    """mmengine's Runner, which shards the blocks of frozen backbones over the processes: ``runner_type`` names it.

    In a run of one process it is the Runner as it is, so that the config serves there too.

    Raises:
        ImportError: torch is too old.
        ValueError: something of the model or its data can not be sharded; the message names key and value.
    """

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Shards before mmengine moves the model, so that no device ever holds the whole."""
        if self.distributed:
            check_in_step(self.cfg, model)
            shard_frozen(model)
        return super().wrap_model(model_wrapper_cfg, model)


def check_in_step(config: Config, model: nn.Module) -> None:
    """Makes sure that all processes run equally many forward passes: each pass waits for the others' weights.

    Raises:
        ValueError: names the key by which they would not.
    """
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if (config.get(loader) or {}).get('sampler', {}).get('round_up') is False:
            raise ValueError(
                f'{loader}.sampler.round_up=False gives some processes fewer batches than others, which sharded blocks '
                'would wait for without end: take True'
            )
    for module in model.modules():
        settings = getattr(module, 'test_cfg', None)
        if isinstance(settings, dict) and settings.get('mode') == 'slide':
            raise ValueError(
                "model.test_cfg.mode='slide' takes more forward passes for larger images, which sharded blocks would "
                "wait for without end: take 'whole'"
            )


def shard_frozen(model: nn.Module) -> None:
    """Loads the base of each frozen backbone of a model on the host, and shards its blocks over all processes.

    Args:
        model: on the host; changed in place. DDP leaves what is sharded alone from here on.

    Raises:
        ImportError: torch is older than 2.7.
        ValueError: a backbone can not be sharded, or there is none.
    """
    wrappers = {path: module for path, module in model.named_modules() if isinstance(module, FrozenBackbone)}
    if not wrappers:
        raise ValueError(
            "runner_type='ShardingRunner' shards frozen backbones, and this model has none: wrap one (--tune), or "
            "take runner_type='Runner'"
        )
    for path, wrapper in wrappers.items():
        _shard(f'model.{path}', wrapper)
    sharded = [name for name, parameter in model.named_parameters() if _is_sharded(parameter)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)


def _shard(name: str, wrapper: FrozenBackbone) -> None:
    fully_shard, blocks = _fully_shard(), _blocks(wrapper)
    _check(name, wrapper, blocks)
    # Weights are read whole, and their fingerprint is taken: afterwards no process has them all.
    if not wrapper._base_is_loaded:
        wrapper.load_base()
    whole = _frozen_bytes(wrapper)
    trained = {parameter for parameter in wrapper.backbone.parameters() if parameter.requires_grad}
    for block in blocks:
        fully_shard(block, reshard_after_forward=True, ignored_params=trained)
        # Its lists would hold on to what has been sharded, until all of it was on the device.
        wrapper.list_parameters()
    # The root shards nothing itself; below it, a block is gathered while the one before computes.
    rest = {parameter for parameter in wrapper.backbone.parameters() if not _is_sharded(parameter)}
    fully_shard(wrapper.backbone, ignored_params=rest)
    wrapper.is_sharded = True
    print_log(
        f'{name}: {len(blocks)} blocks are sharded over {dist.get_world_size()} processes; of {whole / _MIB:.1f} MiB '
        f'of frozen weights, this one holds {_frozen_bytes(wrapper) / _MIB:.1f}',
        logger='current',
    )


def _blocks(wrapper: FrozenBackbone) -> list[nn.Module]:
    """Those with frozen parameters, inner ones first."""
    # Where a block pools (Hiera), the highway calls layers of it by themselves, which would find no weights.
    names = {block.name for block in wrapper.family.blocks() if not block.pools}
    blocks = [wrapper.family.module(name) for name in sorted(names, key=len, reverse=True)]
    return [block for block in blocks if any(not parameter.requires_grad for parameter in block.parameters())]


def _check(name: str, wrapper: FrozenBackbone, blocks: list[nn.Module]) -> None:
    kind = type(wrapper.backbone).__name__
    if wrapper._quantised_dtype:
        raise ValueError(
            f"{name}.frozen_dtype={wrapper._quantised_dtype!r} can not be sharded: take 'bfloat16', or "
            "runner_type='Runner'"
        )
    if not blocks:
        raise ValueError(f"{name}: this {kind} has no frozen blocks to shard: take runner_type='Runner'")
    frozen = [each for block in blocks for each in block.parameters() if not each.requires_grad]
    if not all(each.is_contiguous() for each in frozen):
        raise ValueError(
            f'{name}: this {kind} can not be sharded, because its kernels have channels last in memory: take '
            "runner_type='Runner'"
        )


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, 'to_local')  # a DTensor


def _frozen_bytes(wrapper: FrozenBackbone) -> int:
    """What this process holds of the frozen parameters."""
    frozen = [parameter for parameter in wrapper.backbone.parameters() if not parameter.requires_grad]
    return sum((each.to_local() if _is_sharded(each) else each).nbytes for each in frozen)


def _fully_shard() -> Callable:
    if digit_version(torch.__version__) < digit_version('2.7'):
        raise ImportError(f"runner_type='ShardingRunner' needs torch 2.7 or newer; this is {torch.__version__}")
    from torch.distributed.fsdp import fully_shard

    return fully_shard
