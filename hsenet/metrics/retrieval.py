"""Cross-modal retrieval metrics: recall at k, mean rank and MRR between volumes and reports, in both directions.

    retrieval_metrics(image_embeds, text_embeds)                        # protocol "identity": row i matches row i
    retrieval_metrics(image_embeds, text_embeds, study_ids=study_ids)   # protocol "study": any row of the same study
    retrieval_tally(image_embeds, text_embeds, study_ids=study_ids)     # the same scores, for intervals and tests

The two protocols are not comparable: CT-RATE has about two reconstructions per report, and under "identity" (the
published tables', but for how ties are broken) a perfect model finds the wrong sibling half of the time. The result
names its protocol.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from .tally import Tally, mean_tally


TIE_TOLERANCE = 1e-9  # cosines nearer than this are equal: 64-bit rounding depends on a row's place in the product
QUERY_BLOCK = 256  # queries scored at once, so that memory stays linear in the number of candidates


def retrieval_metrics(
    image_embeds: np.ndarray | torch.Tensor,
    text_embeds: np.ndarray | torch.Tensor,
    *,
    study_ids: Sequence[Hashable] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Any]:
    """
    Recall at k, mean and median rank, MRR, image to text and text to image, by cosine similarity in float64.

    Every row is a query and every row of the other side is a candidate; nothing is deduplicated or dropped. A query's
    rank is that of its best-placed match. Ties are broken at random *in expectation*, without a random number: recall
    at k is the probability that a match is among the first k, the rank is the expected rank, the reciprocal rank the
    expected reciprocal. So a constant embedding scores exactly `chance_...`, whatever the order of the rows. The
    median is that of the expected ranks.

    Args:
        image_embeds: `(num_items, dim)`, normalised here.
        text_embeds: `(num_items, dim)`; row i is the report of image i.
        study_ids: One per row. When given, a hit is any candidate of the query's study.
        ks: The cut-offs. Where k is at least the number of candidates, recall and chance are both 1.

    Returns:
        `image_to_text_R@k`, `text_to_image_R@k` (fractions), `..._mrr`, `..._mean_rank`, `..._median_rank` (1 is
        best), `chance_R@k` and `chance_mrr` (a random ranking under the same protocol), `protocol`, `num_candidates`,
        and `num_studies` under the study protocol.
    """
    ranks, studies = _ranks(image_embeds, text_embeds, study_ids, ks)
    return _metrics(ranks, studies, study_ids, ks)


def similarity_metrics(
    similarity: np.ndarray | torch.Tensor,
    *,
    study_ids: Sequence[Hashable] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Any]:
    """
    `retrieval_metrics` for a model that scores pairs and has no embeddings.

    Args:
        similarity: `(num_items, num_items)`, of image i with text j; text i is the report of image i.
    """
    if isinstance(similarity, torch.Tensor):
        similarity = similarity.detach().to("cpu", torch.float64).numpy()
    scores = np.asarray(similarity, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"similarity must be a non-empty, finite, square array, got shape {scores.shape}.")
    studies, one_hot = _study_numbers(study_ids, len(scores)), np.eye(len(scores))
    directions = {"image_to_text": (scores, one_hot), "text_to_image": (scores.T, one_hot)}
    ranks = {name: _query_scores(*sides, studies, ks) for name, sides in directions.items()}
    return _metrics(ranks, studies, study_ids, ks)


def _metrics(
    ranks: dict[str, dict[str, np.ndarray]],
    studies: np.ndarray,
    study_ids: Sequence[Hashable] | None,
    ks: Sequence[int],
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "protocol": _protocol(study_ids),
        "num_candidates": len(studies),
    }
    if study_ids is not None:
        result["num_studies"] = int(studies.max()) + 1
    for direction, of_queries in ranks.items():
        for name, values in of_queries.items():
            result[f"{direction}_{name}"] = float(np.mean(values))
        result[f"{direction}_median_rank"] = float(np.median(of_queries["mean_rank"]))
    return {**result, **_chance(studies, ks)}


def retrieval_tally(
    image_embeds: np.ndarray | torch.Tensor,
    text_embeds: np.ndarray | torch.Tensor,
    *,
    study_ids: Sequence[Hashable] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Tally:
    """The means of `retrieval_metrics` with what each query adds; the protocol says how large the gallery is."""
    ranks, studies = _ranks(image_embeds, text_embeds, study_ids, ks)
    return _tally(ranks, studies, study_ids)


def recall_curve(
    image_embeds: np.ndarray | torch.Tensor,
    text_embeds: np.ndarray | torch.Tensor,
    *,
    study_ids: Sequence[Hashable] | None = None,
    num_points: int = 40,
) -> dict[str, Any]:
    """`k`, recall at each k of both directions and of chance, from 1 to all evenly in log k, and the `protocol`."""
    ks = _curve_ks(len(image_embeds), num_points)
    return _curve(retrieval_metrics(image_embeds, text_embeds, study_ids=study_ids, ks=ks), ks)


def retrieval_scores(
    image_embeds: np.ndarray | torch.Tensor,
    text_embeds: np.ndarray | torch.Tensor,
    *,
    study_ids: Sequence[Hashable] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> tuple[dict[str, Any], Tally, dict[str, Any]]:
    """`retrieval_metrics`, `retrieval_tally` and `recall_curve` from one comparison of all with all."""
    curve_ks = _curve_ks(len(image_embeds), 40)
    ranks, studies = _ranks(image_embeds, text_embeds, study_ids, sorted({*ks, *curve_ks}))
    curve = _curve(_metrics(ranks, studies, study_ids, curve_ks), curve_ks)
    names = (*(f"R@{k}" for k in ks), "mean_rank", "mrr")
    asked = {direction: {name: of_queries[name] for name in names} for direction, of_queries in ranks.items()}
    return _metrics(asked, studies, study_ids, ks), _tally(asked, studies, study_ids), curve


def _tally(
    ranks: dict[str, dict[str, np.ndarray]], studies: np.ndarray, study_ids: Sequence[Hashable] | None
) -> Tally:
    values = {f"{direction}_{name}": column for direction, of in ranks.items() for name, column in of.items()}
    return mean_tally(f"{_protocol(study_ids)}[{len(studies)} candidates]", values)


def _curve_ks(num_candidates: int, num_points: int) -> list[int]:
    return np.unique(np.geomspace(1, num_candidates, num_points).round().astype(int)).tolist()


def _curve(scores: dict[str, Any], ks: Sequence[int]) -> dict[str, Any]:
    names = ("image_to_text", "text_to_image", "chance")
    curve = {name: [scores[f"{name}_R@{k}"] for k in ks] for name in names}
    return {"protocol": scores["protocol"], "k": list(ks), **curve}


def _protocol(study_ids: Sequence[Hashable] | None) -> str:
    return "retrieval-identity/1" if study_ids is None else "retrieval-study/1"


def _ranks(
    image_embeds: np.ndarray | torch.Tensor,
    text_embeds: np.ndarray | torch.Tensor,
    study_ids: Sequence[Hashable] | None,
    ks: Sequence[int],
) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Direction: score: what each query has, `(num_items,)`; and the study number of each row."""
    images, texts = _unit_rows(image_embeds, "image_embeds"), _unit_rows(text_embeds, "text_embeds")
    if images.shape != texts.shape:
        raise ValueError(
            f"image_embeds and text_embeds must have one shape, row i of one matching row i of the other, "
            f"got {images.shape} and {texts.shape}."
        )
    studies = _study_numbers(study_ids, len(images))
    directions = {"image_to_text": (images, texts), "text_to_image": (texts, images)}
    return {name: _query_scores(*sides, studies, ks) for name, sides in directions.items()}, studies


