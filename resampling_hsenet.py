# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Tensors of HU, (D, H, W), to tensors of the model's size: where the body is, windows, resampling.

The ways of the released weights (`min_max`, `nonzero_box`, `trilinear`, `stated`) are here beside those of the
defaults. All is exact in float32 up to rounding; the order of work only saves memory and time.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate


try:
    from .volume_hsenet import UnsupportedImageError
except ImportError:  # imported as a plain top-level module, not from the Hub cache
    if __package__:
        raise
    from volume_hsenet import UnsupportedImageError


# Half-way between lung and soft tissue: air, lung and out-of-field padding lie below, the body's wall above.
BODY_THRESHOLD_HU = -500


def body_box(array: torch.Tensor) -> list[tuple[float, float]]:
    projection = torch.from_numpy(array.numpy().max(axis=0)) > BODY_THRESHOLD_HU  # torch takes longer
    if not projection.any():
        raise UnsupportedImageError(
            f"No voxel of the volume lies above {BODY_THRESHOLD_HU} HU, so there is no body in it. Expected a CT in "
            f"HU, got values from {array.min():.0f} to {array.max():.0f}."
        )
    box = []
    for plane in (projection.any(dim=1), projection.any(dim=0)):
        first, last = plane.nonzero()[[0, -1], 0].tolist()
        box.append((float(first), float(last + 1 - first)))
    # Most scans begin and end within the body, so the search from both ends is short.
    planes = range(len(array))
    first = next(index for index in planes if (array[index] > BODY_THRESHOLD_HU).any())
    last = next(index for index in reversed(planes) if (array[index] > BODY_THRESHOLD_HU).any())
    return [(float(first), float(last + 1 - first)), *box]


def apply_window(array: torch.Tensor, window: tuple[float, float]) -> torch.Tensor:
    lower, upper = window
    return (array.clamp(lower, upper) - lower) / (upper - lower)


def min_max(values: torch.Tensor) -> torch.Tensor:
    lowest, highest = values.min(), values.max()
    return (values - lowest) / (highest - lowest).clamp(min=1e-8)


def nonzero_box(volume: torch.Tensor) -> list[tuple[float, float]]:
    if not (volume > 0).any():
        raise UnsupportedImageError("The scan is constant within hu_window: expected a CT of a body, in HU.")
    return _bounding_box(volume > 0)


def _bounding_box(mask: torch.Tensor) -> list[tuple[float, float]]:
    planes = [mask.any(dim=2).any(dim=1), mask.any(dim=2).any(dim=0), mask.any(dim=1).any(dim=0)]
    ends = [plane.nonzero()[[0, -1], 0].tolist() for plane in planes]
    return [(float(first), float(last + 1 - first)) for first, last in ends]


