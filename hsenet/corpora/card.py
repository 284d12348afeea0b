"""The dataset card: what a stranger and `load_dataset` need to know, from what a build knows."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Value
from huggingface_hub import DatasetCard, DatasetCardData

from hsenet.card_marks import has_own_title, read_card, sections_of, update_card
from hsenet.card_usage import TEMPLATES
from hsenet.dataset_usage import loading_section
from hsenet.metrics.table import plain_table
from hsenet.phantom import CT_RATE_LABELS

from .files import write_atomically
from .leakage import Leak, leakage_table


CARD = "README.md"
TAGS = ("medical", "radiology", "ct", "3d")
SYNTHETIC = "synthetic"
INTENDED = (
    "Research on 3D CT and text: training and comparing programs that find scans and reports by one another, write "
    "reports or answer questions, within the terms below."
)
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))


@dataclass(frozen=True)
class CardFacts:
    """
    What only the script of a corpus knows.

    Args:
        script (`str`): file name of the script.
        name (`str`): of the dataset.
        license (`str`): the Hub's identifier of the corpus' licence, "other" if it has none.
        terms (`str`): what the corpus' terms allow, in words, and what may not be passed on.
        source (`str`): where the corpus is published.
        splits (`str`): how they were made.
        citation (`str`): whom to cite.
        what (`str`): the card's first sentence.
        scans: paragraphs on what is known of the scans' values and geometry, and what is assumed.
        texts: paragraphs on the reports, questions and labels.
        intended (`str`): what it is for.
        tags: for the metadata.
    """

    script: str
    name: str
    license: str
    terms: str
    source: str
    splits: str
    citation: str
    what: str = "CT scans with their radiology reports."
    scans: Sequence[str] = ()
    texts: Sequence[str] = ()
    intended: str = INTENDED
    tags: Sequence[str] = TAGS


@dataclass(frozen=True)
class Contents:
    """
    What a build has written.

    Args:
        parameters: that it depends on.
        reports: split to the rows of `reports`.
        questions: split to the number of questions; empty if there are none.
        columns: configuration to its columns, each with its type and what it holds.
        preparation: what was done to a scan, and how.
        excluded: `reason` of each volume that was left out.
        leaks: what splits share, and duplicates.
        scans_hashed (`bool`): whether `leaks` has looked at the voxels.
    """

    parameters: dict[str, Any]
    reports: dict[str, list[dict[str, Any]]]
    questions: dict[str, int]
    columns: dict[str, dict[str, tuple[Any, str]]]
    preparation: Sequence[tuple[str, str]]
    excluded: Sequence[dict[str, str]]
    leaks: list[Leak]
    scans_hashed: bool = True


def write_card(output: Path, facts: CardFacts, contents: Contents, *, is_reference: bool = False) -> str:
    """
    Writes or refreshes `README.md` and returns what it says of splits and exclusions. What people wrote stays.

    Raises:
        ValueError: the old card's metadata cannot be read.
    """
    old = read_card(output / CARD, DatasetCard)
    configs = _configs(output, list(contents.reports), with_questions=bool(contents.questions))
    card = DatasetCard.from_template(
        _metadata(facts, contents, configs),
        template_str=(TEMPLATES / "dataset_card.md").read_text(encoding="utf-8"),
        title=None if has_own_title(old) else facts.name,
        what=facts.what,
        intended=facts.intended,
        synthetic=SYNTHETIC in facts.tags,
        loading=loading_section(configs, is_reference=is_reference),
        source=_source(facts, contents),
        splits=_splits(facts, contents),
        columns="\n\n".join(_columns(name, columns) for name, columns in contents.columns.items()),
        scans="\n\n".join([*facts.scans, plain_table(("what", "how"), contents.preparation)]),
        texts="\n\n".join([*facts.texts, *_prevalence(contents.reports)]) or "Nothing beyond the columns.",
        left_out=_exclusions(contents.excluded),
        citation=facts.citation,
    )
    sections = sections_of(card.text)
    write_atomically(output / CARD, update_card(old, card.data.to_dict(), sections).encode())
    return f"{sections['splits']}\n\n{sections['left out']}"


def _metadata(facts: CardFacts, contents: Contents, configs: list[dict]) -> DatasetCardData:
    count = sum(map(len, contents.reports.values()))
    return DatasetCardData(
        language="en",
        license=facts.license,
        **({"license_name": "see-terms"} if facts.license == "other" else {}),
        pretty_name=facts.name,
        task_categories=["image-to-text", *(["visual-question-answering"] if contents.questions else [])],
        tags=list(facts.tags),
        size_categories=next((name for limit, name in SIZES if count < limit), "100K<n<1M"),
        configs=configs,
    )


def _configs(output: Path, splits: list[str], *, with_questions: bool) -> list[dict]:
    names = [*(["preview"] if (output / "preview").exists() else []), "reports", *(["vqa"] if with_questions else [])]
    configs = [
        {
            "config_name": name,
            **({"default": True} if name == "preview" else {}),
            "data_files": [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits],
        }
        for name in names
    ]
    if any((output / "volumes").glob("*.parquet")):
        files = [{"split": split, "path": f"volumes/{split}-*.parquet"} for split in splits]
        configs.append({"config_name": "volumes", "data_files": files})
    return configs


def _source(facts: CardFacts, contents: Contents) -> str:
    is_drawn = SYNTHETIC in facts.tags
    bound = (
        "The licence of the metadata is the source's. The scans and texts are the source's too, so its "
        "terms hold for this dataset, and whoever passes it on has to check them first."
    )
    return "\n\n".join(
        [
            f"Made by `{facts.script}` of the package hsenet from {facts.source}.",
            f"**Licence and terms.** `{facts.license}`. {facts.terms}",
            *([] if is_drawn else [bound]),
            f"Parameters: `{json.dumps(contents.parameters)}`.",
        ]
    )


def _splits(facts: CardFacts, contents: Contents) -> str:
    rows = []
    for split, group in contents.reports.items():
        patients, studies = ({row[name] for row in group} for name in ("patient_id", "study_id"))
        rows.append((split, len(patients), len(studies), len(group), contents.questions.get(split, 0)))
    named = "Names in `leakage.json`. " if contents.scans_hashed else ""
    return "\n\n".join(
        [
            facts.splits,
            plain_table(("split", "patients", "studies", "volumes", "questions"), rows),
            "### Leakage and duplicates",
            leakage_table(contents.leaks, scans_hashed=contents.scans_hashed).strip(),
            f"{named}Reconstructions of one study share its report and are not counted.",
        ]
    )


def _columns(name: str, columns: dict[str, tuple[Any, str]]) -> str:
    lines = [f"`{name}`:\n", "| column | type | content |", "|---|---|---|"]
    for column, (feature, words) in columns.items():
        lines.append(f"| `{column}` | {_type(feature)} | {words} |")
    return "\n".join(lines)


def _type(feature: Any) -> str:
    if isinstance(feature, Value):
        return feature.dtype
    items = getattr(feature, "feature", None)
    return f"list of {items.dtype}" if items is not None else type(feature).__name__


def _prevalence(reports: dict[str, list[dict]]) -> list[str]:
    rows = [row["labels"] for group in reports.values() for row in group if row["labels"]]
    if not rows:
        return []
    shares = [(label, f"{sum(row[i] for row in rows) / len(rows):.1%}") for i, label in enumerate(CT_RATE_LABELS)]
    return [plain_table(("finding", "share of the labelled volumes"), shares)]


def _exclusions(excluded: Sequence[dict[str, str]]) -> str:
    if not excluded:
        return "Nothing."
    counts = Counter(exclusion["reason"] for exclusion in excluded).most_common()
    return f"Names and reasons in `excluded.csv`.\n\n{plain_table(('reason', 'volumes'), counts)}"
