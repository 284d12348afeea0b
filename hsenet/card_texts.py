# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""A model card's words: what kinds of models are, what they are for, what they learned from, where they fail."""

import re
from typing import Any

from transformers import PreTrainedConfig

from hsenet.metrics.table import as_cell, plain_table
from hsenet.model_facts import Kind
from hsenet.sources import HUB_ID, is_synthetic, source_rows


PAPER = "HSENet ([arXiv 2506.09634](https://arxiv.org/abs/2506.09634))"
WHAT = {
    "stage1": "A 3D encoder and a text encoder that put chest CT volumes and reports into one space, to find the one "
    f"by the other: stage 1 of {PAPER}.",
    "stage2": "A 3D encoder whose patches are weighed by features of 2D slices (2E3), and a text encoder, that put "
    f"chest CT volumes and reports into one space, to find the one by the other: stage 2 of {PAPER}.",
    "report": "A 3D vision-language model that writes the report of a chest CT and answers questions about it: two 3D "
    f"encoders, packers that make tokens of their patches, and a language model, by {PAPER}.",
    "encoder": f"A vision transformer over volumes or slices, as a part of {PAPER}.",
    "part": f"A text encoder or language model that models of {PAPER} start from.",
    "adapter": "LoRA weights of a language model and the packers of a 3D vision-language model, for the base that "
    f"they were trained on: {PAPER}.",
}
INTENDED = {
    "report": "Research on reports and answers from 3D CT: comparing methods, studying failures, further training.",
    "stage1": "Research on retrieval between CT volumes and reports, and as an encoder for further training.",
    "encoder": "Research: features of slices or volumes, and as the start of a larger model.",
    "part": "To start the training of a larger model from. It is of no use with scans on its own.",
    "adapter": "Research on reports and answers from 3D CT, on the base that it was trained for and on no other.",
}
INTENDED["stage2"] = INTENDED["stage1"]
CHEST_MM = (300, 250, 350)  # height, depth from front to back, width: about those of an adult
BOUND = (
    "A model carries the terms of what it was trained on and started from. CT-RATE and RadGenome-ChestCT are released "
    "for non-commercial research under CC BY-NC-SA, BIMCV-R under terms of its own, which its users accept; "
    "BiomedCLIP, bert-base-uncased and Phi-4-mini have their own licences. The licence in the metadata follows from "
    "what is known above: whoever publishes this model has to check it."
)


def training_data(record: dict[str, Any] | None, conversion: dict[str, Any] | None) -> str:
    """
    Args:
        record: of the run, see `run_record.py`; `None` if there is none.
        conversion: `conversion.json`; `None` if the weights are not converted.
    """
    if conversion is not None:
        rows = [
            (part["what"], _origin(part["source"]), f"{part['model_parameters']:,}") for part in conversion["parts"]
        ]
        notes = "".join(f"\n- {as_cell(_origin(note))}" for note in conversion.get("notes", []))
        return (
            f"Converted from released weights (`{as_cell(conversion['kind'])}`). What they were trained on, and under "
            "which licence they are, is unknown here: see their own pages.\n\n"
            f"{plain_table(('part', 'from', 'parameters'), rows)}\n{notes}\n\n{BOUND}"
        )
    sources = record["settings"].get("sources") if record else None
    if not sources:
        return f"Unknown: nothing beside the weights says what they were trained on.\n\n{BOUND}"
    synthetic = ""
    if is_synthetic(sources):
        synthetic = (
            "\n\n**Synthetic.** The dataset's scans are procedural phantoms and their reports are written by a "
            "program: no patient is in them."
        )
    return f"{plain_table(('what', 'name', 'licence', 'learned from'), source_rows(sources))}{synthetic}\n\n{BOUND}"


def converted_from(conversion: dict[str, Any] | None) -> list[str]:
    """The Hub ids of what was converted."""
    if conversion is None:
        return []
    texts = [part["source"] for part in conversion["parts"]] + [
        match[1] for note in conversion.get("notes", []) if (match := re.search(r"\bfrom ([^\s:]+)", note))
    ]
    found = [match[0] for text in texts if (match := HUB_ID.match(text))]
    return list(dict.fromkeys("/".join(name.split("/")[:2]) for name in found))


def _origin(text: str) -> str:
    """Without the names of files on somebody's machine."""
    return re.sub(r"\b(?:a )?local (file|folder)(: [^\s:;,]+)?", r"a local \1", text)


def limitations(kind: Kind, config: PreTrainedConfig | None, record: dict[str, Any] | None) -> str:
    points = []
    sources = record["settings"].get("sources", {}) if record else {}
    if is_synthetic(sources):
        points.append("**Phantoms.** Its dataset is synthetic: from it, the model knows nothing of real disease.")
    if kind.name in ("report", "adapter"):
        points += [
            "**Invention.** It writes fluent sentences about findings that are not there, and leaves out findings "
            "that are. A score without one for another patient's scan beside it says nothing about that.",
            "**Sampling.** With `do_sample=True` every draw says something else; likeliest words are not likeliest "
            "findings.",
            "**No history.** It sees one scan: no earlier one, no clinical question, no laboratory values.",
        ]
    if kind.name != "part":
        points += [
            "**Left and right.** Models of this kind confuse sides. Check every side it names; a report that matches "
            "by every score here may have all of them wrong.",
            "**Small lesions and bones.** " + _resolution(config),
            "**Chest CT in English.** Other body parts, contrast phases, devices and languages than those of the "
            "training data were not looked at. Who is in the training data, by age, sex and origin, decides for whom "
            "it fails, and was not measured unless a table above says so.",
        ]
    points.append("**Calibration.** No output is a probability of disease.")
    return "\n".join(f"- {point}" for point in points)


def _resolution(config: PreTrainedConfig | None) -> str:
    bones = "All bone denser than the upper end of the HU window looks alike: fractures and its lesions hardly show."
    encoders = [getattr(config, name, None) for name in ("vision_config", "local_vision_config")]
    encoder = next((encoder for encoder in encoders if encoder is not None), None)
    if encoder is None:
        return f"What is smaller than a voxel of its input is lost. {bones}"
    size = encoder.image_size
    voxel = " x ".join(f"{length / number:.1f}" for length, number in zip(CHEST_MM, size, strict=True))
    return (
        f"A chest of {' x '.join(map(str, CHEST_MM))} mm (height, front to back, width) comes to "
        f"{' x '.join(map(str, size))} voxels, that is {voxel} mm each: what is smaller is lost. {bones}"
    )
