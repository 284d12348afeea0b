"""read_volume on DICOM: the asymmetric scan as series of every kind, and series that must be refused.

Every path and tag carries a patient's name; no error may repeat it.
"""

import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)
from scans import (
    NAME,
    RTSTRUCT,
    as_ras,
    assert_canonical,
    edit_series,
    make_scan,
    refuses,
    write_enhanced,
    write_nifti,
    write_series,
    zip_folder,
)

from reading_hsenet import (
    CorruptFileError,
    GeometryError,
    HSENetInputWarning,
    MissingFileError,
    ResourceLimitError,
    SeriesError,
    UnsafePathError,
    UnsupportedImageError,
    read_volume,
)


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    return make_scan()


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / NAME
    path.mkdir()
    return path


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

    with pytest.warns(HSENetInputWarning, match="by its own"):
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
    refuses(SeriesError, "2 groups", "0: 12 of 10x9", "1: 9 of 10x9", "series=NUMBER", source=folder)
    assert_canonical(read_volume(folder, series="largest"), scan)
    assert_canonical(read_volume(folder, series=0), scan)
    with pytest.warns(HSENetInputWarning, match="Hounsfield"):  # the lower slices of the test scan are all air
        np.testing.assert_array_equal(read_volume(folder, series=1, hu_check="warn").array, scan[:9])
    for number in (-1, 2, "1.2.3"):
        refuses(SeriesError, "0 match", source=folder, series=number)
    write_series(folder, scan, PatientID="another")
    refuses(SeriesError, "2 patients", source=folder)


