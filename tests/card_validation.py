"""What the Hub is known to refuse, and to warn of, in the metadata of a card: a part of its own validator.

Licences and the form of a dataset's type are those that the Hub's own error messages list; its lists of tasks and
languages are longer than those here, so what is not known here is a warning.
"""

import re
from typing import Any

import yaml


LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other
""".split()
TASKS = """
feature-extraction fill-mask image-classification image-feature-extraction image-segmentation image-text-to-text
image-to-text sentence-similarity summarization text-classification text-generation text-retrieval
visual-question-answering zero-shot-image-classification
""".split()
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")
REPO_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)
HEAD = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:[\r\n]|$)", re.DOTALL)


def validate(text: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings; `kind` is "model" or "dataset"."""
    head = HEAD.match(text)
    if head is None:
        broken = text.lstrip().startswith("---")
        return (["The metadata do not end"], []) if broken else ([], ["empty or missing yaml metadata in repo card"])
    try:
        metadata = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if not isinstance(metadata, dict):
        return ["the metadata should be an object"], []
    errors = _licenses(metadata) + _strings(metadata)
    errors += _model_index(metadata.get("model-index")) if kind == "model" else _configs(metadata.get("configs"))
    for base in _listed(metadata.get("base_model")):
        errors += [] if REPO_ID.fullmatch(str(base)) else [f'"base_model" with value "{base}" is not valid']
    return errors, _unknown(metadata)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _licenses(metadata: dict[str, Any]) -> list[str]:
    wrong = [value for value in _listed(metadata.get("license")) if value not in LICENSES]
    errors = [f'"license" must be one of [{", ".join(LICENSES)}, array]'] if wrong else []
    name = metadata.get("license_name")
    if name is not None and not re.fullmatch(r"[a-z0-9.-]+", str(name)):
        errors.append(f'"license_name" with value "{name}" fails to match the required pattern')
    return errors


def _strings(metadata: dict[str, Any]) -> list[str]:
    errors = []
    for name in ("pipeline_tag", "library_name", "pretty_name"):
        if not isinstance(metadata.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name in ("tags", "language", "datasets", "task_categories", "size_categories", "metrics"):
        errors += [f'"{name}" must be strings' for value in _listed(metadata.get(name)) if not isinstance(value, str)]
    return errors


def _model_index(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        place = f"model-index[{i}]"
        errors += _required(model, place, ("name", "results"))
        for j, result in enumerate(model.get("results", [])):
            at = f"{place}.results[{j}]"
            errors += _required(result, at, ("task", "dataset", "metrics"))
            errors += _required(result.get("task", {}), f"{at}.task", ("type",))
            errors += _required(result.get("dataset", {}), f"{at}.dataset", ("type", "name"))
            kind = str(result.get("dataset", {}).get("type"))
            if not DATASET_TYPE.fullmatch(kind):
                errors.append(f'"{at}.dataset.type" with value "{kind}" fails to match the required pattern')
            for k, metric in enumerate(result.get("metrics", [])):
                errors += _required(metric, f"{at}.metrics[{k}]", ("type", "value"))
    return errors


def _required(value: dict[str, Any], place: str, names: tuple[str, ...]) -> list[str]:
    return [f'"{place}.{name}" is required' for name in names if value.get(name) in (None, "")]


def _configs(configs: Any) -> list[str]:
    named = [config.get("config_name") for config in configs or [] if isinstance(config, dict)]
    if len(named) != len(configs or []) or not all(isinstance(name, str) for name in named):
        return ['"configs" must be objects with a config_name']
    return ['"configs" contains a duplicate value'] if len(set(named)) < len(named) else []


def _unknown(metadata: dict[str, Any]) -> list[str]:
    known = {"pipeline_tag": TASKS, "task_categories": TASKS, "size_categories": SIZES}
    return [
        f'The {name} "{value}" is not in the official list'
        for name, values in known.items()
        for value in _listed(metadata.get(name))
        if value not in values
    ]
