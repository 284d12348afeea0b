"""read_volume on real files: one asymmetric scan, written in every way it may arrive, must come back the same.

Every path and DICOM tag carries a patient's name; no error may repeat it.
"""

import gzip
import math
import os
import struct
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, RTStructureSetStorage, generate_uid

import reading_hsenet
from reading_hsenet import (
    CorruptFileError,
    GeometryError,
    HSENetInputError,
    MissingFileError,
    SeriesError,
    UnsupportedImageError,
    Volume,
    read_volume,
)


NAME = "DOE^JANE"
RTSTRUCT = {"Modality": "RTSTRUCT", "SOPClassUID": RTStructureSetStorage, "PixelData": None}
SHAPE = (12, 10, 9)  # D, H, W
SPACING = (2.5, 0.75, 0.7)
AFFINE = np.array([[0, 0, -0.7, 40.0], [0, -0.75, 0, 35.5], [2.5, 0, 0, -120.0], [0, 0, 0, 1]])
# From index (d, h, w): W runs to the patient's left, which is -R; H to posterior, which is -A.


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    """(D, H, W) int16 HU without any symmetry: a value tells its position."""
    array = np.arange(math.prod(SHAPE)).reshape(SHAPE) - 1000
    return array.astype(np.int16)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / NAME
    path.mkdir()
    return path


