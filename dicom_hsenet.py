# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""DICOM: which of the given objects form one CT series, where its slices lie, and their values in HU.

Headers are read first and the pixels of the chosen slices after that, one file at a time. Slices are put in order by
their position in the patient, never by number or name. What a series lacks (a slice, a tag, a decoder) stops the
reading. Classic and enhanced (multi-frame) CT are read; what commonly lies beside them (localizers, structure sets,
reports, secondary captures) is skipped and counted in the log.
"""

import io
import logging
import math
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np


try:
    from .volume_hsenet import (
        AIR_HU,
        MAX_COSINE_ERROR,
        MAX_IN_PLANE,
        MAX_SLICES,
        MIN_SLICES,
        SLOPE_RANGE,
        SPACING_RANGE_MM,
        CorruptFileError,
        GeometryError,
        HSENetInputError,
        ReadOptions,
        ResourceLimitError,
        SeriesError,
        UnsafePathError,
        UnsupportedImageError,
        Volume,
        canonical_volume,
        private_errors,
        warn,
    )
except ImportError:  # imported as a plain top-level module, not from the Hub cache
    if __package__:
        raise
    from volume_hsenet import (
        AIR_HU,
        MAX_COSINE_ERROR,
        MAX_IN_PLANE,
        MAX_SLICES,
        MIN_SLICES,
        SLOPE_RANGE,
        SPACING_RANGE_MM,
        CorruptFileError,
        GeometryError,
        HSENetInputError,
        ReadOptions,
        ResourceLimitError,
        SeriesError,
        UnsafePathError,
        UnsupportedImageError,
        Volume,
        canonical_volume,
        private_errors,
        warn,
    )


logger = logging.getLogger(__name__)

CLASSIC_CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = (f"{CLASSIC_CT}.1", f"{CLASSIC_CT}.2")  # the second: made of classic slices
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DIRECTORY = "1.2.840.10008.1.3.10"
DEFLATED = "1.2.840.10008.1.2.1.99"
PIXEL_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")  # PixelData, little and big endian
NON_IMAGES = {"RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "DOC", "ECG", "HC"}
GEOMETRY = {"ImageOrientationPatient": 6, "PixelSpacing": 2, "ImagePositionPatient": 3}
RESCALE = {"RescaleSlope": 1, "RescaleIntercept": 1}
PHASE = (
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "AcquisitionNumber",
    "TriggerTime",
    "NominalPercentageOfCardiacPhase",
)
MIN_GAP_MM = 0.01  # closer slices are at the same position
EVEN_GAPS, MAX_UNEVEN_GAPS, EVEN_GAPS_MM = 0.01, 0.05, 0.05
MAX_LOSSY_RATIO = 10.0
MAX_ARCHIVE_MEMBERS, MAX_RATIO = 20_000, 200
MAX_PADDING_HU = -500.0  # padding that stands for more would be tissue elsewhere
ROUGH = 4.0  # times the median difference between a slice and its neighbours


@dataclass(frozen=True)
class _Slice:
    """One frame's header, so that a thousand of them fit in memory."""

    read: Callable[[], bytes]  # the whole file
    frame: int
    patient: str
    series: str
    group: tuple  # what all slices of a series share exactly
    phase: tuple  # what may tell slices at the same position apart
    shape: tuple[int, int]  # rows, columns
    orientation: np.ndarray  # (6,), or (0,) if unusable; so for the others
    pixel_spacing: np.ndarray  # (2,)
    position: np.ndarray  # (3,)
    rescale: tuple[float, ...]  # slope and intercept
    stored_range: tuple[int, int]
    problem: HSENetInputError | None  # why it cannot be read if it is chosen
    derived: bool
    lossy_ratio: float  # 0: not lossy


def import_pydicom() -> ModuleType:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ImportError('Reading DICOM needs pydicom: pip install "pydicom>=3.0.2"') from error
    return pydicom


