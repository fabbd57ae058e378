"""A model with its optimizer and a batch, whose training steps are measured one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from torch.nn.parallel import DistributedDataParallel

from e3va_mm.hooks.amp import run_in_float32
from e3va_mm.launch import enable_amp

AMP_DTYPES = {'fp32': None, 'amp-fp16': 'float16', 'amp-bf16': 'bfloat16'}


class Bench:
    """Steps once it has been moved to the device and given a batch.

    What a detection head has to do depends on what it predicts. So that all methods get the same of it, heads and
    batches are drawn from the same seeds, and the learning rate is 0: the optimizer does its work, the weights stay.

    Args:
        case: ``config``, ``backbone`` (see :func:`benchmarks.methods.backbone_of`), ``precision``, ``image_size``
            (H, W), ``data`` ('synthetic' or 'real') and ``cfg_options``; with the option ``masks`` in its ``method``,
            ground-truth masks are moved to the device once a step, as under ``DeviceMasksHook``; with ``sharded``,
            frozen blocks are sharded over the processes, as under ``ShardingRunner``; with ``bn``, SyncBN becomes BN.
    """

    def __init__(self, case: dict) -> None:
        self.case = case
        self.options = case.get('method', '').split('+')
        config = Config.fromfile(case['config'])
        init_default_scope(config.default_scope)
        config.merge_from_dict(case['cfg_options'])
        set_backbone(config, case['backbone'])
        if AMP_DTYPES[case['precision']]:
            enable_amp(config)
            config.optim_wrapper.dtype = AMP_DTYPES[case['precision']]
        config.optim_wrapper.optimizer.lr = 0
        if 'bn' in self.options:
            use_plain_norms(config.model)
        self.config = config
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        # Drawn on the device, where that takes no time; moved there from the host afterwards, as in a training.
        with self.device:
            self.model = self._build(config.model)
        self.model.cpu()

    @staticmethod
    def _build(config) -> torch.nn.Module:
        torch.manual_seed(0)
        backbone = MODELS.build(config.backbone)
        torch.manual_seed(1)
        # Built by itself, because methods draw different numbers of weights.
        config.backbone = dict(type=lambda: backbone)
        return MODELS.build(config)

    def to_device(self) -> None:
        """With those of the other processes, if there are any: they exchange gradients."""
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
        if 'sharded' in self.options:
            from e3va_mm.sharding import shard_frozen

            # Nothing is read: a fingerprint of random weights tells nothing, and a giant's copy for it takes a minute.
            self.model.backbone._base_is_loaded = True
            shard_frozen(self.model)
        self.model.to(self.device).train()
        if self.case['precision'] == 'amp-bf16':
            run_in_float32(self.model)
        self.optim = build_optim_wrapper(self.model, self.config.optim_wrapper)
        # As mmengine's Runner has it.
        replicate = partial(DistributedDataParallel, broadcast_buffers=False)
        self.replica = replicate(self.model) if dist.is_initialized() else self.model

    def load_batch(self, batch_size: int, image_size: Sequence[int] | None = None) -> None:
        """A batch of the case's image size, or another."""
        # Of random and numpy too, which draw the crops and sizes of real data.
        set_random_seed(2)
        make = real_batch if self.case['data'] == 'real' else synthetic_batch
        batch = make(self.config, batch_size, image_size or self.case['image_size'])
        self.batch = self.model.data_preprocessor(batch, training=True)

    def step(self) -> None:
        """What mmengine's ``train_step`` does with a batch that is already on the device, all but its masks."""
        if 'masks' in self.options:
            from e3va_mm.device_masks import move_masks_once

            # None is on the device yet, as a loader brings them.
            move_masks_once(self.batch['data_samples'])
        with self.optim.optim_context(self.model):
            losses = self.replica(**self.batch, mode='loss')
        loss, _ = self.model.parse_losses(losses)
        self.optim.update_params(loss)

    def warm_up(self, steps: int) -> None:
        """So many steps, and more until the optimizer has made its state: AMP skips it while its scale is too high."""
        for _ in range(steps):
            self.step()
        for _ in range(20):
            if self.optim.optimizer.state:
                return
            self.step()

    def timed_step(self) -> float:
        """Seconds of a step."""
        started = self.synchronize()
        self.step()
        return self.synchronize() - started

    def synchronize(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()


def set_backbone(config: Config, changes: dict[str, object]) -> None:
    """Changes the stock backbone by dotted keys, or wraps it if they name a ``type``.

    No weights are loaded or drawn but those of the constructors: what they are does not change what a step costs.
    """
    stock = config.model.backbone
    stock.init_cfg = None
    for name in ('pretrained', 'checkpoint'):
        stock.pop(name, None)
    if 'type' in changes:
        config.model.backbone = dict(type=changes['type'], backbone=stock)
    config.merge_from_dict({f'model.backbone.{key}': value for key, value in changes.items()})


def use_plain_norms(config: dict | Sequence) -> None:
    """Makes every SyncBN in a config BN, which waits for no other process."""
    if isinstance(config, dict) and config.get('type') == 'SyncBN':
        config['type'] = 'BN'
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, (dict, list, tuple)):
            use_plain_norms(value)


def real_batch(config: Config, batch_size: int, _) -> dict:
    """The first training batch of the config's own data, whatever its image size."""
    config.train_dataloader.update(batch_size=batch_size, num_workers=0, persistent_workers=False)
    return next(iter(Runner.build_dataloader(config.train_dataloader, seed=0)))


def synthetic_batch(config: Config, batch_size: int, image_size: Sequence[int]) -> dict:
    """Random images of one size, with random labels in blocks or 10 random boxes and masks an image."""
    make = _detection_batch if config.default_scope == 'mmdet' else _segmentation_batch
    return make(config.model, batch_size, *image_size)


def _detection_batch(model, batch_size: int, height: int, width: int) -> dict:
    from mmdet.testing import demo_mm_inputs

    head = model.get('bbox_head') or model.roi_head.bbox_head
    num_classes = (head[0] if isinstance(head, (list, tuple)) else head).num_classes
    with_mask = 'mask_head' in model.get('roi_head', {})
    # It draws labels from 1 up, which leaves none for a single class.
    batch = demo_mm_inputs(batch_size, (3, height, width), [10] * batch_size, num_classes + 1, with_mask=with_mask)
    for sample in batch['data_samples']:
        sample.gt_instances.labels -= 1
        if with_mask:
            # It draws float64; a loader brings a byte a pixel, an eighth of what is to be moved.
            masks = sample.gt_instances.masks
            masks.masks = masks.masks.astype('uint8')
    return batch


def _segmentation_batch(model, batch_size: int, height: int, width: int) -> dict:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    inputs, samples = [], []
    for _ in range(batch_size):
        inputs.append(torch.randint(256, (3, height, width), dtype=torch.uint8))
        blocks = torch.randint(model.decode_head.num_classes, (1, -(-height // 32), -(-width // 32)))
        labels = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width]
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=(height, width))))
    return dict(inputs=inputs, data_samples=samples)
