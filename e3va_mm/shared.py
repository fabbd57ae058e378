"""One pass, many tasks: models that differ in highway and head share the frozen base, and its pass over an image."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement
from torch import nn

from .backbones.shared_pass import InputMismatchError, SharedPass
from .checkpoints.files import weights_only
from .launch import load_model, open_config

# Of a data preprocessor, what changes the images of a test.
_PREPROCESSING = ('mean', 'std', 'bgr_to_rgb', 'rgb_to_bgr', 'pad_size_divisor', 'test_cfg')


class Task(NamedTuple):
    """A model of a :class:`SharedInferencer`."""

    model: nn.Module
    config: Config
    infer: Callable  # of its toolbox: model, image -> sample
    given: dict[bool, Config]  # the config that goes with paths, and with arrays


class SharedInferencer:
    """Applies many models to an image by one frozen pass, with one frozen base in memory.

    Segmentors and detectors of mmseg and mmdet side by side, each with its own test pipeline. Their bases must have
    equal weights, and their pipelines must make the same input of an image. Each result is that of the model alone.
    Models are added and removed at any time between images.

    Args:
        models: a pair of config and checkpoint each, or a checkpoint that holds its config; in a dict, by their names.
        device: such as ``'cuda:0'``, which is the default where there is one, or ``'cpu'``.

    Attributes:
        tasks: of each model by its name, in the order of their addition.

    Raises:
        ValueError, FileNotFoundError, CheckpointMismatchError: see :meth:`add`.

    Example::

        infer = SharedInferencer([('parts.py', 'parts.pth'), 'cells.safetensors'])
        samples = infer('image.png')   # {'parts': SegDataSample, 'cells': DetDataSample}
    """

    def __init__(self, models: Iterable | dict = (), device: str | None = None) -> None:
        self.device = device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
        self.tasks: dict[str, Task] = {}
        self._shared = SharedPass(self.device)
        named = models.items() if isinstance(models, dict) else ((None, model) for model in models)
        for name, model in named:
            self.add(*([model] if isinstance(model, (str, Path)) else model), name=name)

    def add(self, config: Config | str | Path, checkpoint: str | Path | None = None, name: str | None = None) -> str:
        """Loads a model; its base is compared with that of the others, and then theirs.

        Args:
            config: a config, its path or name; or a checkpoint that holds its config.
            checkpoint: a ``.pth``, or a published ``.safetensors``.
            name: of the task in results; by default that of the config's file, with a number where it is taken.

        Returns:
            The name.

        Raises:
            ValueError: the name is taken, the model has no highway, or the frozen bases differ; the message says how.
            FileNotFoundError, DamagedCheckpointError, CheckpointMismatchError: the checkpoint can not be read, or
                does not fit its config.
        """
        if not isinstance(config, Config):
            config, checkpoint = open_config(str(config)), checkpoint or config
        name = name or free_name(Path(config.filename or 'task').stem, self.tasks)
        if name in self.tasks:
            raise ValueError(f'there is a task {name!r} already: remove it before, or choose another name')
        given = {is_array: copy.deepcopy(config) for is_array in (False, True)}
        with weights_only(), DefaultScope.overwrite_default_scope(config.default_scope):
            model, infer = load_model(copy.deepcopy(config), str(checkpoint), 'cpu')
        self._shared.join(name, model)
        self.tasks[name] = Task(model, config, infer, given)
        return name

    def remove(self, name: str) -> None:
        """Frees a model, but for the base, which is that of the others.

        Raises:
            KeyError: there is no such task.
        """
        del self.tasks[name]
        self._shared.leave(name)

    def __call__(self, images: str | Path | np.ndarray | Sequence) -> dict[str, BaseDataElement] | list[dict]:
        """Results by task, as the toolboxes' own functions return them.

        Args:
            images: a path, or an array (H, W, 3), BGR as mmcv reads it; a list of them gives a list of results, one
                pass an image.

        Raises:
            InputMismatchError: the models' pipelines make different inputs of an image; the message says by what.
        """
        if isinstance(images, (list, tuple)):
            return [self(image) for image in images]
        with self._shared.one_image():
            return {name: self._apply(name, images) for name in self.tasks}

    def _apply(self, name: str, image: str | Path | np.ndarray) -> BaseDataElement:
        task, is_array = self.tasks[name], isinstance(image, np.ndarray)
        # The toolboxes write into the config in which form an image was given.
        task.model.cfg = task.given[is_array]
        try:
            with DefaultScope.overwrite_default_scope(task.config.default_scope):
                return task.infer(task.model, image if is_array else str(image))
        except InputMismatchError as error:
            other = self.tasks[error.other].config
            raise InputMismatchError(f'{error}. {_differing_settings(task.config, other)}', error.other) from None


def free_name(name: str, taken: Container[str]) -> str:
    """The name, with a number where it is taken."""
    numbered = itertools.chain([name], (f'{name}-{number}' for number in itertools.count(2)))
    return next(each for each in numbered if each not in taken)


def _differing_settings(config: Config, other: Config) -> str:
    """In words, in what two configs differ that decides on the input of their models."""
    own, others = _input_settings(config), _input_settings(other)
    keys = [key for key in own | others if own.get(key) != others.get(key)]
    listed = '; '.join(f'{key} is {own.get(key)}, not {others.get(key)}' for key in keys)
    return f'Of their configs differ: {listed}' if listed else 'Their configs do not tell why'


def _test_pipeline(config: Config) -> list[dict]:
    """As the toolbox takes it."""
    if config.default_scope == 'mmseg':
        return config.test_pipeline
    from mmdet.utils import get_test_pipeline_cfg

    return get_test_pipeline_cfg(config)


def _input_settings(config: Config) -> dict[str, object]:
    preprocessor, test_cfg = (config.model.get(key) or {} for key in ('data_preprocessor', 'test_cfg'))
    settings = {f'data_preprocessor.{key}': preprocessor.get(key) for key in _PREPROCESSING}
    settings['model.test_cfg.mode'] = test_cfg.get('mode', 'whole')
    for step in _test_pipeline(config):
        if not str(step['type']).rpartition('.')[2].startswith(('Load', 'Pack')):
            settings[f'test_pipeline {step["type"]}'] = {key: step[key] for key in sorted(step) if key != 'type'}
    # Lists and tuples mean the same.
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
