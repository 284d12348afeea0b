# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""NIfTI and NRRD: one file with a header, which says how many bytes of voxels must follow, and the voxels.

The header is checked before the voxels are in memory, then exactly as many bytes are read as it announces, and the
file must end there: only reading gzip to its end finds truncation and a wrong checksum. `isal`, if it is installed,
unzips about twice as fast as the standard library.
"""

import gzip
import io
import math
import os
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np


try:
    from .volume_hsenet import (
        CorruptFileError,
        GeometryError,
        ReadOptions,
        ResourceLimitError,
        UnsupportedImageError,
        Volume,
        canonical_volume,
        check_layout,
        checked_affine,
        cosines,
        private_errors,
        to_hu,
        warn,
    )
except ImportError:  # imported as a plain top-level module, not from the Hub cache
    if __package__:
        raise
    from volume_hsenet import (
        CorruptFileError,
        GeometryError,
        ReadOptions,
        ResourceLimitError,
        UnsupportedImageError,
        Volume,
        canonical_volume,
        check_layout,
        checked_affine,
        cosines,
        private_errors,
        to_hu,
        warn,
    )

ACCEPTED = "a NIfTI (.nii, .nii.gz) or NRRD file, a folder or zip with the DICOM files of one CT series"
CHUNK_BYTES = 1024**2
GZIP_MAGIC = b"\x1f\x8b"
MAX_HEADER_BYTES = 16 * 1024**2
MAX_RATIO, SMALL_BYTES = 200, 64 * 1024**2  # a scan zips 2 to 10 times, an empty one up to 200
MAX_FORM_CODE = 5
MAX_FORM_DIFFERENCE = 1e-3  # direction cosines of NIfTI's two affines
MAX_ORIGIN_DIFFERENCE_MM = 0.1
UNITS_TO_MM = {1: 1000.0, 3: 0.001}  # NIfTI xyzt_units: metres and micrometres; everything else is taken as mm
NRRD_SPACES = {  # to RAS+
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}


class _Stream:
    """A file, unzipped if it is zipped, of which never more is read than was asked for."""

    def __init__(self, file: BinaryIO, max_bytes: int):
        start = file.tell()
        self.stored_bytes = file.seek(0, os.SEEK_END) - start
        file.seek(start)
        self.zipped = file.read(2) == GZIP_MAGIC
        file.seek(start)
        self.max_bytes = max_bytes
        self._file = file
        if self.zipped:
            self._file = _gunzip(file)

    def read(self, count: int) -> bytes:
        return self._file.read(count)

    def read_voxels(self, num_bytes: int, before: int) -> np.ndarray:
        """The bytes that a checked header of `before` bytes announces, after which the file must end."""
        self._check_size(before + num_bytes)
        voxels = np.empty(num_bytes, dtype=np.uint8)
        view, filled = memoryview(voxels), 0
        while filled < num_bytes:
            count = self._file.readinto(view[filled : filled + CHUNK_BYTES])
            if not count:
                raise CorruptFileError(_wrong_size(before + num_bytes, f"{before + filled}"))
            filled += count
        if self.read(1):
            raise CorruptFileError(_wrong_size(before + num_bytes, "more"))
        return voxels

    def _check_size(self, total: int) -> None:
        if total > self.max_bytes:
            raise ResourceLimitError(
                f"The header announces {total} bytes, at most {self.max_bytes} are read: raise max_bytes= if that is "
                "the scan's true size."
            )
        if not self.zipped and total != self.stored_bytes:
            raise CorruptFileError(_wrong_size(total, str(self.stored_bytes)))
        if self.zipped and total > max(SMALL_BYTES, MAX_RATIO * self.stored_bytes):
            raise ResourceLimitError(
                f"The file is {self.stored_bytes} bytes and would unzip to {total}: no scan shrinks "
                f"{MAX_RATIO}-fold. Get it again from its source."
            )


def _gunzip(file: BinaryIO) -> BinaryIO:
    try:
        from isal import igzip

        return igzip.IGzipFile(fileobj=file)
    except ImportError:
        return gzip.GzipFile(fileobj=file)


def _wrong_size(expected: int, found: str) -> str:
    return f"By its header the file should hold {expected} bytes but it holds {found}. Copy or download it again."


# NIfTI


def import_nibabel() -> ModuleType:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError('Reading NIfTI files needs nibabel: pip install "nibabel>=5.2"') from error
    return nibabel


def read_nifti(file: BinaryIO, options: ReadOptions, *, named_nifti: bool) -> Volume:
    """
    Args:
        file: of a NIfTI-1 or NIfTI-2 file, zipped or not.
        named_nifti (`bool`): whether its name claims that it is NIfTI.
    """
    with private_errors("The file"):
        stream = _Stream(file, options.max_bytes)
        head = stream.read(348)
        version = _nifti_version(head, named_nifti)
        head += stream.read(540 - 348) if version == 2 else b""
    nibabel = import_nibabel()
    with private_errors("The header of the NIfTI file"):
        # Unchecked, because nibabel would repair a zero spacing to 1 mm without telling.
        header = {1: nibabel.Nifti1Header, 2: nibabel.Nifti2Header}[version](head, check=False)
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header["vox_offset"])
        _check_nifti_header(header, shape, len(head), offset)
        affine = header.get_best_affine()
        _check_extensions(stream.read(offset - len(head)), header.endianness)
    frame_shape, frame = _one_frame(shape, options)
    check_layout(frame_shape, dtype, "(i, j, k)")
    affine = _nifti_affine(header, affine, options)
    with private_errors("The header of the NIfTI file"):
        scaling = _nifti_scaling(header, options)
    with private_errors("The voxel data of the NIfTI file"):
        voxels = stream.read_voxels(math.prod(shape) * dtype.itemsize, offset)
        stored = voxels.view(dtype).reshape((*frame_shape, -1), order="F")[..., frame]
        array = to_hu(stored, *scaling)
    return canonical_volume(array, affine, options, reuse=True)


def from_nibabel(image: Any, options: ReadOptions) -> Volume:
    """An image that nibabel opened: its checks are nibabel's, which don't see a damaged end of a zipped file."""
    with private_errors("The image"):
        shape, frame = _one_frame(tuple(image.dataobj.shape), options)
        check_layout(shape, image.dataobj.dtype, "(i, j, k)")
        affine = np.array(image.affine, dtype=np.float64)
        if not hasattr(image, "get_sform") and hasattr(image.header, "default_x_flip"):
            raise GeometryError(
                "The image is Analyze, which says nothing of left and right: convert the scan again from its source."
            )
        if hasattr(image.dataobj, "get_unscaled"):  # a file's, whose scaling nibabel keeps there
            stored, slope, intercept = image.dataobj.get_unscaled(), image.dataobj.slope, image.dataobj.inter
        else:
            stored, slope, intercept = np.asanyarray(image.dataobj), 1, 0
        scaling = options.scaling(float(slope), float(intercept))
        array = to_hu(stored.reshape((*shape, -1), order="F")[..., frame], *scaling)
    if hasattr(image, "get_sform"):
        affine = _nifti_affine(image.header, affine, options)
    return canonical_volume(array, affine, options)


def _nifti_version(head: bytes, named_nifti: bool) -> int:
    if head[344:348] == b"n+1\0":
        return 1
    if head[4:12] == b"n+2\0\r\n\x1a\n":
        return 2
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        raise UnsupportedImageError("A NIfTI header/image pair is not read: convert it to a single .nii or .nii.gz.")
    if named_nifti:
        raise CorruptFileError(
            "The file is named as NIfTI but does not start with a NIfTI header: copy or convert it again."
        )
    raise UnsupportedImageError(f"The file is not NIfTI (a picture, or another format): expected {ACCEPTED}.")


def _check_nifti_header(header: Any, shape: tuple[int, ...], header_bytes: int, offset: int) -> None:
    if not 1 <= int(header["dim"][0]) <= 7 or min(shape) < 1:
        raise CorruptFileError(f"The NIfTI header has an impossible shape: {int(header['dim'][0])} axes, {shape}.")
    if int(header["bitpix"]) != header.get_data_dtype().itemsize * 8:
        raise CorruptFileError(
            f"The NIfTI header contradicts itself: {int(header['bitpix'])} bits a voxel, but a type of "
            f"{header.get_data_dtype().itemsize * 8}. Convert the scan again from its source."
        )
    if not header_bytes + 4 <= offset <= MAX_HEADER_BYTES:
        raise CorruptFileError(
            f"The voxels of a NIfTI file of this version start at byte {header_bytes + 4} or later, the header says "
            f"{offset}. Convert the scan again from its source."
        )
    codes = int(header["sform_code"]), int(header["qform_code"])
    if not all(0 <= code <= MAX_FORM_CODE for code in codes):
        raise CorruptFileError(f"sform_code and qform_code are {codes} in the NIfTI header, at most {MAX_FORM_CODE}.")
    if np.isinf(header["scl_slope"]):  # nibabel would take it for none
        raise CorruptFileError("scl_slope in the NIfTI header is infinite: convert the scan again from its source.")
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if not (np.isfinite(pixdim) & (pixdim != 0)).all():
        raise GeometryError(
            f"The voxel spacing in the NIfTI header must be finite and not zero, got {pixdim.tolist()}: "
            "convert the scan again from its source."
        )


def _check_extensions(between: bytes, endianness: str) -> None:
    """What lies between header and voxels: a flag, then blocks that say their size and end where the voxels start."""
    flag, position = between[0], 4
    while flag and position < len(between):
        size = int(np.frombuffer(between, f"{endianness}i4", 1, position)[0])
        position += max(size, 8)
    if flag and position != len(between):
        raise CorruptFileError(
            f"The extensions of the NIfTI header end {position - len(between)} bytes beside the first voxel: "
            "convert the scan again from its source."
        )
    if not flag and any(between[4:]):
        raise CorruptFileError("Between NIfTI header and voxels lie data that the header doesn't know of.")


def _one_frame(shape: tuple[int, ...], options: ReadOptions) -> tuple[tuple[int, ...], int]:
    """Shape and number of the frame to read; several frames without a choice keep all their axes."""
    if len(shape) > 3 and set(shape[3:]) == {1}:
        shape = shape[:3]
    if options.frame is None:
        return shape, 0
    count = shape[3] if len(shape) == 4 else 1
    if not 0 <= options.frame < count:
        raise UnsupportedImageError(f"frame= should be from 0 to {count - 1}, got {options.frame}.")
    return shape[:3], options.frame


def _nifti_scaling(header: Any, options: ReadOptions) -> tuple[float, float]:
    slope, intercept = header.get_slope_inter()  # None for 0 and NaN, which mean no scaling
    if slope is None:
        slope, intercept = 1.0, 0.0
    return options.scaling(float(slope), float(intercept))


def _nifti_affine(header: Any, affine: np.ndarray, options: ReadOptions) -> np.ndarray:
    """`affine`, which follows the sform or else the qform, in mm, if the header's two don't contradict each other."""
    with private_errors("The header of the NIfTI file"):
        sform, sform_code = header.get_sform(coded=True)
        qform, qform_code = header.get_qform(coded=True)
        spacing = np.asarray(header["pixdim"][1:4], dtype=np.float64)
        to_mm = UNITS_TO_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    if (sform_code == 0 and qform_code == 0) or np.array_equal(affine, np.eye(4)):
        if options.assume_orientation is None:
            raise GeometryError(
                "The NIfTI header has no orientation (sform_code and qform_code are both 0, or the affine is the "
                "identity, which programs write that do not know it), so left and right are unknown: convert the scan "
                "again from its source, or pass assume_orientation= if you know it."
            )
        affine = _affine_from_codes(options.assume_orientation, spacing)
    with np.errstate(all="ignore"):  # what overflows is refused as not finite
        affine = checked_affine(affine * np.array([[to_mm], [to_mm], [to_mm], [1.0]]))
    if sform_code > 0 and qform_code > 0:
        with np.errstate(all="ignore"):  # a zero or endless axis gives NaN, which agrees with nothing
            difference = np.abs(cosines(sform) - cosines(qform)).max()
            lengths = [np.linalg.norm(form[:3, :3], axis=0) for form in (sform, qform)]
        if not (difference <= MAX_FORM_DIFFERENCE and np.allclose(*lengths, rtol=0.01)):
            raise GeometryError(
                f"The sform and the qform of the NIfTI header disagree: their direction cosines differ by "
                f"{difference:.3f}, at most {MAX_FORM_DIFFERENCE} is expected, their spacings by "
                f"{np.abs(lengths[0] - lengths[1]).max():.3f}. Remove the wrong one."
            )
        origins = float(np.abs(sform[:3, 3] - qform[:3, 3]).max()) * to_mm
        if origins > MAX_ORIGIN_DIFFERENCE_MM:
            warn(f"The sform and the qform of the NIfTI header differ by {origins:.1f} mm in the origin.")
    return affine


def _affine_from_codes(codes: str, spacing: np.ndarray) -> np.ndarray:
    worlds = [next((world for world, pair in enumerate(("LR", "PA", "IS")) if code in pair), None) for code in codes]
    if sorted(worlds, key=str) != [0, 1, 2]:
        raise ValueError(f"assume_orientation= should be three letters such as 'LPS', got {codes!r}.")
    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    for axis, (code, world) in enumerate(zip(codes, worlds, strict=True)):
        affine[world, axis] = spacing[axis] * (1 if code in "RAS" else -1)
    return affine


# NRRD


def _import_nrrd() -> ModuleType:
    try:
        import nrrd
    except ImportError as error:
        raise ImportError('Reading NRRD files needs pynrrd: pip install "pynrrd>=1.0"') from error
    return nrrd


def read_nrrd(file: BinaryIO, options: ReadOptions) -> Volume:
    """
    Args:
        file: of a NRRD file with raw or gzip encoding, whose values are HU (the format knows no scaling).
    """
    nrrd = _import_nrrd()
    with private_errors("The header of the NRRD file"):
        start = file.tell()
        head = file.read(MAX_HEADER_BYTES)
        end = min((head.find(blank) + len(blank) for blank in (b"\n\n", b"\r\n\r\n") if blank in head), default=0)
        _check_nrrd_text(head[:end])
        header = nrrd.read_header(io.BytesIO(head[:end]))
        _check_nrrd_header(header)
        shape = tuple(int(size) for size in header["sizes"])
        # By way of one voxel: the library has no function that turns the header's dozen names of types into NumPy's.
        one_voxel = {**header, "encoding": "raw", "dimension": 1, "sizes": np.array([1])}
        dtype = nrrd.read_data(one_voxel, io.BytesIO(bytes(8))).dtype
    check_layout(shape, dtype, "(i, j, k)")
    affine = checked_affine(_nrrd_affine(header))
    with private_errors("The voxel data of the NRRD file"):
        file.seek(start + end)
        voxels = _Stream(file, options.max_bytes).read_voxels(math.prod(shape) * dtype.itemsize, 0)
        array = to_hu(voxels.view(dtype).reshape(shape, order="F"), *options.scaling(1.0, 0.0))
    return canonical_volume(array, affine, options, reuse=True)


def _check_nrrd_text(head: bytes) -> None:
    """The library leaves out bytes that are not ASCII, of numbers too; comments and free values may have them."""
    fields = [line for line in head.splitlines() if not line.startswith(b"#") and b":=" not in line]
    if not all(line.isascii() for line in fields):
        raise CorruptFileError("The NRRD header holds bytes that are not ASCII: convert the scan again.")


def _check_nrrd_header(header: dict[str, Any]) -> None:
    detached = header.keys() & {"data file", "datafile"}
    skipped = [header.get(name, 0) for name in ("line skip", "lineskip", "byte skip", "byteskip")]
    if detached or any(skipped) or header["encoding"] not in ("raw", "gzip", "gz"):
        raise UnsupportedImageError(
            "Only NRRD files that hold their voxels themselves, raw or gzip, are read: convert it to such a .nrrd."
        )
    if len(header["sizes"]) != header["dimension"] or min(header["sizes"]) < 1:
        raise CorruptFileError(f"The NRRD header has an impossible shape: {header['dimension']} axes.")


def _nrrd_affine(header: dict[str, Any]) -> np.ndarray:
    signs = NRRD_SPACES.get(str(header.get("space", "")).lower())
    directions, origin = header.get("space directions"), header.get("space origin")
    if signs is None or np.shape(directions) != (3, 3) or np.shape(origin) != (3,):
        raise GeometryError(
            "The NRRD header must say where the scan lies: space (right-anterior-superior, left-anterior-superior or "
            "left-posterior-superior), 3 space directions of 3 numbers and a space origin. Convert the scan again."
        )
    if set(header.get("space units", ())) - {"mm"}:
        raise GeometryError("The space units of the NRRD header must be mm: convert the scan again.")
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions, dtype=np.float64).T
    affine[:3, 3] = origin
    affine[:3] *= np.array(signs, dtype=np.float64)[:, None]
    return affine


__all__ = ["from_nibabel", "read_nifti", "read_nrrd"]
