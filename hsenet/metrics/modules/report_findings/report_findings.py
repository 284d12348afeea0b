"""Findings of generated chest CT reports against the truth: precision, recall, F1 (macro, micro, weighted) and CRG.

`labeller` reads the findings: by default the rules of the package `hsenet`; a folder or Hub id of a sequence
classification model (such as a converted RadBERT) in its place. `reference_labels` (0 or 1, a row for each report, a
column for each of CT-RATE's 18 findings) are the truth; without them the labeller reads the references too.
"""

import datasets
import evaluate

from hsenet.metrics.findings import findings_tally
from hsenet.metrics.labellers import ClassifierLabeller, RuleLabeller
from hsenet.phantom import CT_RATE_LABELS


class ReportFindings(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: a report each. reference_labels, labels, labeller: optional.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, reference_labels=None, labels=CT_RATE_LABELS, labeller=None) -> dict:
        reader = ClassifierLabeller(labeller) if labeller else RuleLabeller()
        truth = reader(references, labels) if reference_labels is None else reference_labels
        tally = findings_tally(reader(predictions, labels), truth, labels=labels, labeller=reader.name)
        given = "inferred" if reference_labels is None else "given"
        return {**tally.scores(), "protocol": f"{tally.protocol}; reference labels {given}"}
