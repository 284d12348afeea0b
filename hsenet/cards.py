# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Model cards that fill themselves from what lies beside the weights.

    write_model_card("outputs/stage3", evaluation="outputs/evaluation")
    hsenet card outputs/stage3 --evaluation outputs/evaluation

A card is written by the programs and by people: see `card_marks.py`. What is not known is said to be unknown.
"""

import hashlib
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from hsenet.card_marks import has_own_title, read_card, sections_of, update_card
from hsenet.card_texts import INTENDED, WHAT, converted_from, limitations, training_data
from hsenet.card_usage import TEMPLATES, usage
from hsenet.evaluation_card import Evaluation, read_evaluation
from hsenet.fingerprint import FILE as FINGERPRINT
from hsenet.fingerprint import fingerprint_problem
from hsenet.metrics.table import plain_table
from hsenet.model_facts import (
    Kind,
    file_hashes,
    input_contract,
    kind_of,
    part_sizes,
    part_words,
    read_config,
    read_image_processor,
    read_json,
    tensors_of,
)
from hsenet.run_record import CONFIG, read_record, write_whole
from hsenet.sources import hub_ids, license_of
from hsenet.training_card import training_section


CARD = "README.md"
CONVERSION = "conversion.json"
WITHOUT_CODE = ("part", "adapter")  # kinds that bring no Hub files
TAGS = ["hsenet", "computed-tomography", "radiology", "medical", "3d"]


def write_model_card(folder: str | Path, *, repo_id: str | None = None, evaluation: str | Path | None = None) -> Path:
    """Writes or refreshes `README.md` of a saved model or adapter; arguments and errors as of [`model_card`]."""
    path = Path(folder) / CARD
    write_whole(path, model_card(folder, repo_id=repo_id, evaluation=evaluation))
    return path


def model_card(folder: str | Path, *, repo_id: str | None = None, evaluation: str | Path | None = None) -> str:
    """
    The text that [`write_model_card`] writes.

    Args:
        folder (`str`): what `save_pretrained` wrote, with whatever a run or a conversion left beside it.
        repo_id (`str`, *optional*): where it is going to be published; the snippet then loads it from there.
        evaluation (`str`, *optional*):
            The output_dir of `train/evaluate.py`. Without it, an evaluation that the card has stays, as long as the
            weights are those that were evaluated.

    Raises:
        FileNotFoundError: there is no model in `folder`, or no evaluation in `evaluation`.
        ValueError: the evaluation is of other weights, or the old card's metadata cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind, hashes = kind_of(config), file_hashes(folder)
    run = _beside(folder, kind, CONFIG)
    record = read_record(run) if run is not None else None
    conversion = read_json((_beside(folder, kind, CONVERSION) or folder) / CONVERSION)
    old = read_card(folder / CARD, ModelCard)
    weights = _weights_hash(hashes)
    found = read_evaluation(folder, Path(evaluation)) if evaluation is not None else None
    results, said = _evaluation(found, old, weights)
    metadata = _metadata(kind, record, conversion, results, repo_id)
    card = ModelCard.from_template(
        metadata,
        template_str=(TEMPLATES / "model_card.md").read_text(encoding="utf-8"),
        title=None if has_own_title(old) else kind.title,
        what=WHAT[kind.name],
        intended=INTENDED[kind.name],
        usage=usage(folder, kind, config, record, repo_id),
        remote_code=kind.name not in WITHOUT_CODE,
        needs_package=kind.name == "adapter",
        architecture=_architecture(folder, config),
        adapters=", ".join(f"`adapters/{path.name}`" for path in sorted(folder.glob("adapters/*")) if path.is_dir()),
        input=_input(folder, kind),
        data=training_data(record, conversion),
        training=_training(folder, run, conversion),
        evaluation=said,
        limitations=limitations(kind, config, record),
        fingerprint=_fingerprint(folder, hashes),
        files=plain_table(("file", "SHA-256"), list(hashes.items())),
        repo_id=repo_id,
    )
    return update_card(old, card.data.to_dict(), sections_of(card.text))


