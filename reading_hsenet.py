# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Read one CT scan, from a file, a folder or memory, into Hounsfield units in one fixed orientation.

    volume = read_volume("scan.nii.gz")                     # NIfTI-1 or NIfTI-2, needs nibabel
    volume = read_volume("folder_with_one_series")          # plain DICOM CT slices, needs pydicom
    volume = read_volume(nibabel_image)
    volume = read_volume(array, affine=image.affine)        # array axes in the order of the affine's columns
    volume = read_volume(array, spacing=(1.5, 0.75, 0.75))  # already (D, H, W) as described in `Volume`

Everything that would make the values or the geometry a guess is refused with a subclass of `HSENetInputError`.
File names and header values may identify a patient, so no message repeats them: only measured numbers.
This file is also loaded from Hub repositories: beyond the standard library and NumPy it imports only inside functions.
"""

import gzip
import io
import math
import os
import stat
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


AIR_HU = -1000.0
MIN_SLICES = 8
MAX_FILE_BYTES = 2 * 1024**3  # after decompression
SPACING_RANGE_MM = (0.1, 10.0)
MIN_GAP_MM = 0.01  # closer slices are at the same position
SLOPE_RANGE = (1e-4, 1e4)
MAX_FORM_DIFFERENCE = 1e-3  # direction cosines of NIfTI's two affines
MAX_COSINE_ERROR = 1e-2  # between axes that should be perpendicular, about 0.6 degrees

CHUNK_BYTES = 16 * 1024**2
CANONICAL_AXES = ((2, 1), (1, -1), (0, -1))  # D, H, W as (world axis of RAS, direction along it): S, P, L
UNITS_TO_MM = {1: 1000.0, 3: 0.001}  # NIfTI xyzt_units: metres and micrometres; everything else is taken as mm
ACCEPTED = "a NIfTI file (.nii, .nii.gz) or a folder with the DICOM files of one CT series"
NON_IMAGE_MODALITIES = {"RTSTRUCT", "RTDOSE", "RTPLAN", "SEG", "SR", "PR", "KO", "REG", "DOC"}  # exported beside CT


class HSENetInputError(ValueError):
    """Base of all errors about a scan that cannot be used."""


class MissingFileError(HSENetInputError, FileNotFoundError):
    """There is nothing at the given path."""


class CorruptFileError(HSENetInputError):
    """The data are damaged: truncated, checksum mismatch, invalid header, NaN or infinite voxels."""


class UnsupportedImageError(HSENetInputError):
    """The data are intact but not a 3D CT volume this package reads."""


class GeometryError(HSENetInputError):
    """Where the voxels lie in the patient is missing, contradictory or impossible."""


class SeriesError(HSENetInputError):
    """The DICOM files do not form exactly one complete CT series."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT scan in canonical orientation: `array[d]` shown as an image is the usual radiological display.

    Args:
        array (`np.ndarray`): float32 Hounsfield units (D, H, W); D runs from inferior to superior,
            H from anterior to posterior, W from the patient's right to the left.
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


def read_volume(source: Any, *, affine: Any = None, spacing: Sequence[float] | None = None) -> Volume:
    """Reads a scan and turns it to the orientation of `Volume`, along the axes nearest to the stored ones.

    Args:
        source (`str`, `Path`, nibabel image, `np.ndarray`, `torch.Tensor` or `Volume`):
            A NIfTI file, a folder with one DICOM CT series, or data in memory: arrays and tensors hold HU.
        affine (`np.ndarray` (4, 4), *optional*): For arrays: index along the array's axes to RAS+ millimetres.
        spacing (three `float`, *optional*): For arrays already (D, H, W) in canonical orientation: millimetres.
    """
    if isinstance(source, np.ndarray) or hasattr(source, "detach"):
        return _from_array(source, affine, spacing)
    if affine is not None or spacing is not None:
        raise GeometryError(
            "affine= and spacing= describe arrays and tensors, but the source has a geometry of its own: "
            "leave them out, or pass the array alone with one of them."
        )
    # By attributes, not isinstance: a Volume may come from another copy of this module (package and Hub cache).
    if hasattr(source, "array") and hasattr(source, "affine"):
        return source
    if hasattr(source, "dataobj") and hasattr(source, "affine"):
        return _from_nibabel(source)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(source))
    raise UnsupportedImageError(
        f"Expected {ACCEPTED}, a nibabel image, an array, a tensor or a Volume, got {type(source).__name__}."
    )


