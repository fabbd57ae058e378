"""The one reader of weights that others have published: it runs no code of a file, and says what it has found."""

from __future__ import annotations

import contextlib
import re
import urllib.error
from collections.abc import Iterator

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from .comparison import FOREIGN, RESHAPED, below, differences
from .errors import CheckpointMismatchError
from .files import UNREADABLE, reason, weights_only
from .fingerprint import FINGERPRINT, named_tensors

# Where training code keeps the state dict, and what it puts before the names; what it averages comes first.
_NESTS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'teacher')
_PREFIXES = ('module.', '_orig_mod.', 'model.', 'teacher.', 'student.', 'detector.', 'backbone.')
# By a pattern of their keys: files that fit no backbone as they are, and what to do with them.
_FORMATS = {
    rf'(^|\.){FINGERPRINT}$': 'a checkpoint of this package, which has no base in it: name it in load_from or '
    "in the wrapper's own init_cfg",
    r'patch_embeddings\.': "in the names of the transformers library: take the authors' file, or timm's",
    r'\.w_msa\.|\.ffn\.layers\.': "in OpenMMLab's names, for a backbone of mmseg or mmdet with convert_weights=False",
    r'^layers\.\d+\.blocks\.': "in the names of Microsoft's Swin: mmdet's SwinTransformer reads them with "
    'convert_weights=True, for mmseg there is its tools/model_converters/swin2mmseg.py',
}


def read_weights(model: nn.Module, path: str, source: str, prefix: str | None = None) -> dict[str, Tensor]:
    """The tensors in a file by the names of ``model``, or by others without the prefixes that training code adds.

    Those of a first layer for 3 channels are adapted to the channels of ``model``.

    Args:
        model: that they are for; not changed.
        path: of the file, or a URL.
        source: what messages call it.
        prefix: take what has it alone.

    Raises:
        FileNotFoundError: the file is missing.
        CheckpointMismatchError: it is damaged, or holds something else than tensors by their names.
    """
    with reading(source):
        content = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    # A prefix is mmengine's word for a part of a whole model, of which it takes no average.
    nests = ('state_dict', *_NESTS) if prefix else _NESTS
    while isinstance(content, dict) and (found := [key for key in nests if isinstance(content.get(key), dict)]):
        content = content[found[0]]
    weights = content if isinstance(content, dict) else {}
    weights = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointMismatchError(
            f'{source} holds a {type(content).__name__} without weights by name; save the state_dict() of the backbone'
        )
    if prefix:
        weights = {key.removeprefix('module.'): value for key, value in weights.items()}
        weights = below(prefix.rstrip('.') + '.', weights)
    names = named_tensors(model).keys()
    while not names & weights.keys():
        found = [each for each in _PREFIXES if any(key.startswith(each) for key in weights)]
        if not found:
            break
        weights = below(found[0], weights)
    return _adapt_channels(model, weights, source)


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """While this lasts, weights are read without running code, and what is raised names ``source``."""
    try:
        with weights_only():
            yield
    except CheckpointMismatchError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{source}: there is no such file; give the path or URL of its weights') from error
    except urllib.error.URLError as error:
        message = f'{source} can not be fetched ({error.reason}): download it elsewhere, and name the file'
        raise CheckpointMismatchError(message) from error
    except UNREADABLE as error:
        message = f'{source} can not be read, it may be damaged or unsafe: {reason(error)}'
        raise CheckpointMismatchError(message) from error


def _adapt_channels(model: nn.Module, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights of a first convolution, for RGB, made for the channels that ``model`` reads; as timm does it.

    A single channel is read as grey (the sum); more repeat the three, scaled so that the sum stays.
    """
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None or stem.in_channels == 3 or stem.groups != 1:
        return weights
    adapted, number = dict(weights), stem.in_channels
    for name, value in weights.items():
        if value.ndim == 4 and value.shape[:2] == (stem.out_channels, 3):
            repeated = value[:, [channel % 3 for channel in range(number)]] * (3 / number)
            adapted[name] = value.sum(1, keepdim=True) if number == 1 else repeated
            print_log(f'{source}: {name} is for 3 channels, adapted to {number}', logger='current')
    return adapted


def describe_misfit(
    model: nn.Module, weights: dict[str, Tensor], missing: list[str], num_required: int, source: str
) -> str:
    """In words, how the ``weights`` of a file differ from those of ``model``; '' where they do not."""
    tensors = named_tensors(model)
    found = differences(tensors, weights)
    if not missing and not found[RESHAPED]:
        return ''
    foreign = missing and found[FOREIGN]
    parts = [f'it lacks {len(missing)} of the {num_required} weights: {first_few(missing, tensors)}'] if missing else []
    if foreign:
        parts.append(f'foreign are {first_few(foreign, weights)}')
    parts += found[RESHAPED][:3]
    # Where most are there, or a converter has been at them, the names are right.
    if 2 * len(missing) > num_required and not getattr(model, 'convert_weights', False):
        formats = (advice for key, advice in _FORMATS.items() if any(re.search(key, name) for name in weights))
        parts += [f'it is {advice}' for advice in formats][:1]
    return f'{source} does not fit {type(model).__name__}: {"; ".join(parts)}'


def first_few(names: list[str], tensors: dict[str, Tensor]) -> str:
    return ', '.join(f'{name} {tuple(tensors[name].shape)}' for name in names[:3]) + (', …' if len(names) > 3 else '')
