"""timm's models as backbones for dense prediction."""

from __future__ import annotations

import contextlib
import difflib
from functools import partial

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..checkpoints.errors import CheckpointMismatchError
from ..checkpoints.reader import describe_misfit, read_weights
from ..families.registry import find_timm_family, timm_modules
from ..families.timm_base import TIMMFamily


@MODELS.register_module()
class TIMMFeatures(BaseModule):
    """A timm model that returns normalised feature maps, for images of any size.

    Hierarchical models return one map a stride (4, 8, 16, 32), plain ViTs one each after a quarter, half, three
    quarters and all of their depth, at the stride of a patch (see :class:`~e3va_mm.families.timm_vits.ViTFamily`); put
    :class:`~e3va_mm.necks.SimpleFeaturePyramid` on top of these.

    Args:
        model_name: as timm lists it, of a family in :mod:`e3va_mm.families.registry`.
        pretrained: load the weights that timm publishes for it, from its hub.
        checkpoint: load weights from this file (``.pth`` or ``.safetensors``) instead, in timm's or the authors' names.
        out_indices: which of the maps to return, by increasing stride or depth.
        init_cfg: unused by the model; ``dict(type='Pretrained', checkpoint=...)`` is the same as ``checkpoint``.
        **model_args: what else ``timm.create_model`` takes, e.g. ``drop_path_rate`` or ``img_size``.

    Raises:
        ImportError: timm is not installed.
        ValueError: the model is unknown or of an unsupported family, or ``out_indices`` has no such map.
        FileNotFoundError, CheckpointMismatchError: by ``init_weights``, where ``checkpoint`` is missing or lacks
            weights.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        init_cfg: dict | None = None,
        **model_args,
    ) -> None:
        super().__init__()
        family = _family(model_name)
        timm = _import_timm()
        self.create = partial(timm.create_model, model_name, num_classes=0, **{**family.model_args, **model_args})
        self.model_name = model_name
        self.checkpoint = checkpoint or (init_cfg or {}).get('checkpoint')
        self.pretrained = pretrained
        self.model = self.create(pretrained=False)
        self.family = family(self, out_indices)
        for name, norm in self.family.new_norms.items():
            self.add_module(name, norm)
        for name in family.unused:
            parent, _, child = name.rpartition('.')
            if child in dict(self.model.get_submodule(parent).named_children()):
                setattr(self.model.get_submodule(parent), child, nn.Identity())

    @property
    def embed_dims(self) -> list[int]:
        """Channels of the maps."""
        return [stage.embed_dims for stage in self.family.stages if stage.norm]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (B, 3, H, W) -> (B, C_s, H_s, W_s) for each of ``out_indices``, with gradient to all parameters."""
        maps = self.family.maps(self.family.prepare(images))
        norms = (self.get_submodule(name) for name in self.family.norm_names)
        return tuple(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous() for norm, x in zip(norms, maps))

    @property
    def names_weights(self) -> bool:
        return bool(self.checkpoint or self.pretrained)

    @property
    def weights_source(self) -> str:
        if self.checkpoint:
            return f'backbone.checkpoint={self.checkpoint!r}'
        return f'backbone.model_name={self.model_name!r}, pretrained={self.pretrained}'

    def init_weights(self) -> None:
        """Loads the weights that the config names, if any; random ones are those of timm's constructor."""
        if self.names_weights:
            self.load_weights()

    def load_weights(self) -> None:
        """Loads ``checkpoint``, or what timm publishes."""
        # Into a model with all of its parts: the file has them, and the output norms start from them.
        complete = self.create(pretrained=not self.checkpoint)
        if self.checkpoint:
            load_file(self.family, complete, self.checkpoint, self.weights_source)
        weights = complete.state_dict()
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        for index, stage in enumerate(self.family.stages):
            if stage.norm:
                # In place: wrappers hold on to these modules.
                self.get_submodule(stage.norm).load_state_dict(self.family.new_norm(complete, index).state_dict())


def load_file(family: TIMMFamily, model: nn.Module, checkpoint: str, source: str) -> None:
    """Loads a timm model from a file, which may be in the authors' key names and lack or have a classifier.

    Args:
        family: of the model.
        model: changed in place.
        checkpoint: the file's path, or a URL.
        source: what messages call it.

    Raises:
        FileNotFoundError, CheckpointMismatchError: the file is missing or damaged, or does not fit.
    """
    weights = read_weights(model, checkpoint, source)
    # timm's converters know the formats of their family, and stumble over others: what is missing then shows below.
    with contextlib.suppress(AssertionError, AttributeError, IndexError, KeyError, RuntimeError, ValueError):
        weights = family.convert(model, dict(weights))
    optional = tuple(f'{name}.' for name in family.unused)
    needed = [
        name
        for name in model.state_dict()
        if not name.startswith(optional) and not name.endswith('num_batches_tracked')
    ]
    missing = [name for name in needed if name not in weights]
    misfit = describe_misfit(model, weights, missing, len(needed), source)
    if misfit:
        raise CheckpointMismatchError(misfit)
    model.load_state_dict(weights, strict=False)


def _import_timm():
    try:
        import timm
    except ImportError as error:
        raise ImportError("TIMMFeatures needs timm: pip install 'e3va_mm[timm]'") from error
    return timm


def _family(model_name: str) -> type[TIMMFamily]:
    timm = _import_timm()
    if not timm.is_model(model_name):
        close = difflib.get_close_matches(model_name, timm.list_models(), 3)
        raise ValueError(f'timm has no model_name={model_name!r}; similar: {close}')
    module = timm.models.model_entrypoint(model_name).__module__.rpartition('.')[2]
    family = find_timm_family(module)
    if family is None:
        raise ValueError(f'model_name={model_name!r} is of the family {module!r}; supported are {timm_modules()}')
    return family
