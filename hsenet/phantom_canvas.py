"""The grid a phantom is drawn on: coordinates, soft edges, curves as points, and smooth random fields.

Arrays are (z, y, x), so that their transpose is a NIfTI array whose first axis runs fastest. Coverage is the part of a
voxel, 0 to 1, that a structure fills: at 6 mm slices it is what makes a 10 mm nodule look like one.
"""

from dataclasses import dataclass

import numpy as np


Box = tuple[slice, slice, slice]
EVERYWHERE: Box = (slice(None), slice(None), slice(None))
GOLDEN_ANGLE = 2.399963  # rad
FIELD_EXTENT = 230.0  # smooth fields cover the gantry from minus to plus this, in mm


def rotation_matrix(angles: tuple[float, float, float]) -> np.ndarray:
    """Rotation about x, then y, then z (rad), (3, 3)."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def linear_weights(nodes: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Matrix (positions, nodes) that interpolates values at equally spaced `nodes` linearly."""
    step = nodes[1] - nodes[0]
    return np.clip(1 - np.abs(positions[:, None] - nodes[None, :]) / step, 0, 1).astype(np.float32)


@dataclass
class Canvas:
    """A volume under construction. `axes` are gantry positions (mm) along z, y and x; `x`, `y`, `z` patient mm."""

    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    rotation: np.ndarray
    shift: np.ndarray

    def __post_init__(self) -> None:
        z, y, x = (axis.astype(np.float32) for axis in self.axes)
        self.shape = (len(z), len(y), len(x))
        self.spacing = tuple(float(axis[1] - axis[0]) for axis in self.axes)  # (z, y, x) mm
        self.edge = float(np.prod(self.spacing) ** (1 / 3))  # width of a soft edge, mm
        r = self.rotation.astype(np.float32)
        gx = (x - np.float32(self.shift[0]))[None, None, :]
        gy = (y - np.float32(self.shift[1]))[None, :, None]
        gz = (z - np.float32(self.shift[2]))[:, None, None]
        self.x, self.y, self.z = (r[0, i] * gx + (r[1, i] * gy + r[2, i] * gz) for i in range(3))
        self.hu = np.full(self.shape, -1000, dtype=np.float32)
        self.mask = np.zeros(self.shape, dtype=np.uint8)

    def coordinates(self, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.x[box], self.y[box], self.z[box]

    def coverage(self, distance: np.ndarray) -> np.ndarray:
        """Signed distance (mm) to coverage."""
        coverage = distance * np.float32(-1 / self.edge)
        coverage += np.float32(0.5)
        return np.clip(coverage, 0, 1, out=coverage)

    def to_index(self, points: np.ndarray) -> np.ndarray:
        """Patient points (points, 3) to fractional (z, y, x) indices."""
        # One matrix does rotation, reversal to (z, y, x) and scaling.
        spacing = np.array(self.spacing)
        matrix = self.rotation.T[:, ::-1] / spacing
        first = np.array([axis[0] for axis in self.axes])
        return points @ matrix.astype(points.dtype) + ((self.shift[::-1] - first) / spacing).astype(points.dtype)

    def box(self, points: np.ndarray, margin: float) -> Box:
        """The part of the grid within `margin` mm of the extent of patient points; empty where it misses the grid."""
        index = self.to_index(np.atleast_2d(points))
        pad = (margin + self.edge) / np.array(self.spacing)
        low = np.clip(np.floor(index.min(axis=0) - pad), 0, self.shape).astype(int)
        high = np.clip(np.ceil(index.max(axis=0) + pad) + 1, 0, self.shape).astype(int)
        return tuple(slice(int(a), int(max(a, b))) for a, b in zip(low, high, strict=True))

    def paint(self, coverage: np.ndarray, hu: float | np.ndarray, box: Box = EVERYWHERE) -> None:
        """Mix `hu` into the volume by coverage."""
        region = self.hu[box]
        region += coverage * (hu - region)

    def record(self, coverage: np.ndarray, value: int, box: Box = EVERYWHERE, *, fullness: float = 0.5) -> None:
        """Mark a finding: the voxels it fills to `fullness`, or its fullest ones where it is thinner than a voxel."""
        if coverage.size:
            threshold = min(fullness, 0.6 * float(coverage.max()))
            if threshold > 0:
                self.mask[box][coverage >= threshold] = value

    def splat(self, points: np.ndarray, volumes: np.ndarray) -> tuple[np.ndarray, Box]:
        """Coverage by a cloud of patient points (points, 3), each of which stands for `volumes` mm3."""
        index = self.to_index(points)
        low = np.clip(np.floor(index.min(axis=0)), 0, self.shape).astype(int)
        high = np.clip(np.floor(index.max(axis=0)) + 2, low, self.shape).astype(int)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        shape = tuple(s.stop - s.start for s in box)
        if 0 in shape:
            return np.zeros(shape, np.float32), box
        # One more layer on every side takes what falls off the grid.
        padded = tuple(size + 2 for size in shape)
        index = (index - (low - 1)).astype(np.float32)
        inside = np.ones(len(index), bool)
        for axis, size in enumerate(padded):
            inside &= (index[:, axis] > 0) & (index[:, axis] < size - 1)
        index, weight = index[inside], (volumes[inside] / np.prod(self.spacing)).astype(np.float32)
        base = index.astype(np.int32)
        upper = np.ascontiguousarray((index - base).T)  # (3, points)
        along = (1 - upper, upper)
        first = (base[:, 0] * padded[1] + base[:, 1]) * padded[2] + base[:, 2]
        total = np.zeros(int(np.prod(padded)))
        for dz, dy, dx in np.ndindex(2, 2, 2):
            part = weight * along[dz][0] * along[dy][1] * along[dx][2]
            total += np.bincount(first + ((dz * padded[1] + dy) * padded[2] + dx), part, len(total))
        total = total.reshape(padded)[1:-1, 1:-1, 1:-1]
        return np.minimum(total, 1).astype(np.float32), box

    def smooth_field(self, seed, scale: float) -> np.ndarray:
        """A random field of unit variance that varies over `scale` mm, fixed in the gantry: alike in every grid."""
        nodes = np.arange(-FIELD_EXTENT, FIELD_EXTENT + scale, scale)
        values = np.random.default_rng(seed).standard_normal((len(nodes),) * 3, dtype=np.float32)
        wz, wy, wx = (linear_weights(nodes, axis) for axis in self.axes)
        field = np.tensordot(wz, values, 1)  # (z, node, node)
        field = np.matmul(wy, field) @ wx.T  # (z, y, x)
        return field * np.float32(1.8)  # interpolation averages variance away


def resample_path(path: np.ndarray, step: float) -> np.ndarray:
    """Points every `step` mm along a polyline, its corners rounded, (points, 3)."""
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    count = max(int(length[-1] / step), 2)
    at = np.linspace(0, length[-1], count)
    points = np.stack([np.interp(at, length, path[:, axis]) for axis in range(3)], axis=-1)
    window = min(int(24 / step) | 1, (count - 1) | 1)
    padded = np.pad(points, ((window // 2, window // 2), (0, 0)), mode="edge")
    kernel = np.ones(window) / window
    smooth = np.stack([np.convolve(padded[:, axis], kernel, "valid") for axis in range(3)], axis=-1)
    return smooth if len(smooth) == count else points


def tube_points(
    paths: np.ndarray, radii: np.ndarray, step: float, flatten: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Fill tubes with points about `step` mm apart.

    Args:
        paths (`np.ndarray`): centre lines, (tubes, stations, 3) mm.
        radii (`np.ndarray`): radii, (tubes, stations) mm.
        step (`float`): spacing of the points, mm.
        flatten (`tuple`): stretch of the cross-section along x, y and z.

    Returns:
        points (points, 3) and the volume (mm3) that each stands for, (points,).
    """
    paths, radii = paths.astype(np.float32), radii.astype(np.float32)
    tangent = np.gradient(paths, axis=1)
    ds = np.linalg.norm(tangent, axis=-1)
    tangent = tangent / np.maximum(ds, 1e-6)[..., None]
    upright = np.abs(tangent[..., 2:]) >= 0.8
    reference = np.concatenate([upright, np.zeros_like(upright), ~upright], axis=-1).astype(np.float32)
    first = np.cross(tangent, reference)
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    second = np.cross(tangent, first)
    count = max(int(np.ceil(np.pi * (radii.max() / step) ** 2)), 1)
    # Sunflower seeds cover a disc evenly.
    k = np.arange(count)
    r, angle = np.sqrt((k + 0.5) / count), k * GOLDEN_ANGLE
    offset_first, offset_second = (r * np.cos(angle)).astype(np.float32), (r * np.sin(angle)).astype(np.float32)
    disc = offset_first[:, None] * first[..., None, :] + offset_second[:, None] * second[..., None, :]
    points = paths[..., None, :] + radii[..., None, None] * disc * np.array(flatten, np.float32)
    volume = np.pi * radii**2 * ds * max(flatten) / count
    return points.reshape(-1, 3), np.repeat(volume.reshape(-1), count)