def trilinear(volume: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(D, H, W) stretched to `size`, voxel edges on voxel edges, without antialiasing."""
    return interpolate(volume[None, None], size=tuple(size), mode="trilinear", align_corners=False)[0, 0]


def stated(millimetres: float) -> float:
    """The spacing that a single-precision header was made from: a part of a power of two, or a decimal."""
    binary = round(millimetres * 8192) / 8192
    return binary if abs(millimetres - binary) < 1e-7 * millimetres else round(millimetres, 6)


def resampling_weights(length: int, start: float, extent: float, samples: int) -> torch.Tensor:
    """`(samples, length)`: linear interpolation, widened to the sample distance when shrinking (antialiasing).

    Samples are the centres of equal parts of `extent`; those outside the scan get no weight, that is, the window's
    lower end.
    """
    step = extent / samples
    centres = start + (torch.arange(samples, dtype=torch.float64) + 0.5) * step - 0.5  # in voxel indices
    distances = (torch.arange(length, dtype=torch.float64) - centres.unsqueeze(1)).abs()
    weights = (1 - distances / max(step, 1.0)).clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    inside = (centres > -0.5) & (centres < length - 0.5)
    return (weights * inside.unsqueeze(1)).float()


def plane_weights(length: int, start: float, extent: float, samples: int) -> torch.Tensor:
    """`(samples, length)`: the single planes nearest to equal distances from the first plane to the last."""
    planes = start + torch.linspace(0, extent - 1, samples, dtype=torch.float64)
    planes = planes.round()
    return (torch.arange(length, dtype=torch.float64) == planes.unsqueeze(1)).float()


def slab_weights(length: int, start: float, extent: float, samples: int) -> torch.Tensor:
    """`(samples, length)`: the share of each plane in each of the equal slabs; nothing lies outside the scan."""
    step = extent / samples
    lower = start + torch.arange(samples, dtype=torch.float64).unsqueeze(1) * step
    planes = torch.arange(length, dtype=torch.float64)
    shared = torch.minimum(planes + 1, lower + step) - torch.maximum(planes, lower)
    return (shared.clamp(min=0) / step).float()


# Parts of the work that fit the processor's cache. A block of samples needs only the voxels near them.
DEPTH_BLOCK, IN_PLANE_BLOCK, SLAB_ROWS = 8, 32, 4


def resample(array: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """`(D, H, W)` resampled along every axis, in the array's own precision."""
    for axis, axis_weights in enumerate(weights):
        array = torch.tensordot(axis_weights.to(array.dtype), array, dims=([1], [axis])).movedim(0, axis)
    return array


def resample_windowed(array: torch.Tensor, window: tuple[float, float], weights: list[torch.Tensor]) -> torch.Tensor:
    """The scan (D, H, W) with its window applied, resampled along every axis; it is never whole in float32."""
    (lower, upper), (depth, height, width) = window, weights
    resampled, memory = torch.empty(len(depth), len(height), len(width)), _Memory()
    ((height, rows, _),) = _blocks(height, len(height))
    ((width, columns, _),) = _blocks(width, len(width))
    array = array[:, rows][:, :, columns]
    height_blocks, width_blocks = (_blocks(axis_weights, IN_PLANE_BLOCK) for axis_weights in (height, width))
    stretched = torch.empty(len(height), array.shape[2])
    for depth_weights, voxels, samples in _blocks(depth, DEPTH_BLOCK):
        part = array[voxels]
        planes = memory("planes", (len(depth_weights), *part.shape[1:]))
        for slab, target in zip(part.split(SLAB_ROWS, dim=1), planes.split(SLAB_ROWS, dim=1), strict=True):
            target.copy_(torch.tensordot(depth_weights, _above(slab, lower, upper, memory), 1))
        planes.div_(upper - lower)
        for plane, target in zip(planes, resampled[samples], strict=True):
            for block, voxels, places in height_blocks:
                torch.mm(block, plane[voxels], out=stretched[places])
            for block, voxels, places in width_blocks:
                target[:, places] = stretched[:, voxels] @ block.T
    return resampled


class _Memory:
    """Tensors whose memory is used again: to get fresh memory from the system takes longer than the work on it."""

    def __init__(self):
        self._tensors: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        size = math.prod(shape)
        if name not in self._tensors or len(self._tensors[name]) < size:
            self._tensors[name] = torch.empty(size, dtype=dtype)
        return self._tensors[name][:size].view(shape)


def _above(slab: torch.Tensor, lower: float, upper: float, memory: _Memory) -> torch.Tensor:
    """Values clipped to the window, counted from its lower end; in int16 where that is as exact, because faster."""
    fits = -(2**15) <= lower and upper < 2**15 and upper - lower < 2**15 and (lower, upper) == (int(lower), int(upper))
    above = memory("above", slab.shape)
    if slab.dtype == torch.int16 and fits:
        clipped = torch.clamp(slab, int(lower), int(upper), out=memory("clipped", slab.shape, slab.dtype))
        return above.copy_(clipped.sub_(int(lower)))
    return above.copy_(slab).clamp_(lower, upper).sub_(lower)


def _blocks(weights: torch.Tensor, size: int) -> list[tuple[torch.Tensor, slice | torch.Tensor, slice]]:
    """For `size` samples each: their weights (samples, voxels), which voxels these are, and which samples."""
    blocks = []
    for start in range(0, len(weights), size):
        block = weights[start : start + size]
        used = block.any(dim=0).nonzero()[:, 0]
        first, last = used[[0, -1]].tolist() if len(used) else (0, -1)
        voxels = slice(first, last + 1) if len(used) == last + 1 - first else used
        blocks.append((block[:, voxels], voxels, slice(start, start + size)))
    return blocks


__all__ = [
    "apply_window",
    "body_box",
    "min_max",
    "nonzero_box",
    "plane_weights",
    "resample",
    "resample_windowed",
    "resampling_weights",
    "slab_weights",
    "stated",
    "trilinear",
]
