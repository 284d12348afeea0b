"""read_volume on arrays, NIfTI and NRRD: one asymmetric scan, written in every way it may arrive, comes back the same.

Every path carries a patient's name; no error may repeat it.
"""

import gzip
import os
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import nullcontext
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scans import (
    AFFINE,
    NAME,
    SPACING,
    as_ras,
    assert_canonical,
    make_scan,
    patch_bytes,
    refuses,
    stored_as,
    write_nifti,
)

import reading_hsenet
from reading_hsenet import (
    CorruptFileError,
    GeometryError,
    HSENetInputError,
    HSENetInputWarning,
    ImplausibleHounsfieldError,
    MissingFileError,
    ResourceLimitError,
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
    with pytest.warns(HSENetInputWarning, match="20.0 degrees"):
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
        with pytest.warns(HSENetInputWarning, match="gzip") if "named" in path.name else nullcontext():
            assert_canonical(read_volume(path), scan)
        assert_canonical(read_volume(path.read_bytes()), scan)
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
        (252, "<h", 46),
        (254, "<h", -3),
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
    refuses(UnsafePathError, "regular file", source=folder / "fifo")
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


# One source of HU, and values that cannot be HU


def test_ct_rate_releases(folder, scan):
    """The first release stores values that need the table, the second HU; either taken for the other is refused."""
    body = np.random.default_rng(0).normal(40, 20, (20, 24, 24))
    body[:, :, :8] = -1000
    body[:, 2:8, 10:20] = -800
    hu = body.round().astype(np.int16)
    array, affine = as_ras(hu)
    for intercept in (-1024, -8192):
        first = write_nifti(folder / "first.nii.gz", array - np.int16(intercept), affine)
        second = write_nifti(folder / "second.nii.gz", array, affine)
        table = {"hu_source": "ct-rate-v1", "rescale": (1, intercept)}
        for volume in (read_volume(first, **table), read_volume(second, hu_source="ct-rate-v2"), read_volume(second)):
            np.testing.assert_array_equal(volume.array, hu)
            assert volume.array.dtype == np.int16
        refuses(ImplausibleHounsfieldError, "hu_source", source=first)
        refuses(ImplausibleHounsfieldError, "hu_source", source=second, **table)


def test_exactly_one_scaling(folder, scan):
    array, affine = as_ras(scan)
    stored = ((array.astype(np.int32) + 1024) * 2).astype(np.int16)
    plain = write_nifti(folder / "plain.nii", stored, affine)
    scaled = patch_bytes(write_nifti(folder / "scaled.nii", stored, affine), 112, "<2f", 0.5, -1024)
    metadata = {"hu_source": "metadata", "rescale": (0.5, -1024.0)}
    assert_canonical(read_volume(plain, **metadata), scan)
    assert_canonical(read_volume(stored, affine=affine, **metadata), scan)
    refuses(UnsupportedImageError, "one source of HU", source=scaled, **metadata)
    refuses(UnsupportedImageError, "one source of HU", source=nib.load(scaled), **metadata)
    wrong_header = patch_bytes(write_nifti(folder / "wrong.nii", array, affine), 112, "<2f", 2.0, 7)
    assert_canonical(read_volume(wrong_header, hu_source="identity"), scan)
    for options, word in (
        ({"hu_source": "metadata"}, "needs rescale"),
        ({"hu_source": "ct-rate-v2", "rescale": (1, -1024)}, "exactly one"),
        ({"rescale": (1, -1024)}, "exactly one"),
        ({"hu_source": "metadata", "rescale": (0, 0)}, "slope"),
        ({"hu_source": "csv"}, "ct-rate-v1"),
        ({"hu_check": "off"}, "warn"),
    ):
        with pytest.raises(ValueError, match=word):
            read_volume(plain, **options)


@pytest.mark.parametrize("dtype", ["u2", "i2", "i4", "i8", "f4", "f8", "u4"])
@pytest.mark.parametrize("endian", "<>")
def test_types_and_byte_orders(folder, scan, dtype, endian):
    array, affine = as_ras(scan)
    stored = (array.astype(np.int32) + 1024).astype(endian + dtype)
    image = nib.Nifti1Image(stored, affine, nib.Nifti1Header(endianness=endian), dtype=stored.dtype)
    image.header.set_slope_inter(1, -1024)
    nib.save(image, folder / "a.nii")
    path = patch_bytes(folder / "a.nii", 112, endian + "2f", 1, -1024)
    assert_canonical(read_volume(path), scan)
    assert read_volume(path).array.dtype == (np.float32 if dtype[0] == "f" else np.int16)


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (0.97, 0.97, 3.0), (3.0, 0.8, 0.8), (10.0, 10.0, 10.0)])
def test_spacings(folder, scan, spacing):
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])
    volume = read_volume(write_nifti(folder / "a.nii.gz", scan.T, affine))
    np.testing.assert_allclose(volume.spacing, spacing[::-1], rtol=1e-6)
    np.testing.assert_array_equal(volume.array, scan[:, ::-1])


