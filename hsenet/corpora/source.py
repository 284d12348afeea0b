"""A corpus where it lies: a local copy, or the Hub, where files are fetched, used and deleted one by one."""

import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from hsenet.scans import local_copy


INSIDE = "::"  # "part.zip::folder/scan.nii.gz" is a member of an archive


class CorpusError(ValueError):
    """The corpus is not laid out as published, or a part of it is missing."""


class MissingInCorpusError(CorpusError, FileNotFoundError):
    """A file that the corpus' own tables name is not there."""


class Corpus:
    """
    Files of a corpus, by their names relative to its root; members of zip archives as `archive.zip::member`.

    Args:
        location (`str`): a local folder, or an fsspec URL such as `hf://datasets/OWNER/NAME@REVISION`.

    Raises:
        CorpusError: a Hub URL without a revision, or a local folder that is not there.
    """

    def __init__(self, location: str):
        # A build goes on for days: it must read one state of the corpus from its first file to its last.
        if location.startswith("hf://") and "@" not in location:
            raise CorpusError(f"{location} names no revision: write {location}@REVISION, a commit of the repository.")
        self.location = location
        self.files, self.root = url_to_fs(location)
        self.is_local = isinstance(self.files, LocalFileSystem)
        if self.is_local and not self.files.isdir(self.root):
            raise CorpusError("There is no folder at the given location of the corpus: expected its root folder.")
        self._archives: dict[str, zipfile.ZipFile] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archives": {}}  # open archives stay in their process

    def glob(self, pattern: str) -> list[str]:
        """Names that match, sorted; `archive-pattern::member-pattern` looks into archives."""
        outer, _, inner = pattern.partition(INSIDE)
        prefix = len(self.root.rstrip("/")) + 1
        names = sorted(name[prefix:] for name in self.files.glob(self._path(outer)))
        if not inner:
            return names
        return [f"{name}{INSIDE}{member}" for name in names for member in self.members(name) if fnmatch(member, inner)]

    def listing(self, folder: str) -> list[str]:
        """What lies in a folder, on disk or in an archive."""
        archive, _, inside = folder.partition(INSIDE)
        if inside:
            return [f"{archive}{INSIDE}{name}" for name in self.members(archive) if name.rpartition("/")[0] == inside]
        return [f"{folder}/{name.rpartition('/')[2]}" for name in self.files.ls(self._path(folder), detail=False)]

    def members(self, archive: str) -> list[str]:
        """Files in an archive, in its own order."""
        return [info.filename for info in self._archive(archive).infolist() if not info.is_dir()]

    def exists(self, name: str) -> bool:
        return self.files.exists(self._path(name.partition(INSIDE)[0]))

    def read(self, name: str) -> bytes:
        archive, _, member = name.partition(INSIDE)
        with self._errors(name):
            return self._archive(archive).read(member) if member else self.files.cat_file(self._path(name))

    @contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """A local path to a file (or, of a local corpus, a folder); a copy is deleted at the end."""
        if self.is_local and INSIDE not in name:
            if not self.exists(name):
                raise MissingInCorpusError(_missing(name))
            yield Path(self._path(name))
            return
        if INSIDE not in name:
            with self._errors(name), local_copy(f"{self.location.rstrip('/')}/{name}") as path:
                yield path
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("scan" + "".join(PurePosixPath(name).suffixes[-2:]))
            path.write_bytes(self.read(name))
            yield path

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _archive(self, name: str) -> zipfile.ZipFile:
        if name not in self._archives:
            with self._errors(name):
                # By ranges: of a remote archive only the directory and the members that are read are transferred.
                self._archives[name] = zipfile.ZipFile(self.files.open(self._path(name), "rb"))
        return self._archives[name]

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, KeyError):
            raise MissingInCorpusError(_missing(name)) from None
        except (zipfile.BadZipFile, zlib.error, EOFError):
            raise CorpusError(f"The archive of {name} is damaged: expected a whole zip file. Get it again.") from None


def _missing(name: str) -> str:
    return (
        f"The corpus has no {name}: expected it at this place below the corpus' root. Complete the copy, or accept "
        "the corpus' terms on the Hub and log in."
    )
