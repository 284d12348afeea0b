"""Short names of what was computed from what: of settings, of a model's weights, of a scan's voxels."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reading_hsenet import Volume


def digest(value: Any) -> str:
    """A short name of anything that JSON holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(*paths: Path) -> str:
    """SHA-256 of files' bytes, one after the other, however large they are."""
    sha = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                sha.update(block)
    return sha.hexdigest()


def model_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all weights with their names: what exactly was scored."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def content_hash(volume: Volume) -> str:
    """SHA-256 of shape and rounded HU in canonical orientation: the same however a scan is stored."""
    digest = hashlib.sha256(repr(volume.array.shape).encode())
    digest.update(as_int16(volume.array).tobytes())
    return digest.hexdigest()


def as_int16(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.int16:
        return array
    limits = np.iinfo(np.int16)
    return np.rint(np.clip(array, limits.min, limits.max)).astype(np.int16)


def public_name(source: str, model: torch.nn.Module) -> str:
    """A Hub id as it is; of a local folder its own name, not where it lies, and what tells its weights from others."""
    folder = Path(source)
    return f"{folder.resolve().name} {model_digest(model)[:8]}" if folder.is_dir() else source