def chest(shape=(24, 24, 24)) -> np.ndarray:
    generator = np.random.default_rng(0)
    hu = generator.normal(40, 20, shape)
    hu[:, :, : shape[2] // 3] = generator.normal(-1000, 10, hu[:, :, : shape[2] // 3].shape)
    hu[:, 4:16, 10:16] = generator.normal(-850, 30, hu[:, 4:16, 10:16].shape)
    return hu.round()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda hu: hu + 1024, "air"),
        (lambda hu: hu + 8192, "air"),
        (lambda hu: hu - 1024, "1% or more from"),
        (lambda hu: hu - 8192, "air"),
        (lambda hu: np.where(hu < 0, hu + 65536, hu), "air"),
        (lambda hu: ((hu + 1000) / 8).clip(0, 255).round(), "air"),
        (lambda hu: (hu + 1000) / 1200, "air"),
        (lambda hu: np.where(hu > 0, 3.0, 0.0), "air"),
        (lambda hu: (hu > 0) * 100.0 - 1000 * (hu < -500), "different values"),
        (lambda hu: np.where(hu < -500, hu, hu + 1000), "tissue|150"),
        (lambda hu: np.where(np.arange(24) == 12, 50000, hu), "40000"),
    ],
)
def test_values_that_are_not_hounsfield_units(values, words):
    array = np.asarray(values(chest()))
    with pytest.raises(ImplausibleHounsfieldError, match=words):
        read_volume(array, spacing=SPACING)
    with pytest.warns(HSENetInputWarning, match=words):
        volume = read_volume(array, spacing=SPACING, hu_check="warn")
    np.testing.assert_array_equal(volume.array, array.astype(np.float32))


@pytest.mark.parametrize("intercept", [-1024, -8192])
@pytest.mark.parametrize("padding", [-1024, -2048, -3024])
def test_padding_does_not_pass_for_air(padding, intercept):
    """Stored values of a scan whose padding, never rescaled, lies where air should."""
    hu = chest()
    hu[:, :, :5] = padding
    with pytest.raises(ImplausibleHounsfieldError, match="air"):
        read_volume(hu - intercept, spacing=SPACING)


@pytest.mark.parametrize("padding", [-1024, -2000, -2048, -3024])
def test_padding_and_metal_are_plausible(padding):
    hu = chest()
    hu[:, :, :5], hu[3, 3, 20] = padding, 32767
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_volume(hu, spacing=SPACING)


def test_resampled_nan_can_be_replaced(scan):
    array = scan.astype(np.float32)
    array[0, 0, :2] = np.nan, -np.inf
    with pytest.warns(HSENetInputWarning, match="2 NaN"):
        volume = read_volume(array, spacing=SPACING, nan_to=-1000)
    assert (volume.array[0, 0, :2] == -1000).all()
    np.testing.assert_array_equal(volume.array[1:], scan[1:])
    refuses(CorruptFileError, "nan_to", source=array, spacing=SPACING)


# Limits, before anything is allocated


