# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""An experiment's scores as Markdown and JSON: what the paper claims, what was measured, whether it held."""

from dataclasses import asdict
from statistics import mean
from typing import Any

from hsenet.experiments.decision import Interval, paired_difference, t_interval, verdict


RULE = (
    "Held: yes if the 95 % interval of the difference (Student's t over seeds, paired by seed) lies wholly on the "
    "claim's side of zero, no if wholly on the other, else undecided. Intervals are not corrected for the number of "
    "claims."
)
Scores = dict[str, list[dict[str, float]]]  # arm -> one a seed


def arm_intervals(experiment: dict[str, Any], scores: Scores) -> dict[str, dict[str, Interval]]:
    """Arm -> score -> t interval over seeds, of the scores that the arm has."""
    return {
        arm: {
            name: t_interval([score[name] for score in of_seeds])
            for name in experiment["columns"]
            if name in of_seeds[0]
        }
        for arm, of_seeds in scores.items()
    }


def decided_claims(experiment: dict[str, Any], scores: Scores) -> list[dict[str, Any]]:
    """Each claim of the file with `difference` (its first arm less its second) and `held`."""
    decided = []
    for claim in experiment["claims"]:
        metric = claim.get("metric", experiment["metric"])
        sides = ([score[metric] for score in scores[claim[side]]] for side in ("first", "second"))
        difference = paired_difference(*sides)
        held = verdict(difference, claim.get("better", experiment.get("better", "higher")))
        decided.append({**claim, "metric": metric, "difference": difference, "held": held})
    return decided


def arms_table(experiment: dict[str, Any], scores: Scores) -> str:
    """The arms with intervals over seeds, then the claims."""
    columns = experiment["columns"]
    rows = [
        [arm, *(str(values[name]) if name in values else "" for name in columns)]
        for arm, values in arm_intervals(experiment, scores).items()
    ]
    claims = [
        [
            claim["claim"],
            f"{claim['first']} − {claim['second']}",
            claim["metric"],
            str(claim["difference"]),
            claim["held"],
        ]
        for claim in decided_claims(experiment, scores)
    ]
    return _document(
        experiment,
        _table(["arm", *columns], rows),
        _table(["the paper's claim", "difference", "score", "measured", "held"], claims),
        RULE,
    )


def alignment_table(experiment: dict[str, Any], result: dict[str, dict[str, Interval]]) -> str:
    columns = list(next(iter(result.values())))
    rows = [[finding, *(str(values[name]) for name in columns)] for finding, values in result.items()]
    note = "AUROC within a scan of the patches that show the finding; 95 % bootstrap intervals over patients."
    return _document(experiment, _table(["finding", *columns], rows), note)


def nodule_table(experiment: dict[str, Any], result: dict[str, dict[float, Interval]]) -> str:
    sizes = list(next(iter(result.values())))
    rows = [[name, *(str(values[size]) for size in sizes)] for name, values in result.items()]
    note = "AUROC of a linear probe at the nodule's place; 95 % bootstrap intervals over patients."
    return _document(experiment, _table(["representation", *(f"{size:g} mm" for size in sizes)], rows), note)


def experiment_record(
    experiment: dict[str, Any], result: Any, runs: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """All that the table says and how it came about, for the JSON file."""
    record = {"experiment": experiment, "result": _plain(result)}
    if "claims" in experiment:
        record["intervals"] = _plain(arm_intervals(experiment, result))
        record["claims"] = _plain(decided_claims(experiment, result))
    record["cpu_seconds_a_run"] = {arm: mean(run["cpu_seconds"] for run in of_seeds) for arm, of_seeds in runs.items()}
    record["runs"] = runs
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _document(experiment: dict[str, Any], *parts: str) -> str:
    seeds = ", ".join(map(str, experiment["seeds"]))
    return "\n\n".join([f"### {experiment['title']}", f"Seeds {seeds}.", *parts]) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
