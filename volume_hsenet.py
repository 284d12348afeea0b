# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`Volume`, what every scan becomes, and the rules that hold for all of them wherever they come from.

`reading_hsenet.read_volume` is the door; the readers of the file formats end in `canonical_volume` here. What would
make the values or the geometry a guess is refused with a subclass of `HSENetInputError`. File names and header values
may identify a patient, so no message repeats them: only measured numbers.
"""

import gzip
import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np


LOGGERS = ("nibabel.global", "pydicom", "pydicom.pixels.decoders.base", "pydicom.pixels.utils")  # that may name files
AIR_HU = -1000.0
MIN_SLICES, MAX_SLICES, MAX_IN_PLANE = 8, 2048, 1024
SPACING_RANGE_MM = (0.1, 10.0)
SLOPE_RANGE = (1e-4, 1e4)
MAX_COSINE_ERROR = 1e-2  # between axes that should be perpendicular, about 0.6 degrees
MAX_TILT_DEGREES = 35.0  # gantries tilt by 30 at most; an affine with more is broken, not tilted
OBLIQUE_DEGREES, MAX_OBLIQUE_DEGREES = 10.0, 45.0  # beyond 45 the nearest anatomical axes are another set
CANONICAL_AXES = ((2, 1), (1, -1), (0, -1))  # D, H, W as (world axis of RAS, direction along it): S, P, L

# What CT in HU looks like. Thresholds are wide: they catch scans rescaled twice or never, 8-bit and MR images.
HU_SAMPLE = 2**17
LOW_PERCENTILE_HU = (-3100.0, -500.0)  # there is air in every scan, and padding ends at -3024
MIN_PADDING = 0.01
SOFT_TISSUE_HU, MIN_SOFT_TISSUE = (-150.0, 250.0), 0.01
BELOW_AIR_HU, MAX_BELOW_AIR = -1100.0, 0.6
MAX_HU = 40000.0
MIN_DISTINCT = 64


class HSENetInputError(ValueError):
    """Base of all errors about a scan that cannot be used."""


class MissingFileError(HSENetInputError, FileNotFoundError):
    """There is nothing at the given path."""


class UnsafePathError(HSENetInputError):
    """A path that must not be opened: a pipe or device, or a link out of the given folder."""


class ResourceLimitError(HSENetInputError):
    """The data would take more memory or time than allowed; found before either was spent."""


class CorruptFileError(HSENetInputError):
    """The data are damaged: truncated, checksum mismatch, invalid header, NaN or infinite voxels."""


class UnsupportedImageError(HSENetInputError):
    """The data are intact but not a 3D CT volume this package reads."""


class GeometryError(HSENetInputError):
    """Where the voxels lie in the patient is missing, contradictory or impossible."""


class SeriesError(HSENetInputError):
    """The DICOM files do not form exactly one complete CT series."""


class ImplausibleHounsfieldError(HSENetInputError):
    """The values don't look like Hounsfield units of a body."""


