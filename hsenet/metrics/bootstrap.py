"""Confidence intervals and paired tests of a metric's scores, by patient.

Scans of one patient are not independent, so patients are resampled, not scans. Scores are recomputed from the summed
counts of each resample: a corpus BLEU or a macro F1 is never averaged.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from .tally import Tally


BLOCK = 200  # resamples held at once: memory stays linear in the number of patients


def confidence_intervals(
    tally: Tally,
    clusters: Sequence[Hashable],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """
    Percentile bootstrap interval of each score.

    Args:
        clusters: the patient of each item. Retrieval keeps its gallery: only the queries are resampled.

    Raises:
        ValueError: as many clusters as items were expected, or fewer than two different ones.
    """
    sums = _cluster_sums(tally.counts, clusters)
    resampled = _resample(tally, [sums], num_resamples, seed)[0]
    return {name: _interval(values, confidence) for name, values in resampled.items()}


def compare_runs(
    first: Tally,
    second: Tally,
    clusters: Sequence[Hashable],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """
    `first` minus `second` on the same items: score -> `difference`, `low`, `high`, `p_value`, `p_holm`.

    The interval is that of the difference when both runs lose and repeat the same patients. The p-value is that of
    approximate randomisation (each patient's two results change sides with probability 1/2; two-sided; never below
    1 / (num_resamples + 1)), and `p_holm` corrects it for the number of scores compared here (Holm).

    Raises:
        ValueError: other protocols or numbers of items: nothing to compare.
    """
    if first.protocol != second.protocol or first.counts.shape != second.counts.shape:
        raise ValueError(
            "Runs are compared under one protocol and on the same items, got "
            f"{first.protocol} with {first.counts.shape} and {second.protocol} with {second.counts.shape} counts."
        )
    sums = [_cluster_sums(tally.counts, clusters) for tally in (first, second)]
    one, other = _resample(first, sums, num_resamples, seed)
    second_scores = second.scores()
    observed = {name: value - second_scores[name] for name, value in first.scores().items()}
    p_values = _randomisation(first, *sums, observed, num_resamples, seed)
    holm = holm_adjusted(p_values)
    result = {}
    for name, difference in observed.items():
        low, high = _interval(one[name] - other[name], confidence)
        values = {"difference": difference, "low": low, "high": high}
        result[name] = {**values, "p_value": p_values[name], "p_holm": holm[name]}
    return result


def holm_adjusted(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: the family of all names keeps its error rate; a nan stays one and is no test."""
    tested = sorted((name for name, p in p_values.items() if not np.isnan(p)), key=lambda name: p_values[name])
    adjusted, largest = dict(p_values), 0.0
    for position, name in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - position) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def _cluster_sums(counts: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    if len(clusters) != len(counts):
        raise ValueError(f"Every item needs its cluster (patient), expected {len(counts)}, got {len(clusters)}.")
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    if len(numbers) < 2:
        raise ValueError("An interval takes at least two clusters (patients), got one.")
    sums = np.zeros((len(numbers), counts.shape[1]))
    np.add.at(sums, index, counts)
    return sums


def _resample(tally: Tally, sums: list[np.ndarray], num_resamples: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Scores of each run on the same resamples: score -> (num_resamples,)."""
    generator, num_clusters = np.random.default_rng(seed), len(sums[0])
    blocks: list[list[dict[str, np.ndarray]]] = [[] for _ in sums]
    for start in range(0, num_resamples, BLOCK):
        size = min(BLOCK, num_resamples - start)
        weights = generator.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size)
        for run, run_sums in zip(blocks, sums, strict=True):
            run.append(tally.formula(weights @ run_sums))
    return [{name: np.concatenate([block[name] for block in run]) for name in run[0]} for run in blocks]


def _randomisation(
    tally: Tally, first: np.ndarray, second: np.ndarray, observed: dict[str, float], num_resamples: int, seed: int
) -> dict[str, float]:
    generator = np.random.default_rng((seed, 1))
    total, change = first.sum(0) + second.sum(0), second - first
    extreme = dict.fromkeys(observed, 0)
    for start in range(0, num_resamples, BLOCK):
        swapped = generator.integers(0, 2, (min(BLOCK, num_resamples - start), len(first))) @ change
        one = first.sum(0) + swapped
        ours, theirs = tally.formula(one), tally.formula(total - one)
        for name, difference in observed.items():
            # Equal up to rounding is as extreme: sums in another order differ in the last digits.
            extreme[name] += int(np.sum(np.abs(ours[name] - theirs[name]) >= abs(difference) - 1e-12))
    return {
        name: float("nan") if np.isnan(difference) else (extreme[name] + 1) / (num_resamples + 1)
        for name, difference in observed.items()
    }


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    values = values[~np.isnan(values)]  # a resample without a single positive has no F1
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
