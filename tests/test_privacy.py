"""Names planted in paths, tables and headers, followed through a build, a search for leaks and a training step.

A patient's name, record number, birth date and accession number lie wherever a hospital's files may hold them. They
must be in nothing that is written or said, except the two files beside the dataset that are its owner's key.
"""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import corpora
import nibabel
import numpy as np
import pyarrow.parquet
import pytest
import scans
import tiny
from test_corpora import build, rows_of

from hsenet.corpora import CorpusError
from hsenet.corpora.schema import REPORT
from hsenet.scans import read_scan
from reading_hsenet import read_volume


ROOT = Path(__file__).parent.parent
CANARIES = ("Zwanzig", "MRN4711", "19470229", "ACC0815")
LOUD = "import logging, runpy, sys; logging.basicConfig(level=logging.DEBUG); sys.argv = sys.argv[1:]; "
LOUD += "runpy.run_path(sys.argv[0], run_name='__main__')"


def nifti(index: int) -> bytes:
    array, affine = corpora.scan(index)
    image = nibabel.Nifti1Image(array, affine)
    image.header["descrip"], image.header["db_name"] = CANARIES[0], CANARIES[1]
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", " ".join(CANARIES).encode()))
    return gzip.compress(image.to_bytes())


def dicom(folder: Path, index: int) -> None:
    """A series, and a shorter one beside it."""
    array, affine = corpora.scan(index)
    series = read_volume(array, affine=affine).array
    tags = {"PatientName": CANARIES[0], "PatientID": CANARIES[1], "PatientBirthDate": CANARIES[2]}
    tags |= {"AccessionNumber": CANARIES[3], "SeriesDescription": " ".join(CANARIES), "StudyID": CANARIES[3]}
    folder.mkdir(parents=True)
    for part in (series, series[:9]):
        scans.write_series(folder, part, **tags)
    for path in list(folder.iterdir()):
        path.rename(folder / f"{CANARIES[0]}_{path.name}")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hospital")
    rows = []
    for number in range(8):
        file = f"{CANARIES[0]}_{number}/{CANARIES[3]}{number}" + (".nii.gz" if number else "")
        if number:
            corpora.write(folder / "scans" / file, nifti(number)[: -200 if number == 7 else None])
        else:
            dicom(folder / "scans" / file, number)
        split = ("train", "train", "validation", "test")[number % 4]
        who = {"who": f"{CANARIES[0]}^Max {number}", "accession": f"{CANARIES[3]}{number}", "born": CANARIES[2]}
        who["report"] = corpora.study(number).findings_text
        rows.append(
            {"file": file, **who, "report": corpora.study(number).findings_text, "set": split, "age": 88 + number}
        )
    (folder / "table.csv").write_text(corpora.table(rows))
    return folder


def arguments(hospital: Path, output: Path) -> list[str]:
    columns = {"path": "file", "text": "report", "patient": "who", "study": "accession", "split": "set", "age": "age"}
    options = [word for name, column in columns.items() for word in (f"--{name}-column", column)]
    options += ["--table", hospital / "table.csv", "--corpus", hospital / "scans", "--output", output]
    options += ["--reading", json.dumps({"series": "largest"})]
    return [str(option) for option in options]


