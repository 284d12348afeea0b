"""Short names of what was computed from what: of settings, and of a model's weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch


def digest(value: Any) -> str:
    """A short name of anything that JSON holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all weights with their names: what exactly was scored."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def public_name(source: str, model: torch.nn.Module) -> str:
    """A Hub id as it is; of a local folder its own name, not where it lies, and what tells its weights from others."""
    folder = Path(source)
    return f"{folder.resolve().name} {model_digest(model)[:8]}" if folder.is_dir() else source
