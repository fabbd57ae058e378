"""Checkpoints that survive interruption, load as weights only, and resume to the bit."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner.base_loop import BaseLoop

from ..checkpoints.comparison import check_fits
from ..checkpoints.errors import CheckpointMismatchError
from ..checkpoints.files import restore_history, to_plain
from ..checkpoints.latest import mark_fresh_run

# Steps in a row: fewer can be the search for a loss scale, or a single damaged image.
_MOST_NOT_FINITE = 50


class AtomicLocalBackend(LocalBackend):
    """Local files that appear under their name only when they are whole."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f'{path.name}.partial')
        try:
            with open(partial, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            # On a full disk, it would take the room that is left.
            partial.unlink(missing_ok=True)


register_backend('AtomicLocalBackend', AtomicLocalBackend, force=True)


class _DelayedRemoval:
    """A file backend whose removals wait for :meth:`flush`: mmengine removes old checkpoints before saving new ones."""

    def __init__(self, backend) -> None:
        self._backend, self._pending = backend, []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def remove(self, path) -> None:
        self._pending.append(path)

    def flush(self, kept: list) -> None:
        """Removes what is pending, but for the paths in ``kept``: a new file may bear an old one's name."""
        kept = {os.path.abspath(path) for path in kept if path}
        while self._pending:
            path = self._pending.pop()
            if os.path.abspath(path) not in kept and self._backend.isfile(path):
                self._backend.remove(path)


@HOOKS.register_module()
class AdapterCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, made safe; all of its options stay. ``tools/train.py`` puts it in its place.

    - A checkpoint appears under its name only when it is complete, and the one before is removed only then, so an
      interruption at any moment leaves a good one.
    - It holds tensors, numbers and strings alone, so that ``torch.load(..., weights_only=True)`` reads it.
    - It holds the state of the random number generators, so that resuming repeats the uninterrupted run to the bit
      on the CPU (with ``num_workers=0``: worker processes restart with their own seeds).
    - Resuming or testing raises when a tensor has another shape than the model's and, for an adapter, when any key is
      missing or foreign, heads included; resuming, when the optimizer's parameter groups are others.
    - While the loss is not finite nothing is saved, so that good checkpoints stay; at 50 such steps in a row training
      ends with a FloatingPointError.
    """

    _random_state: dict | None = None
    _num_not_finite = 0

    def before_train(self, runner) -> None:
        is_local = '://' not in str(self.out_dir or runner.work_dir)
        if is_local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend='AtomicLocalBackend')
        super().before_train(runner)
        self.file_backend = _DelayedRemoval(self.file_backend)
        if runner._resume:
            _warn_of_ended_schedule(runner)
        elif is_main_process():
            mark_fresh_run(runner.work_dir)
        _seed_privately(runner.train_dataloader)
        if self._random_state:
            _set_random_state(self._random_state)
            self._random_state = None

    def before_val(self, runner) -> None:
        _seed_privately(runner.val_dataloader)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        losses = _not_finite_losses(outputs)
        self._num_not_finite = self._num_not_finite + 1 if losses else 0
        if self._num_not_finite == _MOST_NOT_FINITE:
            raise FloatingPointError(
                f'{losses} have not been finite for {_MOST_NOT_FINITE} steps, up to step {runner.iter + 1}; the last '
                f'checkpoint, {self.last_ckpt}, is from before. Try a smaller learning rate, or clip_grad'
            )
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def _save_checkpoint(self, runner) -> None:
        if self._num_not_finite:
            runner.logger.warning('no checkpoint is saved here: the loss is not finite')
        else:
            super()._save_checkpoint(runner)

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_old()

    def _save_best_checkpoint(self, runner, metrics) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_old()

    def _remove_old(self) -> None:
        best = [getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()]
        self.file_backend.flush([self.last_ckpt, *best])

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        for key in ('meta', 'message_hub', 'param_schedulers'):
            if key in checkpoint:
                checkpoint[key] = to_plain(checkpoint[key])
        checkpoint['random_state'] = _get_random_state()

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        restore_history(checkpoint.get('message_hub', {}))
        # In a test run the training loop is never built; a `load_from` in training may change the head.
        if runner._resume or not isinstance(runner._train_loop, BaseLoop):
            check_fits(runner.model, checkpoint)
        if runner._resume:
            _check_param_groups(runner.optim_wrapper, checkpoint.get('optimizer', {}))
            self._random_state = checkpoint.get('random_state')


def _not_finite_losses(outputs: dict | None) -> list[str]:
    """Names of those losses of a step that are not finite; none where their sum is."""
    total = (outputs or {}).get('loss')
    if total is None or torch.as_tensor(total).isfinite().all():
        return []
    return [name for name, value in outputs.items() if 'loss' in name and not torch.as_tensor(value).isfinite().all()]


def _check_param_groups(optim_wrapper, state: dict) -> None:
    if not isinstance(optim_wrapper, OptimWrapper) or 'param_groups' not in state:
        return
    saved, own = (
        [len(group['params']) for group in groups]
        for groups in (state['param_groups'], optim_wrapper.optimizer.param_groups)
    )
    if saved != own:
        raise CheckpointMismatchError(
            f"the checkpoint's optimizer has {sum(saved)} parameters in {len(saved)} groups, this run's {sum(own)} in "
            f'{len(own)}: resume with the optim_wrapper.constructor and paramwise_cfg that it was trained with, '
            'or take load_from in place of resume for a fresh optimizer'
        )


def _warn_of_ended_schedule(runner) -> None:
    """A checkpoint brings the ends of its schedulers along, whatever ``param_scheduler`` says now."""
    schedulers = runner.param_schedulers
    if not schedulers or not isinstance(schedulers, list) or runner.iter >= runner.max_iters:
        return
    has_ended = all(scheduler._global_step >= scheduler.end for scheduler in schedulers)
    # A schedule that has but a warm-up goes on at the full rate.
    if has_ended and all(group['lr'] < group['initial_lr'] for group in runner.optim_wrapper.param_groups):
        runner.logger.warning(
            f'the param_scheduler of the checkpoint ends at {max(scheduler.end for scheduler in schedulers)}: this run '
            f'goes on at the last learning rate, {runner.optim_wrapper.get_lr()["lr"]}. For another schedule, take '
            'load_from in place of resume'
        )


def _seed_privately(dataloader) -> None:
    """Keeps the start of a data iterator, which draws a seed, from moving the global generator."""
    if dataloader.generator is None:
        dataloader.generator = torch.Generator()


def _get_random_state() -> dict:
    algorithm, keys, *position = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (algorithm, torch.from_numpy(keys.astype(np.int64)), *position),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict) -> None:
    algorithm, keys, *position = state['numpy']
    random.setstate(state['python'])
    np.random.set_state((algorithm, keys.cpu().numpy().astype(np.uint32), *position))
    torch.set_rng_state(state['torch'].cpu())
    if len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state['cuda']])
