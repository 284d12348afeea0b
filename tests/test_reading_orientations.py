"""One scan stored in every way there is: 48 axis orders and flips, spacings, byte orders, NIfTI and DICOM.

Read, it is the same array in the same place; through the image processor, the same tensors.
"""

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian
from scans import stored_as, write_series

from hsenet import HSENetImageProcessor
from reading_hsenet import Volume, read_volume


SPACINGS = ((2.5, 0.75, 0.7), (1.0, 1.0, 1.0), (5.0, 0.9, 0.9))  # D, H, W in mm
ORIENTATIONS = list(product(permutations(range(3)), product((False, True), repeat=3)))


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    """(D, H, W) int16 HU; a body with a cavity, so that it is lopsided along every axis."""
    return np.rint(tiny.scan(shape=(10, 24, 20)).clip(-1024)).astype(np.int16)


def affine_of(spacing: tuple[float, float, float]) -> np.ndarray:
    depth, height, width = spacing
    return np.array([[0, 0, -width, 40.0], [0, -height, 0, 35.5], [depth, 0, 0, -120.0], [0, 0, 0, 1]])


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, endian: str) -> Path:
    nib.save(nib.Nifti1Image(array, affine, nib.Nifti1Header(endianness=endian)), path)
    return path


@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("spacing", SPACINGS)
def test_nifti(tmp_path, scan, spacing, endian):
    for order, flips in ORIENTATIONS:
        array, affine = stored_as(scan, order, flips, affine_of(spacing))
        volume = read_volume(write_nifti(tmp_path / "scan.nii", array, affine, endian))
        np.testing.assert_array_equal(volume.array, scan)
        np.testing.assert_allclose(volume.affine, affine_of(spacing), atol=1e-4)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian], ids=["little", "big"])
def test_dicom(tmp_path, scan, syntax):
    """Axes of D, H, W as (slice, row, column), in turn with the spacings."""
    for number, (order, flips) in enumerate(ORIENTATIONS):
        spacing = SPACINGS[number % len(SPACINGS)]
        folder = tmp_path / str(number)
        folder.mkdir()
        flipped = tuple(axis for axis in range(3) if flips[axis])
        write_series(folder, scan, axes=order, flips=flipped, syntax=syntax, affine=affine_of(spacing))
        volume = read_volume(folder)
        np.testing.assert_array_equal(volume.array, scan)
        np.testing.assert_allclose(volume.affine, affine_of(spacing), atol=1e-4)


def octant(tensor: torch.Tensor) -> tuple[bool, ...]:
    """In which half of each axis the darkest of eight parts lies: superior, posterior, left."""
    parts = torch.nn.functional.adaptive_avg_pool3d(tensor[None], 2)[0]
    return tuple(bool(half) for half in np.unravel_index(int(parts.argmin()), (2, 2, 2)))


def test_tensors_show_the_same_sides(tmp_path, scan):
    """A cavity superior, anterior and on the right, in volume and slices, however the scan was stored."""
    scan = np.full((10, 24, 20), 40, dtype=np.int16)
    scan += np.random.default_rng(0).integers(-60, 60, scan.shape, dtype=np.int16)
    scan[6:, 2:10, 2:8] = -900
    processor = HSENetImageProcessor(image_size=(8, 32, 32), num_slices=8, slice_size=(32, 32))
    reference = processor.process_volume(Volume(scan, affine_of(SPACINGS[0])))
    pictures = reference["slice_pixel_values"]
    assert octant(reference["pixel_values"][0]) == octant(pictures[:, 0]) == (True, False, False)
    folder = tmp_path / "series"
    folder.mkdir()
    sources = [write_series(folder, scan, axes=(2, 0, 1), flips=(0, 2), affine=affine_of(SPACINGS[0]))]
    for number, (order, flips) in enumerate(ORIENTATIONS[::7]):
        array, affine = stored_as(scan, order, flips, affine_of(SPACINGS[0]))
        sources.append(write_nifti(tmp_path / f"{number}.nii", array, affine, "<"))
    for source in sources:
        tensors = processor.process_volume(read_volume(source, hu_check="warn"))
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, reference[name], atol=1e-5, rtol=0)
