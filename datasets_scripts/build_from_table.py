"""Any table of scans and texts to a dataset that the training programs read.

    python datasets_scripts/build_from_table.py --table scans.csv --corpus /data/scans --output data/mine \
        --path-column file --text-column report --patient-column patient --license cc-by-4.0

Run it again after an interruption: it goes on. Needs `pip install -e ".[corpora]"`.

`--table` is a CSV (UTF-8, with a header) or Parquet file; its paths are relative to `--corpus` and name NIfTI files or
folders of one DICOM CT series (these only of a local corpus), which are in HU by their own headers, or by the columns
`--slope-column` and `--intercept-column`. Patients stay in one split: that of `--split-column` (train, validation,
test), or one chosen by a hash.

Names may be of patients, so the dataset holds pseudonyms of patients, studies and paths instead, and no age above 90;
their key lies beside it, in `OUTPUT.salt`, and `OUTPUT.names.csv` says which volume is which file: don't share these.
`--no-deidentify` keeps the names, and `--volumes reference`, whose rows hold the paths, needs it. Texts are taken over
as they are: whether they identify anybody is yours to check before anything is shared.

What a DICOM folder or file leaves open is refused, unless `--reading '{"series": "largest", "resample": true}'` gives
options of `read_volume` for all scans.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from hsenet.corpora import CardFacts, Corpus, CorpusError, Plan, add_build_arguments, add_split_arguments, run
from hsenet.corpora.marks import SPLITS, split_of
from hsenet.corpora.shards import read_file
from hsenet.corpora.tables import age_in_years, number_or_none, read_table, sex_or_none, text_or_none
from reading_hsenet import ReadOptions


OPTIONAL = ("impression", "study", "split", "age", "sex", "clinical-information", "slope", "intercept")


def plan_rows(entries: list[dict[str, Any]], columns: dict[str, str | None], fractions: dict, seed: int) -> Plan:
    """`columns`: the table's column for each of our names."""
    plan, counts = Plan([]), {}
    for number, entry in enumerate(entries, start=1):
        value = {name: entry[column] if column else None for name, column in columns.items()}
        path = text_or_none(value["path"])
        if path is None or Path(path).is_absolute() or ".." in Path(path).parts:
            raise CorpusError(
                f"Row {number} of the table has no path relative to --corpus: expected one, without '..'."
            )
        name = path.replace("/", "_")
        patient = str(value["patient"]) if columns["patient"] else name
        study = str(value["study"]) if columns["study"] else name
        counts[study] = counts.get(study, 0) + 1
        row = {
            "file": path,
            "volume_name": name.removesuffix(".gz").removesuffix(".nii"),
            "study_id": study,
            "patient_id": patient,
            "reconstruction": counts[study],
            "age": age_in_years(value["age"]),
            "sex": sex_or_none(value["sex"]),
            "clinical_information": text_or_none(value["clinical-information"]),
            "findings": text_or_none(value["text"]),
            "impression": text_or_none(value["impression"]),
            "hu_slope": number_or_none(value["slope"]),
            "hu_intercept": number_or_none(value["intercept"]),
            "split": _split(value["split"], number) if columns["split"] else split_of(patient, fractions, seed),
        }
        if row["findings"]:
            plan.rows.append(row)
        else:
            exclusion = {"volume_name": row["volume_name"], "split": row["split"], "reason": "no findings"}
            plan.excluded.append(exclusion)
    names = [row["volume_name"] for row in plan.rows]
    if len(set(names)) < len(names):
        raise CorpusError(f"{len(names) - len(set(names))} rows of the table repeat a path: expected one row a scan.")
    return plan


def _split(value: Any, number: int) -> str:
    if value not in SPLITS:
        raise CorpusError(f"Row {number} of the table has no split: expected one of {', '.join(SPLITS)}.")
    return value


def _reading(text: str | None) -> dict[str, Any]:
    """Options of the reader, without those that the table's columns decide."""
    options = json.loads(text) if text else {}
    if {"hu_source", "rescale"} & options.keys():
        raise SystemExit("--slope-column and --intercept-column say what turns values into HU, not --reading.")
    try:
        ReadOptions(**options)
    except TypeError as error:
        raise SystemExit(f"--reading: {error}") from None
    return options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_build_arguments(parser)
    add_split_arguments(parser)
    parser.add_argument("--test", type=float, default=0.1, help="share of the patients")
    parser.add_argument("--table", type=Path, required=True, help="CSV or Parquet file")
    parser.add_argument("--path-column", required=True)
    parser.add_argument("--text-column", required=True, help="becomes `findings`")
    patients = parser.add_mutually_exclusive_group(required=True)
    patients.add_argument("--patient-column")
    patients.add_argument("--one-patient-per-row", action="store_true", help="no patient has two scans")
    for name in OPTIONAL:
        parser.add_argument(f"--{name}-column")
    parser.add_argument("--reading", metavar="JSON", help="options of read_volume for all scans")
    parser.add_argument("--name", default="CT scans with reports", help="of the dataset, for the card")
    parser.add_argument("--license", default="other", help="the Hub's identifier, for the card")
    parser.add_argument(
        "--terms",
        default="Not stated: ask for them before anything is passed on.",
        help="what users may do, for the card",
    )
    parser.set_defaults(deidentify=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    columns = {
        name: getattr(arguments, f"{name.replace('-', '_')}_column") for name in ("path", "text", "patient", *OPTIONAL)
    }
    if bool(columns["slope"]) != bool(columns["intercept"]):
        raise SystemExit("--slope-column and --intercept-column belong together: give both, or neither.")
    corpus = Corpus(arguments.corpus)
    asked = tuple(column for column in columns.values() if column)
    entries = read_table(Corpus(str(arguments.table.resolve().parent)), arguments.table.name, asked)
    fractions = {"test": arguments.test, "validation": arguments.validation}
    plan = plan_rows(entries, columns, fractions, arguments.seed)
    reading = _reading(arguments.reading)
    if reading and arguments.volumes == "reference":
        raise SystemExit("--reading is for scans that are read once, while building: use --volumes nifti.")
    plan.read = partial(read_file, reading=reading)
    splits = "By a hash of the patient." if not columns["split"] else "Those of the table's own column."
    facts = CardFacts(
        script="build_from_table.py",
        name=arguments.name,
        license=arguments.license,
        terms=arguments.terms,
        source="a table",
        splits=splits,
        citation="Nobody is named.",
        scans=("Values are HU by the files' own headers, or by the table's slope and intercept.",),
    )
    names = ("test", "validation", "seed")
    parameters = {**{name: getattr(arguments, name) for name in names}, "columns": sorted(asked), "reading": reading}
    run(plan, corpus, facts, arguments, **parameters)


if __name__ == "__main__":
    main()