def _from_array(source: Any, affine: Any, spacing: Sequence[float] | None) -> Volume:
    if (affine is None) == (spacing is None):
        raise GeometryError(
            f"An array needs exactly one of affine= and spacing=, got {'neither' if affine is None else 'both'}. "
            "Pass affine= (4x4, array index to RAS+ mm, as nibabel gives it), or spacing= (mm along D, H, W) if the "
            "array already runs inferior to superior, anterior to posterior, right to left."
        )
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()  # NumPy has no bfloat16
    array = source[0] if source.ndim == 4 and source.shape[0] == 1 else source
    _check_layout(array.shape, array.dtype, "(D, H, W) or (1, D, H, W)")
    if affine is None:
        values = np.asarray(spacing, dtype=np.float64)
        if values.shape != (3,):
            raise GeometryError(f"spacing= must be 3 numbers (mm along D, H, W), got shape {values.shape}.")
        affine = np.zeros((4, 4))
        affine[3, 3] = 1.0
        for axis, (world, direction) in enumerate(CANONICAL_AXES):
            affine[world, axis] = direction * values[axis]
    return _to_canonical(array, affine)


def _to_canonical(array: np.ndarray, affine: Any) -> Volume:
    """Permutes and flips the axes to S, P, L; never interpolates, so an oblique scan keeps its obliqueness."""
    affine = _checked_affine(affine)
    cosines = _cosines(affine)  # (world axis, array axis)
    axis_along = max(permutations(range(3)), key=lambda axes: sum(abs(cosines[w, a]) for w, a in enumerate(axes)))
    codes = {axis: ("LR", "PA", "IS")[world][int(cosines[world, axis] > 0)] for world, axis in enumerate(axis_along)}

    order = [axis_along[world] for world, _ in CANONICAL_AXES]
    array, affine = array.transpose(order), affine[:, [*order, 3]]  # the index copies: the caller's stays as it was
    for axis, (world, direction) in enumerate(CANONICAL_AXES):
        if affine[world, axis] * direction < 0:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    array = np.ascontiguousarray(array, dtype=np.float32)
    _check_values(array)
    return Volume(array, affine, "".join(codes[axis] for axis in range(3)))