def read_dicom_folder(folder: Path, options: ReadOptions) -> Volume:
    """The CT series whose files lie directly in the folder, among whatever else does."""
    with private_errors("The folder"):
        root, entries = folder.resolve(), sorted(folder.iterdir())
        if any(path.is_symlink() and not path.resolve().is_relative_to(root) for path in entries):
            raise UnsafePathError(
                "A file of the folder is a link to somewhere else: copy the files themselves into the folder."
            )
        paths = [path for path in entries if path.is_file()]
    return read_dicom_files(paths, options)


def read_dicom_files(paths: Iterable[Path], options: ReadOptions) -> Volume:
    files = [(path.name, lambda path=path, count=-1: _read_file(path, count, options)) for path in paths]
    return _read_series(files, options)


def read_dicom_bytes(content: bytes, options: ReadOptions) -> Volume:
    return _read_series([("", lambda count=-1: content if count < 0 else content[:count])], options)


def read_dicom_zip(file: BinaryIO, options: ReadOptions) -> Volume:
    """The CT series in a zip archive, at any depth; nothing is written to disk."""
    with private_errors("The zip archive"):
        archive = zipfile.ZipFile(file)
        members = [member for member in archive.infolist() if not member.is_dir()]
        if any(member.flag_bits & 1 for member in members):
            raise UnsupportedImageError("The zip archive is encrypted: unpack it first.")
        packed, unpacked = (sum(getattr(m, n) for m in members) for n in ("compress_size", "file_size"))
    too_long = len(members) > MAX_ARCHIVE_MEMBERS or unpacked > options.max_bytes
    if too_long or unpacked > max(MAX_RATIO * packed, 64 * 1024**2):
        raise ResourceLimitError(
            f"The zip archive has {len(members)} files of {unpacked} bytes (zipped {packed}): at most "
            f"{MAX_ARCHIVE_MEMBERS} files, {options.max_bytes} bytes and a ratio of {MAX_RATIO} are read. Unpack it "
            "and pass the folder of one series, or raise max_bytes=."
        )
    names = [member.filename.rsplit("/", 1)[-1] for member in members]
    files = [
        (name, lambda member=member, count=-1: _read_member(archive, member, count))
        for name, member in zip(names, members, strict=True)
    ]
    return _read_series(files, options)


def _read_file(path: Path, count: int, options: ReadOptions) -> bytes:
    with private_errors("A DICOM file"), open(path, "rb") as file:
        if path.stat().st_size > options.max_bytes:
            raise ResourceLimitError(f"A DICOM file is larger than {options.max_bytes} bytes: raise max_bytes=.")
        return file.read(count)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: int) -> bytes:
    with private_errors("A file in the zip archive"), archive.open(member) as file:
        # Never more than announced, which has been checked; the end of the member is where its checksum is compared.
        content = file.read(member.file_size + 1 if count < 0 else count)
    if count < 0 and len(content) != member.file_size:
        raise CorruptFileError("A file in the zip archive has another size than announced: pack it again.")
    return content


def _read_series(files: list[tuple[str, Callable[..., bytes]]], options: ReadOptions) -> Volume:
    if options.hu_source != "header":
        raise UnsupportedImageError(
            f"DICOM files say themselves how their values become HU: expected hu_source='header', got "
            f"{options.hu_source!r}."
        )
    pydicom = import_pydicom()
    slices, skipped = _ct_slices(files, options, pydicom)
    slices = _chosen_series(slices, options)
    if slices[0].series in skipped:
        # A damaged header can make a slice look like another kind of object: it would go missing.
        raise SeriesError(
            "Beside its slices the CT series holds objects that are no CT slices: remove them, or copy or export the "
            "series again."
        )
    origins, slices = _sorted_along_normal(slices, options, pydicom)
    rows, columns = slices[0].shape
    if len(slices) * rows * columns * 2 > options.max_bytes:
        raise ResourceLimitError(
            f"The series has {len(slices)} slices of {rows}x{columns}, more than {options.max_bytes} bytes: raise "
            "max_bytes= if that is the scan's true size."
        )
    array = np.empty((len(slices), rows, columns), dtype=_hu_dtype(slices))
    padded = []
    for target, one, (dataset, stored) in zip(array, slices, _decoded(slices, options, pydicom), strict=True):
        with private_errors("The pixels of a DICOM slice"):
            _write_hu(stored, dataset, one, target)
            padded.append(_fill_padding(stored, dataset, target))
    _report_padding(padded)
    _warn_of_odd_slices(array)
    orientation, pixel_spacing = slices[0].orientation, slices[0].pixel_spacing
    if options.resample:
        array, origins = _evenly_spaced(array, origins)
    # Array axes are (slice, row, column): the row index moves along the second vector of the orientation.
    affine = np.eye(4)
    affine[:3, 0] = (origins[-1] - origins[0]) / (len(origins) - 1)
    affine[:3, 1] = orientation[3:] * pixel_spacing[0]
    affine[:3, 2] = orientation[:3] * pixel_spacing[1]
    affine[:3, 3] = origins[0]
    affine[:2] *= -1  # DICOM is LPS+, the affine RAS+
    return canonical_volume(array, affine, options, reuse=True)


