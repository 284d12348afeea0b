"""Figures of a run: recall against the number of candidates looked at, and the F1 of each finding."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from hsenet.metrics.table import Result


matplotlib.use("Agg")  # before pyplot is imported: figures go to files, a display may be missing

from matplotlib import pyplot as plt


def save_recall_curves(curves: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Of `recall_curve`, by model: a panel a protocol, each with its chance; the candidates on a logarithmic axis."""
    protocols = list(dict.fromkeys(curve["protocol"] for curve in curves.values()))
    figure, axes = plt.subplots(1, len(protocols), figsize=(5.5 * len(protocols), 4), squeeze=False)
    for axis, protocol in zip(axes[0], protocols, strict=True):
        shown = {name: curve for name, curve in curves.items() if curve["protocol"] == protocol}
        for number, (name, curve) in enumerate(shown.items()):
            for direction, style in (("image_to_text", "-"), ("text_to_image", "--")):
                label = f"{name}, {direction.replace('_', ' ')}"
                axis.plot(curve["k"], curve[direction], style, color=f"C{number}", label=label)
        axis.plot(curve["k"], curve["chance"], ":", color="gray", label="chance")
        axis.set(title=protocol, xscale="log", xlabel="candidates looked at (k)", ylabel="recall at k", ylim=(0, 1.02))
        axis.legend(fontsize=8)
    _save(figure, path)


def save_finding_bars(results: Mapping[str, Sequence[Result]], path: str | Path) -> None:
    """F1 of each finding with its interval, one bar a system."""
    figure, axis = plt.subplots(figsize=(7, 5))
    height = 0.8 / len(results)
    for number, (system, of_system) in enumerate(results.items()):
        bars = [bar for bar in of_system if bar.score.startswith("f1[") and not math.isnan(bar.value)]
        values = [bar.value for bar in bars]
        reach = [[max(0.0, bar.value - (bar.low if bar.low is not None else bar.value)) for bar in bars]]
        reach.append([max(0.0, (bar.high if bar.high is not None else bar.value) - bar.value) for bar in bars])
        places = [place + number * height for place in range(len(bars))]
        axis.barh(places, values, height, xerr=reach, label=system, error_kw={"linewidth": 0.8})
    axis.set_yticks([place + 0.4 - height / 2 for place in range(len(bars))], [bar.score[3:-1] for bar in bars])
    axis.invert_yaxis()
    axis.set(xlabel="F1 (95 % interval by patient)", xlim=(0, 1))
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(results))
    _save(figure, path)


def _save(figure, path: str | Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