def _metadata(
    kind: Kind, record: dict | None, conversion: dict | None, results: list, repo_id: str | None
) -> ModelCardData:
    sources = record["settings"].get("sources", {}) if record else {}
    bases = hub_ids(sources, datasets=False) + converted_from(conversion)
    languages = sources.get("dataset", {}).get("language")
    return ModelCardData(
        library_name=kind.library,
        pipeline_tag=kind.task,
        **license_of(sources),
        language=languages,
        base_model=bases or None,
        datasets=hub_ids(sources, datasets=True) or None,
        tags=TAGS + (["custom_code"] if kind.name not in WITHOUT_CODE else []),
        model_name=(repo_id or kind.title).rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _evaluation(found: Evaluation | None, old: ModelCard | None, weights: str) -> tuple[list, str]:
    """The entries of the metadata and the section: of this evaluation, or of the earlier one of the same weights."""
    mark = f"<!-- of weights {weights} -->"
    if found is not None:
        return found.results, f"## Evaluation\n\n{mark}\n{found.markdown}"
    section = sections_of(old.text).get("evaluation", "") if old is not None else ""
    if mark in section:
        return old.data.get("eval_results") or [], section
    return [], (
        "## Evaluation\n\nNone of these weights is on record. `train/evaluate.py` makes one, "
        "`hsenet card DIR --evaluation OUTPUT_DIR` enters it."
    )


def _weights_hash(hashes: dict[str, str]) -> str:
    names = [f"{name} {sha}" for name, sha in _weights(hashes).items()]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _weights(hashes: dict[str, str]) -> dict[str, str]:
    return {name: sha for name, sha in hashes.items() if name.endswith(".safetensors")}


def _architecture(folder: Path, config: PreTrainedConfig | None) -> str:
    tensors = tensors_of(folder)
    sizes, words = part_sizes(tensors), part_words(config)
    rows = [(part, words.get(part, ""), f"{sizes[part]:,}" if part in sizes else "") for part in {**words, **sizes}]
    types = ", ".join(sorted({kind for _, kind in tensors.values()}))
    total = f"{sum(sizes.values()):,} parameters in {types}, counted from the files." if sizes else "No weights here."
    return f"{total}\n\n{plain_table(('part', 'what it is', 'parameters'), rows)}"


def _input(folder: Path, kind: Kind) -> str:
    processor = read_image_processor(folder)
    if processor is None:
        where = "its base's" if kind.name == "adapter" else "that of the model it is used in"
        return f"There is no processor among these files: the preparation of scans is {where}."
    note = (
        "These steps are saved settings of the processor (`processor_config.json`), which does them all: give it "
        "scans as they are, in Hounsfield units. One that cannot be read with certainty is refused."
    )
    return f"{note}\n\n{plain_table(('step', 'setting'), input_contract(processor))}"


def _beside(folder: Path, kind: Kind, name: str) -> Path | None:
    """The folder that has this file: the model's, or of an adapter also the one of its run or base."""
    folders = [folder, *folder.resolve().parents[:2]] if kind.name == "adapter" else [folder]
    return next((place for place in folders if (place / name).exists()), None)


def _training(folder: Path, run: Path | None, conversion: dict | None) -> str:
    if run == folder:
        return training_section(run)
    if run is not None:  # without what lies there
        return training_section(run).partition("\n![")[0].rstrip()
    if conversion is not None:
        return "## Training\n\nNot trained here: converted, see above. How it was trained is for its authors to say."
    return "## Training\n\nUnknown: there is no record of a run beside the weights."


def _fingerprint(folder: Path, hashes: dict[str, str]) -> str:
    stored = read_json(folder / FINGERPRINT)
    if stored is None:
        return "No fingerprint is stored; `hsenet fingerprint DIR` makes one."
    if problem := fingerprint_problem(stored, _weights(hashes)):
        return f"The fingerprint that is stored {problem}; `hsenet fingerprint DIR` makes another."
    return (
        f"Fingerprint of what it computes: `{stored['hash']}`; `hsenet fingerprint DIR --check` compares it with what "
        "the installed libraries compute."
    )