# Headers


def _ct_slices(
    files: list[tuple[str, Callable[..., bytes]]], options: ReadOptions, pydicom: ModuleType
) -> tuple[list[_Slice], set[str]]:
    """All slices of CT, and the series of what was skipped; localizers may share the series of the scan."""
    slices, skipped, skipped_series = [], Counter(), set()
    for name, read in files:
        head = read(count=132)
        if head[128:] != b"DICM":
            # macOS leaves ._*.dcm beside files.
            if not name.startswith(".") and (name.lower().endswith(".dcm") or not any(head)):
                raise CorruptFileError(
                    "A file is empty, holds nothing but zeros, or is named .dcm and is not DICOM: copy or export the "
                    "series again."
                )
            skipped["not DICOM"] += 1
            continue
        with private_errors("A DICOM file"):
            found = _slices_of_file(read, options, pydicom)
        if isinstance(found, list):
            slices += found
        else:
            kind, series = found
            skipped[kind] += 1
            skipped_series |= {series} if kind != "localizer" else set()
    counts = ", ".join(f"{count} {kind}" for kind, count in skipped.items()) or "none"
    if not slices:
        num_dicom = len(files) - skipped["not DICOM"]
        raise SeriesError(
            f"Expected the slices of one CT series, got none: {len(files)} files, {num_dicom} of them DICOM, none "
            f"with CT slices (skipped: {counts}). Pass the folder or the files that hold the slices."
        )
    if skipped:
        logger.info("Of %d files, %d were skipped: %s.", len(files), skipped.total(), counts)
    return slices, skipped_series


def _slices_of_file(
    read: Callable[[], bytes], options: ReadOptions, pydicom: ModuleType
) -> list[_Slice] | tuple[str, str]:
    """The frames of a CT image, or what else the file is and its SeriesInstanceUID."""
    content = read()
    file = io.BytesIO(content)
    file.seek(132)
    meta = pydicom.filereader.read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    sop_class, syntax = str(meta.get("MediaStorageSOPClassUID", "")), str(meta.get("TransferSyntaxUID", ""))
    if syntax == DEFLATED:
        _check_deflated(content[file.tell() :], options)
    file.seek(0)
    header = pydicom.dcmread(file, stop_before_pixels=True)
    has_pixels = syntax == DEFLATED or file.read(4) in PIXEL_TAGS
    kind = _other_kind(sop_class, header, has_pixels=has_pixels)
    if kind is not None:
        return kind, str(header.get("SeriesInstanceUID"))
    count = int(header.get("NumberOfFrames") or 1)
    if sop_class not in ENHANCED_CT:
        problem = None
        if count > 1:
            problem = UnsupportedImageError("A multi-frame DICOM object is not enhanced CT: convert it to NIfTI.")
        return [_slice(read, 0, header, [header], problem)]
    shared = _flat(header.SharedFunctionalGroupsSequence[0])
    frames = header.PerFrameFunctionalGroupsSequence
    if count > MAX_SLICES:
        raise ResourceLimitError(f"Expected at most {MAX_SLICES} frames, got {count}.")
    if count != len(frames):
        raise CorruptFileError(f"Expected the positions of {count} frames, got {len(frames)}.")
    return [_slice(read, number, header, [_flat(frame), shared, header], None) for number, frame in enumerate(frames)]


