"""Whether generated text depends on the image at all, in words that nobody can overlook.

A model is asked about every scan, and again with another patient's scan in its place. If its text is as good there,
the text does not come from the image, however high BLEU is.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from .bootstrap import compare_runs, holm_adjusted
from .tally import Tally


DEPENDS = "The text depends on the image"
DOES_NOT_DEPEND = "THE TEXT DOES NOT DEPEND ON THE IMAGE"
SIGNIFICANCE = 0.05


def image_verdict(
    own: Mapping[str, tuple[Tally, str]],
    blind: Mapping[str, tuple[Tally, str]],
    clusters: Mapping[str, Sequence[Hashable]],
    *,
    texts: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """
    Args:
        own, blind: for each task, its tally with the own and with a wrong image, and the score that decides.
        clusters: for each task, the patient of each item.
        texts: for each task, what was written with the own and with the wrong image.

    Returns:
        `depends` (`bool`), `text` (the verdict to print), `tests` (task -> difference, interval, Holm's p over the
        tasks) and `changed` (task -> share of the texts that another image changed). The text depends on the image
        where at least one task is better with the own one (p < 0.05).
    """
    tests = {
        task: {
            "score": score,
            **compare_runs(tally, blind[task][0], clusters[task], num_resamples=num_resamples, seed=seed)[score],
        }
        for task, (tally, score) in own.items()
    }
    for task, p_value in holm_adjusted({task: test["p_value"] for task, test in tests.items()}).items():
        tests[task]["p_holm"] = p_value
    better = [task for task, test in tests.items() if test["difference"] > 0 and test["p_holm"] < SIGNIFICANCE]
    changed = {
        task: float(np.mean([one != other for one, other in zip(*pair, strict=True)])) for task, pair in texts.items()
    }
    return {"depends": bool(better), "text": _words(better, tests, changed), "tests": tests, "changed": changed}


def _words(better: list[str], tests: Mapping[str, dict], changed: Mapping[str, float]) -> str:
    lines = [
        f"- {task}: {test['score']} {test['difference']:+.3f} with the own image [{test['low']:+.3f}, "
        f"{test['high']:+.3f}], p = {test['p_holm']:.4f}; another image changed {changed[task]:.0%} of the texts."
        for task, test in tests.items()
    ]
    if better:
        head = f"{DEPENDS} ({', '.join(better)}): it is better with the own scan than with another patient's."
    else:
        head = f"{DOES_NOT_DEPEND}: it is no worse with another patient's scan, so no score shows that it reads scans."
    return "\n".join([f"**{head}**", "", *lines])