def stored_as(array: np.ndarray, order: tuple[int, ...], flips: tuple[bool, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The same scan with its axes permuted and flipped, and the affine that says so."""
    array, affine = array.transpose(order), AFFINE[:, [*order, 3]]
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


def as_ras(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return stored_as(array, (2, 1, 0), (True, True, False))


def patch_bytes(path: Path, offset: int, form: str, *values) -> Path:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(content)
    return path


def write_series(folder: Path, array: np.ndarray, *, axes=(0, 1, 2), flips=(), descending=False, **tags) -> Path:
    """One DICOM file a slice; `axes` of D, H, W become (slice, row, column), those in `flips` run backwards."""
    stored, affine = stored_as(array, axes, tuple(axis in flips for axis in range(3)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    series = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(), **tags}
    shuffled = np.random.default_rng(0).permutation(len(stored)).tolist()
    for index, number in enumerate(reversed(shuffled) if descending else shuffled):
        dataset = pydicom.Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
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
        dataset.PixelData = (stored[index].astype(np.int32) + 1024).astype(np.uint16).tobytes()
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
    np.testing.assert_array_equal(volume.array, scan.astype(np.float32))
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    np.testing.assert_allclose(volume.spacing, SPACING, atol=1e-5)


# Orientation


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_nifti_in_all_48_orientations_is_the_same_volume(folder, scan, order):
    for flips in product((False, True), repeat=3):
        array, affine = stored_as(scan, order, flips)
        path = write_nifti(folder / f"{NAME}.nii", array, affine)
        volume = read_volume(path)
        assert_canonical(volume, scan)
        assert volume.stored_orientation == "".join(nib.aff2axcodes(affine))
        assert_canonical(read_volume(nib.load(path)), scan)
        assert_canonical(read_volume(array, affine=affine), scan)


def test_world_positions_of_an_oblique_scan_are_kept(folder, scan):
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    array, affine = as_ras(scan)
    affine = turn @ affine
    volume = read_volume(write_nifti(folder / "a.nii.gz", array, affine))
    np.testing.assert_array_equal(volume.array, scan)
    for index in product(range(0, 9, 4), range(0, 10, 3), range(0, 12, 5)):
        (found,) = np.argwhere(volume.array == array[index])
        np.testing.assert_allclose(volume.affine @ [*found, 1], affine @ [*index, 1], atol=1e-4)


def test_canonical_axes_are_the_radiological_display(scan):
    assert nib.aff2axcodes(read_volume(scan, spacing=SPACING).affine) == ("S", "P", "L")


def test_array_with_spacing_is_taken_as_canonical(scan):
    for source in (scan, scan[None], scan.astype(np.float64)):
        volume = read_volume(source, spacing=SPACING)
        np.testing.assert_array_equal(volume.array, scan)
        np.testing.assert_allclose(volume.spacing, SPACING)
        assert volume.stored_orientation == "SPL"


def test_tensors_and_volumes(scan):
    torch = pytest.importorskip("torch")
    array, affine = as_ras(scan)
    assert_canonical(read_volume(torch.tensor(array.copy()), affine=torch.tensor(affine)), scan)
    half = torch.tensor(scan).to(torch.bfloat16).requires_grad_()
    volume = read_volume(half, spacing=SPACING)
    np.testing.assert_array_equal(volume.array, half.detach().float().numpy())
    assert read_volume(volume) is volume


def test_input_array_and_affine_are_not_changed(scan):
    array, affine = as_ras(scan.astype(np.float32))
    before = array.copy(), affine.copy()
    read_volume(array, affine=affine)
    np.testing.assert_array_equal(array, before[0])
    np.testing.assert_array_equal(affine, before[1])


# NIfTI values


def test_header_scaling_is_applied_once(folder, scan):
    array, affine = as_ras(scan)
    stored = ((array.astype(np.int32) + 1024) * 2).astype(np.int16)
    path = patch_bytes(write_nifti(folder / "a.nii", stored, affine), 112, "<2f", 0.5, -1024)
    assert_canonical(read_volume(path), scan)
    assert_canonical(read_volume(nib.load(path)), scan)
    for no_scaling in (0.0, np.nan):
        assert_canonical(read_volume(patch_bytes(write_nifti(path, array, affine), 112, "<f", no_scaling)), scan)


def test_file_variants(folder, scan):
    array, affine = as_ras(scan)
    plain = write_nifti(folder / "a.nii", array, affine)
    zipped = write_nifti(folder / "a.nii.gz", array, affine)
    nib.save(nib.Nifti2Image(array, affine), folder / "two.nii.gz")
    one_frame = write_nifti(folder / "frame.nii", array[..., None], affine)
    (folder / "plain_named_zipped.nii.gz").write_bytes(plain.read_bytes())
    (folder / "zipped_named_plain.nii").write_bytes(zipped.read_bytes())
    content = plain.read_bytes()
    (folder / "members.nii.gz").write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    big = nib.Nifti1Image(array, affine, nib.Nifti1Header(endianness=">"))
    nib.save(big, folder / "big.nii")
    for path in (plain, zipped, one_frame, *folder.glob("*.nii*")):
        assert_canonical(read_volume(path), scan)
    assert_canonical(read_volume(str(plain)), scan)
    metres = write_nifti(folder / "metres.nii", array, np.diag([0.001, 0.001, 0.001, 1]) @ affine, xyzt_units=1)
    assert_canonical(read_volume(metres), scan)


def test_damaged_nifti(folder, scan):
    array, affine = as_ras(np.random.default_rng(0).integers(-1000, 1000, (64, 64, 64)).astype(np.int16))
    path = write_nifti(folder / f"{NAME}.nii.gz", array, affine)
    good = path.read_bytes()
    for bad in (good[:-1000], good[:-4], good[:20], good[:-8] + b"\0\0\0\0" + good[-4:], good + b"tail"):
        path.write_bytes(bad)
        refuses(CorruptFileError, "checksum", source=path)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    path.write_bytes(flipped)
    refuses(CorruptFileError, source=path)

    plain = write_nifti(folder / f"{NAME}.nii", array, affine)
    good = plain.read_bytes()
    for bad in (good[:-2], good + b"\0", good[:352]):
        plain.write_bytes(bad)
        refuses(CorruptFileError, f"holds {len(bad)}", source=plain)
    for bad in (b"", good[:100], good[:344] + b"xxxx" + good[348:]):
        plain.write_bytes(bad)
        refuses(CorruptFileError, "NIfTI header", source=plain)
    for offset, form, value in (
        (108, "<f", 0.0),
        (108, "<f", np.nan),
        (40, "<h", 9),
        (70, "<h", 999),
        (112, "<f", np.inf),
    ):
        plain.write_bytes(good)
        refuses(CorruptFileError, source=patch_bytes(plain, offset, form, value))


def test_not_a_ct_volume(folder, scan):
    array, affine = as_ras(scan)
    rgb = np.zeros(array.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for values, words in (
        (np.stack([array, array], axis=-1), "4 dimensions"),
        (array[..., 0], "2 dimensions"),
        (array.astype(np.complex64), "complex64"),
        (rgb, "RGB"),
        (array[..., :5], "got 5"),
        (np.full_like(array, -1000), "constant"),
    ):
        image = nib.Nifti1Image(values, affine)
        nib.save(image, folder / f"{NAME}.nii.gz")
        refuses(UnsupportedImageError, words, source=folder / f"{NAME}.nii.gz")
        refuses(UnsupportedImageError, words, source=image)
    (folder / f"{NAME}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(400))
    refuses(UnsupportedImageError, ".nii.gz", "DICOM", source=folder / f"{NAME}.png")
    nib.save(nib.Nifti1Pair(array, affine), folder / f"{NAME}.img")
    refuses(UnsupportedImageError, "pair", source=folder / f"{NAME}.hdr")
    os.mkfifo(folder / "fifo")
    refuses(UnsupportedImageError, "regular file", source=folder / "fifo")
    refuses(UnsupportedImageError, "list", source=[scan])
    refuses(UnsupportedImageError, "bool", source=scan > 0, spacing=SPACING)


def test_nothing_there(folder):
    refuses(MissingFileError, "no file", source=folder / f"{NAME}.nii.gz")
    assert issubclass(MissingFileError, FileNotFoundError) and issubclass(MissingFileError, ValueError)


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(folder, scan):
    path = write_nifti(folder / f"{NAME}.nii.gz", *as_ras(scan))
    path.chmod(0)
    refuses(HSENetInputError, "could not be read", source=path)


def test_non_finite_voxels_are_counted(folder, scan):
    array, affine = as_ras(scan.astype(np.float32))
    array = array.copy()
    array[0, 0, 0], array[1, 2, 3] = np.nan, np.inf
    refuses(CorruptFileError, "2 NaN", source=write_nifti(folder / f"{NAME}.nii.gz", array, affine))
    refuses(CorruptFileError, "2 NaN", source=array, affine=affine)


def test_bad_nifti_geometry(folder, scan):
    array, affine = as_ras(scan)
    path = write_nifti(folder / f"{NAME}.nii", array, affine)
    good = path.read_bytes()
    row_x = affine[0].tolist()
    for offset, form, values, words in (
        (252, "<2h", (0, 0), "sform_code"),
        (80, "<f", (0.0,), "spacing"),
        (88, "<f", (np.nan,), "spacing"),
        (280, "<4f", (np.nan, *row_x[1:]), "finite"),
        (280, "<4f", (0, 0, 0, 0), "spacing"),
        (280, "<4f", (700.0, 0, 0, 0), "spacing"),
        (280, "<4f", (row_x[0], 0, 1.5, 0), "sheared"),
    ):
        path.write_bytes(good)
        refuses(GeometryError, words, source=patch_bytes(path, offset, form, *values))
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine @ np.diag([-1, 1, 1, 1]), code=1)
    nib.save(image, path)
    refuses(GeometryError, "disagree", source=path)
    image.set_qform(affine, code=1)
    nib.save(image, path)
    assert_canonical(read_volume(path), scan)


def test_geometry_arguments(folder, scan):
    array, affine = as_ras(scan)
    path = write_nifti(folder / f"{NAME}.nii", array, affine)
    refuses(GeometryError, "neither", "affine=", "spacing=", source=scan)
    refuses(GeometryError, "both", source=scan, affine=AFFINE, spacing=SPACING)
    refuses(GeometryError, "3 numbers", source=scan, spacing=(1.0, 1.0))
    refuses(GeometryError, "spacing", source=scan, spacing=(0.0, 1.0, 1.0))
    refuses(GeometryError, "finite", source=scan, spacing=(float("nan"), 1.0, 1.0))
    refuses(GeometryError, "(4, 4)", source=scan, affine=np.eye(3))
    refuses(GeometryError, "leave them out", source=path, affine=AFFINE)
    refuses(GeometryError, "leave them out", source=read_volume(path), spacing=SPACING)
    refuses(UnsupportedImageError, "4 dimensions", source=np.stack([scan, scan]), spacing=SPACING)


# DICOM


@pytest.mark.parametrize("flips", [(), (0,), (1,), (2,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)], ids=["axial", "sagittal", "coronal"])
def test_dicom_series_equals_the_nifti_of_the_same_scan(folder, scan, axes, flips):
    write_series(folder, scan, axes=axes, flips=flips, descending=bool(flips))
    volume = read_volume(folder)
    assert_canonical(volume, scan)
    nifti = read_volume(write_nifti(folder.parent / "a.nii.gz", *as_ras(scan)))
    np.testing.assert_array_equal(volume.array, nifti.array)


def test_other_objects_beside_the_series_are_skipped(folder, scan):
    write_series(folder, scan)
    other = folder.parent / "other"
    other.mkdir()
    write_series(other, scan[:1], **RTSTRUCT)
    write_series(other, scan[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(other, scan[:1], Modality="SEG")
    for path in other.iterdir():
        path.rename(folder / path.name)
    (folder / ".DS_Store").write_bytes(b"junk")
    (folder / f"._{NAME}.dcm").write_bytes(b"macOS")
    (folder / "notes.txt").write_text(NAME)
    (folder / "empty").mkdir()
    assert_canonical(read_volume(folder), scan)


def test_rescale_is_taken_from_each_slice(folder, scan):
    write_series(folder, scan)

    def edit(index, dataset):
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -1024 - index
        dataset.PixelData = ((scan[index].astype(np.int32) + 1024 + index) * 2).astype(np.uint16).tobytes()

    assert_canonical(read_volume(edit_series(folder, edit)), scan)


def test_padding_becomes_air(folder, scan):
    padded = scan.copy()
    padded[:, 0, :3] = -2000  # outside the reconstruction

    def pixels(index):
        return (padded[index] - 24).astype("<i2").tobytes()

    write_series(folder, scan, PixelData=pixels, PixelRepresentation=1, RescaleIntercept=24, PixelPaddingValue=-2024)
    padded[:, 0, :3] = -1000
    assert_canonical(read_volume(folder), padded)


def test_folder_without_images(folder, scan):
    refuses(SeriesError, "0 files", source=folder)
    (folder / f"{NAME}.txt").write_text(NAME)
    write_series(folder, scan[:2], **RTSTRUCT)
    refuses(SeriesError, "3 files", "2 of them DICOM", source=folder)


def test_two_series_and_two_patients(folder, scan):
    write_series(folder, scan, SeriesDescription=NAME)
    write_series(folder, scan[:9])
    refuses(SeriesError, "2 groups", "12 of 10x9", "9 of 10x9", source=folder)
    write_series(folder, scan, PatientID="another")
    refuses(SeriesError, "2 patients", source=folder)


@pytest.mark.parametrize(
    ("tags", "error_class", "words"),
    [
        ({"Modality": "MR"}, UnsupportedImageError, "Modality"),
        ({"NumberOfFrames": 2}, UnsupportedImageError, "Multi-frame"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, UnsupportedImageError, "MONOCHROME2"),
        ({"RescaleType": "US"}, UnsupportedImageError, "RescaleType"),
        ({"RescaleSlope": None}, UnsupportedImageError, "RescaleSlope"),
        ({"RescaleIntercept": None}, UnsupportedImageError, "RescaleIntercept"),
        ({"RescaleSlope": 0}, UnsupportedImageError, "RescaleSlope is 0"),
        ({"PixelSpacing": None}, GeometryError, "PixelSpacing"),
        ({"ImageOrientationPatient": None}, GeometryError, "ImageOrientationPatient"),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, GeometryError, "unit vectors"),
        ({"ImagePositionPatient": None}, GeometryError, "ImagePositionPatient"),
        ({"PixelData": bytes(100)}, CorruptFileError, "damaged"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_unusable_series(folder, scan, tags, error_class, words):
    refuses(error_class, words, source=write_series(folder, scan, **tags))


def test_missing_repeated_and_tilted_slices(folder, scan):
    def at(*heights):
        return lambda index: [-40.0, -35.5, heights[index]]

    even = [2.5 * index for index in range(len(scan))]
    cases = (
        ((*even[:5], *(height + 2.5 for height in even[5:])), SeriesError, "gap of 5.00 mm"),
        ((*even[:5], even[5] + 0.6, *even[6:]), SeriesError, "2.50 mm apart"),
        ((*even[:5], even[4], *even[6:]), SeriesError, "1 repeated"),
    )
    for number, (heights, error_class, words) in enumerate(cases):
        series = folder / str(number)
        series.mkdir()
        refuses(error_class, words, source=write_series(series, scan, ImagePositionPatient=at(*heights)))
    tilt = np.tan(np.deg2rad(15))
    write_series(folder, scan, ImagePositionPatient=lambda index: [-40.0, -35.5 + tilt * even[index], even[index]])
    refuses(GeometryError, "15.0 degrees", source=folder)
    few = folder / "few"
    few.mkdir()
    refuses(UnsupportedImageError, "got 3", source=write_series(few, scan[:3]))


@pytest.mark.parametrize("size", [10, 64])  # pixels read at once, or left on disk at first
def test_damaged_slice(folder, size):
    write_series(folder, np.random.default_rng(0).integers(-1000, 1000, (12, size, size)))
    assert read_volume(folder).array.shape == (12, size, size)
    victim = min(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    good = victim.read_bytes()
    refuses(UnsupportedImageError, "single DICOM", source=victim)
    for bad in (good[:-60], good[:700], good[:200], good[:132], b"", good[:132] + bytes(range(256)) * 4):
        victim.write_bytes(bad)
        refuses(CorruptFileError, source=folder)


def test_missing_decoder_names_the_package(folder, scan, monkeypatch):
    write_series(folder, scan)

    def edit(index, dataset):
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
        dataset["PixelData"].VR = "OB"

    edit_series(folder, edit)
    monkeypatch.setattr(pydicom.pixels.get_decoder(JPEG2000Lossless), "_available", {})
    refuses(UnsupportedImageError, "pylibjpeg", "JPEG 2000", source=folder)


# The module itself


def test_arrays_need_neither_nibabel_nor_pydicom(tmp_path):
    """As a Hub user without the libraries: arrays work, files say what to install."""
    (tmp_path / "a.nii").write_bytes(bytes(344) + b"n+1\0" + bytes(400))
    code = f"""
import sys
sys.modules["nibabel"] = sys.modules["pydicom"] = None
import numpy as np
from reading_hsenet import read_volume
print(read_volume(np.arange(1000.0).reshape(10, 10, 10), spacing=(1, 1, 1)).array.shape)
for source in ({str(tmp_path / "a.nii")!r}, {str(tmp_path)!r}):
    try:
        read_volume(source)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(reading_hsenet.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "(10, 10, 10)" in done.stdout and "nibabel" in done.stdout and "pydicom" in done.stdout
