"""What a metric counted on every item, and the formula that makes scores of the summed counts.

    tally = overlap_tally("bleu-coco", predictions, references)
    tally.protocol                      # "bleu-coco/1"
    tally.scores()                      # {"bleu_1": ..., "bleu_4": ...}
    confidence_intervals(tally, patient_ids)

Corpus BLEU, macro F1, CRG, recall at k and plain means have in common that they are functions of sums over items. So a
metric is kept as its counts, one row an item: a bootstrap resample is another weighting of the rows, never an average
of item scores, and the same counts come out however many processes made them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


Formula = Callable[[np.ndarray], dict[str, np.ndarray]]  # (..., num_counts) -> score name: (...)


@dataclass(frozen=True)
class Tally:
    """
    Args:
        protocol (`str`): `name/version` of the exact definition. Numbers of two protocols are never comparable; the
            version rises whenever the same texts would get another number.
        counts (`np.ndarray` of shape `(num_items, num_counts)`): what each item adds.
        formula: scores from the sum of the counts, over any leading axes.
    """

    protocol: str
    counts: np.ndarray
    formula: Formula

    def scores(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.formula(self.counts.sum(0)).items()}


def mean_tally(protocol: str, values: Mapping[str, Sequence[float]]) -> Tally:
    """Scores that are means over items, each from one value an item; nan: the item does not count for that score."""
    names = tuple(values)
    columns = np.array([values[name] for name in names], dtype=np.float64)  # (num_scores, num_items)
    counted = ~np.isnan(columns)
    counts = np.concatenate([np.where(counted, columns, 0.0), counted]).T  # sums, then how many

    def formula(total: np.ndarray) -> dict[str, np.ndarray]:
        sums, numbers = np.split(total, 2, axis=-1)
        return dict(zip(names, np.moveaxis(quotient(sums, numbers, np.nan), -1, 0), strict=True))

    return Tally(protocol, counts, formula)


def quotient(numerator: np.ndarray, denominator: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """Elementwise quotient, `empty` where there is nothing to count."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), empty)
