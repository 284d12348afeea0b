"""Damaged copies of good files, a few hundred with fixed seeds: each ends in our error or in the right voxels.

Every read has one gigabyte and five seconds. Right means: where the format has checksums, the original; where it has
none, what the reference library reads from the damaged file (a header that says something else is not damage that a
reader could see).
"""

import gzip
import resource
import signal
import warnings
import zipfile
from itertools import count
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import scans
from scans import NAME, as_ras, make_scan, write_enhanced, write_nifti, write_series, zip_folder

from reading_hsenet import HSENetInputError, HSENetInputWarning, Volume, read_volume


class Hangs(BaseException):
    """Not an Exception: the reader turns those into its own errors."""


@pytest.fixture(autouse=True)
def limits():
    def stop(*_):
        raise Hangs

    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, old[1]))
    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.fixture(autouse=True)
def same_uids_every_time(monkeypatch):
    numbers = count(10_000_000)
    monkeypatch.setattr(scans, "generate_uid", lambda: pydicom.uid.UID(f"1.2.{next(numbers)}"))


def read(source) -> tuple[Volume | None, bool]:
    """The volume, None if it was refused, and whether the reader warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        signal.setitimer(signal.ITIMER_REAL, 5)
        try:
            volume = read_volume(source)
        except HSENetInputError as error:
            assert NAME not in str(error)
            volume = None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert all(warning.category is HSENetInputWarning for warning in caught), [str(w.message) for w in caught]
    return volume, bool(caught)


def same(volume: Volume, array: np.ndarray, affine: np.ndarray, tolerance: float = 1e-3) -> bool:
    return np.array_equal(volume.array, array) and np.allclose(volume.affine, affine, atol=tolerance)


def damaged(content: bytes, rng: np.random.Generator, start: int = 0, stop: int | None = None) -> bytes:
    """One to three bytes or bits changed between start and stop, or the end cut off, or some of the middle lost."""
    stop = len(content) if stop is None else stop
    kind, copy = rng.integers(5), bytearray(content)
    if kind == 0:
        return content[: rng.integers(start, stop)]
    if kind == 1:
        first = rng.integers(start, stop)
        return content[:first] + content[first + rng.integers(1, 50) :]
    for position in rng.integers(start, stop, size=rng.integers(1, 4)):
        copy[position] = rng.integers(256) if kind < 4 else copy[position] ^ (1 << rng.integers(8))
    return bytes(copy)


def test_zipped_nifti(tmp_path):
    """Every change of a gzip file breaks a checksum, except in its header (time and name) of ten bytes."""
    path = write_nifti(tmp_path / "a.nii.gz", *as_ras(make_scan()))
    content, good = path.read_bytes(), read_volume(path)
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(300):
        copy = damaged(content, rng)
        volume, _ = read(copy)
        num_refused += volume is None
        assert volume is None or same(volume, good.array, good.affine, 0)
        if volume is not None:
            assert copy[10:] == content[10:] or gzip.decompress(copy) == gzip.decompress(content)
    assert num_refused > 250


@pytest.mark.parametrize("version", [nib.Nifti1Image, nib.Nifti2Image])
def test_nifti_headers(tmp_path, version):
    array, affine = as_ras(make_scan())
    image = version(array, affine)
    image.set_qform(affine, code=1)
    nib.save(image, tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    rng = np.random.default_rng(1)
    num_refused = 0
    for _ in range(300):
        copy = damaged(content, rng, 0, 352 if version is nib.Nifti1Image else 544)
        volume, _ = read(copy)
        num_refused += volume is None
        if volume is not None:
            with np.errstate(all="ignore"):
                reference = nib.as_closest_canonical(version.from_bytes(copy))
                expected = reference.get_fdata(dtype=np.float64).transpose(2, 1, 0)[:, ::-1, ::-1]
            np.testing.assert_allclose(volume.array, expected, rtol=1e-6, atol=1e-3)
            assert volume.array.shape == expected.shape
    assert num_refused > 60


def slice_headers(content: bytes) -> int:
    return content.index(b"\xe0\x7f\x10\x00OW")


def test_headers_of_one_dicom_slice(tmp_path):
    """DICOM has no checksums: a changed digit is another number, which must clash with the other slices."""
    write_series(tmp_path, make_scan())
    good = read_volume(tmp_path)
    paths = sorted(tmp_path.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    rng = np.random.default_rng(2)
    num_refused = 0
    for number in range(300):
        victim = paths[(0, 5, -1)[number % 3]]  # at both ends nothing shows that a slice is missing
        content = victim.read_bytes()
        victim.write_bytes(damaged(content, rng, 0, slice_headers(content)))
        volume, warned = read(tmp_path)
        victim.write_bytes(content)
        num_refused += volume is None
        assert volume is None or warned or same(volume, good.array, good.affine, 0.05)
    assert num_refused > 60


def test_pixels_of_compressed_dicom(tmp_path):
    """RLE has no checksum either, but lengths; pixels may change, sizes, geometry and the process must not."""
    write_series(tmp_path, make_scan())
    for path in tmp_path.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(pydicom.uid.RLELossless)
        dataset.save_as(path)
    good = read_volume(tmp_path)
    victim = sorted(tmp_path.iterdir())[4]
    content = victim.read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(100):
        victim.write_bytes(damaged(content, rng, content.index(b"\xe0\x7f\x10\x00OB")))
        volume, _ = read(tmp_path)
        if volume is not None:
            assert (volume.array != good.array).any(axis=(1, 2)).sum() <= 1
            assert volume.array.shape == good.array.shape and np.array_equal(volume.affine, good.affine)


def test_enhanced_dicom(tmp_path):
    path = write_enhanced(tmp_path / "a.dcm", make_scan())
    content, good = path.read_bytes(), read_volume(path)
    rng = np.random.default_rng(4)
    for _ in range(150):
        volume, warned = read(damaged(content, rng, 0, slice_headers(content)))
        assert volume is None or volume.array.shape[1:] == good.array.shape[1:] or warned


def test_zip_archives(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    write_series(folder, make_scan())
    archive = zip_folder(folder, tmp_path / "a.zip", compression=zipfile.ZIP_DEFLATED)
    content, good = archive.read_bytes(), read_volume(archive)
    rng = np.random.default_rng(5)
    for _ in range(100):
        volume, _ = read(damaged(content, rng))
        assert volume is None or same(volume, good.array, good.affine, 0)


def test_nrrd(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    array, affine = as_ras(make_scan())
    lps = np.diag([-1, -1, 1, 1]) @ affine
    header = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
    nrrd.write(str(tmp_path / "a.nrrd"), array, header)
    content, good = (tmp_path / "a.nrrd").read_bytes(), read_volume(tmp_path / "a.nrrd")
    start = content.index(b"\n\n") + 2
    rng = np.random.default_rng(6)
    for number in range(200):
        in_header = number % 2 == 0
        copy = damaged(content, rng, *((0, start) if in_header else (start + 10, None)))
        volume, _ = read(copy)
        if volume is None:
            continue
        if in_header:
            (tmp_path / "b.nrrd").write_bytes(copy)
            expected, fields = nrrd.read(str(tmp_path / "b.nrrd"))
            np.testing.assert_array_equal(np.sort(volume.array.ravel()), np.sort(expected.ravel()))
            spacing = np.linalg.norm(fields["space directions"], axis=1)
            np.testing.assert_allclose(np.sort(volume.spacing), np.sort(spacing), rtol=1e-6)
        else:
            assert same(volume, good.array, good.affine, 0)
