"""What a stage keeps of its taps between the forward and the backward pass.

Only the gradient of the adapters' input basis ``P`` needs a tap in its full width; everything behind it needs the
rank-space image ``z P`` alone. A :class:`TapRecord` is filled while the frozen stage runs, so that a tap is reduced,
compressed and dropped before the next one exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A sample smaller than this saves little and makes the gradient too noisy to train by.
_FEWEST_TOKENS = 4096


@dataclass(frozen=True)
class TapStorage:
    """What is kept of the taps for the gradient of ``P``; the forward pass and all other gradients are exact.

    Args:
        dtype: taps are rounded to it where it is narrower than theirs; ``None`` keeps them as they are.
        fraction: share of the tokens that is kept, but no fewer than 4096, drawn anew (with replacement) in every
            forward pass. The gradient is scaled up accordingly and stays unbiased.
    """

    dtype: torch.dtype | None = None
    fraction: float = 1.0


EXACT = TapStorage()


class TapRecord:
    """The taps of one stage in one forward pass, ``N`` of ``M`` tokens each.

    Args:
        down_in: ``P`` of the stage's adapters, (N, C, W).
        storage: what is kept beside the rank-space images.

    Attributes:
        reduced: ``z P``, (N, M, W), in the taps' dtype.
        kept: (N, K, C) in the storage dtype, or ``None`` where no gradient of ``P`` will be asked for.
        scales: (N,) fp32 for 8-bit floats, else ``None``.
        sample: (K,) indices of the kept tokens, or ``None`` for all of them.
    """

    def __init__(self, down_in: Tensor, storage: TapStorage = EXACT) -> None:
        self.num_taps, self.shape = 0, None
        self.reduced = self.kept = self.scales = self.sample = None
        self.down_in, self._storage = down_in, storage
        self._traced: list[Tensor] = []
        # Decided here, since taps arrive from a frozen forward without gradient.
        self._keeps_taps = records_gradient() and down_in.requires_grad

    def add(self, tap: Tensor) -> None:
        """Records the next tap, (..., C).

        Raises:
            ValueError: there are more taps than adapters, or their shapes differ.
        """
        if self.shape is None:
            self._allocate(tap)
        if self.num_taps == len(self.down_in) or tap.shape != self.shape:
            raise ValueError(
                f'{len(self.down_in)} taps of shape {tuple(self.shape)} fit, got number {self.num_taps + 1} of shape '
                f'{tuple(tap.shape)}'
            )
        tokens = tap.reshape(-1, tap.shape[-1])
        with torch.no_grad(), torch.autocast(tap.device.type, enabled=False):
            basis = self._basis[self.num_taps]
            if in_trace():
                self._traced.append(tokens @ basis)
            else:
                torch.mm(tokens, basis, out=self.reduced[self.num_taps])
            if self.kept is not None:
                self._keep(tokens)
        self.num_taps += 1

    def free_basis(self) -> None:
        """Ends the filling."""
        self.down_in = self._basis = None

    def images(self) -> Tensor:
        """``z P`` of all taps, (N, M, W): in a trace they are put together here, since it knows no writing in place."""
        return torch.stack(self._traced) if self._traced else self.reduced

    def _allocate(self, tap: Tensor) -> None:
        num_adapters, dims, width = self.down_in.shape
        self.shape = tap.shape
        self._basis = self.down_in.detach().to(tap.dtype)
        if in_trace():
            return
        num_tokens = tap.shape[:-1].numel()
        self.reduced = tap.new_empty(num_adapters, num_tokens, width)
        if not self._keeps_taps:
            return
        num_kept = min(num_tokens, max(_FEWEST_TOKENS, round(num_tokens * self._storage.fraction)))
        if num_kept < num_tokens:
            self.sample = torch.randint(num_tokens, (num_kept,), device=tap.device)
        dtype = stored_dtype(tap.dtype, self._storage.dtype)
        self.kept = tap.new_empty(num_adapters, num_kept, dims, dtype=dtype)
        if dtype.itemsize == 1:
            self.scales = tap.new_empty(num_adapters, dtype=torch.float32)

    def _keep(self, tokens: Tensor) -> None:
        if self.sample is not None:
            tokens = tokens.index_select(0, self.sample)
        kept = self.kept[self.num_taps]
        if self.scales is None:
            kept.copy_(tokens)
            return
        scale = self.scales[self.num_taps].copy_(float8_scale(tokens, kept.dtype))
        torch.div(tokens, scale, out=kept)


def in_trace() -> bool:
    """Whether operations are recorded to be run elsewhere: ``torch.jit.trace``, or ``torch.export`` and so ONNX."""
    is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)  # new in torch 2.7
    return torch.jit.is_tracing() or is_exporting()


def records_gradient() -> bool:
    """Whether a gradient may be asked for; not of a trace, which is for inference and knows no autograd functions."""
    return torch.is_grad_enabled() and not in_trace()


def stored_dtype(dtype: torch.dtype, limit: torch.dtype | None) -> torch.dtype:
    """The narrower of the two."""
    return dtype if limit is None or limit.itemsize >= dtype.itemsize else limit


def float8_scale(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``values`` are divided by to use the range of an 8-bit float: a positive fp32 scalar."""
    # At least fp32, because half precision can not hold every scale.
    precise = torch.promote_types(values.dtype, torch.float32)
    largest = values.new_zeros((), dtype=precise)
    if values.numel():
        largest = torch.linalg.vector_norm(values, torch.inf, dtype=precise)
    return largest.clamp(min=torch.finfo(torch.float32).tiny) / torch.finfo(dtype).max


def decompress(packed: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Kept values in ``dtype``; ``scale`` is that of 8-bit floats."""
    values = packed.to(dtype)
    # In place: the product is formed in the scale's precision and written in dtype.
    return values if scale is None else values.mul_(scale)
