# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Scans and texts to embeddings by a contrastive model, and a record of all that decides what they are.

    embedder = Embedder.load("outputs/quickstart/stage2")
    embedder.texts(["Pleural effusion."]) @ embedder.volume(read_volume("scan.nii.gz"))  # a cosine

Embeddings have length 1.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig
from transformers.utils.logging import tqdm

from hsenet.data import VolumeRows
from hsenet.folder_or_hub import check_model_source
from hsenet.volume_cache import VolumeCache, preprocessing_settings
from modeling_hsenet import HSENetCLIPModel
from processing_hsenet import HSENetProcessor
from reading_hsenet import Volume


# What a model computes beside its weights: the settings that neither their names nor their shapes show.
CONFIG_KEYS = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size")
PROBE = "No pleural effusion; a 12 mm nodule (left upper lobe)."


class Embedder:
    """
    A contrastive model and its processor, in float32. All embeddings are float32 and of length 1.

    Args:
        model ([`HSENetCLIPModel`]): of stage 1 or 2.
        processor ([`HSENetProcessor`]): the one it was trained with.
        name (`str`, *optional*): the model's Hub id.
    """

    def __init__(self, model: HSENetCLIPModel, processor: HSENetProcessor, name: str | None = None):
        self.model = model.float().eval()
        self.image_processor = processor.image_processor
        self.tokenizer = processor.tokenizer
        self.name = name
        positions = model.config.text_config.max_position_embeddings
        self.max_length = min(positions, processor.tokenizer.model_max_length)

    @classmethod
    def load(cls, model: str | Path, revision: str | None = None) -> "Embedder":
        """
        Args:
            model: folder or Hub id.
            revision (`str`, *optional*): branch, tag or commit on the Hub.

        Raises:
            ValueError: there is no model, it is one of another kind, or a weight is missing.
        """
        check_model_source(model, revision=revision)
        location = {} if revision is None else {"revision": revision}
        kind = AutoConfig.from_pretrained(model, **location).model_type
        if kind != HSENetCLIPModel.config_class.model_type:
            raise ValueError(f"Expected a contrastive model (stage 1 or 2, hsenet_clip), got one of type {kind}.")
        name = None if Path(model).is_dir() else str(model)
        processor = HSENetProcessor.from_pretrained(model, **location)
        return cls(HSENetCLIPModel.from_pretrained(model, **location), processor, name)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """`(num_texts, projection_dim)`. Of texts longer than `max_length` tokens the end is lost, as in training."""
        embeddings = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
                return_token_type_ids=False,
            ).to(self.model.device)
            embeddings.append(_unit(self.model.get_text_features(**tokens).pooler_output))
        return np.concatenate(embeddings)

    @torch.no_grad()
    def volumes(self, rows: Sequence[dict[str, Any]], cache: VolumeCache, batch_size: int = 8) -> np.ndarray:
        """`(num_rows, projection_dim)`; the cache holds the volume of every row."""
        embeddings = []
        loader = DataLoader(VolumeRows(rows, cache), batch_size, collate_fn=list)
        for examples in tqdm(loader, "embeddings"):
            names = [name for name in ("pixel_values", "slice_features") if name in examples[0]]
            inputs = {name: torch.stack([example[name] for example in examples]) for name in names}
            inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
            embeddings.append(_unit(self.model.get_image_features(**inputs).pooler_output))
        return np.concatenate(embeddings)

    @torch.no_grad()
    def volume(self, scan: Volume) -> np.ndarray:
        """`(projection_dim,)`, that of the same scan out of the cache."""
        tensors = self.image_processor.process_volume(scan)
        # The cache keeps half precision, and a scan should find itself at a cosine of 1.
        inputs = {"pixel_values": tensors["pixel_values"].half().float()}
        if self.model.slice_encoder is not None:
            inputs["slice_pixel_values"] = tensors["slice_pixel_values"]
        inputs = {name: tensor.unsqueeze(0).to(self.model.device) for name, tensor in inputs.items()}
        return _unit(self.model.get_image_features(**inputs).pooler_output)[0]

    def identity(self) -> dict[str, Any]:
        """JSON that is equal for two embedders if and only if they give comparable embeddings."""
        return {
            "weights": _weights_hash(self.model),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "max_length": self.max_length,
            "image_processor": preprocessing_settings(self.image_processor),
        }


def _unit(embeddings: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()


def _weights_hash(model: HSENetCLIPModel) -> str:
    """SHA-256 of all weights in float32 with their names, and of `CONFIG_KEYS` of the model's parts."""
    parts = [part for part in (model.vision_model, model.slice_encoder, model.text_model) if part is not None]
    configs = [part.config.to_dict() for part in parts]
    settings = [{key: config[key] for key in CONFIG_KEYS if key in config} for config in configs]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Of its vocabulary and of a sentence's tokens; its file also holds settings that each call changes."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
