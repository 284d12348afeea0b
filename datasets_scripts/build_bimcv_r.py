"""BIMCV-R (chest CTs with Spanish reports, translated) to a dataset that the training programs read.

    python datasets_scripts/build_bimcv_r.py --corpus /data/BIMCV-R --output data/bimcv_r
    python datasets_scripts/build_bimcv_r.py --corpus hf://datasets/cyd0806/BIMCV-R@COMMIT --output data/bimcv_r \
        --archives "*.zip" --table meta_1.zip::curated_ct_report_path_En.csv --spacing 3 1.5 1.5

Run it again after an interruption: it goes on. Needs `pip install -e ".[corpora]"`.

Layout read: scans `CT*/ct/*.nii.gz`, or in zip archives that match `--archives`, found by their file names;
`meta/curated_ct_report_path_En.csv` with `PatientID`, `ReportID`, `Report_en`, `Labels`, `Localizations` and, in
`ct_path` or else `path`, each scan's file name on the authors' machine. HU are the files' own. The corpus has no
splits that keep patients apart: test and validation are chosen by a hash of the patient. Its labels (96 terms, not
CT-RATE's 18) go to `details`. Files whose name says another body part than the chest (`_bp-...`) are left out.

Not verified, without the corpus at hand: the names of the archives on the Hub, whether scans of other body parts hide
under `bp-chest` (reports of abdomens and legs do; leave them out with `--exclude`), and the licence.
"""

import argparse
import ast
import json
import re
from typing import Any

from hsenet.corpora import CardFacts, Corpus, CorpusError, Plan, add_build_arguments, add_split_arguments, run
from hsenet.corpora.card import TAGS
from hsenet.corpora.marks import split_of
from hsenet.corpora.tables import read_table, text_or_none


TABLE = "meta/curated_ct_report_path_En.csv"
SCANS = "CT*/ct/*.nii.gz"
FACTS = CardFacts(
    script="build_bimcv_r.py",
    name="BIMCV-R for HSENet",
    license="other",
    terms="Those of BIMCV and of the corpus' page on the Hub, which every user has to accept; they were not at hand "
    "here. Keep the dataset private, and pass nothing of it on before you have read them.",
    source="https://huggingface.co/datasets/cyd0806/BIMCV-R",
    splits="By a hash of the patient, and of this package: the corpus has none that keep patients apart.",
    citation="Chen et al., [arXiv 2403.15992](https://arxiv.org/abs/2403.15992) (BIMCV-R).",
    what="Chest CT scans with their radiology reports, of BIMCV-R.",
    scans=("HU are the files' own. Some scans of other body parts may hide among those that are named chest.",),
    texts=(
        "Reports are machine translations from Spanish: `findings` holds the whole report. The corpus' own labels are "
        "in `details`.",
    ),
    tags=(*TAGS, "chest"),
)


def plan_rows(corpus: Corpus, table: str, archives: str | None, fractions: dict[str, float], seed: int) -> Plan:
    found = corpus.glob(SCANS) + (corpus.glob(f"{archives}::*.nii.gz") if archives else [])
    files = {name.rpartition("/")[2].rpartition("::")[2]: name for name in found}
    if not files:
        raise CorpusError(f"The corpus has no scans: expected {SCANS}, or archives and --archives.")
    plan, counts, seen = Plan([]), {}, set()
    for entry in read_table(corpus, table, ("PatientID", "ReportID", "Report_en", "path")):
        file = (text_or_none(entry.get("ct_path")) or entry["path"]).rpartition("/")[2]
        study = f"{entry['PatientID']}_{entry['ReportID']}"
        if file in seen:  # the table repeats some scans
            continue
        seen.add(file)
        counts[study] = counts.get(study, 0) + 1
        row = _row(entry, file, study, counts[study])
        row |= {"file": files.get(file), "split": split_of(entry["PatientID"], fractions, seed)}
        if reason := _reason(row, file):
            plan.excluded.append({"volume_name": row["volume_name"], "split": row["split"], "reason": reason})
        else:
            plan.rows.append(row)
    return plan


def _row(entry: dict[str, Any], file: str, study: str, number: int) -> dict[str, Any]:
    details = {name.lower(): _terms(entry.get(name)) for name in ("Labels", "Localizations")}
    return {
        "volume_name": file.removesuffix(".nii.gz"),
        "study_id": study,
        "patient_id": entry["PatientID"],
        "reconstruction": number,
        "findings": text_or_none(entry["Report_en"]),
        "impression": None,
        "details": json.dumps(details),
        "hu_slope": None,
        "hu_intercept": None,
    }


def _reason(row: dict[str, Any], file: str) -> str | None:
    part = re.search(r"_bp-([a-z]+)", file)
    if part and part[1] != "chest":
        return "not a chest scan"
    if not row["findings"]:
        return "no findings"
    return None if row["file"] else "no such file in the corpus"


def _terms(value: Any) -> list[str]:
    """A Python list in text, as the table writes it."""
    text = text_or_none(value)
    return sorted({term.strip() for term in ast.literal_eval(text)} - {""}) if text else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_build_arguments(parser)
    add_split_arguments(parser)
    parser.add_argument("--table", default=TABLE, help="the table; ARCHIVE.zip::NAME if it is in an archive")
    parser.add_argument("--archives", help="pattern of zip archives that hold scans")
    parser.add_argument("--test", type=float, default=0.1, help="share of the patients")
    arguments = parser.parse_args()
    corpus = Corpus(arguments.corpus)
    fractions = {"test": arguments.test, "validation": arguments.validation}
    plan = plan_rows(corpus, arguments.table, arguments.archives, fractions, arguments.seed)
    splits = {"validation": arguments.validation, "seed": arguments.seed}
    run(plan, corpus, FACTS, arguments, test=arguments.test, **splits)


if __name__ == "__main__":
    main()