def _other_kind(sop_class: str, header: Any, *, has_pixels: bool) -> str | None:
    """What a DICOM object is that holds no slices, None if it is an image."""
    if sop_class == DIRECTORY:
        return "directory"
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return "localizer"
    kind = None
    if sop_class.startswith(SECONDARY_CAPTURE):
        kind = "secondary capture"
    elif header.get("Modality") in NON_IMAGES:
        kind = f"not an image ({header.Modality})"
    elif not has_pixels:
        kind = "without pixels"
    # A CT slice cut off before its pixels, or with a damaged class, would go missing as another kind of object.
    is_cut = kind == "without pixels" and sop_class in (CLASSIC_CT, *ENHANCED_CT)
    if kind is not None and (is_cut or header.get("SOPClassUID") != sop_class):
        raise CorruptFileError(
            "A CT slice has no pixels, or an object states two different SOP classes: copy or export the series again."
        )
    return kind


def _check_deflated(content: bytes, options: ReadOptions) -> None:
    """pydicom inflates the whole at once, so it must be known before how large it will be."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    limit = min(options.max_bytes, max(64 * 1024**2, MAX_RATIO * len(content)))
    rest, size = content, 0
    while rest and not inflate.eof:
        size += len(inflate.decompress(rest, 1024**2))
        rest = inflate.unconsumed_tail
        if size > limit:
            raise ResourceLimitError(f"A deflated DICOM file of {len(content)} bytes inflates to more than {limit}.")


def _flat(groups: Any) -> dict[str, Any]:
    """The macros of an enhanced image's frame, each a sequence of one item, as if they were tags of a classic one."""
    items = [element.value[0] for element in groups if element.VR == "SQ" and element.value]
    return {element.keyword: element.value for item in items for element in item if element.keyword}


def _slice(
    read: Callable[[], bytes], frame: int, header: Any, sources: list[Any], problem: HSENetInputError | None
) -> _Slice:
    """`sources`: where to look for a tag of this frame; the first that has it counts."""

    def get(keyword: str) -> Any:
        return next((source.get(keyword) for source in sources if keyword in source), None)

    image_type = tuple(str(value) for value in (get("FrameType") or get("ImageType") or ()))
    shape = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    study, place, modality = (str(get(name)) for name in ("StudyInstanceUID", "FrameOfReferenceUID", "Modality"))
    series, kernel = str(get("SeriesInstanceUID")), str(get("ConvolutionKernel"))
    bits, signed = int(header.get("BitsStored") or 16), int(header.get("PixelRepresentation") or 0)
    if not 1 <= bits <= 32:
        raise CorruptFileError(f"Expected pixels of 1 to 32 bits, got BitsStored {bits}: export the series again.")
    geometry = {name: _numbers(get(name)) for name in GEOMETRY}
    rescale = {name: _numbers(get(name)) for name in RESCALE}
    return _Slice(
        read=read,
        frame=frame,
        patient=str(get("PatientID")),
        series=series,
        group=(study, series, place, modality, shape, kernel, image_type),
        phase=tuple(str(get(name)) for name in PHASE),
        shape=shape,
        orientation=geometry["ImageOrientationPatient"],
        pixel_spacing=geometry["PixelSpacing"],
        position=geometry["ImagePositionPatient"],
        rescale=tuple(float(value) for values in rescale.values() for value in values),
        stored_range=(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1),
        problem=_problem(get, shape, geometry, rescale) or problem,
        derived=image_type[:2] == ("DERIVED", "SECONDARY"),
        lossy_ratio=_lossy_ratio(get),
    )


