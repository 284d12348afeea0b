"""What frozen models say of volumes that stay the same, computed once and kept beside the preprocessed volumes.

Stage 2's anchor becomes a look-up, and an epoch of stage 3 costs packers and language model only. Both caches are
named by all that they depend on, so that one of other weights, settings or scans is never read. They are for volumes
and texts without augmentation: what a frozen model says of a moved volume is another thing.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from hsenet.collators import ContrastiveCollator
from hsenet.data import VolumeRows
from hsenet.digests import digest, model_digest
from hsenet.scoring.work import embeddings_of
from hsenet.volume_cache import VolumeCache, update_with_weights
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration, HSENetVisionModel


# What an encoder computes beside its weights: the settings that neither their names nor their shapes show.
ENCODER_KEYS = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps", "scorer_residual")


@dataclass
class CachedEmbeddings:
    """
    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(num_rows, projection_dim)`): L2-normalised.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor

    def __call__(self, index: torch.Tensor, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the rows `index`, whatever became of their inputs."""
        index = index.to(self.image_embeds.device)
        return self.image_embeds[index], self.text_embeds[index]


@dataclass
class ComputedEmbeddings:
    """
    Args:
        model ([`HSENetCLIPModel`]): stage 1, in eval mode.
        chunk_size (`int`): rows at once; 0: all.
    """

    model: HSENetCLIPModel
    chunk_size: int
    accelerator: Accelerator

    @torch.no_grad()
    def __call__(self, index: torch.Tensor, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of these very inputs, as augmentation left them."""
        sides = []
        names = ("input_ids", "attention_mask", "pixel_values")
        for part in zip(*(inputs[name].split(self.chunk_size or len(index)) for name in names), strict=True):
            with self.accelerator.autocast():
                outputs = self.model(**dict(zip(names, part, strict=True)))
            sides.append((outputs.image_embeds.float(), outputs.text_embeds.float()))
        images, texts = zip(*sides, strict=True)
        return torch.cat(images), torch.cat(texts)


ANCHOR_BATCH = 32  # volumes at once, and in one file; a part of the cache's key


def anchor_embeddings(
    anchor: HSENetCLIPModel,
    rows: Sequence[dict[str, Any]],
    volumes: VolumeCache,
    collator: ContrastiveCollator,
    accelerator: Accelerator,
) -> CachedEmbeddings:
    """
    The frozen stage-1 embeddings of rows without augmentation, from disk or computed now.

    Processes share the work, and a build that was interrupted goes on.

    Args:
        anchor ([`HSENetCLIPModel`]): stage 1, in eval mode.
        rows: with `volume_name` and `text`.
        volumes ([`VolumeCache`]): holds the volume of every row; the embeddings are kept beside its folder.
        collator ([`ContrastiveCollator`]): says how texts become tokens.
    """
    without_slices = ContrastiveCollator(
        collator.tokenizer, collator.max_length, with_slices=False, whole_sentences=collator.whole_sentences
    )
    sha = digest([model_digest(anchor), accelerator.mixed_precision, collator.whole_sentences])
    folder = volumes.folder.parent / "anchors"
    with accelerator.autocast():
        embeds = embeddings_of(rows, anchor, sha, without_slices, volumes, ANCHOR_BATCH, folder, accelerator)
    return CachedEmbeddings(*embeds)


class PatchFeatureCache(VolumeCache):
    """By volume name `global_patch_features` and `local_patch_features`, each (num_patches, hidden_size)."""

    def __init__(self, folder: Path, volumes: VolumeCache):
        super().__init__(folder)
        self.volumes = volumes

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether the row's features are here, made from the volume that is in the volume cache now."""
        name = row["volume_name"]
        return self.path(name).exists() and self.content_hash(name) == self.volumes.content_hash(name)

    def write_features(self, volume_name: str, tensors: dict[str, torch.Tensor]) -> None:
        self._write(volume_name, tensors, {"content_hash": self.volumes.content_hash(volume_name)})


@torch.no_grad()
def cache_patch_features(
    rows: Sequence[dict[str, Any]],
    volumes: VolumeCache,
    model: HSENetForConditionalGeneration,
    accelerator: Accelerator,
    batch_size: int,
    dtype: Literal["float32", "float16"] = "float32",
) -> PatchFeatureCache:
    """
    Args:
        rows: with `volume_name`; a name that repeats is done once.
        volumes ([`VolumeCache`]): holds the volume of every row.
        model ([`HSENetForConditionalGeneration`]): its encoders are frozen; their weights are part of the cache's key.
        dtype: on disk. At the paper's sizes a volume takes 12.6 MB in float32.
    """
    encoders = [encoder for encoder in (model.model.global_encoder, model.model.local_encoder) if encoder is not None]
    key = _encoders_key(encoders, [volumes.folder.name, dtype, accelerator.mixed_precision])
    cache = PatchFeatureCache(volumes.folder.parent / "patches" / key, volumes)
    cache.folder.mkdir(parents=True, exist_ok=True)
    cache.remove_orphans()
    unique = list({row["volume_name"]: row for row in rows}.values())
    numbers = sum(encoder.config.num_patches * encoder.config.hidden_size for encoder in encoders)
    size = len(unique) * numbers * getattr(torch, dtype).itemsize / 1e9
    accelerator.print(f"Patch features of {len(unique)} volumes: {size:.2f} GB in cache_dir.")
    share = unique[accelerator.process_index :: accelerator.num_processes]
    mine = [row for row in share if not cache.holds(row)]
    for encoder in encoders:
        encoder.to(accelerator.device).eval()
    loader = DataLoader(VolumeRows(mine, volumes), batch_size, collate_fn=list)
    for examples in tqdm(loader, "patch features", disable=not mine or not accelerator.is_main_process):
        _write(cache, examples, model, accelerator, getattr(torch, dtype))
    accelerator.wait_for_everyone()
    if missing := len(unique) - len(cache.readable(unique)):
        raise RuntimeError(
            f"Patch features of {missing} of {len(unique)} volumes that other processes made are not in cache_dir: "
            "put it on a file system that all nodes share."
        )
    return cache


def _write(
    cache: PatchFeatureCache,
    examples: list[dict[str, Any]],
    model: HSENetForConditionalGeneration,
    accelerator: Accelerator,
    dtype: torch.dtype,
) -> None:
    names = [name for name in ("pixel_values", "slice_features", "slice_pixel_values") if name in examples[0]]
    inputs = {name: torch.stack([e[name] for e in examples]).to(accelerator.device) for name in names}
    with accelerator.autocast():
        features = model.get_patch_features(**inputs)
    kept = {name: tensor.to("cpu", dtype) for name, tensor in features.items() if name != "patch_scores"}
    for index, example in enumerate(examples):
        tensors = {name: tensor[index].clone() for name, tensor in kept.items()}
        cache.write_features(example["volume_name"], tensors)


def _encoders_key(encoders: list[HSENetVisionModel], settings: list[str]) -> str:
    configs = [encoder.config.to_dict() for encoder in encoders]
    settings = [*settings, *({key: config[key] for key in ENCODER_KEYS} for config in configs)]
    sha = hashlib.sha256(json.dumps(settings).encode())
    for encoder in encoders:
        update_with_weights(sha, encoder)
    return sha.hexdigest()[:16]
