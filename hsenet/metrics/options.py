"""Multiple choice: which option an answer chose, and how often none could be read from it.

    options_tally(predictions, answers, options)      # answers: letters; options: the texts of A, B, C, ... each

A choice that cannot be read is wrong, not left out.
"""

import re
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from .tally import Tally, mean_tally
from .vqa import _check_lengths, by_group, normalise_answer


LETTER = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?:\s|$)|$)")


def chosen_option(prediction: str | None, options: Sequence[str]) -> str | None:
    """
    The letter of the option that a prediction chose, or None.

    A leading letter counts if it stands alone ("B", "(b)", "B. left lung", "B: left lung"), and the whole text of one
    option does; "CT shows an A." or two options do not.
    """
    text = " ".join((prediction or "").split())
    letters = [chr(ord("A") + index) for index in range(len(options))]
    leading = LETTER.match(text)
    if leading and leading[1].upper() in letters:
        return leading[1].upper()
    same = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if normalise_answer(option) == normalise_answer(text) != ""
    ]
    return same[0] if len(same) == 1 else None


def options_tally(
    predictions: Sequence[str | None],
    answers: Sequence[str],
    options: Sequence[Sequence[str] | None],
    groups: Mapping[str, Sequence[Hashable | None]] | None = None,
) -> Tally:
    """
    `option_accuracy` (an unreadable choice is wrong), `unreadable` (share of those), `option_chance`, and
    `option_accuracy[GROUP=VALUE]` for the values of each group, such as type or anatomy.

    Args:
        answers: the right letter of each question.
        options: the texts of each question's options, from A on; None: no multiple choice, it doesn't count.

    Raises:
        ValueError: lists of different length, or an answer that is no letter of its options.
    """
    _check_lengths(predictions=predictions, answers=answers)
    _check_lengths(options=options, answers=answers)
    for answer, texts in zip(answers, options, strict=True):
        if texts and (len(answer) != 1 or not 0 <= ord(answer) - ord("A") < len(texts)):
            raise ValueError(f"Each answer must be the letter of one of its {len(texts)} options, got {answer!r}.")
    chosen = [chosen_option(text, texts or ()) for text, texts in zip(predictions, options, strict=True)]
    values = {
        "option_accuracy": [one == answer for one, answer in zip(chosen, answers, strict=True)],
        "unreadable": [one is None for one in chosen],
        "option_chance": [1 / len(texts) if texts else np.nan for texts in options],
    }
    counted = np.array([bool(texts) for texts in options])
    values = {name: np.where(counted, of_score, np.nan) for name, of_score in values.items()}
    split = {"option_accuracy": values["option_accuracy"]}
    return mean_tally("vqa-option/1", {**values, **by_group(split, groups or {})})


def options_m3d_tally(predictions: Sequence[str | None], answers: Sequence[str]) -> Tally:
    """M3D's test: the letter and a period anywhere in the text, so that "CTA." chooses A. For comparison only."""
    _check_lengths(predictions=predictions, answers=answers)
    hits = [f"{answer}." in (text or "") for text, answer in zip(predictions, answers, strict=True)]
    return mean_tally("vqa-option-m3d/1", {"option_m3d": np.array(hits, dtype=float)})
