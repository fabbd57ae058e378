"""RoIAlign (https://arxiv.org/abs/1703.06870) and RoIPool. A region is: image, x1, y1, x2, y2."""

import torch
from torch import Tensor

from .common import corners, torchvision_has, unsupported, wide, without_autocast

_CORNERS = 2**23  # interpolated pixels at a time: about 300 MB


def _refuse_max(pool_mode: int) -> None:
    if pool_mode == 0:
        raise unsupported("roi_align with pool_mode='max'")


@without_autocast
def roi_align_forward(
    input, rois, output, argmax_y, argmax_x, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode,
    aligned,
) -> None:  # fmt: skip
    """input: (B, C, H, W); writes output: (regions, C, aligned_height, aligned_width)."""
    _refuse_max(pool_mode)
    size = aligned_height, aligned_width
    features, regions = wide(input), rois.to(wide(input).dtype)
    if torchvision_has('roi_align', input):
        args = spatial_scale, *size, sampling_ratio, aligned
        output.copy_(torch.ops.torchvision.roi_align(features, regions, *args))
        return
    table = features.permute(0, 2, 3, 1).flatten(0, 2)
    for part, target in _parts(regions, output, size, spatial_scale, sampling_ratio, aligned):
        share = _shares(part, size, spatial_scale, sampling_ratio, aligned, input.shape)
        target.copy_((share @ table).view(len(part), *size, -1).permute(0, 3, 1, 2))


@without_autocast
def roi_align_backward(
    grad_output, rois, argmax_y, argmax_x, grad_input, aligned_height, aligned_width, spatial_scale, sampling_ratio,
    pool_mode, aligned,
) -> None:  # fmt: skip
    """Adds to grad_input: (B, C, H, W)."""
    _refuse_max(pool_mode)
    size = aligned_height, aligned_width
    grad, regions = wide(grad_output), rois.to(wide(grad_output).dtype)
    if torchvision_has('_roi_align_backward', grad_output):
        args = spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        grad_input.add_(torch.ops.torchvision._roi_align_backward(grad, regions, *args).to(grad_input.dtype))
        return
    batch, channels, height, width = grad_input.shape
    table = grad.new_zeros(batch * height * width, channels)
    for part, source in _parts(regions, grad, size, spatial_scale, sampling_ratio, aligned):
        share = _shares(part, size, spatial_scale, sampling_ratio, aligned, grad_input.shape)
        table += share.t() @ source.permute(0, 2, 3, 1).reshape(-1, channels)
    grad_input.add_(table.view(batch, height, width, channels).permute(0, 3, 1, 2).to(grad_input.dtype))


