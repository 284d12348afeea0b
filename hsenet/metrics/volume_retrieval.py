"""Volume-to-volume retrieval: do a scan's nearest neighbours have its findings?

    volume_retrieval_tally(embeds, labels, study_ids).scores()      # mean_jaccard@k, as it should be
    ct_clip_volume_scores(embeds, labels)                           # what CT-CLIP and HSENet publish as "MAP@k"

The published score is neither mean average precision nor precision: each query finds itself first, the value printed
for k is the mean of those of all k up to it, and a scan without findings can only score 0. A random embedding reaches
0.88, 0.58, 0.46, 0.39 that way on synthetic labels, so it is kept for comparison with published tables only.
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch

from .retrieval import QUERY_BLOCK, _study_numbers, _unit_rows
from .tally import Tally, mean_tally


KS = (1, 5, 10, 50)


def volume_retrieval_tally(
    embeds: np.ndarray | torch.Tensor, labels: np.ndarray, study_ids: Sequence[Hashable], *, ks: Sequence[int] = KS
) -> Tally:
    """
    `mean_jaccard@k`, the mean Jaccard index between a query's findings and those of its k nearest volumes, and
    `chance_jaccard`, that of all volumes it could have found.

    Queries and gallery are the volumes with at least one finding, and a query never sees its own study. Each k stands
    alone; of fewer than k candidates all are taken. Ties in the embedding go to the earlier row. A volume without
    findings is no query (nan: it doesn't count) and in nobody's gallery.

    Args:
        embeds: `(num_volumes, dim)`, compared by cosine.
        labels: `(num_volumes, num_labels)` of 0 and 1.

    Raises:
        ValueError: fewer than two studies with findings.
    """
    rows, labels = _unit_rows(embeds, "embeds"), _labels(labels, len(embeds))
    studies = _study_numbers(study_ids, len(rows))
    shown = np.flatnonzero(labels.any(1))
    if len(set(studies[shown].tolist())) < 2:
        raise ValueError("Retrieval between volumes takes at least two studies with findings.")
    values = {f"mean_jaccard@{k}": np.full(len(rows), np.nan) for k in ks}
    values["chance_jaccard"] = np.full(len(rows), np.nan)
    for block, similarity, jaccard in _blocks(rows, labels, shown, shown):
        other = studies[block, None] != studies[None, shown]
        ranked = np.take_along_axis(jaccard, _nearest(np.where(other, similarity, -np.inf), max(ks)), axis=1)
        places, available = np.arange(ranked.shape[1]), other.sum(1, keepdims=True)
        for k in ks:
            taken = places < np.minimum(k, available)
            values[f"mean_jaccard@{k}"][block] = (ranked * taken).sum(1) / taken.sum(1)
        values["chance_jaccard"][block] = (jaccard * other).sum(1) / other.sum(1)
    return mean_tally(f"volume-jaccard/1[{len(shown)} volumes with findings]", values)


def ct_clip_volume_scores(
    embeds: np.ndarray | torch.Tensor, labels: np.ndarray, *, ks: Sequence[int] = KS
) -> dict[str, float]:
    """
    `ct_clip_map@k` as CT-CLIP and HSENet compute it, faults and all; beside it `protocol`.

    Queries are all volumes, the gallery those with findings, the query itself included; the score of a neighbour is
    the Jaccard index of the findings, and the value of each k is the running mean over this k and all before it.
    """
    rows, labels = _unit_rows(embeds, "embeds"), _labels(labels, len(embeds))
    gallery = np.flatnonzero(labels.any(1))
    if not len(gallery):
        raise ValueError("No volume has a finding: there is nothing to retrieve.")
    per_k: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for _, similarity, jaccard in _blocks(rows, labels, np.arange(len(rows)), gallery):
        ranked = np.take_along_axis(jaccard, _nearest(similarity, max(ks)), axis=1)
        for k in ks:
            per_k[k].append(ranked[:, :k].mean(1))
    means = [np.concatenate(per_k[k]).mean() for k in ks]
    running = np.cumsum(means) / np.arange(1, len(means) + 1)
    scores = {f"ct_clip_map@{k}": float(value) for k, value in zip(ks, running, strict=True)}
    return {**scores, "protocol": "volume-map-ct-clip/1"}


def _blocks(
    rows: np.ndarray, labels: np.ndarray, queries: np.ndarray, gallery: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers of some queries, their cosines and their Jaccard indices with the gallery `(queries, gallery)`."""
    found = labels.astype(np.float64)
    for start in range(0, len(queries), QUERY_BLOCK):
        block = queries[start : start + QUERY_BLOCK]
        both = found[block] @ found[gallery].T
        either = found[block].sum(1)[:, None] + found[gallery].sum(1)[None] - both  # the gallery has findings: not 0
        yield block, rows[block] @ rows[gallery].T, both / either


def _nearest(similarity: np.ndarray, number: int) -> np.ndarray:
    """Of each row the columns of the `number` largest, the largest first and of equal ones the earlier."""
    number = min(number, similarity.shape[1])
    smallest = np.partition(similarity, -number, axis=1)[:, -number]
    nearest = np.empty((len(similarity), number), dtype=np.intp)
    for row, values in enumerate(similarity):
        reached = np.flatnonzero(values >= smallest[row])  # in their order, more than `number` where some are equal
        nearest[row] = reached[np.argsort(-values[reached], kind="stable")[:number]]
    return nearest


def _labels(labels: np.ndarray, num_volumes: int) -> np.ndarray:
    matrix = np.asarray(labels)
    if matrix.ndim != 2 or len(matrix) != num_volumes or not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"labels must be ({num_volumes}, num_labels) of 0 and 1, got shape {matrix.shape}.")
    return matrix.astype(bool)
