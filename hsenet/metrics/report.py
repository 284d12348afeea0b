"""Report generation metrics: corpus BLEU through sacrebleu, and finding F1 through the rule-based labeller.

    report_metrics(predictions, references)                             # labels of the references inferred from text
    report_metrics(predictions, references, reference_labels=labels)    # labels of the references given
    best_constant_report_floor(labels, training_reports=reports)        # print it beside every F1

BLEU hardly notices a wrong finding, and a constant report can reach a high one; so neither number stands alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..phantom import CT_RATE_LABELS
from .labeller import Uncertainty, label_vector


Labels = Sequence[Mapping[str, int]] | np.ndarray
BLEU_ORDERS = (1, 2, 3, 4)


def report_metrics(
    predictions: Sequence[str | None],
    references: Sequence[str],
    *,
    reference_labels: Labels | None = None,
    labels: Sequence[str] = CT_RATE_LABELS,
    uncertain: Uncertainty = "positive",
) -> dict[str, Any]:
    """
    Corpus BLEU-1..4 and finding precision, recall and F1 of generated reports.

    BLEU-n is cumulative (geometric mean of the 1..n-gram precisions times the brevity penalty) over the corpus, one
    reference per report, tokenizer 13a, case kept, no smoothing, as a fraction. Findings of the predictions, and of
    the references unless `reference_labels` are given, come from `label_report`: a rule-based labeller of this
    package, not RadBERT, so these F1 are not those of published CT-RATE tables. A missing (`None`) or empty
    prediction counts as an empty report: no n-gram, no finding, and it stays in every denominator.

    Args:
        reference_labels: The truth, as one mapping label -> 0/1 per report or an array `(num_reports, num_labels)`
            whose columns are `labels`.
        labels: The findings to score. Those without a positive in the truth have no recall: they are left out of
            the macro means and listed in `labels_without_positives`; their false positives do count in the micro.
        uncertain: What a hedged finding ("possible", "cannot be excluded") counts as, in both texts.

    Returns:
        `bleu_1` .. `bleu_4`, `bleu_signature`, `findings_f1_macro` / `_micro` and likewise `findings_precision_*` and
        `findings_recall_*`, `per_finding` (precision, recall, f1, support, predicted), `labels_without_positives`,
        `findings_protocol`, `num_reports`, `num_empty_predictions`. A ratio with nothing to count is 0, a macro or
        micro mean over a truth without any positive is nan.
    """
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            "predictions and references must be of one length and not empty (a missing prediction is None), "
            f"got {len(predictions)} and {len(references)}."
        )
    empty = [index for index, reference in enumerate(references) if not (reference or "").strip()]
    if empty:
        raise ValueError(f"Every reference must have text, got {len(empty)} empty ones, first: {empty[:5]}.")
    texts = [(prediction or "").strip() for prediction in predictions]
    given = reference_labels is not None
    truth = _label_matrix(reference_labels if given else _infer(references, labels, uncertain), labels)
    if len(truth) != len(references):
        raise ValueError(f"reference_labels need one row per report, expected {len(references)}, got {len(truth)}.")
    return {
        **corpus_bleu(texts, references),
        **finding_scores(_infer(texts, labels, uncertain), truth, labels=labels),
        "findings_protocol": f"hsenet rule-based labeller; reference labels {'given' if given else 'inferred'}; "
        f"uncertain={uncertain}; {len(labels)} labels",
        "num_reports": len(references),
        "num_empty_predictions": sum(not text for text in texts),
    }


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU-1..4 as fractions (sacrebleu, 13a, no smoothing, one reference each), and sacrebleu's signature."""
    from sacrebleu.metrics import BLEU  # of the extra `eval`; the finding scores do without

    result: dict[str, Any] = {}
    for order in BLEU_ORDERS:
        bleu = BLEU(max_ngram_order=order, tokenize="13a", smooth_method="none", lowercase=False)
        result[f"bleu_{order}"] = bleu.corpus_score(list(predictions), [list(references)]).score / 100
    result["bleu_signature"] = f"{bleu.get_signature()}|max_ngram_order:1..{BLEU_ORDERS[-1]}|scale:0-1"
    return result


def finding_scores(predicted: Labels, truth: Labels, *, labels: Sequence[str] = CT_RATE_LABELS) -> dict[str, Any]:
    """Precision, recall and F1 per finding, micro, and macro over the findings that occur in the truth."""
    predicted, truth = _label_matrix(predicted, labels), _label_matrix(truth, labels)
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted and truth must have one shape, got {predicted.shape} and {truth.shape}.")
    hits, said, support = (predicted & truth).sum(0), predicted.sum(0), truth.sum(0)
    scores = {"precision": _ratio(hits, said), "recall": _ratio(hits, support), "f1": _ratio(2 * hits, said + support)}
    totals = {"precision": (hits, said), "recall": (hits, support), "f1": (2 * hits, said + support)}
    occurs = support > 0
    result: dict[str, Any] = {}
    for name, per_label in scores.items():
        numerator, denominator = (counts.sum() for counts in totals[name])
        result[f"findings_{name}_macro"] = float(per_label[occurs].mean()) if occurs.any() else float("nan")
        result[f"findings_{name}_micro"] = float(_ratio(numerator, denominator)) if occurs.any() else float("nan")
    result["per_finding"] = {
        label: {name: float(per_label[i]) for name, per_label in scores.items()}
        | {"support": int(support[i]), "predicted": int(said[i])}
        for i, label in enumerate(labels)
    }
    result["labels_without_positives"] = [label for label, found in zip(labels, occurs, strict=True) if not found]
    return result


def best_constant_report_floor(
    reference_labels: Labels,
    *,
    training_reports: Sequence[str] | None = None,
    labels: Sequence[str] = CT_RATE_LABELS,
    uncertain: Uncertainty = "positive",
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
    truth = _label_matrix(reference_labels, labels)
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
    said = _label_matrix(_infer(training_reports, labels, uncertain), labels)  # (num_reports, num_labels)
    macro = (said * (2 * prevalence / (1 + prevalence)))[:, occurs].mean(1)
    micro = 2 * said @ support / (len(truth) * said.sum(1) + support.sum())
    best = int(macro.argmax())
    return result | {
        "constant_report_f1_macro": float(macro[best]),
        "constant_report_f1_micro": float(micro.max()),
        "constant_report_index": best,
        "constant_report": training_reports[best],
    }


def _infer(texts: Sequence[str], labels: Sequence[str], uncertain: Uncertainty) -> np.ndarray:
    return np.array([label_vector(text, labels=labels, uncertain=uncertain) for text in texts], dtype=bool)


def _label_matrix(rows: Labels, labels: Sequence[str]) -> np.ndarray:
    """`(num_reports, num_labels)` of booleans, from mappings (read by name) or an array (columns are `labels`)."""
    if len(rows) and isinstance(rows[0], Mapping):
        unknown = [label for label in labels if label not in rows[0]]
        if unknown:
            raise ValueError(f"reference_labels must have every label of `labels`, missing: {unknown}.")
        rows = [[row[label] for label in labels] for row in rows]
    matrix = np.asarray(rows)
    if matrix.ndim != 2 or matrix.shape[1] != len(labels) or not len(matrix):
        raise ValueError(f"Labels must be a non-empty (num_reports, {len(labels)}) matrix, got shape {matrix.shape}.")
    if not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"Labels must be 0 or 1, got {sorted(set(matrix.ravel().tolist()) - {0, 1})[:5]}.")
    return matrix.astype(bool)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient, 0 where there is nothing to count."""
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), 0.0)