@pytest.fixture
def little_memory():
    """Whatever allocates 1 GiB fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_header_bombs_are_refused(folder, scan, little_memory):
    path = write_nifti(folder / f"{NAME}.nii", *as_ras(scan))
    refuses(ResourceLimitError, "32767", source=patch_bytes(path, 42, "<3h", 32767, 32767, 32767))
    content = path.read_bytes()
    bomb = folder / f"{NAME}.nii.gz"
    bomb.write_bytes(gzip.compress(content))
    refuses(ResourceLimitError, source=bomb)
    path = patch_bytes(path, 42, "<3h", 1024, 1024, 2048)
    refuses(ResourceLimitError, "max_bytes", source=path)
    refuses(CorruptFileError, f"holds {len(content)}", source=path, max_bytes=2**33)
    refuses(ResourceLimitError, "max_bytes", source=write_nifti(path, *as_ras(scan)), max_bytes=1000)


def test_gzip_bombs_are_refused(folder, scan, little_memory):
    header = write_nifti(folder / "a.nii", *as_ras(scan)).read_bytes()[:352]
    bomb = folder / f"{NAME}.nii.gz"
    packer = zlib.compressobj(9, wbits=31)
    zeros = b"".join(packer.compress(chunk) for chunk in [header] + [bytes(2**20)] * 1024) + packer.flush()
    bomb.write_bytes(zeros)
    refuses(CorruptFileError, "more", source=bomb)  # the header tells of a small scan: a gigabyte is never unzipped
    for shape in ((512, 512, 2048), (512, 512, 400)):
        honest = bytearray(header)
        struct.pack_into("<3h", honest, 42, *shape)
        bomb.write_bytes(gzip.compress(bytes(honest)) + zeros[:2000])
        refuses(ResourceLimitError, "unzip to", source=bomb)


def test_extensions_must_fill_the_gap_before_the_voxels(folder, scan):
    array, affine = as_ras(scan)
    image = nib.Nifti1Image(array, affine)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", f"{NAME} was here".encode()))
    nib.save(image, folder / "extended.nii.gz")
    assert_canonical(read_volume(folder / "extended.nii.gz"), scan)
    content = gzip.decompress((folder / "extended.nii.gz").read_bytes())
    path = folder / f"{NAME}.nii"
    for size in (0, 7, 2**30, -8):
        path.write_bytes(content)
        refuses(CorruptFileError, "extensions", source=patch_bytes(path, 352, "<i", size))
    path.write_bytes(content)
    refuses(CorruptFileError, "doesn't know", source=patch_bytes(path, 348, "B", 0))
    for offset in (0, 10, 348, 2.0**30, -1.0, np.nan, np.inf):
        path.write_bytes(content)
        refuses(CorruptFileError, source=patch_bytes(path, 108, "<f", offset))
    plain = write_nifti(folder / f"{NAME}.nii", array, affine)
    refuses(CorruptFileError, source=patch_bytes(plain, 348, "B", 1) and patch_bytes(plain, 108, "<f", 360))


# Geometry that is unusual


def test_frame_selects_one_of_a_time_series(folder, scan):
    array, affine = as_ras(scan)
    series = np.stack([array - np.int16(24), array, array - np.int16(3)], axis=-1)
    path = write_nifti(folder / f"{NAME}.nii.gz", series, affine)
    assert_canonical(read_volume(path, frame=1), scan)
    assert_canonical(read_volume(nib.load(path), frame=1), scan)
    refuses(UnsupportedImageError, "frame=", source=path)
    refuses(UnsupportedImageError, "0 to 2", source=path, frame=3)
    refuses(UnsupportedImageError, "0 to 0", source=write_nifti(path, array, affine), frame=1)


def test_a_file_without_orientation_needs_the_callers_word(folder, scan):
    array, affine = as_ras(scan)
    path = patch_bytes(write_nifti(folder / f"{NAME}.nii", array, affine), 252, "<2h", 0, 0)
    refuses(GeometryError, "assume_orientation", source=path)
    volume = read_volume(path, assume_orientation="RAS")
    np.testing.assert_array_equal(volume.array, scan)
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)
    np.testing.assert_array_equal(read_volume(path, assume_orientation="LAS").array, scan[:, :, ::-1])
    for codes in ("RAL", "XYZ", "RA"):
        with pytest.raises(ValueError, match="three letters"):
            read_volume(path, assume_orientation=codes)


def test_headers_that_only_seem_to_know_the_orientation(folder, scan):
    """What programs write that have lost the geometry: the identity, or the format without one."""
    array, affine = as_ras(scan)
    path = write_nifti(folder / f"{NAME}.nii", array, np.eye(4))
    for source in (path, nib.load(path)):
        refuses(GeometryError, "identity", "assume_orientation", source=source)
    np.testing.assert_array_equal(read_volume(path, assume_orientation="RAS").array, scan)
    assert read_volume(array, affine=np.eye(4)).spacing == (1, 1, 1)  # an array's affine is the caller's word
    nib.save(nib.AnalyzeImage(array.astype(np.int16), affine), folder / f"{NAME}.img")
    refuses(GeometryError, "Analyze", source=nib.load(folder / f"{NAME}.img"))


@pytest.mark.parametrize("slope", [1e-30, 1e6, -1e-9])
def test_impossible_slopes(folder, scan, slope):
    path = patch_bytes(write_nifti(folder / f"{NAME}.nii", *as_ras(scan)), 112, "<2f", slope, 0)
    for source in (path, nib.load(path)):
        refuses(CorruptFileError, "slope", source=source)


def test_without_isal_the_standard_library_unzips(folder, scan, monkeypatch):
    monkeypatch.setitem(sys.modules, "isal", None)
    path = write_nifti(folder / f"{NAME}.nii.gz", *as_ras(scan))
    assert_canonical(read_volume(path), scan)
    good = path.read_bytes()
    assert_canonical(
        read_volume(gzip.compress(gzip.decompress(good)[:500]) + gzip.compress(gzip.decompress(good)[500:])), scan
    )
    for bad in (good[:-100], good[:-4], good[:20], good[:-8] + b"\0\0\0\0" + good[-4:], good + b"tail"):
        path.write_bytes(bad)
        refuses(CorruptFileError, source=path)


def test_oblique_scans(folder, scan):
    def turned(degrees: float) -> Path:
        angle = np.deg2rad(degrees)
        turn = np.eye(4)
        turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        array, affine = as_ras(scan)
        return write_nifti(folder / f"{NAME}.nii", array, turn @ affine)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_volume(turned(8))
    with pytest.warns(HSENetInputWarning, match="20.0 degrees"):
        np.testing.assert_array_equal(read_volume(turned(20)).array, scan)
    cosine, sine = np.cos(np.deg2rad(59)), np.sin(np.deg2rad(59))
    diagonal, above, below = (2 * cosine + 1) / 3, (1 - cosine - 3**0.5 * sine) / 3, (1 - cosine + 3**0.5 * sine) / 3
    about = np.array([[diagonal, above, below], [below, diagonal, above], [above, below, diagonal]])  # (1, 1, 1)
    array, affine = as_ras(scan)
    affine = affine.copy()
    affine[:3, :3] = about @ np.diag([0.7, 0.75, 2.5])
    refuses(GeometryError, "47.4 degrees", source=write_nifti(folder / f"{NAME}.nii", array, affine))


def test_sheared_scan_is_untilted_on_request(folder):
    """A ball in a gantry tilted by 15 degrees: sheared in the file, round again after resampling."""
    shape, spacing, tilt = (40, 60, 60), (2.0, 1.0, 1.0), np.tan(np.deg2rad(15))
    d, h, w = np.meshgrid(*(np.arange(size, dtype=float) for size in shape), indexing="ij")
    y = (h - 30) + tilt * (d - 20) * spacing[0]
    ball = (((d - 20) * 2) ** 2 + y**2 + (w - 30) ** 2) ** 0.5
    hu = np.where(ball < 18, 40, -1000) + np.random.default_rng(0).normal(0, 5, shape)
    affine = np.array([[0, 0, -1.0, 0], [2 * -tilt, -1.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    refuses(GeometryError, "15.0 degrees", "resample=True", source=hu, affine=affine)
    with pytest.warns(HSENetInputWarning, match="15.0 degrees"):
        volume = read_volume(hu, affine=affine, resample=True)
    np.testing.assert_allclose(volume.spacing, spacing, rtol=1e-6)
    assert np.abs(volume.affine[:3, :3]).max(axis=0).tolist() == pytest.approx(list(spacing))
    inside = np.argwhere(volume.array > -480) * spacing
    assert np.ptp(inside, axis=0) == pytest.approx([34, 34, 34], abs=2.5)
    centre = affine @ [20, 30, 30, 1]
    np.testing.assert_allclose(volume.affine @ [*(inside.mean(axis=0) / spacing), 1], centre, atol=0.3)
    affine[1, 0] = -5.0
    refuses(GeometryError, "Correct the affine", source=hu, affine=affine, resample=True)


def test_origins_of_the_two_forms_may_differ(folder, scan):
    array, affine = as_ras(scan)
    image = nib.Nifti1Image(array, affine)
    moved = affine.copy()
    moved[:3, 3] += 5
    image.set_qform(moved, code=1)
    nib.save(image, folder / "a.nii")
    with pytest.warns(HSENetInputWarning, match="5.0 mm"):
        assert_canonical(read_volume(folder / "a.nii"), scan)
    image.set_qform(affine @ np.diag([1.5, 1, 1, 1]), code=1)
    nib.save(image, folder / f"{NAME}.nii")
    refuses(GeometryError, "disagree", source=folder / f"{NAME}.nii")


# NRRD


def write_nrrd(path: Path, array: np.ndarray, affine: np.ndarray, **header) -> Path:
    nrrd = pytest.importorskip("nrrd")
    lps = np.diag([-1, -1, 1, 1]) @ affine
    defaults = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
    fields = {name: value for name, value in {**defaults, **header}.items() if value is not None}
    nrrd.write(str(path), array, fields)
    return path


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_nrrd_equals_the_nifti_of_the_same_scan(folder, scan, encoding):
    for order in permutations(range(3)):
        array, affine = stored_as(scan, order, (False, True, False))
        path = write_nrrd(folder / "a.nrrd", np.asfortranarray(array), affine, encoding=encoding)
        assert_canonical(read_volume(path), scan)
        assert_canonical(read_volume(path.read_bytes()), scan)
    array, affine = as_ras(scan)
    ras = {"space directions": affine[:3, :3].T, "space origin": affine[:3, 3], "space": "RAS"}
    assert_canonical(read_volume(write_nrrd(folder / "a.nrrd", array.astype(">i4"), affine, **ras)), scan)


def test_nrrd_that_is_refused(folder, scan, little_memory):
    array, affine = as_ras(scan)
    path = folder / f"{NAME}.nrrd"
    for header, error, words in (
        ({"space": None}, GeometryError, "space"),
        ({"space": "scanner-xyz"}, GeometryError, "space"),
        ({"space origin": None}, GeometryError, "space origin"),
        ({"space units": ["cm", "cm", "cm"]}, GeometryError, "mm"),
        ({"encoding": "bzip2"}, UnsupportedImageError, "gzip"),
    ):
        refuses(error, words, source=write_nrrd(path, array, affine, **header))
    good = write_nrrd(path, array, affine, encoding="raw").read_bytes()
    for bad in (
        good[:-1],
        good + b"x",
        good[:100],
        good.replace(b"int16", b"int61"),
        b"NRRD0005\n\n",
        good.replace(b"0,-0.75", b"0,-0.\xce5"),
    ):
        path.write_bytes(bad)
        refuses(CorruptFileError, source=path)
    path.write_bytes(good.replace(b"sizes: 9 10 12", b"sizes: 30000 30000 30000"))
    refuses(ResourceLimitError, "30000", source=path)
    path.write_bytes(good.replace(b"encoding: raw", b"encoding: raw\ndata file: ../../etc/passwd"))
    refuses(UnsupportedImageError, "themselves", source=path)
    zipped = write_nrrd(path, array, affine, encoding="gzip").read_bytes()
    path.write_bytes(zipped[:-9])
    refuses(CorruptFileError, source=path)


# The module itself


def test_arrays_need_neither_nibabel_nor_pydicom(tmp_path):
    """As a Hub user without the libraries: arrays work, files say what to install."""
    (tmp_path / "a.nii").write_bytes(bytes(344) + b"n+1\0" + bytes(400))
    code = f"""
import sys
sys.modules["nibabel"] = sys.modules["pydicom"] = None
import numpy as np
from reading_hsenet import read_volume
print(read_volume(np.arange(1000.0).reshape(10, 10, 10) - 950, spacing=(1, 1, 1)).array.shape)
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
