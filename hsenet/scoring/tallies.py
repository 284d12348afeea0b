"""The tallies of each task: which protocols apply to reports, to answers and to embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hsenet.metrics.bertscore import bert_score_tally
from hsenet.metrics.findings import findings_tally
from hsenet.metrics.labellers import Labeller
from hsenet.metrics.options import options_tally
from hsenet.metrics.overlap import overlap_tally
from hsenet.metrics.radiology import radeval_tally
from hsenet.metrics.tally import Tally
from hsenet.metrics.vqa import major_class, major_class_hsenet_tally, vqa_tally


@dataclass(frozen=True)
class ReportTask:
    """
    Args:
        references: the true reports.
        labels: `(num_reports, 18)`, the dataset's labels; None: what the labeller finds in the references.
        overlap: names of `OVERLAP_PROTOCOLS`.
        bert_score: (model, layer), None: without.
        radeval: names of `RADEVAL_METRICS`.
        device: where BERTScore's encoder runs.
    """

    references: Sequence[str]
    labels: np.ndarray | None
    labeller: Labeller
    overlap: Sequence[str]
    bert_score: tuple[str, int] | None = None
    radeval: Sequence[str] = ()
    device: str | torch.device = "cpu"

    @cached_property
    def truth(self) -> np.ndarray:
        return np.array(self.labels if self.labels is not None else self.labeller(self.references), dtype=bool)

    @property
    def has_findings(self) -> bool:
        """Whether any report has one: without, there is no F1."""
        return bool(self.truth.any())

    def tallies(self, texts: Sequence[str]) -> list[Tally]:
        tallies = [overlap_tally(protocol, texts, self.references) for protocol in self.overlap]
        if self.bert_score is not None:
            model, layer = self.bert_score
            tallies.append(bert_score_tally(texts, self.references, model=model, layer=layer, device=self.device))
        tallies += [radeval_tally(metric, texts, self.references) for metric in self.radeval]
        return [*tallies, *self.finding_tallies(self.labeller(texts))]

    def finding_tallies(self, found: np.ndarray) -> list[Tally]:
        """
        Of findings `(num_reports, 18)`; none if the truth has no finding at all.

        All 18 count, those too that never occur: to claim one of them is wrong, and lowers the micro F1 and the CRG.
        """
        if not self.has_findings:
            return []
        source = f"{self.labeller.name}; reference labels {'given' if self.labels is not None else 'inferred'}"
        return [findings_tally(found, self.truth, labeller=source)]


def question_tallies(predictions: Sequence[str], questions: Sequence[dict[str, Any]]) -> list[Tally]:
    """By type, and by anatomy where the questions name a region; multiple choice where they have `options`."""
    answers = [row["answer"] for row in questions]
    groups: dict[str, list] = {"type": [row["question_type"] for row in questions]}
    if any(row.get("region") for row in questions):
        groups["anatomy"] = [major_class(row["region"]) if row.get("region") else None for row in questions]
    tallies = [vqa_tally(predictions, answers, groups), major_class_hsenet_tally(predictions, answers)]
    options = [row.get("options") for row in questions]
    return [*tallies, options_tally(predictions, answers, options, groups)] if any(options) else tallies
