"""Whether reports differ from scan to scan: a collapsed model writes one template, whatever it is shown."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .overlap import ORDERS, _bleu_formula


SELF_BLEU_TEXTS = 1000  # of more, so many at equal distances: every n-gram of these is held in memory


def diversity(texts: Sequence[str | None]) -> dict[str, float]:
    """
    `unique_texts` (share of different texts; 1/n for a constant) and `self_bleu_4` (1 for a constant, low is varied).

    Self-BLEU (Zhu et al., arXiv 1802.01886): the mean over the texts of BLEU-4 with all others as references, words
    between blanks, no smoothing, on at most 1,000 of the texts. Compare both with those of the true reports, which
    repeat themselves too.

    Raises:
        ValueError: fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"Diversity is of at least two texts, got {len(texts)}.")
    unique = len({" ".join((text or "").split()) for text in texts}) / len(texts)
    some = np.linspace(0, len(texts) - 1, min(len(texts), SELF_BLEU_TEXTS)).round().astype(int)
    return {"unique_texts": unique, "self_bleu_4": _self_bleu([(texts[i] or "").split() for i in some])}


def _self_bleu(words: list[list[str]]) -> float:
    matched = np.zeros((len(words), len(ORDERS)))
    for column, order in enumerate(ORDERS):
        grams = [Counter(zip(*(text[i:] for i in range(order)), strict=False)) for text in words]
        most = _two_largest(grams)
        for row, counts in enumerate(grams):
            # The most often that any *other* text says it: the second largest where the text is the first itself.
            limits = {gram: most[gram][1] if most[gram][2] == row else most[gram][0] for gram in counts}
            matched[row, column] = sum(min(count, limits[gram]) for gram, count in counts.items())
    lengths = np.array([len(text) for text in words])
    said = np.maximum(lengths[:, None] - np.array(ORDERS) + 1, 0)
    reference = _nearest_other(lengths)
    return float(_bleu_formula(np.column_stack([matched, said, lengths, reference]))["bleu_4"].mean())


def _two_largest(grams: list[Counter]) -> dict[tuple, tuple[int, int, int]]:
    """n-gram: its largest and second largest count over the texts, and the text of the largest."""
    most: dict[tuple, tuple[int, int, int]] = {}
    for row, counts in enumerate(grams):
        for gram, count in counts.items():
            first, second, holder = most.get(gram, (0, 0, -1))
            if count > first:
                most[gram] = (count, first, row)
            elif count > second:
                most[gram] = (first, count, holder)
    return most


def _nearest_other(lengths: np.ndarray) -> np.ndarray:
    """For each text the length of the other text that is nearest in length; the shorter one of two."""
    order = np.argsort(lengths, kind="stable")
    ranked = lengths[order].astype(float)
    below, above = np.append(np.nan, ranked[:-1]), np.append(ranked[1:], np.nan)
    nearer_above = np.isnan(below) | (above - ranked < ranked - below)
    nearest = np.empty(len(lengths))
    nearest[order] = np.where(nearer_above, above, below)
    return nearest
