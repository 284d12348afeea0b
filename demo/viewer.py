# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Slices of a scan as pictures: three planes in radiological display, windows, and the patch scores over them."""

import base64
import html
import io
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image

from hsenet import Volume


class Plane(NamedTuple):
    """Slices across `axis` of `Volume.array` (D, H, W); `letters` are patient directions at the picture's edges."""

    axis: int
    left: str
    right: str
    top: str
    bottom: str


# Seen from the feet (axial), the front (coronal), the patient's left (sagittal). D runs upwards: a picture turns it.
PLANES = {
    "axial": Plane(0, "R", "L", "A", "P"),
    "coronal": Plane(1, "R", "L", "S", "I"),
    "sagittal": Plane(2, "A", "P", "S", "I"),
}
WINDOWS = {"Lung": (-1350.0, 150.0), "Soft tissue": (-160.0, 240.0), "Bone": (-500.0, 1300.0)}  # lowest, highest HU
LONGEST_SIDE = 512  # pixels
# Coordinate of RAS+ millimetres that changes across the plane, and the letters of its two directions.
WORLD = {"axial": (2, "S", "I"), "coronal": (1, "A", "P"), "sagittal": (0, "R", "L")}
COLOURS = (matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)


class Overlay(NamedTuple):
    """Scores (D, H, W), and start and extent in voxels of what they cover along each axis; see `patches_on_scan`."""

    scores: torch.Tensor
    box: list[tuple[float, float]]


def slice_picture(volume: Volume, plane: str, index: int, window: tuple[float, float]) -> np.ndarray:
    """One slice in 8-bit grey, (rows, columns), a pixel a voxel."""
    values = _across(volume.array, plane, index).astype(np.float32)
    lowest, highest = window
    return (np.clip((values - lowest) / (highest - lowest), 0, 1) * 255).round().astype(np.uint8)


def render(
    volume: Volume,
    plane: str,
    index: int,
    window: tuple[float, float],
    overlay: Overlay | None = None,
    opacity: float = 0.4,
) -> Image.Image:
    """A slice with square pixels, its longer side at most 512 of them; with `overlay` the scores as colour."""
    picture = Image.fromarray(slice_picture(volume, plane, index, window))
    size = _displayed_size(volume, plane)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    scores = None if overlay is None else _scores_in(overlay, volume, plane, index, size)
    if scores is None:
        return picture
    coloured = np.asarray(picture, dtype=np.float32)[..., None].repeat(3, axis=2)
    inside = np.isfinite(scores)
    colours = COLOURS[(np.where(inside, scores, 0) * 255).astype(np.uint8)]
    coloured[inside] += opacity * (colours[inside] - coloured[inside])
    return Image.fromarray(coloured.round().astype(np.uint8))


def figure(picture: Image.Image, volume: Volume, plane: str, index: int, window_name: str) -> str:
    """HTML with the picture inside: nothing is left on the disk."""
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=88, method=1)
    source = base64.b64encode(stream.getvalue()).decode()
    letters = "".join(
        f'<span class="{edge}" aria-hidden="true">{getattr(PLANES[plane], edge)}</span>'
        for edge in ("left", "right", "top", "bottom")
    )
    count = volume.array.shape[PLANES[plane].axis]
    place = f"{index + 1} / {count} · {position(volume, plane, index)}"
    what = html.escape(f"{plane.capitalize()} slice {index + 1} of {count}, window {window_name}")
    return (
        f'<figure class="slice"><img src="data:image/webp;base64,{source}" alt="{what}">{letters}'
        f"<figcaption>{plane.capitalize()}<b>{place}</b></figcaption></figure>"
    )


def position(volume: Volume, plane: str, index: int) -> str:
    """Where the centre of the slice lies, from the scanner's origin: a letter and millimetres, as viewers have it."""
    centre = [(size - 1) / 2 for size in volume.array.shape]
    centre[PLANES[plane].axis] = index
    coordinate, positive, negative = WORLD[plane]
    millimetres = float((volume.affine @ [*centre, 1])[coordinate])
    return f"{positive if millimetres >= 0 else negative} {abs(millimetres):.1f} mm"


def _across(array: Any, plane: str, index: int) -> Any:
    """Rows from the top, columns from the left of the picture."""
    if plane == "axial":
        return array[index]
    if plane == "coronal":
        return array[::-1, index]
    return array[::-1, :, index]


def _displayed_size(volume: Volume, plane: str) -> tuple[int, int]:
    """Width and height in pixels, in the proportions of the patient."""
    rows, columns = (axis for axis in range(3) if axis != PLANES[plane].axis)
    height, width = (volume.array.shape[axis] * volume.spacing[axis] for axis in (rows, columns))
    scale = LONGEST_SIDE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _scores_in(overlay: Overlay, volume: Volume, plane: str, index: int, size: tuple[int, int]) -> np.ndarray | None:
    """Scores from 0 to 1 at each pixel (rows, columns), NaN where the model sees nothing; None: nowhere here."""
    axis = PLANES[plane].axis
    start, extent = overlay.box[axis]
    grid = overlay.scores.numpy()
    layer = int(np.floor((index + 0.5 - start) / extent * grid.shape[axis]))
    if not 0 <= layer < grid.shape[axis]:
        return None
    lowest, highest = float(grid.min()), float(grid.max())
    values = (grid - lowest) / max(highest - lowest, 1e-6)
    values = values.take(layer, axis=axis)
    rows, columns = (other for other in range(3) if other != axis)
    picked_rows = _cells(overlay.box[rows], volume.array.shape[rows], values.shape[0], size[1])
    picked_columns = _cells(overlay.box[columns], volume.array.shape[columns], values.shape[1], size[0])
    if rows == 0:  # D runs upwards
        picked_rows = picked_rows[::-1]
    padded = np.pad(values, ((0, 1), (0, 1)), constant_values=np.nan)  # -1 is outside
    return padded[picked_rows][:, picked_columns]


def _cells(box: tuple[float, float], length: int, cells: int, pixels: int) -> np.ndarray:
    """For each pixel along an axis the cell of the grid that it lies in; -1: none."""
    start, extent = box
    voxels = (np.arange(pixels) + 0.5) * length / pixels
    picked = np.floor((voxels - start) / extent * cells).astype(int)
    return np.where((picked >= 0) & (picked < cells), picked, -1)