def _checked_affine(affine: Any) -> np.ndarray:
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        raise GeometryError(f"The affine must have shape (4, 4), got {affine.shape}.")
    if not np.isfinite(affine).all() or not np.allclose(affine[3], (0, 0, 0, 1)):
        raise GeometryError(
            "The affine must hold finite numbers and end with the row (0, 0, 0, 1), got "
            f"{np.count_nonzero(~np.isfinite(affine))} non-finite numbers and the row {affine[3].tolist()}."
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACING_RANGE_MM
    if spacing.min() < low * 0.999 or spacing.max() > high * 1.001:
        raise GeometryError(
            f"The voxel spacing must lie between {low} and {high} mm, got {np.round(spacing, 4).tolist()} mm: "
            "correct the affine or the header, or convert the scan again from its source."
        )
    cosines = _cosines(affine)
    error = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if error > MAX_COSINE_ERROR:
        raise GeometryError(
            f"The affine is singular or sheared: its axes should be perpendicular, but two are "
            f"{math.degrees(math.asin(min(error, 1.0))):.1f} degrees off (a tilted gantry does this). "
            "Resample the scan to a rectangular grid first."
        )
    return affine


def _cosines(affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)


def _check_layout(shape: tuple[int, ...], dtype: np.dtype, expected: str) -> None:
    if len(shape) != 3:
        raise UnsupportedImageError(
            f"Expected one 3D volume {expected}, got {len(shape)} dimensions {tuple(shape)}: "
            "select one frame of a time series; a single slice or picture cannot be used."
        )
    if dtype.kind not in "iuf":
        kind = "RGB" if dtype.names else dtype.name
        raise UnsupportedImageError(
            f"Expected real numbers in Hounsfield units, got {kind} voxels: pass the CT itself."
        )


def _check_values(array: np.ndarray) -> None:
    if len(array) < MIN_SLICES or array.size == 0:
        raise UnsupportedImageError(
            f"Expected at least {MIN_SLICES} axial slices, got {len(array)} (shape D, H, W {array.shape}): "
            "pass the whole scan."
        )
    low, high = float(array.min()), float(array.max())  # NaN and infinity reach one of the two
    if not (math.isfinite(low) and math.isfinite(high)):
        count = array.size - np.count_nonzero(np.isfinite(array))
        raise CorruptFileError(
            f"The volume has {count} NaN or infinite voxels of {array.size}: all must be finite. "
            f"If they lie outside the field of view, replace them with {AIR_HU:.0f} HU first."
        )
    if low == high:
        raise UnsupportedImageError(f"The volume is constant ({low:g} HU everywhere): expected a CT scan of a body.")


@contextmanager
def _private_errors(what: str) -> Iterator[None]:
    """nibabel and pydicom raise a dozen types of error and warn with paths or header values in the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (HSENetInputError, MemoryError):
        raise
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


def _from_path(path: Path) -> Volume:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"There is no file or folder at the given path: expected {ACCEPTED}.") from None
    except OSError as error:
        raise HSENetInputError(f"The given path could not be opened: {error.strerror}.") from None
    if stat.S_ISDIR(mode):
        return _from_dicom_folder(path)
    if not stat.S_ISREG(mode):
        raise UnsupportedImageError(f"The given path is neither a regular file nor a folder: expected {ACCEPTED}.")
    return _from_nifti_file(path)


# NIfTI


def _import_nibabel() -> ModuleType:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError('Reading NIfTI files needs nibabel: pip install "nibabel>=5.2"') from error
    return nibabel


def _from_nifti_file(path: Path) -> Volume:
    with _private_errors("The file"):
        content = _read_content(path)
        head, num_bytes = bytes(content.getbuffer()[:544]), content.getbuffer().nbytes
    named_nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    version = _nifti_version(head, named_nifti)
    nibabel = _import_nibabel()
    image_class, header_bytes = {1: (nibabel.Nifti1Image, 348), 2: (nibabel.Nifti2Image, 540)}[version]
    with _private_errors("The header of the NIfTI file"):
        # Unchecked, because nibabel would repair a zero spacing to 1 mm without telling.
        header = image_class.header_class(head[:header_bytes], check=False)
        _check_nifti_header(header, header_bytes + 4, num_bytes)
        image = image_class.from_stream(content)
    return _from_nibabel(image)


def _read_content(path: Path) -> io.BytesIO:
    """The whole file, unzipped: only reading gzip to its end finds truncation and a wrong checksum."""
    content = io.BytesIO()
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if zipped else file
        while chunk := stream.read(CHUNK_BYTES):
            content.write(chunk)
            if content.tell() > MAX_FILE_BYTES:
                raise UnsupportedImageError(f"The file holds more than {MAX_FILE_BYTES / 1024**3:.0f} GiB of data.")
    return content


def _nifti_version(head: bytes, named_nifti: bool) -> int:
    if head[344:348] == b"n+1\0":
        return 1
    if head[4:12] == b"n+2\0\r\n\x1a\n":
        return 2
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        raise UnsupportedImageError("A NIfTI header/image pair is not read: convert it to a single .nii or .nii.gz.")
    if head[128:132] == b"DICM":
        raise UnsupportedImageError("The file is a single DICOM object: pass the folder with all files of its series.")
    if named_nifti:
        raise CorruptFileError(
            "The file is named as NIfTI but does not start with a NIfTI header: copy or convert it again."
        )
    raise UnsupportedImageError(f"The file is not NIfTI (a picture, or another format): expected {ACCEPTED}.")


def _check_nifti_header(header: Any, min_offset: int, num_bytes: int) -> None:
    offset, shape = int(header["vox_offset"]), header.get_data_shape()
    expected = offset + math.prod(shape) * header.get_data_dtype().itemsize
    if offset < min_offset or expected != num_bytes:
        raise CorruptFileError(
            f"The NIfTI file should hold {expected} bytes (image data from byte {offset}, at least {min_offset}; "
            f"shape {tuple(shape)}) but holds {num_bytes}. Copy or download it again."
        )
    slope = abs(float(header["scl_slope"]))
    if slope != 0 and not math.isnan(slope) and not SLOPE_RANGE[0] <= slope <= SLOPE_RANGE[1]:  # 0 and NaN mean none
        raise CorruptFileError(f"scl_slope in the NIfTI header must lie within {SLOPE_RANGE}, got {slope:g}.")
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if not (np.isfinite(pixdim) & (pixdim != 0)).all():
        raise GeometryError(
            f"The voxel spacing in the NIfTI header must be finite and not zero, got {pixdim.tolist()}: "
            "convert the scan again from its source."
        )


def _from_nibabel(image: Any) -> Volume:
    with _private_errors("The image"):
        shape, dtype = tuple(image.dataobj.shape), image.dataobj.dtype
        if len(shape) > 3 and set(shape[3:]) == {1}:
            shape = shape[:3]
        _check_layout(shape, dtype, "(i, j, k)")
        affine = image.affine
        if hasattr(image, "get_sform"):
            affine = _nifti_affine(image)
        array = np.asanyarray(image.dataobj, dtype=np.float32).reshape(shape)  # scaled once, by nibabel
    return _to_canonical(array, affine)


def _nifti_affine(image: Any) -> np.ndarray:
    sform, sform_code = image.get_sform(coded=True)
    qform, qform_code = image.get_qform(coded=True)
    if sform_code == 0 and qform_code == 0:
        raise GeometryError(
            "The NIfTI header has no orientation (sform_code and qform_code are both 0), so left and right are "
            "unknown: convert the scan again from its source, or pass the array with affine=."
        )
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= UNITS_TO_MM.get(int(image.header["xyzt_units"]) & 7, 1.0)
    affine = _checked_affine(affine)
    if sform_code > 0 and qform_code > 0:
        difference = np.abs(_cosines(sform) - _cosines(qform)).max()
        if not difference <= MAX_FORM_DIFFERENCE:
            raise GeometryError(
                f"The sform and the qform of the NIfTI header disagree: their direction cosines differ by "
                f"{difference:.3f}, at most {MAX_FORM_DIFFERENCE} is expected. Remove the wrong one."
            )
    return affine


# DICOM


def _import_pydicom() -> ModuleType:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ImportError('Reading DICOM folders needs pydicom: pip install "pydicom>=3.0.2"') from error
    return pydicom


def _from_dicom_folder(folder: Path) -> Volume:
    pydicom = _import_pydicom()
    with _private_errors("A DICOM file of the folder"):
        slices = _one_series(_ct_images(folder, pydicom))
        origins, first = _sorted_along_normal(slices), slices[0]
        array = np.empty((len(slices), first.Rows, first.Columns), dtype=np.float32)
        for target, dataset in zip(array, slices, strict=True):
            _decode_slice(dataset, target, pydicom)
    # Array axes are (slice, row, column): the row index moves along the second vector of the orientation.
    orientation, pixel_spacing = _numbers(first, "ImageOrientationPatient", 6), _numbers(first, "PixelSpacing", 2)
    affine = np.eye(4)
    affine[:3, 0] = (origins[-1] - origins[0]) / (len(origins) - 1)
    affine[:3, 1] = orientation[3:] * pixel_spacing[0]
    affine[:3, 2] = orientation[:3] * pixel_spacing[1]
    affine[:3, 3] = origins[0]
    affine[:2] *= -1  # DICOM is LPS+, the affine RAS+
    return _to_canonical(array, affine)


def _ct_images(folder: Path, pydicom: ModuleType) -> list[Any]:
    """Headers of the CT slices in a folder, pixels left on disk until they are asked for."""
    images, num_files, num_dicom, num_other = [], 0, 0, 0
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        num_files += 1
        with open(path, "rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        if not is_dicom:
            if path.suffix.lower() == ".dcm" and not path.name.startswith("."):  # macOS leaves ._*.dcm beside files
                raise CorruptFileError("A .dcm file is empty or not DICOM: copy or export the series again.")
            continue
        num_dicom += 1
        dataset = pydicom.dcmread(path, defer_size=4096)
        if "PixelData" not in dataset:
            # A CT slice cut off before its pixels must not pass as another kind of object: it would go missing.
            if dataset.file_meta.get("MediaStorageSOPClassUID") in (None, pydicom.uid.CTImageStorage):
                raise CorruptFileError("A CT slice has no pixels: copy or export the series again.")
            continue
        modality = dataset.get("Modality")
        if modality not in NON_IMAGE_MODALITIES and "LOCALIZER" not in (dataset.get("ImageType") or ()):
            num_other += modality != "CT"
            images.append(dataset)
    if not images:
        raise SeriesError(
            f"Expected the slices of one CT series directly in the folder, got none: {num_files} files, {num_dicom} "
            "of them DICOM, none with CT slices. Pass the folder that holds the slices."
        )
    if num_other:
        raise UnsupportedImageError(
            f"Expected CT images only, got {num_other} of {len(images)} images with another Modality: "
            "pass a folder with one CT series."
        )
    return images


def _one_series(images: list[Any]) -> list[Any]:
    num_patients = len({str(image.get("PatientID", "")) for image in images})
    if num_patients > 1:
        raise SeriesError(f"Expected the series of one patient, got {num_patients} patients: separate them first.")
    groups: dict[tuple, list[Any]] = {}
    for image in images:
        if int(image.get("NumberOfFrames") or 1) > 1:
            raise UnsupportedImageError("Multi-frame DICOM is not read: convert it to NIfTI or to single slices.")
        geometry = (*_numbers(image, "ImageOrientationPatient", 6).round(3), *_numbers(image, "PixelSpacing", 2))
        series = (str(image.get("StudyInstanceUID")), str(image.get("SeriesInstanceUID")))
        groups.setdefault((*series, image.Rows, image.Columns, *geometry), []).append(image)
    if len(groups) > 1:
        sizes = ", ".join(f"{len(group)} of {key[2]}x{key[3]}" for key, group in groups.items())
        raise SeriesError(
            f"Expected one CT series, got {len(groups)} groups of slices that differ in series, orientation, size or "
            f"pixel spacing: {sizes}. Pass a folder with the slices of one."
        )
    if len(images) < MIN_SLICES:
        raise UnsupportedImageError(
            f"Expected at least {MIN_SLICES} slices, got {len(images)}: pass the whole series."
        )
    return images


def _numbers(dataset: Any, keyword: str, count: int, error: type[HSENetInputError] = GeometryError) -> np.ndarray:
    try:
        values = np.array(dataset[keyword].value, dtype=np.float64).reshape(-1)
    except (KeyError, TypeError, ValueError):
        values = np.empty(0)  # absent, empty or not a number: all the same to the reader
    if values.size != count or not np.isfinite(values).all():
        raise error(
            f"A DICOM slice has no usable {keyword}: expected {count} finite number{'s'[: count > 1]}, got "
            f"{np.isfinite(values).sum()}. Export the series again from its source."
        )
    return values


def _sorted_along_normal(slices: list[Any]) -> np.ndarray:
    """Sorts the slices in place by position, never by number or name, and returns their origins (slices, 3) in mm."""
    orientation = _numbers(slices[0], "ImageOrientationPatient", 6)
    lengths = np.linalg.norm(orientation.reshape(2, 3), axis=1)
    if np.abs(lengths - 1).max() > MAX_COSINE_ERROR:
        raise GeometryError(f"ImageOrientationPatient must hold two unit vectors, got lengths {lengths.round(3)}.")
    normal = np.cross(orientation[:3], orientation[3:])
    slices.sort(key=lambda image: float(_numbers(image, "ImagePositionPatient", 3) @ normal))
    origins = np.stack([_numbers(image, "ImagePositionPatient", 3) for image in slices])
    gaps = np.diff(origins @ normal)
    step = float(np.median(gaps))
    tolerance = max(0.01 * step, 0.05)
    if gaps.min() < MIN_GAP_MM:
        raise SeriesError(
            f"Expected one slice at each position, got {np.count_nonzero(gaps < MIN_GAP_MM)} repeated positions among "
            f"{len(slices)} slices: several reconstructions or phases? Pass a folder with one."
        )
    if np.abs(gaps - step).max() > tolerance:
        worst = float(gaps[np.abs(gaps - step).argmax()])
        raise SeriesError(
            f"Expected slices {step:.2f} mm apart, got a gap of {worst:.2f} mm: slices are missing or irregular. "
            "Fetch the missing slices or resample the scan to even spacing."
        )
    sideways = np.linalg.norm(np.diff(origins, axis=0) - gaps[:, None] * normal, axis=1).max()
    if sideways > tolerance:
        raise GeometryError(
            f"Expected slices stacked along their normal, got a sideways shift of {sideways:.2f} mm a slice "
            f"({math.degrees(math.atan2(sideways, step)):.1f} degrees of gantry tilt): untilt the scan first."
        )
    return origins


def _decode_slice(dataset: Any, target: np.ndarray, pydicom: ModuleType) -> None:
    """Writes one slice in HU to `target` (rows, columns)."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not pydicom.pixels.get_decoder(syntax).is_available:
        raise UnsupportedImageError(
            f"The DICOM pixels are compressed ({syntax.name}) and no decoder is installed: "
            "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or decompress the series first."
        )
    photometric, rescale_type = dataset.get("PhotometricInterpretation"), dataset.get("RescaleType") or "HU"
    if photometric != "MONOCHROME2" or rescale_type != "HU":
        raise UnsupportedImageError("Expected MONOCHROME2 pixels with RescaleType HU: pass the original CT images.")
    (slope,) = _numbers(dataset, "RescaleSlope", 1, UnsupportedImageError).tolist()
    (intercept,) = _numbers(dataset, "RescaleIntercept", 1, UnsupportedImageError).tolist()
    if slope == 0:
        raise UnsupportedImageError("RescaleSlope is 0: expected the slope that turns stored values into HU.")
    stored = dataset.pixel_array
    target[:] = stored
    target *= slope
    target += intercept
    if dataset.get("PixelPaddingValue") is not None:
        # Pixels outside the reconstruction hold no measurement. The cast undoes a wrong sign in the header.
        limits = [dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue)]
        low, high = np.sort(np.asarray(limits, dtype=np.int64).astype(stored.dtype))
        target[(stored >= low) & (stored <= high)] = AIR_HU


__all__ = [
    "CorruptFileError",
    "GeometryError",
    "HSENetInputError",
    "MissingFileError",
    "SeriesError",
    "UnsupportedImageError",
    "Volume",
    "read_volume",
]