class HSENetInputWarning(UserWarning):
    """A scan that is used although something about it is unusual."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT scan in canonical orientation: `array[d]` shown as an image is the usual radiological display.

    Args:
        array (`np.ndarray`): Hounsfield units (D, H, W), int16 if they are whole numbers in the source and fit, else
            float32; D runs from inferior to superior, H from anterior to posterior, W from the patient's right to the
            left. It may share memory with the source.
        affine (`np.ndarray`): (4, 4) float64, maps an index (d, h, w, 1) to RAS+ millimetres.
        stored_orientation (`str`, *optional*): directions in which the axes ran as stored, such as `"LAS"`.
    """

    array: np.ndarray
    affine: np.ndarray
    stored_orientation: str | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxels along D, H and W."""
        depth, height, width = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return depth, height, width


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    r"""How `read_volume` treats what a file leaves open; every default refuses rather than guesses.

    Args:
        hu_source (`str`):
            What turns stored values into HU, always one thing: `"header"`, the scaling in the file; `"metadata"`,
            `rescale`, for a file without scaling of its own; `"identity"`, stored values are HU whatever the file
            says. `"ct-rate-v1"` and `"ct-rate-v2"` are these for the two releases of CT-RATE: the first stores values
            that need RescaleSlope and RescaleIntercept of its metadata table, the second HU.
        rescale (two `float`, *optional*): slope and intercept for `"metadata"` and `"ct-rate-v1"`.
        hu_check (`"raise"` or `"warn"`): for values that don't look like HU of a body.
        series (`int` or `str`, *optional*):
            Which series if there are several: its number in the error that lists them, its SeriesInstanceUID, or
            `"largest"`, the one with most slices.
        frame (`int`, *optional*): which frame of a 4D NIfTI file, from 0.
        resample (`bool`):
            Whether a scan with tilted, sheared, missing or unevenly spaced slices is interpolated to an even
            rectangular grid.
        nan_to (`float`, *optional*): HU that take the place of NaN and infinite voxels.
        assume_orientation (`str`, *optional*): such as `"LPS"`, for a NIfTI file that has no orientation.
        allow_derived (`bool`): whether DERIVED\\SECONDARY DICOM images and lossy compression beyond 10:1 are read.
        max_bytes (`int`): of one file or zip archive, unpacked.
    """

    hu_source: Literal["header", "metadata", "identity", "ct-rate-v1", "ct-rate-v2"] = "header"
    rescale: tuple[float, float] | None = None
    hu_check: Literal["raise", "warn"] = "raise"
    series: int | str | None = None
    frame: int | None = None
    resample: bool = False
    nan_to: float | None = None
    assume_orientation: str | None = None
    allow_derived: bool = False
    max_bytes: int = 2 * 1024**3

    def __post_init__(self):
        if self.hu_source not in ("header", "metadata", "identity", "ct-rate-v1", "ct-rate-v2"):
            raise ValueError(
                "hu_source should be 'header', 'metadata', 'identity', 'ct-rate-v1' or 'ct-rate-v2', got "
                f"{self.hu_source!r}."
            )
        if self.hu_check not in ("raise", "warn"):
            raise ValueError(f"hu_check should be 'raise' or 'warn', got {self.hu_check!r}.")
        if self.from_metadata and self.rescale is None:
            raise ValueError(
                f"hu_source={self.hu_source!r} needs rescale=(slope, intercept): RescaleSlope and RescaleIntercept of "
                "the scan's row in the metadata table."
            )
        if not self.from_metadata and self.rescale is not None:
            raise ValueError(
                f"rescale= is for hu_source='metadata' or 'ct-rate-v1', got {self.hu_source!r}: values must become HU "
                "by exactly one scaling."
            )
        if self.rescale is not None:
            slope, intercept = self.rescale
            if not (SLOPE_RANGE[0] <= abs(slope) <= SLOPE_RANGE[1] and math.isfinite(intercept)):
                raise ValueError(f"rescale= should be a slope within {SLOPE_RANGE} and an intercept: {self.rescale}.")

    @property
    def from_metadata(self) -> bool:
        return self.hu_source in ("metadata", "ct-rate-v1")

    def scaling(self, slope: float, intercept: float) -> tuple[float, float]:
        """The one scaling to apply, given the file's own (1 and 0 if it has none)."""
        if self.hu_source == "identity":
            return 1.0, 0.0
        if not SLOPE_RANGE[0] <= abs(slope) <= SLOPE_RANGE[1]:
            raise CorruptFileError(f"The slope in the file's header must lie within {SLOPE_RANGE}, got {slope:g}.")
        if not self.from_metadata:
            return slope, intercept
        if (slope, intercept) != (1.0, 0.0):
            raise UnsupportedImageError(
                f"The file has a scaling of its own (slope {slope:g}, intercept {intercept:g}) beside the metadata's "
                f"({self.rescale[0]:g}, {self.rescale[1]:g}): expected exactly one source of HU. If the file is of a "
                "release that already holds HU (as ct-rate-v2), leave out rescale=."
            )
        return self.rescale


def warn(message: str) -> None:
    warnings.warn(message, HSENetInputWarning, stacklevel=3)


