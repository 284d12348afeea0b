"""M3D-Cap (Radiopaedia cases: pictures of slices, with texts) to a dataset that the training programs read.

    python datasets_scripts/build_m3d_cap.py --corpus /data/M3D-Cap --output data/m3d_cap \
        --window -160 240 --slice-spacing 5 0.8 0.8 --first-slice superior

Run it again after an interruption: it goes on. Needs `pip install -e ".[corpora]"`.

**The corpus has no HU and no geometry**: its scans are 8-bit pictures, windowed by whoever uploaded them. What the
reader needs is therefore assumed, and has to be said: `--window`, the HU of black and white; `--slice-spacing`, mm
between slices, rows and columns; `--first-slice`, which end the lowest number is; pictures as radiologists look at
them (anterior up, the patient's right on the left). The card repeats it. Only axial series are kept.

Layout read: `M3D_Cap/M3D_Cap.json`, the splits: entries with `image` and `text`, of which the last three parts of
`image` are collection, case and series; `M3D_Cap/{ct_case,ct_quizze}/CASE/SERIES/NUMBER.{png,jpeg}` and
`M3D_Cap/{ct_case,ct_quizze}/CASE/*.txt`, as folders or inside zip archives in the collection's folder. Of a text,
`study_findings:` are the findings, or the `discussion:` if they are empty; `presentation:`, `Age:` and `Gender:` are
read too. A case that is in several splits goes to the most held-out of them.

Not verified, without the corpus at hand: the names of the archives on the Hub and the folders inside them, the
sections of the texts beyond `study_findings:` and `discussion:`, and which way slices are numbered.
"""

import argparse
import io
import json
import re
import unicodedata
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from hsenet.corpora import CardFacts, Corpus, CorpusError, Plan, add_build_arguments, run
from hsenet.corpora.marks import SPLITS
from hsenet.corpora.tables import age_in_years, sex_or_none, text_or_none
from reading_hsenet import HSENetInputError, Volume, read_volume
from volume_hsenet import private_errors


ROOT = "M3D_Cap"
SECTIONS = ("title", "presentation", "patient", "age", "gender", "study_findings", "discussion")
MIN_FINDINGS = 5  # characters; the corpus' own preparation turns to the discussion below that
PICTURE = re.compile(r"(\d+)\.(png|jpe?g)", re.IGNORECASE)


def plan_rows(corpus: Corpus, index: str) -> Plan:
    entries = json.loads(corpus.read(index))
    parts = _parts_of_cases(corpus)
    split_of_case: dict[tuple[str, str], str] = {}
    for split in SPLITS:
        for entry in entries.get(split, []):
            split_of_case.setdefault(_parts(entry)[:2], split)
    plan, texts, counts = Plan([]), {}, {}
    for split in SPLITS:
        for entry in entries.get(split, []):
            collection, case, series = _parts(entry)
            counts[collection, case] = counts.get((collection, case), 0) + 1
            if (collection, case) not in texts:
                texts[collection, case] = _read_text(corpus, parts.get((collection, case), set()))
            row = _row(collection, case, series, counts[collection, case], texts[collection, case])
            row["split"] = split_of_case[collection, case]
            row["file"] = _series_folder(parts.get((collection, case), set()), series)
            if reason := _reason(row, series):
                plan.excluded.append({"volume_name": row["volume_name"], "split": row["split"], "reason": reason})
            else:
                plan.rows.append(row)
    plan.rows = list({row["volume_name"]: row for row in reversed(plan.rows)}.values())[::-1]
    return plan


def _parts(entry: dict[str, str]) -> tuple[str, str, str]:
    parts = entry["image"].split("/")
    if len(parts) < 3:
        raise CorpusError(
            f"An entry of the index is {entry['image']}: expected COLLECTION/CASE/SERIES.npy at its end."
        )
    return parts[-3], parts[-2], parts[-1].removesuffix(".npy")


def _parts_of_cases(corpus: Corpus) -> dict[tuple[str, str], set[str]]:
    """Texts and series folders of each case, in folders or archives."""
    names = set(corpus.glob(f"{ROOT}/*/*/*"))
    for picture_or_text in corpus.glob(f"{ROOT}/*/*.zip::*"):
        is_text = picture_or_text.endswith(".txt")
        names.add(picture_or_text if is_text else picture_or_text.rpartition("/")[0])
    cases: dict[tuple[str, str], set[str]] = {}
    for name in names:
        # .../CASE/SERIES or .../CASE/text.txt, whatever folders the archive puts before
        folders = name.replace("::", "/").split("/")
        cases.setdefault((folders[1], folders[-2]), set()).add(name)
    return cases


