"""A few rows with a picture each: the Hub's viewer shows no NIfTI."""

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hsenet.scans import read_scan
from reading_hsenet import Volume

from .parquet import write_rows
from .schema import PREVIEW_FEATURES


ROWS = 4  # of each split
WINDOW = (-1000.0, 400.0)  # HU: lungs and soft tissue both show
HEIGHT = 256


def write_preview(output: Path, reports: dict[str, list[dict[str, Any]]]) -> None:
    for split, rows in reports.items():
        shown = (
            {
                **row,
                "image": {"bytes": picture(read_scan({**row, "volume": str(output / row["volume"])})), "path": None},
            }
            for row in islice(rows, ROWS)
        )
        write_rows(output / f"preview/{split}.parquet", shown, PREVIEW_FEATURES, ROWS)


def picture(volume: Volume) -> bytes:
    """A PNG of the middle axial, coronal and sagittal planes side by side, head up, in true proportions."""
    array, (depth_mm, height_mm, width_mm) = volume.array, volume.spacing
    planes = (
        (array[len(array) // 2], height_mm, width_mm),
        (array[::-1, array.shape[1] // 2], depth_mm, width_mm),
        (array[::-1, :, array.shape[2] // 2], depth_mm, height_mm),
    )
    low, high = WINDOW
    images = []
    for plane, row_mm, column_mm in planes:
        grey = np.rint((np.clip(plane, low, high) - low) / (high - low) * 255).astype(np.uint8)
        rows, columns = plane.shape
        width = max(1, round(HEIGHT * columns * column_mm / (rows * row_mm)))
        images.append(np.asarray(Image.fromarray(grey).resize((width, HEIGHT))))
    content = io.BytesIO()
    Image.fromarray(np.concatenate(images, axis=1)).save(content, "PNG")
    return content.getvalue()
