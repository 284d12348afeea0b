"""How well the findings of generated reports are those of the truth: precision, recall, F1 and CRG.

    findings_tally(labeller(predictions), labels, labeller=labeller.name).scores()

F1 comes as macro (mean over findings), micro (all decisions together) and weighted (mean by support): published tables
mix the three, and they differ by several points. CRG (VLM3D challenge) weighs hits, misses and false alarms by how
common findings are; to say nothing and to claim everything both give exactly 1/3.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..phantom import CT_RATE_LABELS
from .tally import Tally, quotient


Labels = Sequence[Mapping[str, int]] | np.ndarray
CRG_FLOOR = 1 / 3  # of all-negative and of all-positive predictions


def findings_tally(
    predicted: Labels, truth: Labels, *, labels: Sequence[str] = CT_RATE_LABELS, labeller: str = "given"
) -> Tally:
    """
    Args:
        predicted, truth: 0 or 1, as `(num_reports, num_labels)` or one mapping label -> 0/1 a report.
        labels: the findings to score. One without a positive in the truth has no recall: it is left out of the macro
            means; its false positives count in the micro ones and in the CRG.
        labeller: what read the predictions, part of the protocol: F1 of two labellers are not comparable.

    Returns:
        Scores `findings_{precision,recall,f1}_{macro,micro,weighted}`, `crg`, and `f1[FINDING]` (nan where the truth
        has no positive).

    Raises:
        ValueError: shapes that don't fit, values other than 0 and 1.
    """
    predicted, truth = label_matrix(predicted, labels), label_matrix(truth, labels)
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted and truth must have one shape, got {predicted.shape} and {truth.shape}.")
    counts = np.concatenate([predicted & truth, predicted, truth, np.ones((len(truth), 1))], axis=1)

    def formula(total: np.ndarray) -> dict[str, np.ndarray]:
        hits, said, support = np.split(total[..., :-1], 3, axis=-1)
        per_label = _per_label(hits, said, support)
        known = np.where(support > 0, per_label["f1"], np.nan)
        f1 = {f"f1[{label}]": known[..., i] for i, label in enumerate(labels)}
        return {**_means(per_label, hits, said, support), "crg": _crg(hits, said, support, total[..., -1]), **f1}

    return Tally(f"findings/2[{len(labels)} labels; {labeller}]", counts.astype(np.float64), formula)


def finding_scores(predicted: Labels, truth: Labels, *, labels: Sequence[str] = CT_RATE_LABELS) -> dict[str, Any]:
    """The scores of `findings_tally`, those of each finding as `per_finding`, and `labels_without_positives`."""
    tally = findings_tally(predicted, truth, labels=labels)
    scores = {name: value for name, value in tally.scores().items() if not name.startswith("f1[")}
    hits, said, support = np.split(tally.counts.sum(0)[:-1], 3)
    per_label = _per_label(hits, said, support)
    scores["per_finding"] = {
        label: {name: float(values[i]) for name, values in per_label.items()}
        | {"support": int(support[i]), "predicted": int(said[i])}
        for i, label in enumerate(labels)
    }
    scores["labels_without_positives"] = [label for label, found in zip(labels, support, strict=True) if not found]
    return scores


def label_matrix(rows: Labels, labels: Sequence[str]) -> np.ndarray:
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


def _per_label(hits: np.ndarray, said: np.ndarray, support: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "precision": quotient(hits, said),
        "recall": quotient(hits, support),
        "f1": quotient(2 * hits, said + support),
    }


def _means(
    per_label: dict[str, np.ndarray], hits: np.ndarray, said: np.ndarray, support: np.ndarray
) -> dict[str, np.ndarray]:
    occurs, any_occurs = support > 0, (support > 0).any(-1)
    pooled = _per_label(hits.sum(-1), said.sum(-1), support.sum(-1))
    scores = {}
    for name, values in per_label.items():
        scores[f"findings_{name}_macro"] = quotient((values * occurs).sum(-1), occurs.sum(-1), np.nan)
        scores[f"findings_{name}_micro"] = np.where(any_occurs, pooled[name], np.nan)
        scores[f"findings_{name}_weighted"] = quotient((values * support).sum(-1), support.sum(-1), np.nan)
    return scores


def _crg(hits: np.ndarray, said: np.ndarray, support: np.ndarray, num_reports: np.ndarray) -> np.ndarray:
    """Of the VLM3D challenge: `X` decisions, `A` positives; a hit or miss weighs (X - A) / 2A, a false alarm 1."""
    decisions, positives = num_reports * support.shape[-1], support.sum(-1)
    hit, false = hits.sum(-1), (said - hits).sum(-1)
    weight = quotient(decisions - positives, 2 * positives, np.nan)
    best = (decisions - positives) / 2
    return quotient(best, 2 * best - (weight * (hit - (positives - hit)) - false), np.nan)
