"""What a dataset stores of a scan: its hash, and itself, as it is or coarser."""

import gzip
from pathlib import Path

import nibabel
import numpy as np

from hsenet.digests import as_int16
from hsenet.phantom import nifti_bytes
from reading_hsenet import Volume


def has_blank_header(path: Path) -> bool:
    """Whether a NIfTI file leaves open where its voxels lie: no orientation, the identity in its place, no spacing."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else open(path, "rb") as stream:
            header = nibabel.Nifti1Header(stream.read(348), check=False)
        identity = np.array_equal(header.get_best_affine(), np.eye(4))
    except Exception:  # damaged in another way, and the reader says how
        return False
    no_orientation = header["sform_code"] == 0 and header["qform_code"] == 0
    return bool(no_orientation or identity or not np.all(np.abs(header["pixdim"][1:4]) > 0))


def coarser(volume: Volume, spacing: tuple[float, float, float]) -> Volume:
    """
    The mean over blocks of voxels, the largest that are no longer than `spacing` (mm along D, H, W).

    Averaging, unlike dropping voxels, keeps small structures. A rest at the end of an axis that fills no block is cut
    off.
    """
    blocks = [max(1, int(wanted / own + 1e-3)) for wanted, own in zip(spacing, volume.spacing, strict=True)]
    depth, height, width = (size // block * block for size, block in zip(volume.array.shape, blocks, strict=True))
    array = volume.array[:depth, :height, :width]
    for axis, block in enumerate(blocks):
        shape = (*array.shape[:axis], array.shape[axis] // block, block, *array.shape[axis + 1 :])
        array = array.reshape(shape).mean(axis + 1, dtype=np.float32)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [(block - 1) / 2 for block in blocks]  # the centre of the first block
    affine[:3, :3] *= blocks
    return Volume(np.ascontiguousarray(array), affine, volume.stored_orientation)


def to_nifti(volume: Volume) -> bytes:
    """A new .nii.gz of int16 HU, its axes running to left, posterior, superior; no header text is carried over."""
    return nifti_bytes(as_int16(volume.array).transpose(2, 1, 0), volume.affine[:, [2, 1, 0, 3]])
