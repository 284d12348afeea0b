# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""A short hash of what a saved model computes, so that a library upgrade that changes the numbers is noticed.

The model runs in float32 on one synthetic input that needs no random numbers. A few numbers of each output are rounded
and hashed. They are stored beside the weights with the hash: the check compares the numbers themselves, within a
tolerance, because a number on the edge between two roundings may change the hash without meaning anything. Beside them
stands which weights they are of, so that a fingerprint that was left behind by others is not taken for theirs.
"""

import hashlib
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from hsenet.digests import file_sha256
from hsenet.folder_or_hub import check_model_folder


FILE = "fingerprint.json"
# Both relative to the largest number of an output, which other libraries and thread counts change by about 1e-6.
TOLERANCE = 1e-4
ROUNDING = 1e-2


def fingerprint(model: PreTrainedModel) -> dict:
    """
    Args:
        model: one of the package's, in float32 and eval mode.

    Returns:
        `dict`: `hash` (12 hexadecimal digits); `outputs`, for each output its largest magnitude and a few numbers
        relative to it, before rounding; `versions` of the libraries.
    """
    with torch.no_grad():
        outputs = {name: _digest(name, output) for name, output in _outputs(model).items()}
    rounded = {name: [round(number / ROUNDING) for number in numbers] for name, (_, *numbers) in outputs.items()}
    return {
        "hash": hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:12],
        "outputs": outputs,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def fingerprint_folder(folder: str | Path) -> dict:
    """The fingerprint of the model saved in `folder`, loaded as any user would, with the installed package's code."""
    check_model_folder(folder)
    return fingerprint(AutoModel.from_pretrained(folder, dtype=torch.float32).eval())


def store_fingerprint(folder: str | Path) -> dict:
    """Computes the fingerprint and writes it beside the weights, with the SHA-256 of each of their files."""
    result = {**fingerprint_folder(folder), "weights": weight_hashes(folder)}
    (Path(folder) / FILE).write_text(json.dumps(result, indent=2) + "\n")
    return result


def weight_hashes(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each file of weights in the folder, not of those in its folders."""
    return {path.name: file_sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def fingerprint_problem(stored: dict, weights: dict[str, str]) -> str | None:
    """
    Why a stored fingerprint is not to be believed, if it isn't; nothing is computed.

    Args:
        stored: content of `fingerprint.json`.
        weights: what [`weight_hashes`] says of the weights that it should be of.
    """
    if "weights" not in stored:
        return "does not say of which weights it is (an earlier version stored it)"
    if any(weights.get(name) != sha for name, sha in stored["weights"].items()):
        return "is of other weights than those beside it"
    return None


def check_fingerprint(folder: str | Path) -> dict:
    """
    Returns:
        `dict`: as [`fingerprint`], with `largest_difference`, relative to the largest output.

    Raises:
        `ValueError`: if the model no longer computes what is stored beside it.
    """
    check_model_folder(folder)
    file = Path(folder) / FILE
    if not file.exists():
        raise FileNotFoundError(f"There is no {FILE} in this folder: run `hsenet fingerprint DIR` where you trust it.")
    stored, now = json.loads(file.read_text()), fingerprint_folder(folder)
    now["largest_difference"] = max(
        difference
        for name, (largest, *numbers) in stored["outputs"].items()
        for difference in _differences([largest, *numbers], now["outputs"][name])
    )
    if now["largest_difference"] > TOLERANCE:
        raise ValueError(
            f"The model no longer computes what it did: its outputs differ by {now['largest_difference']:.1e} of the "
            f"largest, more than {TOLERANCE:.0e} (hash {stored['hash']} stored, {now['hash']} now; stored with "
            f"{stored['versions']}, now {now['versions']}). Either the files or a library changed."
        )
    return now


def _digest(name: str, output: torch.Tensor) -> list[float]:
    output = output.double().flatten()
    largest = output.abs().max().item()
    if not 0 < largest < float("inf"):
        raise ValueError(f"The model's {name} are {largest} on the synthetic input: its weights are damaged.")
    chosen = output[torch.linspace(0, len(output) - 1, 8).round().long()]
    return [largest, *(chosen / largest).tolist()]


def _differences(stored: list[float], now: list[float]) -> list[float]:
    return [abs(now[0] / stored[0] - 1), *(abs(a - b) for a, b in zip(stored[1:], now[1:], strict=True))]


def _outputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    config = model.config
    if config.model_type == "hsenet_vision":
        inputs = {"pixel_values": _waves(1, config.num_channels, *config.image_size)}
        if config.slice_hidden_size is not None:
            inputs["slice_features"] = _waves(1, 4, config.slice_hidden_size)
        return {"features": model(**inputs).pooler_output}
    volume = config.vision_config if config.vision_config is not None else config.local_vision_config
    inputs = {"pixel_values": _waves(1, 1, *volume.image_size)}
    guided = config.vision_config if config.model_type == "hsenet_clip" else config.local_vision_config
    features = {}
    if config.slice_config is not None:
        channels, (_, height, width) = config.slice_config.num_channels, config.slice_config.image_size
        inputs["slice_features"] = model.get_slice_features(_waves(1, config.num_slices, channels, height, width))
        features["slice features"] = inputs["slice_features"]
    elif guided is not None and guided.slice_hidden_size is not None and not _guided_by_text(config):
        # It takes cached features only.
        inputs["slice_features"] = _waves(1, config.num_slices, guided.slice_hidden_size)
    vocabulary = config.text_config.vocab_size
    words = (torch.arange(1, 9) * 7919 % vocabulary).unsqueeze(0)
    if config.model_type == "hsenet_clip":
        outputs = model(input_ids=words, output_patch_scores=True, **inputs)
        features |= {"image embeddings": outputs.image_embeds, "text embeddings": outputs.text_embeds}
        logits = outputs.logits_per_image
    else:
        words[words == config.image_token_id] = (config.image_token_id + 1) % vocabulary
        placeholders = torch.full((1, config.image_seq_length), config.image_token_id)
        input_ids = torch.cat([placeholders, words], dim=1)
        outputs = model(input_ids=input_ids, logits_to_keep=1, output_patch_scores=True, **inputs)
        features["packed tokens"], logits = outputs.image_hidden_states, outputs.logits
    if outputs.patch_scores is not None:
        features["patch scores"] = outputs.patch_scores
    return {**features, "logits": logits}


def _guided_by_text(config: PreTrainedConfig) -> bool:
    return config.model_type == "hsenet_clip" and config.guidance in ("text", "text_cls")


def _waves(*shape: int) -> torch.Tensor:
    """Numbers in [0, 1] that never repeat, the same on every machine."""
    count = torch.tensor(shape).prod().item()
    return (torch.arange(count, dtype=torch.float64) * 0.6180339887 % 1).float().reshape(shape)
