"""Repairs to the environment, each done only where it is needed; what upstream mends goes from here."""

import functools
import importlib.metadata
import importlib.util
import sys
import types

import mmengine.config.utils
import torch
from mmengine.utils import is_installed

_library = None  # Schemas live as long as the library object that declared them.


def declare_torchvision_ops() -> None:
    """Makes a registry torchvision importable beside a CPU-only torch.

    PyPI's torchvision wheels are CUDA builds. Without CUDA their operators stay unregistered, and torchvision then
    fails on import while attaching meta kernels to two of them; mmengine, which imports it to log its version, fails
    with it. Declaring the two schemas is enough: nothing here calls the operators themselves.
    """
    global _library
    if torch.version.cuda or torch.version.hip or _library or not importlib.util.find_spec('torchvision'):
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _library = torch.library.Library('torchvision', 'FRAGMENT')
        for name in ('nms', 'qnms'):
            _library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')


def resolve_config_scopes() -> None:
    """Lets ``_base_ = 'mmseg::...'`` find mmseg under the name of its maintained distribution.

    mmengine looks ``mmseg::`` up as the distribution ``mmsegmentation``; ``onedl-mmsegmentation`` holds the same
    module under another name. The module's own name finds either.
    """
    packages = mmengine.config.utils.MODULE2PACKAGE
    if not is_installed(packages['mmseg']):
        packages['mmseg'] = 'mmseg'


def leave_out_multimodal() -> None:
    """Makes mmpretrain's models importable beside transformers 5, without the multimodal ones, which need its 4th.

    They are imported with all others where any version of transformers is installed.
    """
    name = 'mmpretrain.models.multimodal'
    if importlib.util.find_spec('mmpretrain') and name not in sys.modules and _transformers() >= 5:
        sys.modules[name] = types.ModuleType(name)


def _transformers() -> int:
    """The installed major version; 0: none."""
    try:
        return int(importlib.metadata.version('transformers').partition('.')[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


@functools.cache
def repair_text_detectors() -> None:
    """Mends mmdet's GLIP and GroundingDINO, which fail in stock; imports mmdet's models.

    Both call what transformers 5 no longer has, and GroundingDINO gives BERT a mask (B, L, L) that it takes no more.
    In onedl-mmdetection 3.5.1 the decoder of GroundingDINO reads reference points in an encoding twice as long as its
    layer, of as many numbers as all published weights have, takes.
    """
    from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerDecoder as Decoder

    make_layers = Decoder._init_layers

    def make_layers_that_fit(self) -> None:
        make_layers(self)
        self.ref_point_head.register_forward_pre_hook(_fit_encoding)

    Decoder._init_layers = make_layers_that_fit
    if _transformers() >= 5:
        _take_old_calls()


def _fit_encoding(head: torch.nn.Module, args: tuple) -> tuple | None:
    """Of twice as many frequencies every second: these are those of the shorter encoding."""
    encoding, dims = args[0], head.layers[0].in_features
    if encoding.shape[-1] == 2 * dims:
        # A sine and a cosine of each frequency are side by side.
        return (encoding.unflatten(-1, (-1, 4))[..., :2].flatten(-2),)
    return None


def _take_old_calls() -> None:
    from mmdet.models.language_models import bert

    if bert.HFBertModel is None:  # It can not be imported, which is no fault as long as nothing needs it.
        return
    from transformers import PreTrainedTokenizerBase

    PreTrainedTokenizerBase.batch_encode_plus = PreTrainedTokenizerBase.__call__

    class BertModel(bert.HFBertModel):
        def forward(self, attention_mask: torch.Tensor, **inputs):
            """attention_mask: (B, L), or a row a token, (B, L, L)."""
            mask = attention_mask[:, None] if attention_mask.ndim == 3 else attention_mask
            return super().forward(attention_mask=mask, **inputs)

    bert.HFBertModel = BertModel
