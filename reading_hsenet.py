# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Read one CT scan, from a file, a folder or memory, into Hounsfield units in one fixed orientation.

    volume = read_volume("scan.nii.gz")                     # NIfTI-1 or NIfTI-2, needs nibabel
    volume = read_volume("folder_or_zip_with_a_series")     # DICOM CT, needs pydicom; also a list of files
    volume = read_volume("scan.nrrd")                       # needs pynrrd
    volume = read_volume(nibabel_image)
    volume = read_volume(array, affine=image.affine)        # array axes in the order of the affine's columns
    volume = read_volume(array, spacing=(1.5, 0.75, 0.75))  # already (D, H, W) as described in `Volume`
    volume = read_volume("train_1_a_1.nii.gz", hu_source="ct-rate-v1", rescale=(1, -8192))

Everything that would make the values or the geometry a guess is refused with a subclass of `HSENetInputError`, or
read with a `HSENetInputWarning`. File names and header values may identify a patient, so no message repeats them.
"""

import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


try:
    from .dicom_hsenet import read_dicom_bytes, read_dicom_files, read_dicom_folder, read_dicom_zip
    from .nifti_hsenet import ACCEPTED, GZIP_MAGIC, from_nibabel, read_nifti, read_nrrd
    from .volume_hsenet import (
        CANONICAL_AXES,
        CorruptFileError,
        GeometryError,
        HSENetInputError,
        HSENetInputWarning,
        ImplausibleHounsfieldError,
        MissingFileError,
        ReadOptions,
        ResourceLimitError,
        SeriesError,
        UnsafePathError,
        UnsupportedImageError,
        Volume,
        canonical_volume,
        check_layout,
        private_errors,
        to_hu,
        warn,
    )
except ImportError:  # imported as a plain top-level module, not from the Hub cache
    if __package__:
        raise
    from dicom_hsenet import read_dicom_bytes, read_dicom_files, read_dicom_folder, read_dicom_zip
    from nifti_hsenet import ACCEPTED, GZIP_MAGIC, from_nibabel, read_nifti, read_nrrd
    from volume_hsenet import (
        CANONICAL_AXES,
        CorruptFileError,
        GeometryError,
        HSENetInputError,
        HSENetInputWarning,
        ImplausibleHounsfieldError,
        MissingFileError,
        ReadOptions,
        ResourceLimitError,
        SeriesError,
        UnsafePathError,
        UnsupportedImageError,
        Volume,
        canonical_volume,
        check_layout,
        private_errors,
        to_hu,
        warn,
    )


def read_volume(source: Any, *, affine: Any = None, spacing: Sequence[float] | None = None, **options) -> Volume:
    """Reads a scan and turns it to the orientation of `Volume`, along the axes nearest to the stored ones.

    Args:
        source (`str`, `Path`, list of them, `bytes`, nibabel image, `np.ndarray`, `torch.Tensor` or `Volume`):
            A NIfTI or NRRD file, a folder, zip or list with the DICOM files of one CT series, the content of one such
            file, or data in memory: arrays and tensors hold HU unless `hu_source` says otherwise. A `Volume` is
            returned as it is.
        affine (`np.ndarray` (4, 4), *optional*): For arrays: index along the array's axes to RAS+ millimetres.
        spacing (three `float`, *optional*): For arrays already (D, H, W) in canonical orientation: millimetres.
        options: The fields of [`ReadOptions`].

    Raises:
        HSENetInputError: with what was found, what was expected and the remedy; its subclasses tell what kind.
    """
    chosen = ReadOptions(**options)
    if isinstance(source, np.ndarray) or hasattr(source, "detach"):
        return _from_array(source, affine, spacing, chosen)
    if affine is not None or spacing is not None:
        raise GeometryError(
            "affine= and spacing= describe arrays and tensors, but the source has a geometry of its own: "
            "leave them out, or pass the array alone with one of them."
        )
    # By attributes, not isinstance: a Volume may come from another copy of this module (package and Hub cache).
    if hasattr(source, "array") and hasattr(source, "affine"):
        return source
    if hasattr(source, "dataobj") and hasattr(source, "affine"):
        return from_nibabel(source, chosen)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(source), chosen)
    if isinstance(source, bytes):
        return _from_file(io.BytesIO(source), chosen)
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, os.PathLike)) for item in source):
        return read_dicom_files([_regular_file(Path(item)) for item in source], chosen)
    raise UnsupportedImageError(
        f"Expected {ACCEPTED}, the bytes of such a file, a list of DICOM files, a nibabel image, an array, a tensor "
        f"or a Volume, got {type(source).__name__}."
    )


def _from_array(source: Any, affine: Any, spacing: Sequence[float] | None, options: ReadOptions) -> Volume:
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
    check_layout(array.shape, array.dtype, "(D, H, W) or (1, D, H, W)")
    if affine is None:
        values = np.asarray(spacing, dtype=np.float64)
        if values.shape != (3,):
            raise GeometryError(f"spacing= must be 3 numbers (mm along D, H, W), got shape {values.shape}.")
        affine = np.zeros((4, 4))
        affine[3, 3] = 1.0
        for axis, (world, direction) in enumerate(CANONICAL_AXES):
            affine[world, axis] = direction * values[axis]
    with private_errors("The array"):
        array = to_hu(array, *options.scaling(1.0, 0.0))
    return canonical_volume(array, affine, options)


def _from_path(path: Path, options: ReadOptions) -> Volume:
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        return read_dicom_folder(path, options)
    path, name = _regular_file(path), path.name.lower()
    with private_errors("The file"):
        file = open(path, "rb")
    with file:
        is_zipped = file.read(2) == GZIP_MAGIC
        file.seek(0)
        if name.endswith((".nii", ".nii.gz")) and is_zipped != name.endswith(".gz"):
            warn(f"The file is {'' if is_zipped else 'not '}gzip, other than its name says; it is read as what it is.")
        return _from_file(file, options, named_nifti=name.endswith((".nii", ".nii.gz")))


def _from_file(file: BinaryIO, options: ReadOptions, *, named_nifti: bool = False) -> Volume:
    """By what the file starts with, whatever its name."""
    with private_errors("The file"):
        head = file.read(132)
        file.seek(0)
    if head[128:] == b"DICM":
        with private_errors("The file"):
            if file.seek(0, os.SEEK_END) > options.max_bytes:
                raise ResourceLimitError(f"The file is larger than {options.max_bytes} bytes: raise max_bytes=.")
            file.seek(0)
            content = file.read()
        return read_dicom_bytes(content, options)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return read_dicom_zip(file, options)
    if head.startswith(b"NRRD000"):
        return read_nrrd(file, options)
    return read_nifti(file, options, named_nifti=named_nifti)


def _regular_file(path: Path) -> Path:
    """Pipes and devices would block or never end."""
    if not stat.S_ISREG(_mode(path)):
        raise UnsafePathError(f"The given path is neither a regular file nor a folder: expected {ACCEPTED}.")
    return path


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"There is no file or folder at the given path: expected {ACCEPTED}.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise HSENetInputError(f"The given path could not be opened: {reason}.") from None


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
    "read_volume",
]
