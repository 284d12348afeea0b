# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet index` and `hsenet search`: options to [`~hsenet.index.SearchIndex`] and its results to text or JSON."""

import argparse
import json
import textwrap
from typing import Any

from hsenet.cli_scan import at_least_one
from hsenet_command import UsageError


FILTERS = ("sex", "min_age", "max_age", "labels", "without_labels", "splits")


def add_index(parser: argparse.ArgumentParser) -> None:
    # Options that are not given stay out of the call: the functions have the defaults.
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("model", metavar="MODEL", help="contrastive model (stage 1 or 2): folder or Hub id")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="dataset folder or Hub id with `reports`, or a .csv or .parquet table of scans",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist")
    parser.add_argument("--splits", nargs="+", help="(default: all)")
    parser.add_argument("--report_fields", nargs="+", help="(default: findings impression)")
    parser.add_argument("--cache_dir", help="where preprocessed volumes are kept (default: outputs/cache)")
    parser.add_argument("--batch_size", type=int, help="volumes at once (default: 8)")
    parser.add_argument("--num_workers", type=int, help="processes that read scans (default: 0, this one)")
    parser.add_argument("--keep_ids", action="store_true", help="ids as they are, where they identify nobody")
    parser.add_argument("--json", action="store_true", default=False, help="what was made, as JSON")
    parser.set_defaults(run=_run_index)


def add_search(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("model", metavar="MODEL", help="the model that made the index: folder or Hub id")
    parser.add_argument("index", metavar="INDEX", help="folder that `hsenet index` wrote")
    parser.add_argument("--text", help="finding or report to search by")
    parser.add_argument("--volume", metavar="SCAN", help="NIfTI file or DICOM folder to search by")
    parser.add_argument("--text_weight", type=_share, help="with both; the volume's is the rest of 1 (default: 0.5)")
    parser.add_argument("--target", choices=("volumes", "reports"), help="what to find (default: volumes)")
    parser.add_argument("-k", type=at_least_one, help="how many (default: 10)")
    parser.add_argument("--one_per_study", action="store_true", help="only the best reconstruction of each study")
    filters = parser.add_argument_group("filters")
    filters.add_argument("--sex", choices=("M", "F"))
    filters.add_argument("--min_age", type=int, metavar="YEARS")
    filters.add_argument("--max_age", type=int, metavar="YEARS")
    filters.add_argument("--labels", nargs="+", metavar="LABEL", help="findings that all have to be there")
    filters.add_argument("--without_labels", nargs="+", metavar="LABEL", help="findings of which none may be there")
    filters.add_argument("--splits", nargs="+", metavar="SPLIT")
    guard = parser.add_argument_group("the query's own patient, who is left out")
    guard.add_argument("--study_id", help="as in the dataset")
    guard.add_argument("--patient_id", help="as in the dataset")
    guard.add_argument("--include_same_patient", action="store_true", help="do not leave them out")
    parser.add_argument("--engine", choices=("exact", "faiss"), help="(default: exact)")
    parser.add_argument("--json", action="store_true", default=False, help="results as JSON")
    parser.set_defaults(run=_run_search)


def _run_index(model: str, source: str, output: str, *, json: bool, **options) -> None:
    from hsenet.index import SearchIndex  # needs datasets and accelerate, which the other commands do not

    info = SearchIndex.build(output, source, model, **options).info
    print(_as_json(info) if json else _describe(info, output))


def _run_search(model: str, index: str, *, json: bool, **options) -> None:
    from hsenet.index import SearchIndex
    from hsenet.index_filters import Filter

    if "text" not in options and "volume" not in options:
        raise UsageError("nothing to search by: give --text, --volume or both")
    if not options.get("text", "any").strip():
        raise UsageError("--text is empty: give a finding or a report")
    where = Filter(**{name: options.pop(name) for name in FILTERS if name in options})
    engine = {"engine": options.pop("engine")} if "engine" in options else {}
    result = SearchIndex.load(index, model, **engine).search(where=where, **options)
    print(_as_json(result.to_dict()) if json else _show(result, with_volume="volume" in options))


def _share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return number


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2)


def _describe(info: dict[str, Any], output: str) -> str:
    lines = [
        f"{info['volumes']} volumes of {info['studies']} studies and {info['patients']} patients, "
        f"{info['with_report']} with a report; {info['with_identical_volume']} have the voxels of another",
        f"written to {output}",
    ]
    if info["ids"] == "pseudonyms":
        lines.append(f"ids are pseudonyms; their key is {output.rstrip('/')}.salt: keep it, and keep it to yourself")
    return "\n".join(lines)


def _show(result: Any, *, with_volume: bool) -> str:
    own = "".join(f"; left out, {name}: {count}" for name, count in result.left_out.items())
    lines = [f"{len(result.hits)} of {result.num_candidates} candidates{own}"]
    for hit in result.hits:
        about = [hit.volume_id, f"{hit.split} row {hit.row}", hit.sex, hit.age, ", ".join(hit.labels or ())]
        notes = [hit.relation, f"copy of {hit.copy_of}" if hit.copy_of else ""]
        about = [str(part) for part in (*about, *notes) if part not in (None, "")]
        lines.append(f"{hit.rank:>3}  {hit.score:+.3f}  {' | '.join(about)}")
        if hit.report:
            lines.append(textwrap.indent(textwrap.shorten(hit.report, 240), " " * 13))
    if with_volume and not result.is_guarded:
        lines.append("The index does not know this volume's patient; if it may, give --patient_id, to leave them out.")
    return "\n".join(lines)
