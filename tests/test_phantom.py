"""The phantoms are deterministic, true to their reports, and right where right is."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from card_validation import validate

from hsenet.card_checks import check_dataset_card, snippets
from hsenet.phantom import (
    CT_RATE_LABELS,
    ORIENTATIONS,
    PHANTOM_LABELS,
    _make_canvas,
    _store,
    nifti_bytes,
    render_study,
    sample_study,
)


SCRIPT = Path(__file__).parents[1] / "datasets_scripts" / "build_phantom.py"
STUDIES = [sample_study(0, index) for index in range(400)]
# What a reader would look for. A sentence without a word of negation that holds the term affirms the label.
TERMS = {
    "Medical material": r"catheter|port\b|central line|pacemaker|wires|suture",
    "Arterial wall calcification": r"atheromatous|atherosclero|arterial wall|wall of the thoracic aorta",
    "Cardiomegaly": r"cardiomegaly|heart is \w+ enlarged|heart size is \w+ increased",
    "Pericardial effusion": r"pericardial (effusion|fluid)",
    "Coronary artery wall calcification": r"coronary",
    "Hiatal hernia": r"hernia",
    "Lymphadenopathy": r"lymph",
    "Emphysema": r"emphysem",
    "Atelectasis": r"atelecta",
    "Lung nodule": r"nodule",
    "Lung opacity": r"ground.glass",
    "Pleural effusion": r"pleural( or pericardial| and pericardial)? effusion|pleural spaces? ?reaching",
    "Consolidation": r"consolidation",
}
NEGATION = re.compile(r"\b(no|not|free of|without)\b", re.IGNORECASE)


def centroid(image, label: str) -> np.ndarray:
    """Mean position of a finding in RAS+ mm."""
    voxels = np.argwhere(image.mask == 1 + CT_RATE_LABELS.index(label))
    return image.affine[:3, :3] @ voxels.mean(axis=0) + image.affine[:3, 3]


def find(label: str, **attributes):
    """(study, finding) pairs in which the finding has these attributes."""
    for study in STUDIES:
        for finding in study.findings:
            if finding.label == label and all(getattr(finding, key) == value for key, value in attributes.items()):
                yield study, finding


def test_the_same_seed_gives_the_same_bytes():
    first, second = (render_study(sample_study(3, 5, "test")) for _ in range(2))
    assert nifti_bytes(first.array, first.affine) == nifti_bytes(second.array, second.affine)
    assert nifti_bytes(first.mask, first.affine) == nifti_bytes(second.mask, second.affine)
    assert sample_study(3, 5, "test") == sample_study(3, 5, "test")
    assert sample_study(3, 5, "test") != sample_study(4, 5, "test")


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_stored_orientation_leaves_the_anatomy_where_it_is(orientation):
    study = STUDIES[0]
    canvas = _make_canvas(study.anatomy, np.random.default_rng(0), (12, 12, 20))
    volume = np.random.default_rng(1).integers(0, 9, canvas.shape).astype(np.int16)
    array, affine = _store(volume, canvas, np.array([1.0, 2.0, 3.0]), orientation)
    assert "".join(nib.aff2axcodes(affine)) == orientation
    canonical = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    np.testing.assert_array_equal(np.asarray(canonical.dataobj), volume.T)
    x, y, z = (axis[0] for axis in canvas.axes[::-1])
    np.testing.assert_allclose(canonical.affine[:3, 3], (x + 1, y + 2, z + 3))


@pytest.mark.parametrize("label", ["Pleural effusion", "Lung nodule", "Consolidation"])
@pytest.mark.parametrize(("side", "sign"), [("left", -1), ("right", 1)])
def test_left_is_left(label, side, sign):
    for study, _ in list(find(label, side=side))[:3]:
        assert sign * centroid(render_study(study), label)[0] > 15


def test_heart_and_liver_lie_where_they_should():
    study, _ = next(find("Cardiomegaly"))
    image = render_study(study)
    assert centroid(image, "Cardiomegaly")[0] < 0
    canonical = nib.as_closest_canonical(nib.Nifti1Image(image.array, image.affine))
    array = np.asarray(canonical.dataobj)
    middle, bottom = array.shape[0] // 2, array[:, :, 0]
    soft = (bottom > 0) & (bottom < 150)
    assert soft[middle:].sum() > soft[:middle].sum()  # the liver, right: increasing x in RAS
    spine, body = np.argwhere(array > 300)[:, 1].mean(), np.argwhere(soft)[:, 1].mean()
    assert spine < body  # posterior: y grows forward


def test_lower_lobe_lesions_lie_below_upper_lobe_lesions():
    heights = {
        lobe: [
            lesion.center[2] for _, finding in find("Lung nodule") for lesion in finding.lesions if lobe in lesion.lobe
        ]
        for lobe in ("upper", "lower")
    }
    assert np.mean(heights["upper"]) > np.mean(heights["lower"]) + 40


def test_every_finding_has_a_mask_in_every_reconstruction():
    for study in STUDIES[:30]:
        for reconstruction in range(1, study.num_reconstructions + 1):
            image = render_study(study, reconstruction)
            assert image.array.shape == image.mask.shape and image.array.dtype == np.int16
            drawn = {CT_RATE_LABELS[value - 1] for value in np.unique(image.mask) if value}
            assert drawn == {finding.label for finding in study.findings}, study.volume_name(reconstruction)


def test_reconstructions_show_the_same_lesion_on_other_grids():
    study = next(s for s, finding in find("Consolidation", count=1) if s.num_reconstructions == 2)
    first, second = render_study(study, 1), render_study(study, 2)
    assert np.abs(centroid(first, "Consolidation") - centroid(second, "Consolidation")).max() < 5
    assert not np.allclose(nib.affines.voxel_sizes(first.affine), nib.affines.voxel_sizes(second.affine))
    with pytest.raises(ValueError, match="1 to 2, got 3"):
        render_study(study, 3)


def test_attenuations_are_those_of_a_chest():
    study = next(s for s in STUDIES if not s.findings)
    array = render_study(study).array
    assert -1030 < np.median(array[(array < -950) & (array > -1100)]) < -970
    assert -930 < np.median(array[(array > -940) & (array < -700)]) < -780
    soft = array[(array > 0) & (array < 120)]
    assert 25 < np.median(soft) < 80
    assert (array > 200).mean() > 0.005  # bone


def test_size_is_drawn_as_reported():
    study, finding = next((s, f) for s, f in find("Lung nodule", count=1, kind="smooth") if f.size_mm >= 20)
    image = render_study(study, spacing=(2.5, 2.5, 3))
    volume = (image.mask == 1 + CT_RATE_LABELS.index("Lung nodule")).sum() * abs(np.linalg.det(image.affine[:3, :3]))
    diameter = (6 * volume / np.pi) ** (1 / 3)
    assert 0.75 * finding.size_mm < diameter < 1.15 * finding.size_mm


def test_reports_say_what_is_there_and_nothing_else():
    for study in STUDIES:
        sentences = study.findings_text.split(". ")
        present = {finding.label for finding in study.findings}
        for label in PHANTOM_LABELS:
            said = [text for text in sentences if re.search(TERMS[label], text, re.IGNORECASE)]
            affirmed = [text for text in said if not NEGATION.search(text)]
            denied = [text for text in said if NEGATION.search(text)]
            if label in present:
                assert affirmed and not denied, (label, study.findings_text)
            else:
                assert not affirmed, (label, study.findings_text)
        for finding in study.findings:
            if finding.label in ("Consolidation", "Lung nodule", "Atelectasis"):
                assert finding.lobe in study.findings_text
            if finding.label == "Pleural effusion" and finding.side != "bilateral":
                assert finding.side in study.findings_text


def test_labels_vary_as_they_should():
    labels = np.array([study.labels for study in STUDIES])
    prevalence = dict(zip(CT_RATE_LABELS, labels.mean(axis=0), strict=True))
    assert len(PHANTOM_LABELS) >= 10
    assert all(0.08 < prevalence[label] < 0.4 for label in PHANTOM_LABELS)
    assert (labels.sum(axis=1) <= 1).mean() > 0.25 and (labels.sum(axis=1) >= 4).mean() > 0.15
    assert len({study.findings_text for study in STUDIES}) > 0.98 * len(STUDIES)


def test_questions_are_balanced_and_agree_with_the_labels():
    answers = []
    for study in STUDIES:
        findings = {finding.label: finding for finding in study.findings}
        for question in study.questions:
            if question.question_type == "presence" and "side" not in question.question:
                assert (question.answer == "yes") == (question.label in findings)
            if question.question_type == "presence":
                answers.append(question.answer == "yes")
            if question.question_type in ("location", "size"):
                assert question.label in findings
    assert 0.44 < np.mean(answers) < 0.56


def test_splits_share_no_patient_and_second_studies_keep_chronic_findings():
    patients = [{sample_study(0, index, split).patient_id for index in range(40)} for split in ("train", "test")]
    assert not patients[0] & patients[1]
    assert len(patients[0]) == 35
    first, second = sample_study(0, 6), sample_study(0, 7)
    assert first.patient_id == second.patient_id and first.sex == second.sex
    assert (first.study_id[-1], second.study_id[-1]) == ("a", "b")
    assert sample_study(0, 3, "train").findings_text != sample_study(0, 3, "test").findings_text


def arguments(output: Path, workers: int, seed: int = 0) -> list[str]:
    sizes = ["--train-studies", "4", "--validation-studies", "1", "--test-studies", "1"]
    # Coarse voxels: these tests are about files.
    rest = ["--seed", str(seed), "--workers", str(workers), "--spacing", "11", "11", "18"]
    return ["--output", str(output), *sizes, *rest]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_phantom", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A data set built by the script as users run it, with two workers."""
    output = tmp_path_factory.mktemp("phantom") / "data"
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments(output, 2)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def test_build_loads_with_datasets(built, tmp_path, monkeypatch, capsys):
    from datasets import load_dataset

    monkeypatch.chdir(built)
    card = (built / "README.md").read_text()
    assert check_dataset_card(card) == [] and validate(card, "dataset") == ([], [])
    (snippet,) = snippets(card)
    exec(snippet, {})

    reports = load_dataset(str(built), "reports", cache_dir=str(tmp_path))
    vqa = load_dataset(str(built), "vqa", cache_dir=str(tmp_path))
    assert set(reports) == set(vqa) == {"train", "validation", "test"}
    assert len(set(reports["train"]["study_id"])) == 4
    for row in reports["train"]:
        image, mask = (nib.load(built / row[column]) for column in ("volume", "mask"))
        assert image.shape == mask.shape and image.get_data_dtype() == np.int16
        np.testing.assert_allclose(image.affine, mask.affine)
        assert {finding["label"] for finding in json.loads(row["details"])} == {
            label for label, present in zip(CT_RATE_LABELS, row["labels"], strict=True) if present
        }
    assert reports["train"][0]["findings"] in capsys.readouterr().out
    texts = {(row["study_id"], row["findings"], row["impression"]) for row in reports["train"]}
    assert len(texts) == 4  # two reconstructions of a study share its report
    assert all((built / volume).exists() for volume in vqa["train"]["volume"])


