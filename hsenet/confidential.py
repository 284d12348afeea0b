# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What must not leave this machine with a model or a dataset: local paths, names of users and machines, keys of
pseudonyms, identifiers of patients.

A file is judged by what it says: names and values of JSON and YAML, the text of anything else, the metadata of weights
and pictures, the columns of Parquet, the headers of scans. Findings say what kind of thing was found, never the thing.
"""

import csv
import getpass
import gzip
import io
import json
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import nibabel
import yaml
from PIL import Image

import reading_hsenet


PATH, HOME = "a local path", "the home or working folder"
USER, MACHINE = "the name of a user", "the name of this machine"
SALT, IDENTIFIER = "the key of pseudonyms", "an identifier of a patient or scan"
DICOM_UID, DICOM_NAME, DICOM_FIELD = "a DICOM UID", "a person's name as DICOM writes it", "a field of a DICOM header"
SCAN, HEADER = "the name of a scan's file", "words in the header of a scan"

# Tokens that look like words and paths stand in every vocabulary.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_ROOTS = (
    "afs|beegfs|ceph(?:fs)?|cluster|content|data|dbfs|efs|export|filer|fsx|glusterfs|gpfs|hdd|home|hpc|isilon|kaggle|"
    "l?scratch|lustre|media|mnt|mount|nas|net|netapp|nfs|nvme|opt|panfs|private|projects?|raid|root|san|shared?|srv|ssd|"
    "storage|tmp|u|users?|var|vol|volumes|weka|work(?:dir|space)?"
)
_SAYS_PATH = re.compile(
    rf"(?<![\w./:~-])/(?:{_ROOTS})\d*/[\w.~]|file://|(?<![\w/])~/[\w.]"
    r"|(?<![\w./:~-])//[\w.-]+/[\w.~]"  # a share; the slashes of a URL stand after a colon
    r"|(?<![\w\\])(?:\\{2}[\w.$-]{2,}\\|\\{4}[\w.$-]{2,}\\{2})[\w.$]"  # the same on Windows, and in JSON
    r"|(?<![a-z])[a-z]:\\{1,2}(?:users|documents|home|data|temp|tmp|work|projects)\b",
    re.IGNORECASE,
)
_IS_PATH = re.compile(r"//?[\w.~-]+/[\w.~-].*|~(?:[a-z_][\w-]*)?/\S.*|[A-Za-z]:[\\/].*|\\\\[\w.-]+\\.*", re.DOTALL)
_UID = re.compile(r"(?<![\w.])[012](?:\.(?:0|[1-9]\d*)){7,}(?![\w.])")
_PERSON = re.compile(r"[^\W\d_][^\W\d_'-]+\^[^\W\d_][^\W\d_'-]+")
_SCAN = re.compile(r".*\.(?:nii|nii\.gz|dcm|nrrd|mha|mhd)", re.IGNORECASE | re.DOTALL)
_SUFFIX = re.compile(r"\.(?:nii|gz|dcm|zip|nrrd|npy)\b", re.IGNORECASE)
_DICOM_FIELDS = {
    "patientname", "patientid", "patientbirthdate", "accessionnumber", "studyinstanceuid", "seriesinstanceuid"
}  # fmt: skip
_FREE_FIELDS = ("descrip", "aux_file", "intent_name", "db_name")  # of a NIfTI header
_SHORTEST = 4  # characters that a name or identifier needs to be told from an ordinary word


@dataclass
class Confidential:
    """
    What this machine knows that nobody else should.

    Args:
        homes: paths of folders: the user's home, what is published, the current one.
        users, machines: names, without those that are ordinary words.
        salts: keys of pseudonyms.
        identifiers: of patients and scans, in lower case; those of several words with one blank between.
    """

    homes: frozenset[str]
    users: frozenset[str]
    machines: frozenset[str]
    salts: frozenset[str]
    identifiers: frozenset[str]

    @classmethod
    def around(cls, folder: Path, public: Iterable[str], identifiers: Iterable[Path]) -> "Confidential":
        """
        Args:
            folder: what is to be published; `*.salt` and `*.names.csv` in it and beside it are known places.
            public: names that may be said, such as the owner's of the repository.
            identifiers: further files, with an identifier a line or as `*.names.csv`.
        """
        folder = folder.resolve()
        ordinary = _ordinary_words() | {name.lower() for name in public}
        machine = socket.gethostname()
        places = [place for place in (folder, folder.parent) if place.is_dir()]
        salts = [path.read_text().strip() for place in places for path in place.glob("*.salt")]
        tables = [*identifiers, *(path for place in places for path in place.glob("*.names.csv"))]
        return cls(
            homes=frozenset(str(path) for path in (Path.home(), folder, Path.cwd()) if len(path.parts) > 1),
            users=frozenset(_telling({_user(), Path.home().name}, ordinary)),
            machines=frozenset(_telling({machine, machine.split(".")[0]}, ordinary)),
            salts=frozenset(salt for salt in salts if len(salt) >= 8),
            identifiers=frozenset(name for table in tables for name in _identifiers(table)),
        )

    def found_in(self, name: str, content: Path | bytes, *, scans_may_be_named: bool = False) -> list[str]:
        """Kinds of what the file says and should not; `name` is its path in the repository."""
        kinds: set[str] = set()
        is_vocabulary = name.rpartition("/")[2] in VOCABULARIES
        for text in _texts(name, content):
            kinds |= self._known_in(text, is_vocabulary)
            if not is_vocabulary:
                kinds |= {
                    kind
                    for kind, pattern in ((PATH, _SAYS_PATH), (DICOM_UID, _UID), (DICOM_NAME, _PERSON))
                    if pattern.search(text)
                }
        if name.endswith((".json", ".jsonl", ".yaml", ".safetensors")) and not is_vocabulary:
            for key, value in _values(name, content):
                if value and key.lower() in _DICOM_FIELDS:
                    kinds.add(DICOM_FIELD)
                if _IS_PATH.fullmatch(value):
                    kinds.add(PATH)
                if _SCAN.fullmatch(value) and not scans_may_be_named:
                    kinds.add(SCAN)
        if name.endswith(".nii.gz") and _has_words(content):
            kinds.add(HEADER)
        return sorted(kinds)

    @cached_property
    def _phrase_lengths(self) -> set[int]:
        return {identifier.count(" ") + 1 for identifier in self.identifiers} - {1}

    def _known_in(self, text: str, is_vocabulary: bool) -> set[str]:
        kinds = {SALT for salt in self.salts if salt in text}
        kinds |= {HOME for home in self.homes if re.search(rf"(?<![\w.]){re.escape(home)}(?![\w-])", text)}
        if self.identifiers and not self.identifiers.isdisjoint(_words(text) | _phrases(text, self._phrase_lengths)):
            kinds.add(IDENTIFIER)
        if not is_vocabulary:
            kinds |= {USER for user in self.users if _says(text, user)}
            kinds |= {MACHINE for machine in self.machines if _says(text, machine)}
        return kinds


def _says(text: str, name: str) -> bool:
    return re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", text, re.IGNORECASE) is not None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return ""


@cache
def _ordinary_words() -> frozenset[str]:
    """Those of the files that go with every model: a user called "slice" is not betrayed by the word."""
    files = Path(reading_hsenet.__file__).parent.glob("*_hsenet.py")
    words = {word for path in files for word in re.findall(r"[a-z]+", path.read_text().lower())}
    return frozenset(words | {"admin", "docker", "home", "jovyan", "localhost", "root", "runner", "ubuntu", "user"})


def _telling(names: set[str], ordinary: Iterable[str]) -> set[str]:
    return {name for name in names if len(name) >= _SHORTEST and name.lower() not in ordinary}


def _identifiers(table: Path) -> Iterator[str]:
    """
    Of a table of names, those of patients and studies, the files' stems, and those of their folders that hold a digit,
    a caret or a comma: folders such as "train" are nobody's. Of any other file, its lines.
    """
    with table.open(newline="") as file:
        found = _of_table(csv.DictReader(file)) if table.name.endswith(".names.csv") else map(str.strip, file)
        for identifier in found:
            words = re.findall(r"[^\W_]+", identifier) if re.search(r"[\s^,]", identifier) else [identifier]
            # A short number is a number.
            if len("".join(words)) >= (6 if identifier.isdigit() else _SHORTEST):
                yield " ".join(words).lower()


def _of_table(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    for row in rows:
        yield from (row[column] for column in ("patient_id", "study_id") if row.get(column))
        *folders, stem = re.split(r"[/\\]", row["file"])
        yield _SUFFIX.sub("", stem)
        yield from (folder for folder in folders if re.search(r"[\d^,]", folder))


def _words(text: str) -> set[str]:
    """In lower case, parted at whatever may stand between an identifier and the rest."""
    text = text.lower()
    coarse = re.split(r"[\s\"'`/\\,;:()\[\]{}<>=|]+", text)
    return {
        *coarse,
        *(_SUFFIX.sub("", word) for word in coarse),
        *re.split(r"[^\w-]+", text),
        *re.split(r"[\W_]+", text),
    }


def _phrases(text: str, lengths: Iterable[int]) -> set[str]:
    """So many words in a row, in lower case, whatever stands between them."""
    words = re.findall(r"[^\W_]+", text.lower()) if lengths else []
    return {" ".join(words[start : start + n]) for n in lengths for start in range(len(words) - n + 1)}


def _texts(name: str, content: Path | bytes) -> Iterator[str]:
    if name.endswith(".safetensors"):
        yield json.dumps(_safetensors_header(content))
    elif name.endswith(".parquet"):
        yield from _parquet_texts(content)
    elif name.endswith(".png"):
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            yield repr({**image.info, **image.getexif()})
    elif not name.endswith(".nii.gz"):
        yield _bytes(content).decode("utf-8", errors="replace")


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _safetensors_header(content: Path | bytes) -> dict[str, Any]:
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def _parquet_texts(path: Path) -> Iterator[str]:
    """Schema metadata, and the strings of all columns, nested ones too; scans and pictures are passed over."""
    import pyarrow.parquet  # datasets need it; models do without

    file = pyarrow.parquet.ParquetFile(path)
    yield repr(file.schema_arrow.metadata)
    leaves = [file.schema.column(number) for number in range(len(file.schema.names))]
    wanted = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
    for batch in file.iter_batches(columns=wanted, batch_size=256) if wanted else ():
        yield json.dumps(batch.to_pylist(), ensure_ascii=False)


def _values(name: str, content: Path | bytes) -> Iterator[tuple[str, str]]:
    """Names and texts of a file of JSON or YAML, with those of all that is nested in it."""
    if name.endswith(".safetensors"):
        yield from _nested("", _safetensors_header(content).get("__metadata__", {}))
        return
    text = _bytes(content).decode("utf-8", errors="replace")
    if name.endswith(".yaml"):
        yield from _nested("", yaml.safe_load(text))
        return
    for part in text.splitlines() if name.endswith(".jsonl") else [text]:
        yield from _nested("", json.loads(part))


def _nested(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inside in value.items():
            yield "", str(key)
            yield from _nested(str(key), inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _nested(name, inside)
    elif value is not None:
        yield name, str(value)


def _has_words(path: Path) -> bool:
    """Whether a NIfTI header says more than geometry."""
    with gzip.open(path) as file:
        header = nibabel.Nifti1Header.from_fileobj(file)
    return bool(header.extensions) or any(header[field].tobytes().strip(b"\0 ") for field in _FREE_FIELDS)
