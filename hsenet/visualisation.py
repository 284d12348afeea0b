"""Figures: where the slices weigh the volume's patches, over the volume itself."""

from pathlib import Path

import matplotlib
import torch


matplotlib.use("Agg")  # before pyplot is imported: figures go to files, a display may be missing

from matplotlib import pyplot as plt


def save_patch_scores(
    pixel_values: torch.Tensor, patch_scores: torch.Tensor, path: str | Path, num_slices: int = 8
) -> None:
    """
    Axial slices, bottom to top, with the 2E3 encoder's patch scores as colour.

    Args:
        pixel_values (`torch.Tensor` of shape `(1, depth, height, width)`): as the model sees the volume.
        patch_scores (`torch.Tensor` of shape `(grid_depth, grid_height, grid_width)`): from `output_patch_scores`.
        path: where the PNG goes.
        num_slices (`int`): how many slices are shown.
    """
    volume = pixel_values[0].float().cpu()
    scores = patch_scores.float().cpu().repeat_interleave(volume.shape[0] // patch_scores.shape[0], dim=0)
    planes = torch.linspace(0, volume.shape[0] - 1, num_slices).round().long().tolist()
    figure, axes = plt.subplots(2, (num_slices + 1) // 2, figsize=(2.6 * ((num_slices + 1) // 2), 5.6), squeeze=False)
    extent = (0, volume.shape[2], volume.shape[1], 0)
    for axis, plane in zip(axes.flat, planes, strict=False):
        axis.imshow(volume[plane], cmap="gray", vmin=volume.min(), vmax=volume.max(), extent=extent)
        overlay = axis.imshow(
            scores[plane], cmap="inferno", alpha=0.4, vmin=scores.min(), vmax=scores.max(), extent=extent
        )
        axis.set_title(f"slice {plane}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(overlay, ax=axes, label="patch score", shrink=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


__all__ = ["save_patch_scores"]
