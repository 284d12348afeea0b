"""Retrieval between scans and reports and between scans, scored from embeddings, with chance beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hsenet.metrics.retrieval import recall_curve, retrieval_metrics, retrieval_tally
from hsenet.metrics.table import Result
from hsenet.metrics.volume_retrieval import ct_clip_volume_scores, volume_retrieval_tally
from hsenet.scoring.output import Scorer, plain_results


KS = (1, 5, 10, 50, 100)


@dataclass
class RetrievalScores:
    """`results` by task, the `metrics` of each protocol, and curves for the figure."""

    results: dict[str, list[Result]] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)


def score_embeddings(
    stage: str, rows: Sequence[dict[str, Any]], images: np.ndarray, texts: np.ndarray, score: Scorer
) -> RetrievalScores:
    """
    Args:
        rows: with `study_id`, and `labels` for retrieval between scans; a study with several rows makes a second
            protocol, in which each of them is right.
        images, texts: `(num_rows, dim)`.
    """
    scores = RetrievalScores()
    studies = [row["study_id"] for row in rows]
    protocols: dict[str, list | None] = {stage: None}
    if len(set(studies)) < len(studies):
        protocols[f"{stage} study-level"] = studies
    for name, ids in protocols.items():
        tally = retrieval_tally(images, texts, study_ids=ids, ks=KS)
        metrics = retrieval_metrics(images, texts, study_ids=ids, ks=KS)
        task = f"{name} retrieval"
        scores.results[task] = score(stage, [tally])
        for direction in ("image_to_text", "text_to_image"):
            chance = {f"{direction}_{what}": metrics[f"chance_{what}"] for what in ("mrr", *(f"R@{k}" for k in KS))}
            scores.results[task] += plain_results("chance", chance, tally.protocol)
        scores.metrics[name], scores.curves[name] = metrics, recall_curve(images, texts, study_ids=ids)
    labels = [row.get("labels") for row in rows]
    if all(labels) and len({study for study, found in zip(studies, labels, strict=True) if any(found)}) > 1:
        task = f"{stage} volume retrieval"
        published = ct_clip_volume_scores(images, np.array(labels))
        scores.results[task] = score(stage, [volume_retrieval_tally(images, np.array(labels), studies)])
        scores.results[task] += plain_results(stage, published, published.pop("protocol"))
    return scores