def test_build_is_the_same_with_one_worker_and_after_an_interruption(built, builder, tmp_path, monkeypatch):
    output = tmp_path / "data"
    command = ["build_phantom.py", *arguments(output, 1)]
    monkeypatch.setattr(sys, "argv", command)
    builder.main()
    complete = contents(output)
    assert complete == contents(built)

    # As after a kill: one volume is missing, another was being written, the tables are not there yet.
    next(output.glob("volumes/train/*.nii.gz")).unlink()
    (output / "volumes/train/.train_9_a_1.nii.gz.77.partial").write_bytes(b"half")
    (output / "reports/train.parquet").unlink()
    builder.main()
    assert contents(output) == complete

    # What somebody wrote into the card, too.
    card = output / "README.md"
    text = card.read_text().replace("<!-- uses", "Mine.\n\n<!-- uses", 1).replace("pretty_name: ", "pretty_name: My ")
    card.write_text(text.replace("## Columns", "## Col"))
    builder.main()
    text = card.read_text()
    assert text.count("Mine.") == 1 and "pretty_name: My" in text and text.count("## Columns") == 1


def test_build_refuses_a_folder_built_otherwise(built, builder, tmp_path, monkeypatch):
    before = contents(built)
    monkeypatch.setattr(sys, "argv", ["build_phantom.py", *arguments(built, 1, seed=1)])
    with pytest.raises(SystemExit, match="was built with"):
        builder.main()
    assert contents(built) == before

    (tmp_path / "thesis.txt").write_text("not ours")
    monkeypatch.setattr(sys, "argv", ["build_phantom.py", *arguments(tmp_path, 1)])
    with pytest.raises(SystemExit, match="not empty"):
        builder.main()