def _read_text(corpus: Corpus, parts: set[str]) -> dict[str, str]:
    """The sections of a case's text."""
    names = sorted(name for name in parts if name.endswith(".txt"))
    if not names:
        return {}
    text = corpus.read(names[0]).decode("utf-8", errors="replace")
    heads = list(re.finditer(rf"^\s*({'|'.join(SECTIONS)})\s*:", text, re.IGNORECASE | re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {head[1].lower(): text[head.end() : end].strip() for head, end in zip(heads, ends, strict=True)}


def _row(collection: str, case: str, series: str, number: int, text: dict[str, str]) -> dict[str, Any]:
    findings = " ".join(text.get("study_findings", "").split())
    if len(findings.replace(" ", "")) < MIN_FINDINGS:
        findings = " ".join(text.get("discussion", "").split())
    return {
        "volume_name": f"{collection}_{case}_{series}",
        "study_id": f"{collection}_{case}",
        "patient_id": f"{collection}_{case}",
        "reconstruction": number,
        "age": age_in_years(text.get("age")),
        "sex": sex_or_none(text.get("gender")),
        "clinical_information": text_or_none(text.get("presentation")),
        "findings": text_or_none(findings),
        "impression": None,
        "hu_slope": None,
        "hu_intercept": None,
    }


def _series_folder(parts: set[str], series: str) -> str | None:
    """The folder of the series, whose name the index writes in ASCII."""
    return next((folder for folder in sorted(parts) if _ascii(folder.rpartition("/")[2]) == _ascii(series)), None)


def _ascii(name: str) -> str:
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()


def _reason(row: dict[str, Any], series: str) -> str | None:
    if not series.lower().startswith("axial"):
        return "not an axial series"
    if not row["findings"]:
        return "no findings"
    return None if row["file"] else "no such series in the corpus"


def read_pictures(
    corpus: Corpus, row: dict[str, Any], *, window: tuple[float, float], slice_spacing: tuple, first_slice: str
) -> Volume:
    """Numbered pictures of axial slices to HU and a geometry, both as assumed."""
    names = corpus.listing(row["file"])
    numbered = sorted((int(match[1]), name) for name in names if (match := PICTURE.fullmatch(name.rpartition("/")[2])))
    files = [corpus.read(name) for _, name in numbered]
    with private_errors("A picture of the series"):
        slices = [np.asarray(Image.open(io.BytesIO(content)).convert("L")) for content in files]
    shapes = {picture.shape for picture in slices}
    if len(shapes) != 1:
        raise HSENetInputError(f"The pictures of a series have {len(shapes)} sizes: expected one.")
    low, high = window
    array = np.stack(slices).astype(np.float32) * ((high - low) / 255) + low
    if first_slice == "superior":
        array = array[::-1]
    return read_volume(np.ascontiguousarray(array), spacing=slice_spacing, hu_check="warn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_build_arguments(parser)
    parser.add_argument("--window", type=float, nargs=2, required=True, metavar=("LOW", "HIGH"), help="HU, assumed")
    parser.add_argument(
        "--slice-spacing", type=float, nargs=3, required=True, metavar=("D", "H", "W"), help="mm, assumed"
    )
    parser.add_argument("--first-slice", choices=("superior", "inferior"), required=True, help="assumed")
    parser.add_argument("--index", default=f"{ROOT}/M3D_Cap.json", help="the file with the splits")
    arguments = parser.parse_args()
    if arguments.volumes == "reference":
        raise SystemExit("M3D-Cap's pictures are no scans that a row could point to: use --volumes nifti.")
    assumed = {
        "window": tuple(arguments.window),
        "slice_spacing": tuple(arguments.slice_spacing),
        "first_slice": arguments.first_slice,
    }
    note = (
        f"**Assumed, not known:** the pictures' window {assumed['window']} HU, spacing {assumed['slice_spacing']} mm "
        f"(slices, rows, columns), first slice {assumed['first_slice']}. The values are no true HU: the corpus holds "
        "8-bit pictures. All body regions; axial series only."
    )
    facts = CardFacts(
        script="build_m3d_cap.py",
        name="M3D-Cap for HSENet",
        license="apache-2.0",
        terms="The corpus is published under Apache 2.0; its cases are Radiopaedia's, whose terms apply to them "
        "and decide what may be passed on.",
        source="https://huggingface.co/datasets/GoodBaiBai88/M3D-Cap",
        splits="The corpus' own; a case in several of them is in the most held-out.",
        citation="Bai et al., [arXiv 2404.00578](https://arxiv.org/abs/2404.00578) (M3D).",
        what="CT scans of all body regions with texts on their cases, of M3D-Cap.",
        scans=(note,),
        texts=("`findings` are the case's study findings, or its discussion where these are empty.",),
    )
    corpus = Corpus(arguments.corpus)
    plan = plan_rows(corpus, arguments.index)
    plan.read = partial(read_pictures, **assumed)
    run(plan, corpus, facts, arguments, **assumed)


if __name__ == "__main__":
    main()