def _numbers(value: Any) -> np.ndarray:
    try:
        values = np.array(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        return np.empty(0)  # absent, empty or not a number: all the same to the reader
    return values if np.isfinite(values).all() else np.empty(0)


def _lossy_ratio(get: Callable[[str], Any]) -> float:
    if str(get("LossyImageCompression")) != "01":
        return 0.0
    return max(_numbers(get("LossyImageCompressionRatio")).max(initial=0.0), 1.0)


def _problem(
    get: Callable[[str], Any], shape: tuple[int, int], geometry: dict[str, np.ndarray], rescale: dict[str, np.ndarray]
) -> HSENetInputError | None:
    """What forbids to read an image as a slice of CT in HU; raised only if its series is the one to be read."""
    expected = "pass a folder with one series of original CT images."
    if get("Modality") != "CT":
        return UnsupportedImageError(f"Expected CT images, got another Modality: {expected}")
    if str(get("BurnedInAnnotation")).upper() == "YES":
        return UnsupportedImageError(f"The images have text burned into their pixels: {expected}")
    if get("PhotometricInterpretation") != "MONOCHROME2" or (get("RescaleType") or "HU") != "HU":
        return UnsupportedImageError(f"Expected MONOCHROME2 pixels with RescaleType HU: {expected}")
    if get("ModalityLUTSequence") is not None:
        return UnsupportedImageError(f"The images have a modality lookup table, expected RescaleSlope: {expected}")
    if max(shape) > MAX_IN_PLANE:
        return ResourceLimitError(f"Expected slices of at most {MAX_IN_PLANE}x{MAX_IN_PLANE}, got {shape}.")
    for values, counts, error in ((geometry, GEOMETRY, GeometryError), (rescale, RESCALE, UnsupportedImageError)):
        for keyword, count in counts.items():
            if values[keyword].size != count:
                return error(
                    f"A DICOM slice has no usable {keyword}: expected {count} finite number{'s'[: count > 1]}, got "
                    f"{values[keyword].size}. Export the series again from its source."
                )
    slope = abs(float(rescale["RescaleSlope"][0]))
    if not SLOPE_RANGE[0] <= slope <= SLOPE_RANGE[1]:
        return UnsupportedImageError(
            f"RescaleSlope is {slope:g}: expected the slope that turns stored values into HU."
        )
    return None


# Series


def _chosen_series(slices: list[_Slice], options: ReadOptions) -> list[_Slice]:
    num_patients = len({one.patient for one in slices})
    if num_patients > 1:
        raise SeriesError(f"Expected the series of one patient, got {num_patients} patients: separate them first.")
    groups: list[list[_Slice]] = []
    for one in slices:
        group = next((group for group in groups if _belong_together(group[0], one)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    groups = [part for group in groups for part in _phases(group)]
    groups.sort(key=lambda group: (-len(group), str(group[0].group), group[0].phase))
    group = _choose(groups, options.series)
    for one in group:
        if one.problem is not None:
            raise one.problem
    if group[0].derived and not options.allow_derived:
        raise UnsupportedImageError(
            "The series is derived from another (a projection or reformation): pass the original, or "
            "allow_derived=True."
        )
    lossy = max(one.lossy_ratio for one in group)
    if lossy > MAX_LOSSY_RATIO and not options.allow_derived:
        raise UnsupportedImageError(
            f"The images were compressed {lossy:.0f}:1 with loss, at most {MAX_LOSSY_RATIO:.0f}:1 is accepted: pass "
            "the originals, or allow_derived=True."
        )
    if lossy:
        warn("The images were compressed with loss.")
    if len({one.rescale for one in group}) > 1:
        warn("The slices differ in RescaleSlope or RescaleIntercept; each is scaled by its own.")
    if len(group) < MIN_SLICES:
        raise UnsupportedImageError(
            f"Expected at least {MIN_SLICES} slices, got {len(group)}: pass the folder with all files of the series."
        )
    return group


def _belong_together(first: _Slice, other: _Slice) -> bool:
    return first.group == other.group and all(
        mine.size == theirs.size and np.allclose(mine, theirs, rtol=0, atol=1e-3)
        for mine, theirs in ((first.orientation, other.orientation), (first.pixel_spacing, other.pixel_spacing))
    )


def _phases(group: list[_Slice]) -> list[list[_Slice]]:
    """Several images at each position, told apart by a tag such as the cardiac phase, are as many series."""
    phases: dict[tuple, list[_Slice]] = {}
    for one in group:
        phases.setdefault(one.phase, []).append(one)
    if _num_repeated(group) and all(len(part) >= MIN_SLICES and not _num_repeated(part) for part in phases.values()):
        return list(phases.values())
    return [group]


def _num_repeated(group: list[_Slice]) -> int:
    return len(group) - len({tuple(one.position.round(2)) for one in group})


def _choose(groups: list[list[_Slice]], series: int | str | None) -> list[_Slice]:
    candidates = groups
    if series == "largest":
        candidates = [group for group in groups if len(group) == len(groups[0])]
    elif isinstance(series, int):
        candidates = groups[series : series + 1] if series >= 0 else []
    elif series is not None:
        candidates = [group for group in groups if group[0].series == series]
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(f"{number}: {_described(group)}" for number, group in enumerate(groups))
    raise SeriesError(
        f"Expected one CT series, got {len(groups)} groups of slices that differ in series, kernel, image type, "
        f"phase, orientation, size or pixel spacing ({listed}), of which {len(candidates)} match series=. Pass a "
        "folder with the slices of one, or choose with series=NUMBER, the SeriesInstanceUID or 'largest'."
    )


def _described(group: list[_Slice]) -> str:
    first = group[0]
    kind = " derived" if first.derived else ""
    spacing = "x".join(f"{number:.2f}" for number in first.pixel_spacing)
    return f"{len(group)} of {first.shape[0]}x{first.shape[1]}{kind}, {spacing} mm"


# Positions


def _sorted_along_normal(
    slices: list[_Slice], options: ReadOptions, pydicom: ModuleType
) -> tuple[np.ndarray, list[_Slice]]:
    """Origins (slices, 3) in mm and the slices, in the order of their positions, without identical repetitions."""
    orientation = slices[0].orientation
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(orientation.reshape(2, 3), axis=1)
    if np.abs(lengths - 1).max() > MAX_COSINE_ERROR or abs(row @ column) > MAX_COSINE_ERROR:
        raise GeometryError(
            f"ImageOrientationPatient must hold two perpendicular unit vectors, got lengths {lengths.round(3)} and "
            f"the scalar product {row @ column:.3f}. Export the series again from its source."
        )
    normal = np.cross(row, column)
    slices = _without_repetitions(
        sorted(slices, key=lambda one: float(one.position @ normal)), normal, options, pydicom
    )
    origins = np.stack([one.position for one in slices])
    gaps = np.diff(origins @ normal)
    step = float(np.median(gaps))
    worst = float(gaps[np.abs(gaps - step).argmax()])
    if abs(worst - step) > max(MAX_UNEVEN_GAPS * step, EVEN_GAPS_MM):
        if not options.resample or gaps.max() > SPACING_RANGE_MM[1]:
            raise SeriesError(
                f"Expected slices {step:.2f} mm apart, got a gap of {worst:.2f} mm: slices are missing or irregular. "
                f"Fetch the missing slices, or pass resample=True to interpolate gaps up to {SPACING_RANGE_MM[1]} mm."
            )
        warn(f"The slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart; they are interpolated to {step:.2f} mm.")
    elif abs(worst - step) > max(EVEN_GAPS * step, EVEN_GAPS_MM):
        warn(f"The slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart; they are taken as even.")
    _check_stacked(origins, gaps, normal, options)
    return origins, slices


def _check_stacked(origins: np.ndarray, gaps: np.ndarray, normal: np.ndarray, options: ReadOptions) -> None:
    shifts = np.diff(origins, axis=0) - gaps[:, None] * normal
    sideways = float(np.linalg.norm(shifts, axis=1).max())
    step = float(np.median(gaps))
    tolerance = max(EVEN_GAPS * step, EVEN_GAPS_MM)
    slopes = shifts / gaps[:, None]
    is_tilt = np.linalg.norm(slopes - slopes.mean(axis=0), axis=1).max() * step <= tolerance
    if sideways > tolerance and not (is_tilt and options.resample):
        remedy = "pass resample=True to interpolate it to a rectangular grid" if is_tilt else "export the series again"
        raise GeometryError(
            f"Expected slices stacked along their normal, got a sideways shift of {sideways:.2f} mm a slice "
            f"({math.degrees(math.atan2(sideways, step)):.1f} degrees of gantry tilt): {remedy}."
        )


def _without_repetitions(
    slices: list[_Slice], normal: np.ndarray, options: ReadOptions, pydicom: ModuleType
) -> list[_Slice]:
    kept, num_same = slices[:1], 0
    for one in slices[1:]:
        if (one.position - kept[-1].position) @ normal >= MIN_GAP_MM:
            kept.append(one)
            continue
        pixels = [stored for pair in (kept[-1], one) for _, stored in _decoded([pair], options, pydicom)]
        if not np.array_equal(*pixels) or kept[-1].rescale != one.rescale:
            raise SeriesError(
                f"Expected one slice at each position, got {_num_repeated(slices)} repeated positions among "
                f"{len(slices)} slices, with different pixels: several reconstructions or phases? Pass a folder with "
                "one."
            )
        num_same += 1
    if num_same:
        warn(f"{num_same} slices were there twice, with the same pixels; one of each is read.")
    if len(kept) < MIN_SLICES:
        raise UnsupportedImageError(f"Expected at least {MIN_SLICES} slices, got {len(kept)}: pass the whole series.")
    return kept


def _evenly_spaced(array: np.ndarray, origins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slices at uneven positions, linearly interpolated to the median distance; even ones stay as they are."""
    along = origins[-1] - origins[0]
    along /= np.linalg.norm(along)
    heights = (origins - origins[0]) @ along
    step = float(np.median(np.diff(heights)))
    if np.abs(np.diff(heights) - step).max() <= max(EVEN_GAPS * step, EVEN_GAPS_MM):
        return array, origins
    wanted = np.arange(0, heights[-1] + 1e-3, step)
    upper = np.searchsorted(heights, wanted, side="left").clip(1, len(heights) - 1)
    weights = ((wanted - heights[upper - 1]) / (heights[upper] - heights[upper - 1])).clip(0, 1)
    even = np.empty((len(wanted), *array.shape[1:]), dtype=np.float32)
    for target, index, weight in zip(even, upper, weights, strict=True):
        target[:] = (1 - weight) * array[index - 1] + weight * array[index]
    return even, origins[0] + wanted[:, None] * along


# Pixels


def _decoded(slices: list[_Slice], options: ReadOptions, pydicom: ModuleType) -> Iterator[tuple[Any, np.ndarray]]:
    """Data set and stored values (rows, columns) of each slice; the frames of one file are read from it at once."""
    for _, frames in groupby(slices, key=lambda one: id(one.read)):
        frames = list(frames)
        with private_errors("A DICOM slice"):
            dataset = pydicom.dcmread(io.BytesIO(frames[0].read()))
            if "PixelData" not in dataset:
                raise CorruptFileError("A CT slice has no pixels: copy or export the series again.")
            _check_pixels(dataset, pydicom)
            pixels = pydicom.pixels.iter_pixels(dataset, indices=[one.frame for one in frames])
        for _ in frames:
            with private_errors("The pixels of a DICOM slice"):
                stored = next(pixels)
            yield dataset, stored


def _check_pixels(dataset: Any, pydicom: ModuleType) -> None:
    """What the decoders would not notice, or only after they had taken the memory for it."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        if not pydicom.pixels.get_decoder(syntax).is_available:
            raise UnsupportedImageError(
                f"The DICOM pixels are compressed ({syntax.name}) and no decoder is installed: pip install pylibjpeg "
                "pylibjpeg-libjpeg pylibjpeg-openjpeg, or decompress the series first."
            )
        count = int(dataset.get("NumberOfFrames") or 1)
        for frame in pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=count):
            shape = _encoded_shape(frame)
            if shape is not None and shape != (dataset.Rows, dataset.Columns):
                raise CorruptFileError(
                    f"Expected a compressed slice of {dataset.Rows}x{dataset.Columns}, got one of "
                    f"{shape[0]}x{shape[1]}: export the series again."
                )
        return
    bits, allocated = dataset.BitsStored, dataset.BitsAllocated
    if dataset.HighBit != bits - 1 or not 0 < bits <= allocated:
        raise UnsupportedImageError(f"Expected pixels in the low {bits} bits, got HighBit {dataset.HighBit}.")
    overlays = any(element.tag.group & 0xFF00 == 0x6000 and element.tag.element == 0x0102 for element in dataset)
    if bits == allocated or overlays:  # old overlays live in the unused bits, which pydicom clears
        return
    endian = "<" if syntax.is_little_endian else ">"
    unused = (
        np.frombuffer(dataset.PixelData, f"{endian}{'iu'[not dataset.PixelRepresentation]}{allocated // 8}") >> bits
    )
    if unused.any() and not (dataset.PixelRepresentation and unused.min() >= -1 and unused.max() <= 0):
        raise CorruptFileError(
            f"The pixels use more than the {bits} bits that the header says are stored: export the series again."
        )


def _encoded_shape(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) as a JPEG, JPEG-LS or JPEG 2000 stream states them; None for others."""
    if frame[:4] == b"\xff\x4f\xff\x51":
        right, bottom, left, top = struct.unpack(">4I", frame[8:24])
        return bottom - top, right - left
    position = 2
    while frame[:2] == b"\xff\xd8" and position + 9 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack(">2H", frame[position + 5 : position + 9])
        position += 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
    return None


def _hu_dtype(slices: list[_Slice]) -> type:
    """int16 if no stored value of any slice can become anything else, else float32."""
    for one in slices:
        slope, intercept = one.rescale
        ends = [slope * end + intercept for end in one.stored_range]
        whole = all(number == int(number) for number in (slope, intercept))
        if not whole or min(ends) < np.iinfo(np.int16).min or max(ends) > np.iinfo(np.int16).max:
            return np.float32
    return np.int16


def _write_hu(stored: np.ndarray, dataset: Any, one: _Slice, target: np.ndarray) -> None:
    if stored.shape != target.shape:
        raise CorruptFileError(f"Expected a slice of {target.shape}, got pixels of {stored.shape}.")
    low, high = one.stored_range
    if stored.min() < low or stored.max() > high:
        raise CorruptFileError(
            f"By their header the stored values lie between {low} and {high}, but they go from {stored.min()} to "
            f"{stored.max()}: export the series again."
        )
    target[:] = stored
    target *= target.dtype.type(one.rescale[0])
    target += target.dtype.type(one.rescale[1])


def _fill_padding(stored: np.ndarray, dataset: Any, target: np.ndarray) -> tuple[int, float]:
    """Air where nothing was measured, by PixelPaddingValue: how many pixels, and the highest of their HU."""
    if dataset.get("PixelPaddingValue") is None:
        return 0, AIR_HU
    limits = [dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue)]
    low, high = np.sort(np.asarray(limits, dtype=np.int64).astype(stored.dtype))  # undoes a wrong sign in the header
    padding = (stored >= low) & (stored <= high)
    highest = float(target[padding].max(initial=target.min()))
    target[padding] = AIR_HU
    return np.count_nonzero(padding), highest


def _report_padding(padded: list[tuple[int, float]]) -> None:
    count, highest = sum(count for count, _ in padded), max(highest for count, highest in padded)
    if highest > MAX_PADDING_HU:
        warn(
            f"{count} voxels of up to {highest:.0f} HU became {AIR_HU:.0f} HU, because the header calls their value "
            "padding, although it could be tissue."
        )
    elif count:
        logger.info("%d voxels are padding and became %d HU.", count, AIR_HU)


def _warn_of_odd_slices(array: np.ndarray) -> None:
    """A damaged compressed slice decodes to nonsense without an error, and differs from both its neighbours."""
    sparse = array[:, ::4, ::4].astype(np.float32)
    roughness = np.abs(sparse[1:-1] - (sparse[:-2] + sparse[2:]) / 2).mean(axis=(1, 2))
    num_odd = np.count_nonzero(roughness > ROUGH * np.median(roughness) + 50)
    if num_odd:
        warn(f"{num_odd} slices differ much from the slices above and below: look whether they are damaged.")


__all__ = ["read_dicom_bytes", "read_dicom_files", "read_dicom_folder", "read_dicom_zip"]
