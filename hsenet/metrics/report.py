"""Report generation in one call: corpus BLEU and the findings, and the best that a constant report can do.

    report_metrics(predictions, references)                             # labels of the references inferred from text
    report_metrics(predictions, references, reference_labels=labels)    # labels of the references given
    best_constant_report_floor(labels, training_reports=reports)        # print it beside every F1

BLEU hardly notices a wrong finding, and a constant report can reach a high one; so neither number stands alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..phantom import CT_RATE_LABELS
from .findings import Labels, finding_scores, label_matrix
from .labeller import Uncertainty
from .labellers import Labeller, RuleLabeller
from .overlap import overlap_tally


def report_metrics(
    predictions: Sequence[str | None],
    references: Sequence[str],
    *,
    reference_labels: Labels | None = None,
    labels: Sequence[str] = CT_RATE_LABELS,
    uncertain: Uncertainty = "positive",
    labeller: Labeller | None = None,
) -> dict[str, Any]:
    """
    Corpus BLEU-1..4 (protocol `bleu-13a`) and finding precision, recall, F1 and CRG of generated reports.

    Findings of the predictions, and of the references unless `reference_labels` are given, come from the labeller. A
    missing (`None`) or empty prediction counts as an empty report: no n-gram, no finding, and it stays in every
    denominator.

    Args:
        reference_labels: The truth, as one mapping label -> 0/1 per report or an array `(num_reports, num_labels)`
            whose columns are `labels`.
        labels: The findings to score, see `findings_tally`.
        uncertain: What a hedged finding ("possible", "cannot be excluded") counts as for our own labeller.
        labeller: By default our rules: not RadBERT, so their F1 are not those of published CT-RATE tables.

    Returns:
        `bleu_1` .. `bleu_4`, the scores of `finding_scores`, `bleu_protocol`, `findings_protocol`, `num_reports`,
        `num_empty_predictions`. A ratio with nothing to count is 0, a mean over a truth without any positive is nan.
    """
    bleu = overlap_tally("bleu-13a", predictions, references)
    labeller = labeller or RuleLabeller(uncertain=uncertain)
    texts = [(prediction or "").strip() for prediction in predictions]
    given = reference_labels is not None
    truth = label_matrix(reference_labels if given else labeller(references, labels), labels)
    if len(truth) != len(references):
        raise ValueError(f"reference_labels need one row per report, expected {len(references)}, got {len(truth)}.")
    return {
        **bleu.scores(),
        **finding_scores(labeller(texts, labels), truth, labels=labels),
        "bleu_protocol": bleu.protocol,
        "findings_protocol": f"findings/2[{len(labels)} labels; {labeller.name}]; "
        f"reference labels {'given' if given else 'inferred'}",
        "num_reports": len(references),
        "num_empty_predictions": sum(not text for text in texts),
    }


def best_constant_report_floor(
    reference_labels: Labels,
    *,
    training_reports: Sequence[str] | None = None,
    labels: Sequence[str] = CT_RATE_LABELS,
    uncertain: Uncertainty = "positive",
    labeller: Labeller | None = None,
) -> dict[str, Any]:
    """
    The finding F1 that saying the same for every scan can reach: the floor that a model has to beat.

    Over label vectors this is the exact maximum. A label that is always claimed has precision p (its prevalence) and
    recall 1, so F1 2p/(1+p), never claimed 0: claiming all is best for the macro F1, and the most prevalent ones up
    to some count for the micro F1. Over `training_reports` it is the best actual report, chosen with the evaluation
    truth in hand (an upper bound for constant reports, hence a floor that cannot be called too low). Conventions are
    those of `finding_scores`: labels without a positive are left out of the macro.

    Returns:
        `constant_labels_f1_macro`, `constant_labels_f1_micro`, `constant_labels_micro_best` (its labels),
        `labels_without_positives`; with `training_reports` also `constant_report_f1_macro`, `constant_report_f1_micro`
        (each maximised on its own) and `constant_report_index`, `constant_report` (the one best for the macro).
    """
    truth = label_matrix(reference_labels, labels)
    if not truth.any():
        raise ValueError("No label has a positive in reference_labels: F1 is undefined.")
    prevalence, support = truth.mean(0), truth.sum(0)
    occurs = support > 0
    order = np.argsort(-support, kind="stable")
    micro = 2 * support[order].cumsum() / (len(truth) * np.arange(1, len(labels) + 1) + support.sum())
    result: dict[str, Any] = {
        "constant_labels_f1_macro": float((2 * prevalence / (1 + prevalence))[occurs].mean()),
        "constant_labels_f1_micro": float(micro.max()),
        "constant_labels_micro_best": [labels[i] for i in order[: int(micro.argmax()) + 1]],
        "labels_without_positives": [label for label, found in zip(labels, occurs, strict=True) if not found],
    }
    if training_reports is None:
        return result
    labeller = labeller or RuleLabeller(uncertain=uncertain)
    said = label_matrix(labeller(training_reports, labels), labels)  # (num_reports, num_labels)
    macro = (said * (2 * prevalence / (1 + prevalence)))[:, occurs].mean(1)
    micro = 2 * said @ support / (len(truth) * said.sum(1) + support.sum())
    best = int(macro.argmax())
    return result | {
        "constant_report_f1_macro": float(macro[best]),
        "constant_report_f1_micro": float(micro.max()),
        "constant_report_index": best,
        "constant_report": training_reports[best],
    }
