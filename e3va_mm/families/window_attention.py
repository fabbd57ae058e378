"""(Shifted-)window attention in eval mode, with the weights of a stock Swin module (arXiv 2103.14030).

The stock module pads, rolls, partitions, builds its shift mask and materialises the attention matrix in every call.
Here one gather replaces the first three and one more their inverse; position bias and shift mask are prepared once;
``scaled_dot_product_attention`` never writes the attention matrix. Windows are ordered so that those that share a mask
lie together: all of them, or, when shifted, the inner ones, the last column, the last row and the last window.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..highway.tap_record import in_trace
from .base import Size

# What the stock module adds to the scores of tokens that the shift has brought together.
_SEPARATED = -100.0
# Fused kernels put the windows in a grid dimension that ends here.
_MOST_WINDOWS = 65535


class WindowLayout(NamedTuple):
    """Where the tokens of a batch go: windows of ``n`` tokens, window-major, the batch inside."""

    order: Tensor  # (windows * B * n,) int32: the token at each place; padding points at token 0
    padding: Tensor  # int64: places that hold padding
    inverse: Tensor  # (B * H * W,) int32: the place of each token
    groups: tuple[tuple[int, int, int], ...]  # first and last window (exclusive), and the kind of their mask


# Two shapes of a four-stage backbone, for training and validation; each may take megabytes.
@lru_cache(maxsize=16)
def window_layout(batch: int, size: Size, window: int, shift: int, device: torch.device) -> WindowLayout:
    """The layout of ``batch`` images of ``size`` tokens in windows of ``window`` x ``window``.

    Built on ``device`` without synchronising with it: under multi-scale training most batches have a new size.
    """
    height, width = size
    rows, columns = -(-height // window), -(-width // window)
    num_tokens = batch * height * width
    tokens = torch.arange(num_tokens, device=device).view(batch, height, width)
    # Padding carries the number behind the last token.
    grid = F.pad(tokens, (0, columns * window - width, 0, rows * window - height), value=num_tokens)
    grid = grid.roll((-shift, -shift), (1, 2)).view(batch, rows, window, columns, window).permute(1, 3, 0, 2, 4)
    kinds = torch.zeros(rows, columns, dtype=torch.int32, device=device)
    counts = [rows * columns]
    if shift:
        kinds[:, -1] += 1
        kinds[-1] += 2
        counts = [(rows - 1) * (columns - 1), rows - 1, columns - 1, 1]
    order = grid.reshape(rows * columns, -1)[kinds.flatten().argsort(stable=True)].flatten()
    inverse = order.new_empty(num_tokens + 1)
    inverse[order] = torch.arange(len(order), device=device)
    is_token = (order < num_tokens).to(torch.int8)
    padding = is_token.argsort(stable=True)[: len(order) - num_tokens].clone()
    return WindowLayout((order * is_token).int(), padding, inverse[:-1].int(), _groups(counts, batch))


def _groups(counts: list[int], batch: int) -> tuple[tuple[int, int, int], ...]:
    groups, start = [], 0
    for kind, count in enumerate(counts):
        stop = start + count * batch
        cuts = range(start, stop, _MOST_WINDOWS)
        groups += [(first, min(first + _MOST_WINDOWS, stop), kind) for first in cuts]
        start = stop
    return tuple(groups)


def window_bias(w_msa: nn.Module, shift: int, dtype: torch.dtype) -> Tensor:
    """Position bias plus mask for each kind of window, (1 or 4, heads, n, n)."""
    bias = _exact_bias(w_msa, shift)
    tokens = bias.shape[-1]
    # Fused kernels read rows of 16 bytes: the storage is padded, the shape is not.
    aligned = bias.new_zeros(*bias.shape[:-1], -(-tokens // 8) * 8, dtype=dtype)
    aligned[..., :tokens] = bias
    return aligned[..., :tokens]


def _exact_bias(w_msa: nn.Module, shift: int) -> Tensor:
    height, width = w_msa.window_size
    tokens = height * width
    bias = w_msa.relative_position_bias_table[w_msa.relative_position_index.flatten()]
    bias = bias.view(1, tokens, tokens, -1).permute(0, 3, 1, 2)
    return bias + _shift_masks(height, shift, bias.device).unsqueeze(1) if shift else bias


def _shift_masks(window: int, shift: int, device: torch.device) -> Tensor:
    """(4, n, n): for inner windows, the last column, the last row, and the window in both."""
    wrapped = torch.arange(window, device=device) >= window - shift
    row, column = (part.flatten() for part in torch.meshgrid(wrapped, wrapped, indexing='ij'))
    row, column = row[:, None] != row, column[:, None] != column
    separated = torch.stack([torch.zeros_like(row), column, row, row | column])
    return separated * _SEPARATED


class FusedWindowAttention:
    """What the stock ``ShiftWindowMSA`` computes in eval mode; takes the place of its ``forward``.

    Args:
        attention: the stock module; its layers are called, its weights and key names stay its own.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        self._prepared: tuple[tuple, Tensor] | None = None

    def __call__(self, query: Tensor, hw_shape: Size) -> Tensor:
        """Normalised tokens (B, H * W, C) -> the same shape, in the dtype of ``proj``'s output."""
        if in_trace():
            return self._traceable(query, hw_shape)
        # What is kept must serve training too, and tensors made in inference mode do not.
        with torch.inference_mode(False):
            layout, bias = self._layout(query, tuple(hw_shape)), self._bias(query)
        return self._attend(query, layout, bias)

    def forget(self) -> None:
        """Frees the bias until the next call."""
        self._prepared = None

    def _traceable(self, query: Tensor, size: Size) -> Tensor:
        """The same of what every trace knows and counts, with height and width open; it keeps nothing."""
        w_msa, window, shift = self.attention.w_msa, self.attention.window_size, self.attention.shift_size
        (height, width), (batch, _, dims) = size, query.shape
        # ONNX divides negative integers towards zero.
        rows, columns = (height + window - 1) // window, (width + window - 1) // window
        grid = F.pad(query.unflatten(1, size), (0, 0, 0, columns * window - width, 0, rows * window - height))
        grid = grid.roll((-shift, -shift), (1, 2)).view(batch, rows, window, columns, window, dims)
        qkv = w_msa.qkv(grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, window**2, dims))
        q, k, v = qkv.unflatten(2, (3, w_msa.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = _exact_bias(w_msa, shift).to(q.dtype)
        if shift:
            last_row, last_column = (torch.arange(number, device=q.device) == number - 1 for number in (rows, columns))
            bias = bias[(2 * last_row.long()[:, None] + last_column.long()).flatten()].repeat(batch, 1, 1, 1)
        attended = (q * w_msa.scale @ k.mT + bias).softmax(-1) @ v
        tokens = w_msa.proj(attended.transpose(1, 2).flatten(2)).view(batch, rows, columns, window, window, dims)
        grid = tokens.transpose(2, 3).reshape(batch, rows * window, columns * window, dims).roll((shift, shift), (1, 2))
        return grid[:, :height, :width].reshape(batch, -1, dims)

    def _layout(self, query: Tensor, size: Size) -> WindowLayout:
        attention = self.attention
        return window_layout(len(query), size, attention.window_size, attention.shift_size, query.device)

    def _bias(self, query: Tensor) -> Tensor:
        """Prepared again only when the table has been written to or has moved."""
        w_msa, device = self.attention.w_msa, query.device.type
        table = w_msa.relative_position_bias_table
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        state = (dtype, table.device, table.data_ptr(), table._version)
        if self._prepared is None or self._prepared[0] != state:
            with torch.no_grad():
                self._prepared = state, window_bias(w_msa, self.attention.shift_size, dtype)
        return self._prepared[1]

    def _attend(self, query: Tensor, layout: WindowLayout, bias: Tensor) -> Tensor:
        w_msa = self.attention.w_msa
        batch, length, dims = query.shape
        # Cast first, so that under autocast the gather moves half the bytes.
        windows = query.to(bias.dtype).reshape(-1, dims).index_select(0, layout.order)
        if len(layout.padding):
            windows.index_fill_(0, layout.padding, 0)
        heads, per_window = w_msa.num_heads, bias.shape[-1]
        qkv = w_msa.qkv(windows).view(-1, per_window, 3, heads, dims // heads).permute(2, 0, 3, 1, 4)
        attended = [
            F.scaled_dot_product_attention(
                *qkv[:, start:stop], attn_mask=bias[kind : kind + 1].expand(stop - start, -1, -1, -1), scale=w_msa.scale
            ).transpose(1, 2)
            for start, stop, kind in layout.groups
        ]
        attended = attended[0] if len(attended) == 1 else torch.cat(attended)
        return w_msa.proj(attended.reshape(-1, dims)).index_select(0, layout.inverse).view(batch, length, -1)
