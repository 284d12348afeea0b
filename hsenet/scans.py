"""A dataset row's scan in Hounsfield units, wherever it lies: a file, a row of a Parquet file, here or on the Hub."""

import hashlib
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow.parquet
from fsspec.core import url_to_fs

from reading_hsenet import HSENetInputWarning, MissingFileError, UnsupportedImageError, Volume, read_volume


PARQUET_ROW = ".parquet#"


def read_scan(row: dict[str, Any]) -> Volume:
    """
    Args:
        row:
            `volume` is a nibabel image, a path or URL of a file or DICOM folder, or `FILE.parquet#ROW` for the column
            `volume` of that row; `hu_slope` and `hu_intercept`, if there, turn the file's stored values into HU.

    Raises:
        HSENetInputError: what the reader refuses.
    """
    volume = row["volume"]
    if not isinstance(volume, str):
        return read_volume(volume)
    if PARQUET_ROW in volume:
        file, _, number = volume.rpartition("#")
        return read_zipped_nifti(_parquet_value(file, int(number)))
    with local_copy(volume) as path:
        return read_hu(path, row.get("hu_slope"), row.get("hu_intercept"))


def read_hu(path: Path, hu_slope: float | None = None, hu_intercept: float | None = None, **options: Any) -> Volume:
    """
    A file or DICOM folder in true HU.

    Args:
        hu_slope, hu_intercept (`float`, *optional*):
            From a corpus' metadata, for a NIfTI file of stored values; None: the file says how its values become HU.
        options: of `read_volume`, such as `series`.

    Raises:
        HSENetInputError: what `read_volume` refuses, and a file that has a scaling beside that of the metadata.
    """
    if hu_slope is None and hu_intercept is None:
        return read_volume(path, **options)
    if hu_slope is None or hu_intercept is None or path.is_dir():
        raise UnsupportedImageError(
            "hu_slope and hu_intercept are of NIfTI files of stored values and belong together: expected both, or "
            f"none, got {hu_slope} and {hu_intercept} for a {'folder' if path.is_dir() else 'file'}."
        )
    return read_volume(path, hu_source="metadata", rescale=(hu_slope, hu_intercept), **options)


def read_zipped_nifti(content: bytes) -> Volume:
    """A .nii.gz file that a build wrote; its HU were checked when it was built, and some are only assumed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HSENetInputWarning)
        return read_volume(content, hu_check="warn")


@contextmanager
def local_copy(location: str) -> Iterator[Path]:
    """A local path to a file; what was fetched from elsewhere is deleted at the end. A local folder stays itself."""
    if "://" not in location:
        yield Path(location)
        return
    with tempfile.TemporaryDirectory() as folder:
        # Only the suffixes: the rest of the name is nobody's business.
        path = Path(folder) / ("scan" + "".join(PurePosixPath(location).suffixes[-2:]))
        files, name = url_to_fs(location)
        try:
            files.get_file(name, str(path))
        except FileNotFoundError:
            raise MissingFileError("There is no file at the given address: expected one scan.") from None
        yield path


def scan_identity(row: dict[str, Any]) -> str:
    """Changes when the scan does: a file's place, size and time and its scaling, hashed since a path may be a name."""
    volume = row["volume"]
    if not isinstance(volume, str):
        return "in the dataset"
    if "://" in volume:  # of a fixed revision
        identity = volume
    else:
        file, separator, number = volume.rpartition("#") if PARQUET_ROW in volume else (volume, "", "")
        path = Path(file).resolve()
        status = path.stat() if path.exists() else None  # the reader has the better words for a missing file
        identity = f"{path} {status.st_size} {status.st_mtime_ns}" if status else str(path)
        identity += separator + number
    if row.get("hu_slope") is not None:
        identity += f" {row['hu_slope']} {row['hu_intercept']}"
    return hashlib.sha256(identity.encode()).hexdigest()


def _parquet_value(file: str, number: int) -> bytes:
    """The scan in row `number`; of a remote file only its row group is transferred."""
    with fsspec.open(file, "rb") as stream:
        parquet = pyarrow.parquet.ParquetFile(stream)
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if number < count:
                return parquet.read_row_group(group, columns=["volume"])["volume"][number].as_py()["bytes"]
            number -= count
    raise MissingFileError("The Parquet file has fewer rows than the dataset's table says: build the dataset again.")