def _query_scores(
    queries: np.ndarray, candidates: np.ndarray, studies: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Score: what each query has, `(num_items,)`; similarities are the products of queries and candidates."""
    if any(k < 1 for k in ks):
        raise ValueError(f"Each k must be at least 1, got {tuple(ks)}.")
    better, tied, tied_matches = _tie_counts(queries, candidates, studies)
    scores = {f"R@{k}": _hit_probability(tied, k - better, tied_matches) for k in ks}
    # Expected position, and expected reciprocal of the position, of the first of the tied matches.
    scores["mean_rank"] = better + (tied + 1) / (tied_matches + 1)
    scores["mrr"] = _reciprocal_rank(better, tied, tied_matches)
    return scores


def _chance(studies: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """A random ranking: every candidate tied with every other."""
    matches, all_tied = np.bincount(studies)[studies], np.full(len(studies), len(studies))
    chance = {f"chance_R@{k}": float(np.mean(_hit_probability(all_tied, k, matches))) for k in ks}
    mrr = _reciprocal_rank(np.zeros(len(studies), dtype=int), all_tied, matches)
    return {**chance, "chance_mrr": float(np.mean(mrr))}


def chance_recall(num_candidates: int, k: int, positives: int = 1) -> float:
    """Recall at k of a uniformly random ranking: that one of `positives` matches is among the first k candidates."""
    if not 1 <= positives <= num_candidates:
        raise ValueError(f"positives must be in 1..num_candidates={num_candidates}, got {positives}.")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}.")
    return float(_hit_probability(np.array([num_candidates]), k, np.array([positives]))[0])


def _unit_rows(embeds: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    if isinstance(embeds, torch.Tensor):
        embeds = embeds.detach().to("cpu", torch.float64).numpy()
    rows = np.asarray(embeds, dtype=np.float64)
    if rows.ndim != 2 or rows.size == 0:
        raise ValueError(f"{name} must be a non-empty array (num_items, dim), got shape {rows.shape}.")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unusable = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if unusable.size:
        first = unusable[:5].tolist()
        raise ValueError(f"{name} has {unusable.size} rows that are zero or not finite, first: {first}.")
    return rows / norms


def _study_numbers(study_ids: Sequence[Hashable] | None, num_items: int) -> np.ndarray:
    if study_ids is None:
        return np.arange(num_items)
    if len(study_ids) != num_items:
        raise ValueError(f"study_ids must have one entry per row, expected {num_items}, got {len(study_ids)}.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(study_id, len(numbers)) for study_id in study_ids])


def _tie_counts(
    queries: np.ndarray, candidates: np.ndarray, studies: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per query: candidates better than its best match, candidates tied with it, and matches among those tied."""
    counts = []
    for start in range(0, len(queries), QUERY_BLOCK):
        similarity = queries[start : start + QUERY_BLOCK] @ candidates.T  # (queries in the block, num_candidates)
        is_match = studies[start : start + QUERY_BLOCK, None] == studies[None, :]
        best = np.where(is_match, similarity, -np.inf).max(axis=1, keepdims=True)
        is_tied = np.abs(similarity - best) <= TIE_TOLERANCE
        better = (similarity > best) & ~is_tied
        counts.append(np.stack([better.sum(1), is_tied.sum(1), (is_tied & is_match).sum(1)]))
    better, tied, tied_matches = np.concatenate(counts, axis=1)
    return better, tied, tied_matches


def _hit_probability(tied: np.ndarray, places: np.ndarray | int, matches: np.ndarray) -> np.ndarray:
    """Probability that one of `matches` is in the first `places` of `tied` shuffled items (1 - hypergeometric 0)."""
    drawn = np.clip(places, 0, tied)
    missed = np.ones(len(tied))
    for i in range(int(matches.max())):
        missed *= np.where(i < matches, np.clip(tied - drawn - i, 0, None) / np.maximum(tied - i, 1), 1.0)
    return 1.0 - missed


def _reciprocal_rank(better: np.ndarray, tied: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Expected reciprocal rank of the first of `matches` among `tied` shuffled items that follow `better` others."""
    cases, index = np.unique(np.stack([better, tied, matches], axis=1), axis=0, return_inverse=True)
    return np.array([_expected_reciprocal(*case) for case in cases.tolist()])[index.reshape(-1)]


def _expected_reciprocal(better: int, tied: int, matches: int) -> float:
    places = np.arange(1, tied - matches + 2)
    if len(places) == 1:
        return 1 / (better + 1)
    # The first match is at place j: none of the j - 1 items before is one, the next is.
    none_before = np.cumprod(np.append(1.0, 1 - matches / (tied - places[:-1] + 1)))
    return float(np.sum(none_before * matches / (tied - places + 1) / (better + places)))
