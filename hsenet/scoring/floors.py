"""What is reached without reading the scan: the floors that stand in every table."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hsenet.metrics.overlap import overlap_tally
from hsenet.metrics.retrieval import QUERY_BLOCK
from hsenet.metrics.vqa import majority_answers


CANDIDATES = 30  # training reports tried as the constant one that is best for BLEU
SAMPLE = 200  # references that they are tried on


def constant_for_bleu(training_reports: Sequence[str], references: Sequence[str], seed: int) -> str:
    """The training report, of a few, that has the best BLEU-4 when it is the answer to every scan (of a sample)."""
    generator = np.random.default_rng(seed)
    candidates = [training_reports[i] for i in _some(generator, len(training_reports), CANDIDATES)]
    sample = [references[i] for i in _some(generator, len(references), SAMPLE)]
    scores = [overlap_tally("bleu-13a", [text] * len(sample), sample).scores()["bleu_4"] for text in candidates]
    return candidates[int(np.argmax(scores))]


def random_reports(training_reports: Sequence[str], number: int, seed: int) -> list[str]:
    picked = np.random.default_rng((seed, 1)).integers(0, len(training_reports), number)
    return [training_reports[i] for i in picked]


def nearest_reports(embeds: np.ndarray, training_embeds: np.ndarray, training_reports: Sequence[str]) -> list[str]:
    """The report of the nearest training volume; unit embeddings `(num_volumes, dim)`. This one does see the scan."""
    blocks = (embeds[start : start + QUERY_BLOCK] for start in range(0, len(embeds), QUERY_BLOCK))
    return [training_reports[i] for block in blocks for i in (block @ training_embeds.T).argmax(1)]


def age_and_sex_labels(
    training_rows: Sequence[dict[str, Any]], training_labels: np.ndarray, rows: Sequence[dict[str, Any]]
) -> np.ndarray | None:
    """
    Findings `(num_rows, num_labels)` guessed from `age` (years) and `sex` alone; None where a row has no such thing.

    A finding is claimed for the groups (sex and decade) in which it is common; how common it has to be is what gives
    the best F1 on the training rows.
    """
    if any(row.get(name) is None for row in (*training_rows, *rows) for name in ("age", "sex")):
        return None
    overall = training_labels.mean(0)
    members: dict[tuple, list[np.ndarray]] = {}
    for row, labels in zip(training_rows, training_labels, strict=True):
        members.setdefault(_group(row), []).append(labels)
    # One more patient of the overall kind in every group: nobody is sure from a single case.
    rates = {group: (np.sum(found, axis=0) + overall) / (len(found) + 1) for group, found in members.items()}
    expected, seen = (np.array([rates.get(_group(row), overall) for row in some]) for some in (rows, training_rows))
    thresholds = [_best_threshold(seen[:, i], training_labels[:, i]) for i in range(len(overall))]
    return expected >= np.array(thresholds)


def question_floors(
    training: Sequence[dict[str, Any]], questions: Sequence[dict[str, Any]], seed: int
) -> dict[str, list[str]]:
    """Answers by name of the floor: the commonest of a question's type, of its type and finding, and a random one."""
    answers = [row["answer"] for row in training]
    floors = {}
    for name, columns in (("majority of type", ("question_type",)), ("majority of type and finding", FINE)):
        train_groups, groups = ([tuple(row[c] for c in columns) for row in rows] for rows in (training, questions))
        floors[name] = majority_answers(answers, train_groups, groups)
    of_type: dict[str, list[str]] = {}
    for row in training:
        of_type.setdefault(row["question_type"], []).append(row["answer"])
    generator = np.random.default_rng((seed, 2))
    pools = [of_type.get(row["question_type"], answers) for row in questions]
    floors["random of type"] = [pool[generator.integers(len(pool))] for pool in pools]
    return floors


FINE = ("question_type", "label")


def _group(row: dict[str, Any]) -> tuple[str, int]:
    return row["sex"], row["age"] // 10


def _best_threshold(rates: np.ndarray, truth: np.ndarray) -> float:
    """The rate from which on to claim the finding for the best F1; infinite if it never occurs."""
    if not truth.any():
        return float("inf")
    order = np.argsort(-rates, kind="stable")
    f1 = 2 * truth[order].cumsum() / (np.arange(1, len(truth) + 1) + truth.sum())
    last_of_tie = np.append(np.diff(rates[order]) != 0, True)  # rows of one rate are claimed together
    return float(rates[order][np.where(last_of_tie, f1, -1).argmax()])


def _some(generator: np.random.Generator, number: int, most: int) -> list[int]:
    return sorted(generator.permutation(number)[:most].tolist())
