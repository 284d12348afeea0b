"""Visual question answering metrics: exact, set and major-class accuracy, and the floors that need no image.

    vqa_metrics(predictions, answers, question_types)
    vqa_tally(predictions, answers, {"type": question_types, "anatomy": anatomies})    # for intervals and tests
    majority_answer_floor(train_answers, train_types, answers, types)   # print it beside every accuracy

Exact match is strict on purpose: the substring tests in use elsewhere count an empty answer as correct. The original's
"major class accuracy" is such a test; it is here under its own name, `major_class_hsenet_tally`. Multiple choice is in
`options.py`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from .tally import Tally, mean_tally


NORMALISATION = "strip, lower case, whitespace collapsed, trailing periods removed"
PARTS = re.compile(r"\s*(?:[,;/]|\band\b)\s*")


def normalise_answer(answer: str | None) -> str:
    """Strip, lower-case, collapse whitespace, remove trailing periods; `None` is the empty answer. Nothing else."""
    return " ".join((answer or "").lower().split()).rstrip(". ")


def answer_set(answer: str | None) -> frozenset[str]:
    """The parts of an answer, whatever their order: "left lung, pleura" and "Pleura and left lung." are one set."""
    return frozenset(part for part in PARTS.split(normalise_answer(answer)) if part)


def major_class(answer: str | None) -> str:
    """What stands before the first "/" of a hierarchical answer: "lung" of "Lung/left lung/upper lobe"."""
    return normalise_answer(normalise_answer(answer).split("/")[0])


def vqa_tally(
    predictions: Sequence[str | None],
    answers: Sequence[str],
    groups: Mapping[str, Sequence[Hashable | None]] | None = None,
) -> Tally:
    """
    `accuracy` (exact), `set_accuracy` (same parts), `set_f1` (mean overlap of the parts), `major_class_accuracy`
    (equal, not contained), and for the values of each group, such as type or anatomy, `accuracy[GROUP=VALUE]` and
    `set_accuracy[GROUP=VALUE]`.

    A missing (`None`) or empty prediction is wrong and stays in the denominator; an empty answer is a data error.
    """
    _check_lengths(predictions=predictions, answers=answers)
    correct = np.array(_correct(predictions, answers), dtype=float)
    said, truth = [answer_set(text) for text in predictions], [answer_set(text) for text in answers]
    values = {
        "accuracy": correct,
        "set_accuracy": [bool(one) and one == other for one, other in zip(said, truth, strict=True)],
        "set_f1": [
            2 * len(one & other) / (len(one) + len(other)) if one else 0.0
            for one, other in zip(said, truth, strict=True)
        ],
        "major_class_accuracy": [
            bool(major_class(text)) and major_class(text) == major_class(answer)
            for text, answer in zip(predictions, answers, strict=True)
        ],
    }
    split = {name: values[name] for name in ("accuracy", "set_accuracy")}
    return mean_tally("vqa-exact/1", {**values, **by_group(split, groups or {})})


def by_group(
    values: Mapping[str, Sequence[float]], groups: Mapping[str, Sequence[Hashable | None]]
) -> dict[str, np.ndarray]:
    """`SCORE[GROUP=VALUE]`: each item's value inside the group, nan outside; None is in no group."""
    columns = {}
    for score, of_score in values.items():
        for name, members in groups.items():
            _check_lengths(**{name: members, score: of_score})
            for value in sorted({member for member in members if member is not None}, key=str):
                inside = np.array([member == value for member in members])
                columns[f"{score}[{name}={value}]"] = np.where(inside, of_score, np.nan)
    return columns


def major_class_hsenet_tally(predictions: Sequence[str | None], answers: Sequence[str]) -> Tally:
    """
    HSENet's "major class accuracy": right where the prediction up to its first "/" is *contained* in the answer.

    An empty answer, "a" or "/anything" is always right, and "heart" is right for everything that mentions a heart. For
    comparison with published numbers only; `major_class_accuracy` of `vqa_tally` is the honest one.
    """
    _check_lengths(predictions=predictions, answers=answers)
    pairs = zip(predictions, answers, strict=True)
    hits = [(text or "").strip().split("/")[0].lower() in answer.lower() for text, answer in pairs]
    return mean_tally("major-class-hsenet/1", {"major_class_hsenet": hits})


def vqa_metrics(
    predictions: Sequence[str | None], answers: Sequence[str], question_types: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """
    Exact-match accuracy over all questions, by question type, and the unweighted mean over types.

    A prediction is correct when it equals the answer after `normalise_answer`. A missing (`None`) or empty prediction
    is wrong and stays in the denominator; an empty answer is a data error.

    Returns:
        `accuracy`, `set_accuracy`, `set_f1`, `major_class_accuracy` (see `vqa_tally`), `num_questions`,
        `num_empty_predictions`, `normalisation`, `protocol`; with `question_types` also `accuracy_macro`,
        `accuracy_by_type` and `num_by_type`.
    """
    tally = vqa_tally(predictions, answers)
    result: dict[str, Any] = {
        **tally.scores(),
        "num_questions": len(answers),
        "num_empty_predictions": sum(not normalise_answer(prediction) for prediction in predictions),
        "normalisation": NORMALISATION,
        "protocol": tally.protocol,
    }
    if question_types is None:
        return result
    _check_lengths(question_types=question_types, answers=answers)
    by_type: dict[Hashable, list[bool]] = defaultdict(list)
    for question_type, is_correct in zip(question_types, _correct(predictions, answers), strict=True):
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