@contextmanager
def private_errors(what: str) -> Iterator[None]:
    """The libraries raise a dozen types of error, and warn and log with paths or header values in the text."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    states = [logger.disabled for logger in loggers]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.disabled = True  # setLevel would take as long as the reading, if there are many loggers
            yield
    except HSENetInputError:
        raise
    except MemoryError:
        raise ResourceLimitError(f"{what} needs more memory than there is: read it on a larger machine.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise CorruptFileError(
            f"{what} is truncated or fails its checksum: expected whole compressed data. Copy it again."
        ) from None
    except OSError as error:
        raise HSENetInputError(
            f"{what} could not be read: {error.strerror or type(error).__name__}. Check the disk and the permissions."
        ) from None
    except Exception as error:
        raise CorruptFileError(
            f"{what} is damaged or not valid ({type(error).__name__} while decoding). Copy or convert it again."
        ) from None
    finally:
        for logger, state in zip(loggers, states, strict=True):
            logger.disabled = state


def check_layout(shape: tuple[int, ...], dtype: np.dtype, expected: str) -> None:
    """One 3D array of numbers, not larger than a scan can be; to be called before the voxels are in memory."""
    if len(shape) != 3:
        raise UnsupportedImageError(
            f"Expected one 3D volume {expected}, got {len(shape)} dimensions {tuple(shape)}: "
            "select one frame of a time series (frame=); a single slice or picture cannot be used."
        )
    if dtype.kind not in "iuf":
        kind = "RGB" if dtype.names else dtype.name
        raise UnsupportedImageError(
            f"Expected real numbers in Hounsfield units, got {kind} voxels: pass the CT itself."
        )
    # The axes may come in any order; two of the three are in plane.
    if min(shape) < 1 or max(shape) > MAX_SLICES or sorted(shape)[1] > MAX_IN_PLANE:
        raise ResourceLimitError(
            f"Expected a volume of at most {MAX_SLICES} slices of {MAX_IN_PLANE}x{MAX_IN_PLANE}, got {tuple(shape)}: "
            "crop or resample it first."
        )


def to_hu(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """`slope * stored + intercept` as int16 where that is exact, else as float32; `stored` itself if it is HU."""
    if stored.dtype == np.int16 and stored.dtype.isnative and (slope, intercept) == (1, 0):
        return stored
    if stored.dtype.kind == "f":
        hu = stored.astype(np.float32, copy=(slope, intercept) != (1, 0))
    else:
        ends = [slope * float(end) + intercept for end in (stored.min(), stored.max())]
        limits = np.iinfo(np.int16)
        if all(limits.min <= number <= limits.max and number == int(number) for number in (slope, intercept, *ends)):
            # Whatever overflows on the way comes back into range: int16 counts modulo 2**16.
            hu = stored.astype(np.int16, copy=(slope, intercept) != (1, 0))
            slope, intercept = int(slope), int(intercept)
        else:
            hu = stored.astype(np.float32)
    if slope != 1:
        hu *= slope
    if intercept != 0:
        hu += intercept
    return hu


def canonical_volume(array: np.ndarray, affine: np.ndarray, options: ReadOptions, *, reuse: bool = False) -> Volume:
    """
    Turns a scan to the orientation of `Volume`, along the axes nearest to the stored ones, and checks its values.
    Nothing is interpolated, so an oblique scan keeps its obliqueness, unless the axes aren't perpendicular.

    Args:
        array (`np.ndarray`): HU, int16 or float32, three axes in any order and direction.
        affine (`np.ndarray`): (4, 4), index along the array's axes to RAS+ mm.
        reuse (`bool`): whether nobody else needs the array, so that its memory can become the volume's.

    Raises:
        GeometryError: impossible, sheared or too oblique affine.
        UnsupportedImageError, CorruptFileError, ImplausibleHounsfieldError: values that are no CT of a body.
    """
    affine = checked_affine(affine)
    if shear_degrees(affine) > math.degrees(MAX_COSINE_ERROR):
        array, affine = _untilted(array, affine, options)
    axis_along = _nearest_axes(affine)
    codes = {axis: ("LR", "PA", "IS")[world][int(affine[world, axis] > 0)] for world, axis in enumerate(axis_along)}

    order = [axis_along[world] for world, _ in CANONICAL_AXES]
    array, affine = array.transpose(order), affine[:, [*order, 3]]  # the index copies: the caller's stays as it was
    backward = [axis for axis, (world, direction) in enumerate(CANONICAL_AXES) if affine[world, axis] * direction < 0]
    for axis in backward:
        affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
        affine[:3, axis] *= -1
    if len(array) < MIN_SLICES or array.size == 0:
        raise UnsupportedImageError(
            f"Expected at least {MIN_SLICES} axial slices, got {len(array)} (shape D, H, W {array.shape}): "
            "pass the whole scan."
        )
    if not (reuse and array.flags.c_contiguous and array.flags.writeable):
        array, backward = np.ascontiguousarray(np.flip(array, backward)), []
    low, high = _flip_in_place(array, backward)
    array = _checked_values(array, low, high, options)
    return Volume(array, affine, "".join(codes[axis] for axis in range(3)))


def _flip_in_place(array: np.ndarray, axes: list[int]) -> tuple[float, float]:
    """
    Turns the array along `axes`; returns its lowest and highest value, NaN if it holds one.

    Plane by plane, in the processor's cache: fresh memory, or one more pass, for a whole scan takes longer than that.
    """
    in_plane = tuple(axis - 1 for axis in axes if axis > 0)
    last, turned, extremes = len(array) - 1, np.empty_like(array[0]), []
    for low in range(len(array) // 2 + len(array) % 2 if 0 in axes else len(array)):
        high = last - low if 0 in axes else low
        if axes:
            turned[:] = np.flip(array[low], in_plane)
            if high != low:
                array[low] = np.flip(array[high], in_plane)
            array[high] = turned
        extremes += [(array[index].min(), array[index].max()) for index in {low, high}]
    lows, highs = zip(*extremes, strict=True)
    return float(np.min(lows)), float(np.max(highs))


def checked_affine(affine: np.ndarray) -> np.ndarray:
    """A float64 affine with a voxel size that a CT can have; it may still be sheared."""
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        raise GeometryError(f"The affine must have shape (4, 4), got {affine.shape}.")
    if not np.isfinite(affine).all() or not np.allclose(affine[3], (0, 0, 0, 1)):
        raise GeometryError(
            "The affine must hold finite numbers and end with the row (0, 0, 0, 1), got "
            f"{np.count_nonzero(~np.isfinite(affine))} non-finite numbers and the row {affine[3].tolist()}."
        )
    with np.errstate(over="ignore"):  # too large in any case
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACING_RANGE_MM
    if spacing.min() < low * 0.999 or spacing.max() > high * 1.001:
        raise GeometryError(
            f"The voxel spacing must lie between {low} and {high} mm, got {np.round(spacing, 4).tolist()} mm: "
            "correct the affine or the header, or convert the scan again from its source."
        )
    return affine


def cosines(affine: np.ndarray) -> np.ndarray:
    """(world axis, array axis) direction cosines."""
    return affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)


def shear_degrees(affine: np.ndarray) -> float:
    """How far the two worst of the axes are from perpendicular."""
    directions = cosines(affine)
    error = np.abs(directions.T @ directions - np.eye(3)).max()
    return math.degrees(math.asin(min(error, 1.0)))


def _nearest_axes(affine: np.ndarray) -> tuple[int, ...]:
    """For each world axis the array axis that runs along it."""
    directions = np.abs(cosines(affine))
    nearest = max(permutations(range(3)), key=lambda axes: sum(directions[w, a] for w, a in enumerate(axes)))
    cosine = min(directions[world, axis] for world, axis in enumerate(nearest))
    angle = math.degrees(math.acos(min(cosine, 1.0)))
    if angle > MAX_OBLIQUE_DEGREES:
        raise GeometryError(
            f"The scan is turned by {angle:.1f} degrees against the patient's axes, at most {MAX_OBLIQUE_DEGREES:g} "
            "are accepted: resample it to axial slices first."
        )
    if angle > OBLIQUE_DEGREES:
        warn(f"The scan is turned by {angle:.1f} degrees against the patient's axes; it is read as it is.")
    return nearest


def _untilted(array: np.ndarray, affine: np.ndarray, options: ReadOptions) -> tuple[np.ndarray, np.ndarray]:
    """A stack of slices that each lie a bit aside of the one before, on a rectangular grid wide enough for all."""
    angle = shear_degrees(affine)
    directions = cosines(affine)
    overlap = np.abs(directions.T @ directions)
    # The axis of the stack is the one whose two others are perpendicular.
    stack, row, column = min(((0, 1, 2), (1, 0, 2), (2, 0, 1)), key=lambda axes: overlap[axes[1], axes[2]])
    is_tilt = angle <= MAX_TILT_DEGREES and overlap[row, column] <= MAX_COSINE_ERROR
    if not (is_tilt and options.resample):
        remedy = "Correct the affine, or convert the scan again from its source."
        if is_tilt:
            remedy = "Pass resample=True to interpolate it to a rectangular grid, or untilt it first."
        raise GeometryError(
            f"The affine is singular or sheared: its axes should be perpendicular, but two are {angle:.1f} degrees "
            f"off (a tilted gantry does this). {remedy}"
        )
    warn(f"The slices are sheared by {angle:.1f} degrees; they are interpolated to a rectangular grid.")
    array, affine = array.transpose(stack, row, column).astype(np.float32), affine[:, [stack, row, column, 3]]
    for axis in (1, 2):
        along = affine[:3, axis]
        drift = float(affine[:3, 0] @ along / (along @ along))  # voxels along this axis from slice to slice
        affine[:3, 0] -= drift * along
        shifts = drift * np.arange(len(array))
        affine[:3, 3] += math.floor(shifts.min()) * along
        array = _shifted(array, shifts - math.floor(shifts.min()), axis)
    return array, affine


def _shifted(array: np.ndarray, shifts: np.ndarray, axis: int) -> np.ndarray:
    """Each slice moved by its own number of voxels >= 0 along `axis`, linearly interpolated into air."""
    length = array.shape[axis]
    shape = list(array.shape)
    shape[axis] += math.ceil(shifts.max()) + 1
    check_layout(tuple(shape), array.dtype, "once resampled")
    moved = np.zeros(shape, dtype=np.float32)
    array, target = np.moveaxis(array, axis, 1), np.moveaxis(moved, axis, 1)
    for plane, shift, out in zip(array, shifts, target, strict=True):
        start, fraction = math.floor(shift), shift - math.floor(shift)
        out[start : start + length] += (1 - fraction) * (plane - AIR_HU)
        out[start + 1 : start + 1 + length] += fraction * (plane - AIR_HU)
    moved += AIR_HU
    return moved


def _checked_values(array: np.ndarray, low: float, high: float, options: ReadOptions) -> np.ndarray:
    """`low` and `high` of the array, which NaN and infinity reach."""
    if not (math.isfinite(low) and math.isfinite(high)):
        finite = np.isfinite(array)
        count = array.size - np.count_nonzero(finite)
        if options.nan_to is None:
            raise CorruptFileError(
                f"The volume has {count} NaN or infinite voxels of {array.size}: all must be finite. "
                f"If they lie outside the field of view, pass nan_to={AIR_HU:.0f}."
            )
        warn(f"{count} NaN or infinite voxels of {array.size} became {options.nan_to:g} HU.")
        array = np.where(finite, array, np.float32(options.nan_to))
        low, high = float(array.min()), float(array.max())
    if low == high:
        raise UnsupportedImageError(
            f"The volume is constant ({low:g} HU everywhere): expected a CT scan of a body. Scaling twice does this."
        )
    problem = _implausibility(array, high)
    if problem and options.hu_check == "raise":
        raise ImplausibleHounsfieldError(
            f"The values don't look like Hounsfield units: {problem}. Scaled twice or never, 8-bit, another modality? "
            "Check hu_source= and rescale=; if they are HU, pass hu_check='warn'."
        )
    if problem:
        warn(f"The values don't look like Hounsfield units: {problem}.")
    return array


def _implausibility(array: np.ndarray, high: float) -> str | None:
    """What is wrong with the values as HU of a body, on a fixed random sample of the voxels."""
    flat = array.reshape(-1)
    sample = flat
    if array.size > HU_SAMPLE:
        sample = flat[np.random.default_rng(0).integers(array.size, size=HU_SAMPLE)]
    values, counts = np.unique(sample, return_counts=True)
    # The lowest value may fill what lies outside of the reconstruction. It shows no air: padding of -2048 that nobody
    # has rescaled is -1024.
    padded = len(values) > MIN_DISTINCT and counts[0] > MIN_PADDING * sample.size
    lowest = float(np.percentile(sample, 0.5))
    lowest_inside = float(np.percentile(sample[sample > values[0]], 0.5)) if padded else lowest
    low, tissue_high = SOFT_TISSUE_HU
    soft = np.count_nonzero((sample >= low) & (sample <= tissue_high)) / sample.size
    below = counts[values < BELOW_AIR_HU]
    padding = below.max(initial=0)  # one value may fill what lies outside of the reconstruction
    below_air = (below.sum() - padding) / max(sample.size - padding, 1)
    if lowest < LOW_PERCENTILE_HU[0] or lowest_inside > LOW_PERCENTILE_HU[1]:
        found = f"{lowest_inside if lowest >= LOW_PERCENTILE_HU[0] else lowest:.0f} at the 0.5th percentile"
        return f"expected {LOW_PERCENTILE_HU[0]:.0f} to {LOW_PERCENTILE_HU[1]:.0f} (air), got {found}"
    if soft < MIN_SOFT_TISSUE:
        return f"expected {MIN_SOFT_TISSUE:.0%} or more from {low:.0f} to {tissue_high:.0f}, got {soft:.2%}"
    if below_air > MAX_BELOW_AIR:
        return f"expected {MAX_BELOW_AIR:.0%} or less below {BELOW_AIR_HU:.0f}, got {below_air:.0%}"
    if high > MAX_HU:
        return f"expected at most {MAX_HU:.0f}, got {high:.0f}"
    if len(values) <= MIN_DISTINCT:
        return f"expected more than {MIN_DISTINCT} different values, got {len(values)}"
    return None


__all__ = [
    "CorruptFileError",
    "GeometryError",
    "HSENetInputError",
    "HSENetInputWarning",
    "ImplausibleHounsfieldError",
    "MissingFileError",
    "ReadOptions",
    "ResourceLimitError",
    "SeriesError",
    "UnsafePathError",
    "UnsupportedImageError",
    "Volume",
]
