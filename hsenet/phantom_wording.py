"""The means of varied wording: every statement of a phantom's report is drawn from several."""

import numpy as np


NUMBERS = ("no", "one", "two", "three", "four", "five")


class Wording:
    """Draws one of several wordings; every draw comes from the study's generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def one_of(self, *wordings: str) -> str:
        return wordings[int(self.rng.integers(len(wordings)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)


def sentence(text: str) -> str:
    """Capitalise and end with a full stop."""
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def join_words(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
