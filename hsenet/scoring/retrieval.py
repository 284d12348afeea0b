"""Retrieval between scans and reports and between scans, scored from embeddings, with chance beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hsenet.metrics.bootstrap import compare_runs
from hsenet.metrics.retrieval import retrieval_scores
from hsenet.metrics.table import Result
from hsenet.metrics.tally import Tally
from hsenet.metrics.volume_retrieval import ct_clip_volume_scores, volume_retrieval_tally
from hsenet.scoring.output import Scorer, plain_results


KS = (1, 5, 10, 50, 100)


@dataclass
class RetrievalScores:
    """`results` and the model's tally by task, the `metrics` of each protocol, and curves for the figure."""

    results: dict[str, list[Result]] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
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
        metrics, tally, curve = retrieval_scores(images, texts, study_ids=ids, ks=KS)
        task = f"{name} retrieval"
        scores.tallies[task] = tally
        scores.results[task] = score(stage, [tally])
        for direction in ("image_to_text", "text_to_image"):
            chance = {f"{direction}_{what}": metrics[f"chance_{what}"] for what in ("mrr", *(f"R@{k}" for k in KS))}
            scores.results[task] += plain_results("chance", chance, tally.protocol)
        scores.metrics[name], scores.curves[name] = metrics, curve
    labels = [row.get("labels") for row in rows]
    if all(labels) and len({study for study, found in zip(studies, labels, strict=True) if any(found)}) > 1:
        task = f"{stage} volume retrieval"
        random = np.random.default_rng(0).normal(size=images.shape)
        scores.results[task] = []
        for system, embeds in ((stage, images), ("random embeddings", random)):
            tally = volume_retrieval_tally(embeds, np.array(labels), studies)
            published = ct_clip_volume_scores(embeds, np.array(labels))
            scores.tallies.setdefault(task, tally)
            scores.results[task] += score(system, [tally])
            scores.results[task] += plain_results(system, published, published.pop("protocol"))
    return scores


def save_queries(path: Path, tallies: dict[str, Tally], ids_digest: str) -> None:
    """What each query adds to the scores of each task, for a paired test with a later run."""
    about = {"ids": ids_digest, "protocols": {task: tally.protocol for task, tally in tallies.items()}}
    counts = {task: np.ascontiguousarray(tally.counts) for task, tally in tallies.items()}
    save_file(counts, path, {"about": json.dumps(about)})  # one entry: several would be written in any order


def compare_queries(
    own: dict[str, Tally], baseline: Path, ids_digest: str, patients: Sequence[str], num_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """
    Paired differences of this run's retrieval and that of another run, whose `save_queries` wrote `baseline`.

    Raises:
        ValueError: the other run did not score the same volumes in the same order, or lacks one of the tasks.
    """
    counts = load_file(baseline) if baseline.exists() else {}
    if missing := sorted(set(own) - set(counts)):
        raise ValueError(
            f"The baseline has no {', '.join(missing)}: score it there too, or leave the model out of this run."
        )
    with safe_open(baseline, "numpy") as file:
        about = json.loads(file.metadata()["about"])
    if about["ids"] != ids_digest:
        raise ValueError("The baseline retrieved among other volumes: a paired test needs the same, see its ids.txt.")
    records = []
    for task, tally in own.items():
        other = Tally(about["protocols"][task], counts[task], tally.formula)
        compared = compare_runs(tally, other, patients, num_resamples=num_resamples, seed=seed)
        records += [{"task": task, "protocol": tally.protocol, "score": n, **v} for n, v in compared.items()]
    return records
