"""One asymmetric scan and the ways it may be stored; every path and DICOM tag carries a patient's name."""

import math
import struct
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    generate_uid,
)

from reading_hsenet import HSENetInputError, Volume, read_volume


NAME = "DOE^JANE"
RTSTRUCT = {"Modality": "RTSTRUCT", "SOPClassUID": RTStructureSetStorage, "PixelData": None}
SHAPE = (12, 10, 9)  # D, H, W
SPACING = (2.5, 0.75, 0.7)
AFFINE = np.array([[0, 0, -0.7, 40.0], [0, -0.75, 0, 35.5], [2.5, 0, 0, -120.0], [0, 0, 0, 1]])
# From index (d, h, w): W runs to the patient's left, which is -R; H to posterior, which is -A.


def stored_as(
    array: np.ndarray, order: tuple[int, ...], flips: tuple[bool, ...], affine: np.ndarray = AFFINE
) -> tuple[np.ndarray, np.ndarray]:
    """The same scan with its axes permuted and flipped, and the affine that says so."""
    array, affine = array.transpose(order), affine[:, [*order, 3]]
    for axis, flip in enumerate(flips):
        if flip:
            step = np.eye(4)
            step[axis, axis], step[axis, 3] = -1, array.shape[axis] - 1
            array, affine = np.flip(array, axis), affine @ step
    return array, affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, **header_fields) -> Path:
    image = nib.Nifti1Image(array, affine)
    for field, value in header_fields.items():
        image.header[field] = value
    nib.save(image, path)
    return path


def make_scan() -> np.ndarray:
    """(D, H, W) int16 HU without any symmetry: a value tells its position."""
    array = np.arange(math.prod(SHAPE)).reshape(SHAPE) - 1000
    return array.astype(np.int16)


def as_ras(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return stored_as(array, (2, 1, 0), (True, True, False))


def patch_bytes(path: Path, offset: int, form: str, *values) -> Path:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(content)
    return path


def write_series(
    folder: Path,
    array: np.ndarray,
    *,
    axes=(0, 1, 2),
    flips=(),
    descending=False,
    syntax=ExplicitVRLittleEndian,
    affine=AFFINE,
    **tags,
) -> Path:
    """One DICOM file a slice; `axes` of D, H, W become (slice, row, column), those in `flips` run backwards."""
    stored, affine = stored_as(array, axes, tuple(axis in flips for axis in range(3)), affine)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    endian = "<" if syntax.is_little_endian else ">"
    series = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(), **tags}
    shuffled = np.random.default_rng(0).permutation(len(stored)).tolist()
    for index, number in enumerate(reversed(shuffled) if descending else shuffled):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.SOPClassUID = CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.PatientName, dataset.PatientID, dataset.Modality = NAME, f"ID {NAME}", "CT"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.InstanceNumber = number
        dataset.Rows, dataset.Columns = stored.shape[1:]
        dataset.PixelSpacing = spacing[1:].tolist()
        dataset.SliceThickness = 5.0  # wrong on purpose: thickness is not spacing
        dataset.ImageOrientationPatient = [*(lps[:3, 2] / spacing[2]), *(lps[:3, 1] / spacing[1])]
        dataset.ImagePositionPatient = (lps[:3, 3] + index * lps[:3, 0]).tolist()
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.PixelData = (stored[index].astype(np.int32) + 1024).astype(endian + "u2").tobytes()
        for keyword, value in series.items():
            value = value(index) if callable(value) else value
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.save_as(folder / f"{NAME}_{generate_uid()[-8:]}_{number:03d}.dcm", enforce_file_format=True)
    return folder


def edit_series(folder: Path, edit) -> Path:
    """Rewrites the headers of a series, slices in the order of their positions."""
    paths = sorted(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    for index, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        edit(index, dataset)
        dataset.save_as(path)
    return folder


def refuses(error_class: type, *words: str, source, **kwargs) -> None:
    """The exact class is raised, its text holds the words, and nothing in the chain holds the patient's name."""
    with pytest.raises(HSENetInputError) as info:
        read_volume(source, **kwargs)
    assert type(info.value) is error_class, info.value
    for word in words:
        assert word in str(info.value), info.value
    error, texts = info.value, []
    while error is not None:
        texts += [str(error), repr(error), repr(error.args), *error.__dict__.get("__notes__", [])]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert not [text for text in texts if "DOE" in text or "JANE" in text]


def assert_canonical(volume: Volume, scan: np.ndarray) -> None:
    np.testing.assert_array_equal(volume.array, scan)
    assert volume.array.dtype in (np.int16, np.float32) and volume.array.flags.c_contiguous
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    np.testing.assert_allclose(volume.spacing, SPACING, atol=1e-5)


def write_enhanced(path: Path, array: np.ndarray, *, order=None, **tags) -> Path:
    """The scan as one enhanced CT object, its frames in any order."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.Modality = NAME, f"ID {NAME}", "CT"
    dataset.SeriesInstanceUID = generate_uid()
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = *array.shape[1:], len(array)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    order = list(range(len(array))) if order is None else order
    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = [SPACING[1], SPACING[2]]
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelValueTransformationSequence = [Dataset()]
    transformation = shared.PixelValueTransformationSequence[0]
    transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = 1, -1024, "HU"
    for index in order:
        frame = Dataset()
        frame.PlanePositionSequence = [Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = (lps[:3, 3] + index * lps[:3, 0]).tolist()
        frames.append(frame)
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], frames
    dataset.PixelData = (array[order].astype(np.int32) + 1024).astype(np.uint16).tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def zip_folder(folder: Path, path: Path, **kwargs) -> Path:
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{NAME}/{file.relative_to(folder)}")
    return path