@pytest.mark.parametrize(
    ("tags", "error_class", "words"),
    [
        ({"Modality": "MR"}, UnsupportedImageError, "Modality"),
        ({"NumberOfFrames": 2}, UnsupportedImageError, "multi-frame"),
        ({"BurnedInAnnotation": "YES"}, UnsupportedImageError, "burned"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MIP"]}, UnsupportedImageError, "derived"),
        ({"LossyImageCompression": "01", "LossyImageCompressionRatio": [4, 30]}, UnsupportedImageError, "30:1"),
        ({"Rows": 65535, "Columns": 65535}, ResourceLimitError, "65535"),
        ({"RescaleSlope": "1e30"}, UnsupportedImageError, "RescaleSlope is 1e+30"),
        ({"HighBit": 11}, UnsupportedImageError, "HighBit"),
        ({"BitsStored": 10, "HighBit": 9}, CorruptFileError, "10 bits"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, GeometryError, "perpendicular"),
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
        ((*even[:5], even[4], *even[6:]), SeriesError, "1 repeated", "different pixels"),
    )
    for number, (heights, error_class, *words) in enumerate(cases):
        series = folder / str(number)
        series.mkdir()
        refuses(error_class, *words, source=write_series(series, scan, ImagePositionPatient=at(*heights)))
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
    refuses(UnsupportedImageError, "got 1", "all files of the series", source=victim)
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
    refuses(UnsupportedImageError, "pip install pylibjpeg", "JPEG 2000", source=folder)


def test_list_of_files_zip_and_bytes(folder, scan):
    write_series(folder, scan)
    write_series(folder, scan[:1], **RTSTRUCT)
    files = sorted(folder.iterdir())
    assert_canonical(read_volume(files[::-1]), scan)
    assert_canonical(read_volume([str(path) for path in files]), scan)
    archive = zip_folder(folder, folder.parent / "a.zip", compression=zipfile.ZIP_DEFLATED)
    assert_canonical(read_volume(archive), scan)
    assert_canonical(read_volume(archive.read_bytes()), scan)
    refuses(SeriesError, "none", source=zip_folder(folder.parent / "nothing", folder.parent / "empty.zip"))
    refuses(MissingFileError, "no file", source=[*files, folder / "missing.dcm"])


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed(folder, syntax):
    if syntax == JPEG2000Lossless:
        pytest.importorskip("openjpeg")
    scan = np.random.default_rng(0).integers(-1000, 1000, (12, 64, 64))
    plain = read_volume(write_series(folder, scan))
    compressed = read_volume(edit_series(folder, lambda index, dataset: dataset.compress(syntax)))
    np.testing.assert_array_equal(compressed.array, plain.array)
    np.testing.assert_array_equal(compressed.affine, plain.affine)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_uncompressed_transfer_syntaxes(folder, scan, syntax):
    assert_canonical(read_volume(write_series(folder, scan, syntax=syntax)), scan)


@pytest.mark.parametrize("compress", [False, True])
def test_enhanced_multi_frame(folder, scan, compress):
    order = np.random.default_rng(0).permutation(len(scan)).tolist()
    path = write_enhanced(folder / f"{NAME}.dcm", scan, order=order)
    if compress:
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    for source in (path, folder, [path], path.read_bytes(), zip_folder(folder, folder.parent / "a.zip")):
        volume = read_volume(source)
        assert_canonical(volume, scan)
        assert volume.array.dtype == np.int16


def test_enhanced_multi_frame_that_is_refused(folder, scan):
    path = folder / f"{NAME}.dcm"
    write_enhanced(path, scan, NumberOfFrames=10)
    refuses(CorruptFileError, "10 frames, got 12", source=path)
    write_enhanced(path, scan, NumberOfFrames=10**6)
    refuses(ResourceLimitError, "1000000", source=path)
    write_enhanced(path, scan, PixelData=bytes(100))
    refuses(CorruptFileError, source=path)
    write_enhanced(path, scan, SharedFunctionalGroupsSequence=[pydicom.Dataset()])
    refuses(GeometryError, "ImageOrientationPatient", source=path)
    write_enhanced(path, scan, PerFrameFunctionalGroupsSequence=[])
    refuses(CorruptFileError, "got 0", source=path)
    write_enhanced(path, scan, ImageType=["DERIVED", "SECONDARY", "VOLUME", "MAXIMUM"])
    refuses(UnsupportedImageError, "derived", source=path)
    assert_canonical(read_volume(path, allow_derived=True), scan)


def test_kernels_and_phases_at_the_same_positions(folder, scan):
    same = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    write_series(folder, scan, ConvolutionKernel="B30f", **same)
    write_series(folder, scan[:, ::-1], ConvolutionKernel="B70f", **same)
    refuses(SeriesError, "2 groups", source=folder)
    refuses(SeriesError, "2 match", source=folder, series="largest")
    refuses(SeriesError, "2 match", source=folder, series=same["SeriesInstanceUID"])
    assert_canonical(read_volume(folder, series=0), scan)
    phases = folder / "phases"
    phases.mkdir()
    write_series(phases, scan, AcquisitionNumber=1, **same)
    write_series(phases, scan[:, ::-1], AcquisitionNumber=2, **same)
    refuses(SeriesError, "2 groups", source=phases)
    assert_canonical(read_volume(phases, series=0), scan)


def test_slices_that_are_there_twice(folder, scan):
    write_series(folder, scan)
    for number, path in enumerate(sorted(folder.iterdir())[:3]):
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.save_as(folder / f"copy{number}.dcm")
    with pytest.warns(HSENetInputWarning, match="3 slices were there twice"):
        assert_canonical(read_volume(folder), scan)


def test_two_frames_of_reference(folder, scan):
    uids = [generate_uid(), generate_uid()]
    write_series(folder, scan, FrameOfReferenceUID=lambda index: uids[index > 5])
    refuses(SeriesError, "2 groups", source=folder)


def test_unusual_series_that_are_read_with_a_warning(folder, scan):
    def at(*heights):
        return lambda index: [-40.0, -35.5, heights[index]]

    even = [2.5 * index - 120 for index in range(len(scan))]
    cases = (
        ({"ImagePositionPatient": at(*even[:5], even[5] + 0.08, *even[6:])}, {}, "2.42 to 2.58"),
        ({"LossyImageCompression": "01", "LossyImageCompressionRatio": 4}, {}, "with loss"),
        ({"LossyImageCompression": "01", "LossyImageCompressionRatio": 30}, {"allow_derived": True}, "with loss"),
    )
    for number, (tags, options, words) in enumerate(cases):
        series = folder / str(number)
        series.mkdir()
        with pytest.warns(HSENetInputWarning, match=words):
            assert_canonical(read_volume(write_series(series, scan, **tags), **options), scan)


def test_missing_and_uneven_slices_are_interpolated_on_request(folder, scan):
    """Values of the test scan are linear in the position, so interpolation gives back what is missing."""
    write_series(folder, scan)
    paths = sorted(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    paths[5].unlink()
    refuses(SeriesError, "gap of 5.00 mm", "resample=True", source=folder)
    with pytest.warns(HSENetInputWarning, match="2.50 to 5.00"):
        assert_canonical(read_volume(folder, resample=True), scan)
    for path in paths[6:9]:
        path.unlink()
    refuses(SeriesError, "gap of 12.50 mm", source=folder, resample=True)


def test_tilted_gantry_is_untilted_on_request(folder):
    """The same ball as for NIfTI: in DICOM the tilt is in the slices' positions."""
    d, h, w = np.meshgrid(np.arange(40) - 20.0, np.arange(60) - 30.0, np.arange(60) - 30.0, indexing="ij")
    tilt = np.tan(np.deg2rad(15))
    ball = np.sqrt((d * 2) ** 2 + (h + tilt * d * 2) ** 2 + w**2) < 18
    array = np.where(ball, 40, -980) + np.random.default_rng(0).integers(-40, 40, ball.shape)
    series = {"PixelSpacing": [1.0, 1.0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    write_series(folder, array, ImagePositionPatient=lambda i: [0.0, 2 * tilt * i, 2.0 * i], **series)
    refuses(GeometryError, "15.0 degrees", "resample=True", source=folder)
    with pytest.warns(HSENetInputWarning, match="15.0 degrees"):
        volume = read_volume(folder, resample=True)
    inside = np.argwhere(volume.array > -480) * volume.spacing
    assert np.ptp(inside, axis=0) == pytest.approx([34, 34, 34], abs=2.5)


def test_a_damaged_compressed_slice_shows(folder):
    smooth = np.random.default_rng(0).normal(0, 5, (16, 64, 64)) + np.linspace(-1000, 300, 64)
    damaged = smooth.copy()
    damaged[7] = damaged[7, :, ::-1]
    series = folder / "good"
    series.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_volume(write_series(series, smooth))
    with pytest.warns(HSENetInputWarning, match="slices differ much"):
        read_volume(write_series(folder, damaged))


def test_compressed_slice_of_another_size(folder):
    pytest.importorskip("openjpeg")
    write_series(folder, np.random.default_rng(0).integers(-1000, 1000, (8, 64, 64)))

    def edit(index, dataset):
        dataset.compress(JPEG2000Lossless)
        frame = bytearray(next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)))
        frame[8:16] = (60000).to_bytes(4, "big") * 2
        dataset.PixelData = pydicom.encaps.encapsulate([bytes(frame)])

    refuses(CorruptFileError, "60000x60000", source=edit_series(folder, edit))


# Bombs and traps


def test_archives_that_are_refused(folder, scan):
    write_series(folder, scan)
    (folder / "zeros").write_bytes(bytes(2**27))
    archive = folder.parent / f"{NAME}.zip"
    zip_folder(folder, archive, compression=zipfile.ZIP_DEFLATED)
    refuses(ResourceLimitError, "ratio", source=archive)
    (folder / "zeros").unlink()
    zip_folder(folder, archive)
    refuses(ResourceLimitError, "max_bytes", source=archive, max_bytes=10_000)
    good = archive.read_bytes()
    for bad in (good[:-30], good[: len(good) // 2], good[:2000] + bytes(100) + good[2100:]):
        archive.write_bytes(bad)
        refuses(CorruptFileError, source=archive)
    flagged = bytearray(good)
    central = good.index(b"PK\x01\x02")
    flagged[central + 8] |= 1
    archive.write_bytes(flagged)
    refuses(UnsupportedImageError, "encrypted", source=archive)


def test_deflated_bomb(folder, scan):
    write_series(folder, scan[:1], syntax=DeflatedExplicitVRLittleEndian, PixelData=bytes(2**27))
    refuses(ResourceLimitError, "inflates", source=folder)


def test_links_out_of_the_folder(folder, scan):
    write_series(folder, scan)
    secret = folder.parent / f"{NAME}.dcm"
    sorted(folder.iterdir())[0].rename(secret)
    (folder / "link.dcm").symlink_to(secret)
    refuses(UnsafePathError, "link", source=folder)
    (folder / "link.dcm").unlink()
    (folder / "other.dcm").symlink_to(secret.rename(folder / "first.dcm"))
    with pytest.warns(HSENetInputWarning, match="1 slices were there twice"):
        assert_canonical(read_volume(folder), scan)


def test_nested_sequences(folder, scan):
    write_series(folder, scan)
    victim = sorted(folder.iterdir())[0]
    content = victim.read_bytes()
    opened = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3000
    at = content.index(b"\x10\x00\x10\x00PN")
    victim.write_bytes(content[:at] + opened + content[at:])
    refuses(CorruptFileError, source=folder)


def test_nothing_about_the_patient_is_logged(folder, scan, caplog, capfd):
    write_series(folder, scan, SeriesDescription=NAME, SpecificCharacterSet=NAME, StudyDate=NAME)
    write_series(folder, scan[:1], **RTSTRUCT)
    caplog.clear()
    caplog.set_level("DEBUG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_canonical(read_volume(folder), scan)
    output = capfd.readouterr()
    for text in (caplog.text, output.out, output.err, *(str(warning.message) for warning in caught)):
        assert "DOE" not in text and "JANE" not in text
    assert "1 not an image (RTSTRUCT)" in caplog.text


def in_order(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))


@pytest.mark.parametrize("end", [0, -1])
def test_a_damaged_slice_at_the_end_does_not_go_missing(folder, scan, end):
    """A gap betrays a slice that is missed in the middle, but nothing betrays one at the end."""
    write_series(folder, scan)
    for number, path in enumerate(in_order(folder)):
        path.rename(folder / f"IM{number:04d}")  # as scanners write them: no .dcm
    victim = in_order(folder)[end]
    good = victim.read_bytes()
    sop_class = good.index(b"1.2.840.10008.5.1.4.1.1.2")
    another = good[: sop_class + 24] + b"7" + good[sop_class + 25 :]  # secondary capture
    truncated = (good[:length] for length in (0, 140, 165, 175, 185, 195, 300, 600))
    for bad in (bytes(len(good)), another, another[:700], *truncated):
        victim.write_bytes(bad)
        refuses(CorruptFileError, source=folder)
    victim.write_bytes(good)
    read_volume(folder)


def test_other_objects_in_the_series_itself(folder, scan):
    uid = generate_uid()
    write_series(folder, scan, SeriesInstanceUID=uid)
    localizer, others = folder.parent / "localizer", folder.parent / "others"
    for place in (localizer, others):
        place.mkdir()
    write_series(localizer, scan[:1], SeriesInstanceUID=uid, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    for path in localizer.iterdir():
        path.rename(folder / path.name)
    assert_canonical(read_volume(folder), scan)
    for path in write_series(others, scan[:1], SeriesInstanceUID=uid, **RTSTRUCT).iterdir():
        path.rename(folder / path.name)
    refuses(SeriesError, "no CT slices", source=folder)


def test_modality_lookup_table(folder, scan):
    table = pydicom.Dataset()
    table.ModalityLUTType = "HU"
    write_series(folder, scan, ModalityLUTSequence=[table])
    refuses(UnsupportedImageError, "lookup table", source=folder)


def test_padding_that_could_be_tissue_is_warned_of(folder, scan):
    write_series(folder, scan, PixelPaddingValue=1024 + 40)
    with pytest.warns(HSENetInputWarning, match="1 voxels of up to 40 HU"):
        volume = read_volume(folder)
    assert (volume.array != scan).sum() == 1 and volume.array[scan == 40] == -1000
