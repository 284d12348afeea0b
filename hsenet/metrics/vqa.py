"""Visual question answering metrics: exact match by question type, and the floors that need no image.

    vqa_metrics(predictions, answers, question_types)
    majority_answer_floor(train_answers, train_types, answers, types)   # print it beside every accuracy

Exact match is strict on purpose: the substring tests in use elsewhere count an empty answer as correct.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np


NORMALISATION = "strip, lower case, whitespace collapsed, trailing periods removed"


def normalise_answer(answer: str | None) -> str:
    """Strip, lower-case, collapse whitespace, remove trailing periods; `None` is the empty answer. Nothing else."""
    return " ".join((answer or "").lower().split()).rstrip(". ")


def vqa_metrics(
    predictions: Sequence[str | None], answers: Sequence[str], question_types: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """
    Exact-match accuracy over all questions, by question type, and the unweighted mean over types.

    A prediction is correct when it equals the answer after `normalise_answer`. A missing (`None`) or empty prediction
    is wrong and stays in the denominator; an empty answer is a data error.

    Returns:
        `accuracy`, `num_questions`, `num_empty_predictions`, `normalisation`; with `question_types` also
        `accuracy_macro`, `accuracy_by_type` and `num_by_type`.
    """
    _check_lengths(predictions=predictions, answers=answers)
    correct = _correct(predictions, answers)
    result: dict[str, Any] = {
        "accuracy": float(np.mean(correct)),
        "num_questions": len(answers),
        "num_empty_predictions": sum(not normalise_answer(prediction) for prediction in predictions),
        "normalisation": NORMALISATION,
    }
    if question_types is None:
        return result
    _check_lengths(question_types=question_types, answers=answers)
    by_type: dict[Hashable, list[bool]] = defaultdict(list)
    for question_type, is_correct in zip(question_types, correct, strict=True):
        by_type[question_type].append(is_correct)
    result["accuracy_by_type"] = {name: float(np.mean(by_type[name])) for name in sorted(by_type, key=str)}
    result["num_by_type"] = {name: len(by_type[name]) for name in sorted(by_type, key=str)}
    result["accuracy_macro"] = float(np.mean(list(result["accuracy_by_type"].values())))
    return result


def majority_answers(
    train_answers: Sequence[str], train_groups: Sequence[Hashable], groups: Sequence[Hashable]
) -> list[str]:
    """
    The most frequent training answer of each question's group: predictions that never saw an image.

    A group without training answers gets the global majority. Equal counts are settled alphabetically, so the order
    of the rows does not matter. Score the result with `vqa_metrics` to have the floor by question type.
    """
    _check_lengths(train_groups=train_groups, train_answers=train_answers)
    counts: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for answer, group in zip(train_answers, train_groups, strict=True):
        counts[group][normalise_answer(answer)] += 1
    fallback = _most_frequent(sum(counts.values(), Counter()))
    majority = {group: _most_frequent(counter) for group, counter in counts.items()}
    return [majority.get(group, fallback) for group in groups]


def majority_answer_floor(
    train_answers: Sequence[str],
    train_groups: Sequence[Hashable],
    answers: Sequence[str],
    groups: Sequence[Hashable],
) -> dict[str, Any]:
    """
    Accuracy of answering without looking: each group's most frequent training answer, and the single most frequent.

    Groups are whatever the question alone reveals: its type, or `(type, finding asked about)`. The finer the group,
    the higher and the more honest the floor. Normalisation and counting are those of `vqa_metrics`.

    Returns:
        `group_majority_accuracy`, `global_majority_accuracy`, `global_majority_answer`, `num_groups`, and
        `num_unseen_groups` (evaluation groups without training answers, answered with the global majority).
    """
    _check_lengths(groups=groups, answers=answers)
    by_group = majority_answers(train_answers, train_groups, groups)
    overall = majority_answers(train_answers, [None] * len(train_answers), [None] * len(answers))
    return {
        "group_majority_accuracy": float(np.mean(_correct(by_group, answers))),
        "global_majority_accuracy": float(np.mean(_correct(overall, answers))),
        "global_majority_answer": overall[0],
        "num_groups": len(set(groups)),
        "num_unseen_groups": len(set(groups) - set(train_groups)),
    }


def _most_frequent(counter: Counter[str]) -> str:
    return min(counter, key=lambda answer: (-counter[answer], answer))


def _correct(predictions: Sequence[str | None], answers: Sequence[str]) -> list[bool]:
    truths = [normalise_answer(answer) for answer in answers]
    empty = [index for index, truth in enumerate(truths) if not truth]
    if empty:
        raise ValueError(f"Every answer must have text, got {len(empty)} empty ones, first: {empty[:5]}.")
    return [normalise_answer(prediction) == truth for prediction, truth in zip(predictions, truths, strict=True)]


def _check_lengths(**sequences: Sequence[Any]) -> None:
    (name, values), (other, others) = sequences.items()
    if len(values) != len(others) or not len(values):
        raise ValueError(
            f"{name} and {other} must be of one length and not empty, got {len(values)} and {len(others)}."
        )
