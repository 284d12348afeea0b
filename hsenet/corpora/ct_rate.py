"""CT-RATE as published: its names, its tables, and the two releases of its volumes."""

import re
from typing import Any

from hsenet.phantom import CT_RATE_LABELS

from .card import TAGS, CardFacts
from .marks import split_of
from .source import Corpus, CorpusError
from .tables import age_in_years, number_or_none, read_table, sex_or_none, text_or_none


NAME = re.compile(r"((train|valid)_[0-9]+)_([a-z]+)_([0-9]+)")  # split, patient, study, reconstruction
# Release: folder of each of the corpus' splits, and whether it takes the metadata to turn the values into HU.
RELEASES = {
    "ct-rate-v1": ({"train": "train", "valid": "valid"}, True),
    "ct-rate-v2": ({"train": "train_fixed", "valid": "valid_fixed"}, False),
}
TABLES = {
    "train": {
        "reports": "dataset/radiology_text_reports/train_reports.csv",
        "labels": "dataset/multi_abnormality_labels/train_predicted_labels.csv",
        "metadata": "dataset/metadata/train_metadata.csv",
        "no_chest": "dataset/metadata/no_chest_train.txt",
    },
    "valid": {
        "reports": "dataset/radiology_text_reports/validation_reports.csv",
        "labels": "dataset/multi_abnormality_labels/valid_predicted_labels.csv",
        "metadata": "dataset/metadata/validation_metadata.csv",
        "no_chest": "dataset/metadata/no_chest_valid.txt",
    },
}
TERMS = (
    "CC-BY-NC-SA 4.0, and the corpus' own terms, which every user has to accept on the Hub: no commercial use, no "
    "attempt to identify anybody, no redistribution. Keep the dataset private."
)
CITATION = "Hamamci et al., [arXiv 2403.17834](https://arxiv.org/abs/2403.17834) (CT-RATE)."


def ct_rate_facts(script: str, name: str, texts: tuple[str, ...] = (), citation: str = CITATION) -> CardFacts:
    source = "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE"
    return CardFacts(
        script=script,
        name=name,
        license="cc-by-nc-sa-4.0",
        terms=TERMS,
        source=source,
        splits="`test` is CT-RATE's validation split, the one that papers report on; `validation` are training "
        "patients, chosen by a hash of the patient's name, to select models on.",
        citation=citation,
        what="Chest CT scans with their radiology reports and 18 findings, of CT-RATE.",
        scans=("Scans whose headers are blank are left out: nothing else says which side is left.",),
        texts=(
            "Reports are the corpus' English ones. Labels are those that CT-RATE's authors predicted from the "
            "reports: they are no reading of the scans. One row is one reconstruction; `sibling_of` marks the further "
            "ones of a study.",
            *texts,
        ),
        tags=(*TAGS, "chest"),
    )


def ct_rate_rows(
    corpus: Corpus, release: str, validation: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """
    Rows of all volumes with a report, and what is left out: scans of other body parts, volumes without findings.

    Raises:
        CorpusError: a table or a column is missing, a name is not of CT-RATE's form, or stored values lack what turns
            them into HU.
    """
    rows, excluded = [], []
    for part in TABLES:
        tables = _read_part(corpus, part)
        for name, report in tables["reports"].items():
            row = _row(name, report, tables, release)
            row["split"] = "test" if part == "valid" else split_of(row["patient_id"], {"validation": validation}, seed)
            reason = "not a chest scan" if name in tables["no_chest"] else None if row["findings"] else "no findings"
            if reason:
                excluded.append({"volume_name": name, "split": row["split"], "reason": reason})
                continue
            if RELEASES[release][1] and None in (row["hu_slope"], row["hu_intercept"]):
                excluded.append({"volume_name": name, "split": row["split"], "reason": "no rescaling in the metadata"})
                continue
            rows.append(row)
    return rows, excluded


def _read_part(corpus: Corpus, part: str) -> dict[str, Any]:
    """The part's tables by volume name, and the names of scans of other body parts."""
    paths = TABLES[part]
    return {
        "reports": _by_name(corpus, paths["reports"], ("Findings_EN", "Impressions_EN")),
        "labels": _by_name(corpus, paths["labels"], CT_RATE_LABELS),
        "metadata": _by_name(corpus, paths["metadata"], ("RescaleSlope", "RescaleIntercept")),
        "no_chest": {_bare(line.rpartition("/")[2]) for line in corpus.read(paths["no_chest"]).decode().split()},
    }


def _by_name(corpus: Corpus, path: str, columns: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_table(corpus, path, ("VolumeName", *columns)), start=1):
        name = _bare(row["VolumeName"])
        if NAME.fullmatch(name) is None:
            raise CorpusError(
                f"Row {number} of {path} names no volume of CT-RATE's form: expected such as train_12_a_1.nii.gz."
            )
        if rows.setdefault(name, row) != row:
            raise CorpusError(f"{path} has two different rows of one volume, the later is row {number}.")
    return rows


def _bare(name: str) -> str:
    return name.strip().removesuffix(".nii.gz")


def _row(name: str, report: dict, tables: dict[str, dict], release: str) -> dict[str, Any]:
    patient, part, study, reconstruction = NAME.fullmatch(name).groups()
    folders, stored_values = RELEASES[release]
    metadata, labels = tables["metadata"].get(name, {}), tables["labels"].get(name)
    return {
        "file": f"dataset/{folders[part]}/{patient}/{patient}_{study}/{name}.nii.gz",
        "volume_name": name,
        "study_id": f"{patient}_{study}",
        "patient_id": patient,
        "reconstruction": int(reconstruction),
        "age": age_in_years(metadata.get("PatientAge")),
        "sex": sex_or_none(metadata.get("PatientSex")),
        "clinical_information": text_or_none(report.get("ClinicalInformation_EN")),
        "technique": text_or_none(report.get("Technique_EN")),
        "findings": text_or_none(report["Findings_EN"]),
        "impression": text_or_none(report["Impressions_EN"]),
        "labels": None if labels is None else _label_vector(labels),
        # The second release is in HU already: the metadata would be a second rescaling.
        "hu_slope": number_or_none(metadata.get("RescaleSlope")) if stored_values else None,
        "hu_intercept": number_or_none(metadata.get("RescaleIntercept")) if stored_values else None,
    }


def _label_vector(labels: dict[str, Any]) -> list[int] | None:
    """0 or 1 for each finding, None if one of them is blank."""
    values = [number_or_none(labels[label]) for label in CT_RATE_LABELS]
    return None if None in values else [int(value) for value in values]
