"""What the operators share: which of torchvision's are there, precision, points between pixels, gradients."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def torchvision_has(op: str, tensor: Tensor) -> bool:
    """Whether torchvision's C++ operator runs on the tensor's device."""
    return _has_kernel(op, tensor.device.type.upper())


@functools.cache
def _has_kernel(op: str, device: str) -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    # Beside a CPU-only torch the name may be declared (see compat.py) or unknown: a kernel is what counts.
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f'torchvision::{op}', device)
    except RuntimeError:
        return False


def unsupported(name: str) -> NotImplementedError:
    """The error of what mmcv's compiled operators have, and these have not."""
    return NotImplementedError(
        f"mmcv's operator {name} is not among those that e3va_mm brings (e3va_mm/ops); it takes an mmcv with compiled "
        'operators: make setup MMCV_OPS=build, which needs a C++ compiler, and nvcc for a GPU'
    )


def wide(tensor: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; the rest stays."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(function: Callable) -> Callable:
    """Calls it with autocast off, which would round what ``wide`` has widened; the first argument is a tensor."""

    @functools.wraps(function)
    def call(tensor: Tensor, *args, **kwargs):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return call


def gradients(function: Callable, inputs: list[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Those of ``function(*inputs)`` for its inputs; evaluated again, as mmcv's wrappers keep no more."""
    leaves = [wide(tensor).detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


def corners(y: Tensor, x: Tensor, height: int | Tensor, width: int | Tensor) -> tuple[Tensor, Tensor]:
    """The four pixels around points (...), and the weights of bilinear interpolation; no weight is outside the map.

    height and width are numbers, or tensors that broadcast to the points. Returns the pixels' places in a flat map and
    their weights, (..., 4); the weights carry gradients to y and x.
    """
    height, width = (torch.as_tensor(size, device=y.device)[..., None] for size in (height, width))
    rows, row_weights = _neighbours(y, height)
    columns, column_weights = _neighbours(x, width)
    index = rows[..., :, None] * width[..., None] + columns[..., None, :]
    weight = row_weights[..., :, None] * column_weights[..., None, :]
    return index.flatten(-2), weight.flatten(-2)


def _neighbours(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    low = position.detach().floor()
    both = torch.stack((low, low + 1), -1)
    inside = (both >= 0) & (both < size)
    weight = torch.stack((low + 1 - position, position - low), -1)
    return torch.where(inside, both, 0).long(), weight * inside
