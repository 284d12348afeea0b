# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Where a mask of a scan lies on the encoder's patch grid, through the same resampling as the scan itself."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from processing_hsenet import HSENetImageProcessor
from reading_hsenet import Volume
from resampling_hsenet import BODY_THRESHOLD_HU


STEP_HU = 500.0


def canonical_mask(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """A mask as its file stores it, turned to the axes of [`Volume`]: inferior to superior, front to back, to left."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt("SPL"))
    return apply_orientation(mask, turn)


def load_mask(path: str) -> np.ndarray:
    image = nib.load(path)
    return canonical_mask(np.asarray(image.dataobj), image.affine)


def patch_overlap(
    processor: HSENetImageProcessor, scan: Volume, mask: np.ndarray, patch_size: tuple[int, int, int]
) -> torch.Tensor:
    """
    The share of each patch that a mask fills, `(grid_d, grid_h, grid_w)`.

    The field of view follows from the body, so a body of two flat values is resampled twice, with and without the
    mask on top; resampling is linear, and the difference is the mask's share of every voxel.

    Args:
        mask: bool, `(D, H, W)` as `scan.array`.

    Raises:
        ValueError: the mask is of another shape, or the processor's window cuts the values used.
    """
    low, high = processor.hu_window
    if tuple(mask.shape) != tuple(scan.array.shape) or low > -1000 or high < STEP_HU + BODY_THRESHOLD_HU + 1:
        raise ValueError(
            f"Expected a mask of the scan's shape {tuple(scan.array.shape)} and a window that holds -1000 to 1 HU, "
            f"got {tuple(mask.shape)} and {processor.hu_window}."
        )
    body = np.where(scan.array > BODY_THRESHOLD_HU, BODY_THRESHOLD_HU + 1, -1000).astype(np.float32)
    marked = body + STEP_HU * mask.astype(np.float32)
    plain, raised = (processor.process_volume(replace(scan, array=array))["pixel_values"] for array in (body, marked))
    share = (raised - plain) * processor.volume_std * (high - low) / STEP_HU  # (1, D, H, W)
    return torch.nn.functional.avg_pool3d(share, patch_size)[0].clamp(0, 1)
