"""The scanner finds what is planted, in rows and in datasets on disk."""

import importlib.util
import json
import sys
from pathlib import Path

import corpora
import numpy as np
import pytest
from datasets import Features

from hsenet.corpora.leakage import Leak, find_leaks, leakage_table
from hsenet.corpora.marks import mark, split_of
from hsenet.corpora.parquet import write_rows
from hsenet.corpora.schema import REPORT_FEATURES
from hsenet.corpora.volumes import has_blank_header
from hsenet.digests import content_hash
from hsenet.phantom import nifti_bytes
from reading_hsenet import read_volume


def row(number: int, split: str = "train", **changes) -> dict:
    return {
        "split": split,
        "volume_name": f"v{number}",
        "study_id": f"s{number}",
        "patient_id": f"p{number}",
        "reconstruction": 1,
        "findings": f"Finding {number}.",
        "impression": None,
        "content_hash": f"h{number}",
        **changes,
    }


CLEAN = [row(1), row(2), row(3, "validation"), row(4, "test"), row(5, patient_id="p1")]


def test_what_is_planted_is_found_and_nothing_else():
    assert find_leaks(CLEAN) == []
    sibling = row(6, study_id="s1", findings="Finding 1.", patient_id="p1")
    assert find_leaks([*CLEAN, sibling]) == []  # shares a report and a patient, as it should
    planted = [
        row(7, "test", patient_id="p2"),
        row(8, "test", content_hash="h3"),
        row(9, findings="FINDING  4."),
        row(10, content_hash="h1"),
    ]
    assert find_leaks([*CLEAN, *planted]) == [
        Leak("patient", ("test", "train"), ("v2", "v7")),
        Leak("report", ("test", "train"), ("s4", "s9")),
        Leak("volume", ("test", "validation"), ("v3", "v8")),
        Leak("volume", ("train",), ("v1", "v10")),
    ]
    table = leakage_table(find_leaks([*CLEAN, *planted]), scans_hashed=True)
    assert "| scans with the same voxels under several names | 1 | 1 |" in table
    assert "not looked for" in leakage_table([], scans_hashed=False)


def test_a_scan_is_the_same_however_it_is_stored(tmp_path):
    array, affine = corpora.scan(0)
    turned = affine.copy()
    turned[:3, 3] += turned[:3, 0] * (array.shape[0] - 1)
    turned[:3, 0] *= -1
    hashes = set()
    for name, content in (("a", nifti_bytes(array, affine)), ("b", nifti_bytes(array[::-1].copy(), turned))):
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(content)
        assert not has_blank_header(path)
        hashes.add(content_hash(read_volume(path)))
    assert len(hashes) == 1
    changed = array.copy()
    changed[5, 5, 5] += 1
    assert content_hash(read_volume(changed, affine=affine)) not in hashes
    (tmp_path / "blank.nii.gz").write_bytes(corpora.blank_nifti(0))
    assert has_blank_header(tmp_path / "blank.nii.gz")
    (tmp_path / "identity.nii.gz").write_bytes(nifti_bytes(array, np.eye(4)))
    assert has_blank_header(tmp_path / "identity.nii.gz")


def test_patients_keep_their_split_whoever_else_comes():
    fractions = {"test": 0.2, "validation": 0.1}
    splits = [split_of(f"p{number}", fractions, seed=0) for number in range(4000)]
    assert splits == [split_of(f"p{number}", fractions, seed=0) for number in range(4000)]
    assert splits.count("test") / 4000 == pytest.approx(0.2, abs=0.02)
    assert splits.count("validation") / 4000 == pytest.approx(0.1, abs=0.02)
    assert splits != [split_of(f"p{number}", fractions, seed=1) for number in range(4000)]


def test_marks_name_the_first_study_in_the_most_held_out_split():
    rows = [row(1, "train", findings="Same."), row(2, "test", findings="same."), row(3, "test", study_id="s2")]
    marked = {entry["volume_name"]: entry for entry in mark(rows)}
    assert (marked["v1"]["duplicate_of"], marked["v2"]["duplicate_of"]) == ("s2", None)
    assert (marked["v3"]["sibling_of"], marked["v2"]["sibling_of"]) == ("v2", None)


@pytest.mark.parametrize("leaks", [False, True])
def test_program_ends_with_1_if_splits_share_a_patient_or_a_scan(leaks, tmp_path, monkeypatch, capsys):
    """On a dataset without hashes, whose scans it reads."""
    data = tmp_path / "data"
    for split, index in (("train", 0), ("test", 0 if leaks else 1)):
        corpora.write(data / f"{split}.nii.gz", corpora.nifti(index))
        number = 1 if split == "train" else 2
        rows = [row(number, volume=f"{split}.nii.gz", content_hash=None)]
        write_rows(data / f"reports/{split}.parquet", rows, Features(REPORT_FEATURES))
    splits = "".join(f"  - {{split: {split}, path: reports/{split}.parquet}}\n" for split in ("train", "test"))
    corpora.write(data / "README.md", f"---\nconfigs:\n- config_name: reports\n  data_files:\n{splits}---\n")
    path = Path(__file__).parents[1] / "datasets_scripts/scan_leakage.py"
    spec = importlib.util.spec_from_file_location("scan_leakage", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    found = tmp_path / "leakage.json"
    monkeypatch.setattr(sys, "argv", ["scan_leakage", str(data), "--hash-scans", "--output", str(found)])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert bool(end.value.code) == leaks
    assert f"under several names | {int(leaks)} | 0 |" in capsys.readouterr().out
    assert [leak["names"] for leak in json.loads(found.read_text())] == ([["v1", "v2"]] if leaks else [])
