"""The dataset card: what a reader and `load_dataset` need to know."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Value
from huggingface_hub import DatasetCard, DatasetCardData

from hsenet.phantom import CT_RATE_LABELS

from .files import write_atomically
from .leakage import Leak, leakage_table
from .schema import QUESTION, REPORT


@dataclass(frozen=True)
class CardFacts:
    """
    What only the script of a corpus knows.

    Args:
        script (`str`): file name of the script.
        name (`str`): of the dataset.
        license (`str`): the Hub's identifier of the corpus' licence, "other" if it has none.
        terms (`str`): what the corpus' terms allow, in words.
        source (`str`): where the corpus is published.
        citation (`str`): whom to cite.
        notes: paragraphs on what the reader should know about this corpus.
    """

    script: str
    name: str
    license: str
    terms: str
    source: str
    citation: str
    notes: Sequence[str] = ()


def write_card(
    output: Path,
    facts: CardFacts,
    parameters: dict,
    reports: dict[str, list[dict[str, Any]]],
    questions: dict[str, int],
    excluded: list[dict[str, str]],
    leaks: list[Leak],
) -> None:
    data = DatasetCardData(
        language="en",
        license=facts.license,
        pretty_name=facts.name,
        task_categories=["image-to-text", *(["visual-question-answering"] if questions else [])],
        tags=["medical", "radiology", "ct", "chest", "3d"],
        size_categories=_size(sum(map(len, reports.values()))),
        configs=_configs(output, list(reports), with_questions=bool(questions)),
        **({"license_name": "see-terms"} if facts.license == "other" else {}),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {facts.name}\n",
        f"Built by `{facts.script}` of the hsenet package from {facts.source}.\n",
        f"Parameters: `{json.dumps(parameters)}`.\n",
        f"**Terms.** {facts.terms} Research only, not for clinical use.\n",
        f"Cite: {facts.citation}\n",
        *(f"{note}\n" for note in facts.notes),
        _counts(reports, questions),
        "## Left out\n",
        _exclusions(excluded),
        "## Leakage and duplicates\n",
        leakage_table(leaks, scans_hashed=True),
        "Names in `leakage.json`. Reconstructions of one study share its report and are not counted.\n",
        _usage(output),
        _prevalence(reports),
        "## Columns\n",
        _columns("reports", REPORT),
        _columns("vqa", QUESTION) if questions else "",
    ]
    content = "\n".join(section for section in sections if section)
    DatasetCard(content)  # parses the YAML: a card that cannot be read is not written
    write_atomically(output / "README.md", content.encode())


def _configs(output: Path, splits: list[str], *, with_questions: bool) -> list[dict]:
    names = ["preview", "reports", *(["vqa"] if with_questions else [])]
    configs = [
        {
            "config_name": name,
            **({"default": True} if name == "preview" else {}),
            "data_files": [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits],
        }
        for name in names
    ]
    if (output / "volumes").exists():
        files = [{"split": split, "path": f"volumes/{split}-*.parquet"} for split in splits]
        configs.append({"config_name": "volumes", "data_files": files})
    return configs


def _size(count: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if count < limit:
            return name
    return "100K<n<1M"


def _counts(reports: dict[str, list[dict]], questions: dict[str, int]) -> str:
    lines = ["| split | patients | studies | volumes | questions |", "|---|---|---|---|---|"]
    for split, rows in reports.items():
        patients, studies = ({row[name] for row in rows} for name in ("patient_id", "study_id"))
        lines.append(f"| {split} | {len(patients)} | {len(studies)} | {len(rows)} | {questions.get(split, 0)} |")
    return "\n".join(lines) + "\n"


def _exclusions(excluded: list[dict[str, str]]) -> str:
    if not excluded:
        return "Nothing.\n"
    counts = Counter(exclusion["reason"] for exclusion in excluded)
    lines = ["Names and reasons in `excluded.csv`.\n", "| reason | volumes |", "|---|---|"]
    lines += [f"| {reason} | {count} |" for reason, count in counts.most_common()]
    return "\n".join(lines) + "\n"


def _usage(output: Path) -> str:
    loading = '`load_dataset(FOLDER_OR_REPOSITORY, "reports")`: one row a volume, without the scan.'
    if (output / "volumes").exists():
        loading += (
            ' `"volumes"`: the same with the scan (`Nifti`, true HU, int16, one a row group, so that it can be '
            "streamed); its rows are found from `reports` through `volume`."
        )
    return f"## Use\n\n{loading} The training programs of hsenet take the folder or repository as `--dataset`.\n"


def _prevalence(reports: dict[str, list[dict]]) -> str:
    rows = [row["labels"] for group in reports.values() for row in group if row["labels"]]
    if not rows:
        return ""
    lines = ["## Findings\n", "| finding | share of the labelled volumes |", "|---|---|"]
    for index, label in enumerate(CT_RATE_LABELS):
        lines.append(f"| {label} | {sum(row[index] for row in rows) / len(rows):.1%} |")
    return "\n".join(lines) + "\n"


def _columns(name: str, columns: dict[str, tuple[Any, str]]) -> str:
    lines = [f"`{name}`:\n", "| column | type | content |", "|---|---|---|"]
    for column, (feature, words) in columns.items():
        kind = feature.dtype if isinstance(feature, Value) else f"list of {feature.feature.dtype}"
        lines.append(f"| `{column}` | {kind} | {words} |")
    return "\n".join(lines) + "\n"
