"""How the tensors of a file differ from those of a model, by their keys and shapes."""

from __future__ import annotations

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner.checkpoint import get_state_dict
from torch import Tensor, nn

from .errors import CheckpointMismatchError
from .fingerprint import FINGERPRINT

MISSING, FOREIGN, RESHAPED = 'missing', 'foreign', 'of another shape'


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with a prefix, by what follows it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def differences(expected: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, list[str]]:
    """By what is wrong with them, the keys of a file that is ``given`` for a model that has the ``expected``."""
    shapes = {key: (tuple(given[key].shape), tuple(own.shape)) for key, own in expected.items() if key in given}
    return {
        MISSING: [key for key in expected if key not in given],
        FOREIGN: [key for key in given if key not in expected],
        RESHAPED: [f'{key} {found} where the model has {own}' for key, (found, own) in shapes.items() if found != own],
    }


def check_same(expected: dict[str, Tensor], given: dict[str, Tensor], what: str, kinds=(MISSING, FOREIGN, RESHAPED)):
    """Raises a CheckpointMismatchError, which calls the model ``what``, where there are :func:`differences`."""
    found = differences(expected, given)
    listed = [f'{len(found[kind])} keys {kind}: {", ".join(found[kind][:3])}' for kind in kinds if found[kind]]
    if listed:
        raise CheckpointMismatchError(f'the checkpoint does not fit {what}: {"; ".join(listed)}')


def check_fits(model: nn.Module, checkpoint: dict) -> None:
    """Compares a checkpoint with the whole model; mmengine only logs what does not fit.

    Where it is of a stock model, a wrapped backbone takes its base from it, and the rest is compared as in any model.

    Raises:
        CheckpointMismatchError: a shape differs or, where the model has a wrapped backbone, a key.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    expected = get_state_dict(model)
    # Saved by plain DDP, keys have a prefix that mmengine strips after this check.
    given = {key.removeprefix('module.'): value for key, value in checkpoint.get('state_dict', checkpoint).items()}
    given = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    wrapped = [(f'{path}.'.lstrip('.'), each) for path, each in model.named_modules() if hasattr(each, 'fits_stock')]
    from_stock = tuple(prefix for prefix, wrapper in wrapped if wrapper.fits_stock(below(prefix, given)))
    expected = {key: value for key, value in expected.items() if not key.startswith(from_stock)}
    is_adapter = any(key.endswith(FINGERPRINT) for key in expected)
    check_same(expected, given, 'the model', (MISSING, FOREIGN, RESHAPED) if is_adapter else (RESHAPED,))