def run_loudly(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    whole = [sys.executable, "-c", LOUD, *map(str, command)]
    return subprocess.run(whole, capture_output=True, text=True, cwd=cwd, env=environment)


def texts_of(path: Path) -> bytes:
    """What a file holds, unpacked as far as it is packed."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
        scan_bytes = [gzip.decompress(row["volume"]["bytes"]) for row in rows if isinstance(row.get("volume"), dict)]
        named = [row["volume"]["path"] for row in rows if isinstance(row.get("volume"), dict)]
        others = [{name: value for name, value in row.items() if name not in ("volume", "image")} for row in rows]
        return b"\0".join([content, repr((others, named)).encode(), *scan_bytes])
    return content


def leaks(*folders: Path) -> list[tuple[str, str]]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    return [(name, str(path)) for path in files for name in CANARIES if name.encode() in texts_of(path) + bytes(path)]


@pytest.fixture(scope="module")
def built(hospital, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    script = ROOT / "datasets_scripts/build_from_table.py"
    failed = run_loudly(script, *arguments(hospital, folder / "data"), "--workers", "1", cwd=folder)
    assert failed.returncode == 1 and "1 scans could not be read" in failed.stderr
    options = [*arguments(hospital, folder / "data"), "--workers", "1", "--allow-unreadable", "1"]
    done = run_loudly(script, *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    for output in (failed, done):
        assert not [name for name in CANARIES if name in output.stdout + output.stderr]
    return folder


def test_nothing_in_the_dataset_names_anybody(built, hospital):
    assert leaks(built / "data") == []
    rows = rows_of(built / "data")
    assert len(rows) == 7 and set(REPORT) <= rows[0].keys()
    assert len({row["patient_id"] for row in rows}) == 7
    assert sorted(row["age"] for row in rows) == [88, 89, *[90] * 5]
    with (built / "data.names.csv").open(newline="") as file:
        key = {row["volume_name"]: row["file"] for row in csv.DictReader(file)}
    for row in rows:  # the key leads the owner back
        number = int(Path(key[row["volume_name"]]).parent.name.rpartition("_")[2])
        array, affine = corpora.scan(number)
        np.testing.assert_array_equal(read_scan(row).array, read_volume(array, affine=affine).array)
    assert row["volume_name"] not in (built / "data/excluded.csv").read_text()
    for name in ("data.names.csv", "data.salt"):
        assert (built / name).stat().st_mode & 0o077 == 0


def test_nothing_that_training_writes_or_says_names_anybody(built, tmp_path):
    text_encoder = tmp_path / "text"
    tiny.clip_model().text_model.save_pretrained(text_encoder)
    tiny.tokenizer(pad_token="[PAD]", cls_token="[CLS]").save_pretrained(text_encoder)
    command = [ROOT / "train/stage1.py", "--text_encoder", text_encoder, "--vision_config", json.dumps(tiny.VISION)]
    command += ["--max_length", "64", "--projection_dim", "16", "--max_steps", "1", "--batch_size", "2"]
    command += ["--dataset", built / "data", "--output_dir", tmp_path / "model", "--cache_dir", tmp_path / "cache"]
    done = run_loudly(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [name for name in CANARIES if name in done.stdout + done.stderr]
    assert leaks(tmp_path) == []


def test_paths_in_a_dataset_need_to_be_asked_for(hospital, tmp_path):
    options = arguments(hospital, tmp_path / "data")
    reference = [option for option in options if option != "--reading" and "series" not in option]
    with pytest.raises(SystemExit, match="--no-deidentify"):
        build("build_from_table", *reference, "--volumes", "reference")
    with pytest.raises(SystemExit, match="--reading"):
        build("build_from_table", *options, "--volumes", "reference", "--no-deidentify")
    build("build_from_table", *options, "--no-deidentify", "--allow-unreadable", "1")
    assert leaks(tmp_path / "data") != []  # so the other tests can fail


@pytest.mark.parametrize(("reading", "word"), [({"colour": 1}, "colour"), ({"hu_source": "identity"}, "slope-column")])
def test_wrong_options_of_the_reader(hospital, tmp_path, reading, word):
    options = [*arguments(hospital, tmp_path / "data"), "--reading", json.dumps(reading)]
    with pytest.raises(SystemExit, match=word):
        build("build_from_table", *options)


def test_a_table_value_is_not_repeated_in_an_error(hospital, tmp_path):
    options = [*arguments(hospital, tmp_path / "data"), "--slope-column", "who", "--intercept-column", "who"]
    with pytest.raises(CorpusError, match="a number is expected") as error:
        build("build_from_table", *options)
    assert not [name for name in CANARIES if name in str(error.value)]
