"""RadGenome-ChestCT (questions and region reports on CT-RATE's volumes) to a dataset that the training programs read.

    python datasets_scripts/build_radgenome_chestct.py --annotations /data/RadGenome-ChestCT \
        --corpus /data/CT-RATE --release ct-rate-v2 --output data/radgenome --volumes reference
    python datasets_scripts/build_radgenome_chestct.py \
        --annotations hf://datasets/RadGenome/RadGenome-ChestCT@COMMIT \
        --corpus hf://datasets/ibrahimhamamci/CT-RATE@COMMIT --release ct-rate-v2 --output data/radgenome

Run it again after an interruption: it goes on. Needs `pip install -e ".[corpora]"`.

Layout read: `dataset/radgenome_files/{train,validation}_vqa_{abnormality,location,presence,size}.csv` and
`..._region_report.csv`, with the columns `Volumename`, `Anatomy` (from large to small, `lung/lung/right lung`; blank:
the whole scan) and, by type, `Abnormality`, `Finding` and `Presence` ("Yes.", "No."), `Size` or `Sentence`. Reports,
labels, ages and scans are CT-RATE's: see build_ct_rate.py, also for the splits, which are the same for the same
`--seed` and `--validation`.

The corpus gives no questions in words: they are written here, one wording a type. The answer to "where" is the
`Anatomy` as it stands, as in the paper. The answer to a region report joins the region's sentences.

Not verified, without the corpus at hand: the columns of the region reports (seen only in a program that reads them),
the licence, and the intensities of the corpus' own resampled volumes (`*_preprocessed`), which is why they are not
read.
"""

import argparse
from collections.abc import Iterator
from functools import partial

from hsenet.corpora import Corpus, Plan, add_build_arguments, add_split_arguments, run
from hsenet.corpora.ct_rate import CITATION, RELEASES, ct_rate_facts, ct_rate_rows
from hsenet.corpora.tables import read_table, text_or_none


FOLDER = "dataset/radgenome_files"
PARTS = ("train", "validation")
# Type: columns, the question about a region, the question about the whole scan.
TYPES = {
    "abnormality": (("Abnormality",), "What is abnormal in the {region}?", "What is abnormal in this scan?"),
    "location": (("Abnormality",), "Where is the {finding}?", "Where is the {finding}?"),
    "presence": (
        ("Finding", "Presence"),
        "Is there {finding} in the {region}?",
        "Is there {finding} in this scan?",
    ),
    "size": (("Abnormality", "Size"), "How large is the {finding} in the {region}?", "How large is the {finding}?"),
}
WHOLE_SCAN = "whole scan"
REGION_QUESTIONS = ("Describe the {region}.", "Describe what this scan shows beside its single regions.")
NOTE = (
    "**Questions** are of RadGenome-ChestCT, in the wordings of the build script; `region` is the corpus' `Anatomy`. "
    "They are about one reconstruction of each study, mostly the first."
)


def questions(corpus: Corpus) -> Iterator[dict]:
    for part in PARTS:
        for kind, (columns, about_region, about_scan) in TYPES.items():
            name = f"{FOLDER}/{part}_vqa_{kind}.csv"
            for row in read_table(corpus, name, ("Volumename", "Anatomy", *columns)):
                anatomy = text_or_none(row["Anatomy"])
                finding = text_or_none(row.get("Abnormality") or row.get("Finding"))
                answer = {
                    "abnormality": finding,
                    "location": anatomy or WHOLE_SCAN,
                    "presence": (text_or_none(row.get("Presence")) or "").lower().rstrip("."),
                    "size": text_or_none(row.get("Size")),
                }[kind]
                if not finding or not answer:
                    continue  # a row without a finding asks nothing
                wording = about_region if anatomy else about_scan
                yield _question(row, kind, wording, answer, anatomy, finding)
        yield from _region_reports(corpus, part)


def _region_reports(corpus: Corpus, part: str) -> Iterator[dict]:
    sentences: dict[tuple[str, str | None], list[str]] = {}
    for row in read_table(corpus, f"{FOLDER}/{part}_region_report.csv", ("Volumename", "Anatomy", "Sentence")):
        if sentence := text_or_none(row["Sentence"]):
            sentences.setdefault((row["Volumename"], text_or_none(row["Anatomy"])), []).append(sentence)
    for (name, anatomy), texts in sentences.items():
        wording = REGION_QUESTIONS[0 if anatomy else 1]
        yield _question({"Volumename": name}, "region_report", wording, " ".join(texts), anatomy, None)


def _question(row: dict, kind: str, wording: str, answer: str, anatomy: str | None, finding: str | None) -> dict:
    region = (anatomy or WHOLE_SCAN).rpartition("/")[2]
    return {
        "volume_name": row["Volumename"].removesuffix(".nii.gz"),
        "question": wording.format(region=region, finding=finding),
        "answer": answer,
        "question_type": kind,
        "label": finding,
        "region": anatomy or WHOLE_SCAN,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_build_arguments(parser)
    add_split_arguments(parser)
    parser.add_argument("--annotations", required=True, help="local folder or hf:// URL of RadGenome-ChestCT")
    parser.add_argument("--release", choices=RELEASES, required=True, help="which of CT-RATE's volumes")
    arguments = parser.parse_args()
    corpus, annotations = Corpus(arguments.corpus), Corpus(arguments.annotations)
    rows, excluded = ct_rate_rows(corpus, arguments.release, arguments.validation, arguments.seed)
    asked = {question["volume_name"] for question in questions(annotations)}
    rows = [row for row in rows if row["volume_name"] in asked]
    excluded = [exclusion for exclusion in excluded if exclusion["volume_name"] in asked]
    citation = f"Zhang et al., [arXiv 2404.16754](https://arxiv.org/abs/2404.16754) (RadGenome-Chest CT); {CITATION}"
    facts = ct_rate_facts("build_radgenome_chestct.py", "RadGenome-ChestCT for HSENet", (NOTE,), citation)
    plan = Plan(rows, excluded, questions=partial(questions, annotations))
    splits = {"validation": arguments.validation, "seed": arguments.seed}
    run(plan, corpus, facts, arguments, release=arguments.release, **splits)


if __name__ == "__main__":
    main()
