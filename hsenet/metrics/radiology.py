"""RaTEScore, RadGraph and GREEN through RadEval, where it is installed (`pip install RadEval`).

    radeval_tally("ratescore", predictions, references)

RadEval brings its own models from the Hub, and GREEN is a 7B language model for a GPU; so nothing here is imported
before it is asked for, and nothing stands in for it where it is missing.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version

import numpy as np

from .tally import Tally, mean_tally


RADEVAL_METRICS = {  # metric: the scores that RadEval (2.2) gives of it
    "ratescore": ("ratescore",),
    "radgraph": ("radgraph_simple", "radgraph_partial", "radgraph_complete"),
    "green": ("green",),
}


def radeval_tally(metric: str, predictions: Sequence[str | None], references: Sequence[str]) -> Tally:
    """
    Means over the reports of what RadEval gives each of them, under `METRIC/1[RadEval VERSION]`.

    An empty prediction scores 0 and is not shown to RadEval.

    Raises:
        ImportError: RadEval is not installed.
        ValueError: another metric, or lists of different length.
    """
    if metric not in RADEVAL_METRICS:
        raise ValueError(f"metric must be one of {', '.join(RADEVAL_METRICS)}, got {metric!r}.")
    if len(predictions) != len(references):
        raise ValueError(f"Expected one reference a prediction, got {len(predictions)} and {len(references)}.")
    scorer = _scorer(metric)
    written = [index for index, text in enumerate(predictions) if (text or "").strip()]
    columns = {name: np.zeros(len(references)) for name in RADEVAL_METRICS[metric]}
    if written:
        values = scorer(refs=[references[i] for i in written], hyps=[predictions[i] for i in written])
        for name, column in columns.items():
            column[written] = values[name]
    return mean_tally(f"{metric}/1[RadEval {version('RadEval')}]", columns)


@cache
def _scorer(metric: str) -> Callable:
    """One for all texts that are scored: loading it takes longer than most scoring."""
    try:
        from radeval import RadEval
    except ImportError as error:
        raise ImportError(f"{metric} is computed by RadEval: pip install RadEval.") from error
    return RadEval(metrics=[metric], per_sample=True)