def _parts(rois, tensor, size, scale, sampling_ratio, aligned):
    """Regions and what belongs to them, so many at a time that the interpolation fits in memory."""
    if not len(rois):
        return []
    most = int(_grids(rois, size, scale, sampling_ratio, aligned)[2].prod(-1).max())
    length = max(1, _CORNERS // (4 * max(most, 1) * size[0] * size[1]))
    return zip(rois.split(length), tensor.split(length))


def _grids(rois, size, scale, sampling_ratio, aligned) -> tuple[Tensor, Tensor, Tensor]:
    """First corner, size of a bin, and number of points in a bin: (regions, 2) each, y before x."""
    first = rois[:, [2, 1]] * scale - (0.5 if aligned else 0)
    extent = rois[:, [4, 3]] * scale - (0.5 if aligned else 0) - first
    if not aligned:
        extent = extent.clamp(min=1)
    steps = extent / extent.new_tensor(size)
    points = torch.full_like(steps, sampling_ratio) if sampling_ratio > 0 else steps.ceil().clamp(min=0)
    return first, steps, points.long()


def _shares(rois, size, scale, sampling_ratio, aligned, shape) -> Tensor:
    """The share of each pixel in each bin: sparse, (regions · bins, B · H · W)."""
    first, steps, points = _grids(rois, size, scale, sampling_ratio, aligned)
    counts = points.prod(-1)
    # One row a point of a bin; a region has as many as its bins have points.
    region = torch.arange(len(rois), device=rois.device).repeat_interleave(counts)
    nth = torch.arange(len(region), device=rois.device) - (counts.cumsum(0) - counts)[region]
    place = torch.stack((nth // points[region, 1], nth % points[region, 1]), -1)
    within = (place + 0.5) * steps[region] / points[region]
    position = [
        first[region, axis, None] + torch.arange(size[axis], device=rois.device) * steps[region, axis, None]
        + within[:, axis, None]
        for axis in (0, 1)
    ]  # fmt: skip
    index, weight = _inside(position[0][:, :, None], position[1][:, None, :], *shape[2:])
    weight = weight / counts[region].view(-1, 1, 1, 1)
    column = index + (rois[region, 0].long() * shape[2] * shape[3]).view(-1, 1, 1, 1)
    bins = torch.arange(size[0] * size[1], device=rois.device).view(1, *size, 1)
    row = (region.view(-1, 1, 1, 1) * size[0] * size[1] + bins).expand_as(column)
    places = torch.stack((row.flatten(), column.flatten()))
    total = len(rois) * size[0] * size[1], shape[0] * shape[2] * shape[3]
    return torch.sparse_coo_tensor(places, weight.flatten(), total, check_invariants=False)


def _inside(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Corners of points: up to a pixel outside they are moved to the border, farther off they count as nought."""
    y, x = torch.broadcast_tensors(y, x)
    near = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    index, weight = corners(y.clamp(0, height - 1), x.clamp(0, width - 1), height, width)
    return index, weight * near[..., None]


def roi_pool_forward(input, rois, output, argmax, pooled_height, pooled_width, spatial_scale) -> None:
    """Writes the largest value of each bin and its place in the flat map; nought and -1 of an empty one."""
    height, width = input.shape[2:]
    regions = rois.to(wide(rois).dtype)
    y1, y2 = _bins(regions[:, 2], regions[:, 4], spatial_scale, pooled_height, height)
    x1, x2 = _bins(regions[:, 1], regions[:, 3], spatial_scale, pooled_width, width)
    for i, image in enumerate(rois[:, 0].long().tolist()):
        rows, columns = _spans(y1[i], y2[i]), _spans(x1[i], x2[i])
        rows, columns = rows.clamp(max=height - 1), columns.clamp(max=width - 1)
        place = (rows[:, None, :, None] * width + columns[:, None]).flatten(2)
        best, nth = input[image].flatten(1)[:, place].max(-1)
        empty = ((y2[i] <= y1[i])[:, None] | (x2[i] <= x1[i])).expand_as(best)
        output[i] = best.masked_fill(empty, 0)
        argmax[i] = place.expand(len(best), -1, -1, -1).gather(-1, nth[..., None])[..., 0].masked_fill(empty, -1)


def _bins(low: Tensor, high: Tensor, scale: float, count: int, size: int) -> tuple[Tensor, Tensor]:
    """First row of each bin and that after its last: (regions, count); no rows where the region has no extent."""
    start, end = low * scale, (high + 1) * scale
    step = ((end - start) / count)[:, None]
    nth = torch.arange(count, device=low.device)
    first = (nth * step + start[:, None]).floor().clamp(0, size)
    last = ((nth + 1) * step + start[:, None]).ceil().clamp(0, size)
    return first.long(), torch.where(step > 0, last, first).long()


def _spans(first: Tensor, last: Tensor) -> Tensor:
    """The rows of each bin, the last one repeated up to the longest: (bins, rows)."""
    longest = max(int((last - first).max()), 1)
    rows = first[:, None] + torch.arange(longest, device=first.device)
    return torch.minimum(rows, (last - 1).clamp(min=0)[:, None])


def roi_pool_backward(grad_output, rois, argmax, grad_input, pooled_height, pooled_width, spatial_scale) -> None:
    """Adds to grad_input: (B, C, H, W)."""
    flat = wide(grad_input).flatten(2)
    images = rois[:, 0].long().view(-1, 1, 1, 1).expand_as(argmax)
    channels = torch.arange(grad_input.shape[1], device=rois.device).view(-1, 1, 1).expand_as(argmax)
    pooled = argmax >= 0
    places = images[pooled], channels[pooled], argmax[pooled].long()
    flat = flat.index_put(places, wide(grad_output)[pooled], accumulate=True)
    grad_input.copy_(flat.view_as(grad_input))
