"""Preprocessed volumes and frozen slice features on disk, computed once for all stages and epochs.

Reading and resampling a scan, and running the 2D encoder over its slices, cost more than a training step and give the
same tensors every time. `cache_volumes` writes them once, one file a volume, and continues where it was interrupted.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hsenet.corpora.volumes import content_hash
from hsenet.scans import read_scan, scan_identity
from modeling_hsenet import HSENetVisionModel
from processing_hsenet import HSENetImageProcessor
from reading_hsenet import HSENetInputError


PREPROCESSING_VERSION = 1  # raise it when the reader or the image processor gives other tensors for the same scan


class VolumeCache:
    """Tensors by volume name: `pixel_values` (1, D, H, W) and, with a slice encoder, `slice_features` (S, width).

    File names are hashes, because a volume's name may be a patient's.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, volume_name: str) -> Path:
        return self.folder / f"{hashlib.sha256(volume_name.encode()).hexdigest()[:32]}.safetensors"

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether the row's volume is here, made from the file that is there now."""
        path = self.path(row["volume_name"])
        if not path.exists():
            return False
        metadata = self._metadata(path)
        return "content_hash" in metadata and metadata["source"] == scan_identity(row)

    def content_hash(self, volume_name: str) -> str:
        """What [`~hsenet.corpora.volumes.content_hash`] says of the scan, before any resampling."""
        return self._metadata(self.path(volume_name))["content_hash"]

    @staticmethod
    def _metadata(path: Path) -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return file.metadata()

    def __getitem__(self, volume_name: str) -> dict[str, torch.Tensor]:
        return {name: tensor.float() for name, tensor in load_file(self.path(volume_name)).items()}

    def write(self, row: dict[str, Any], tensors: dict[str, torch.Tensor], content_hash: str) -> None:
        path = self.path(row["volume_name"])
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, unfinished, metadata={"source": scan_identity(row), "content_hash": content_hash})
        unfinished.rename(path)  # a file with the final name is always whole


class _Scans(Dataset):
    """Rows to preprocessed tensors; a scan that cannot be read stops the run, none is ever replaced."""

    def __init__(self, rows: Sequence[dict], image_processor: HSENetImageProcessor):
        self.rows = rows
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, dict[str, torch.Tensor], str]:
        try:
            scan = read_scan(self.rows[index])
            return index, self.image_processor.process_volume(scan), content_hash(scan)
        except HSENetInputError as error:
            # The reader names no file; the row's number in the split tells the owner of the data which it is.
            raise type(error)(f"Volume in row {self.rows[index]['row']}: {error}") from None


@torch.no_grad()
def cache_volumes(
    rows: Sequence[dict[str, Any]],
    image_processor: HSENetImageProcessor,
    slice_encoder: HSENetVisionModel | None,
    cache_dir: str | Path,
    accelerator: Accelerator,
    num_workers: int = 0,
) -> VolumeCache:
    """
    Args:
        rows: with `volume_name` (unique) and what `read_scan` takes; a name that repeats is done once.
        image_processor ([`HSENetImageProcessor`]): its settings are part of the cache's key.
        slice_encoder ([`HSENetVisionModel`], *optional*): frozen; its weights are part of the cache's key.
        cache_dir: other settings or weights get another folder in it; a scan that changed on disk is done again. All
            processes, on all nodes, have to see the same folder.

    Raises:
        RuntimeError: this process does not see what the others wrote.
    """
    cache = VolumeCache(Path(cache_dir) / _settings_key(image_processor, slice_encoder))
    cache.folder.mkdir(parents=True, exist_ok=True)
    # Shared out before anybody looks at the disk: processes that saw different files would leave gaps.
    unique = list({row["volume_name"]: row for row in rows}.values())
    share = unique[accelerator.process_index :: accelerator.num_processes]
    mine = [row for row in share if not cache.holds(row)]
    loader = DataLoader(_Scans(mine, image_processor), batch_size=None, num_workers=num_workers)
    if slice_encoder is not None:
        slice_encoder = slice_encoder.to(accelerator.device).eval()
    for index, tensors, scan_hash in tqdm(loader, "volumes", disable=not mine or not accelerator.is_main_process):
        cached = {"pixel_values": tensors["pixel_values"].half().contiguous()}
        if slice_encoder is not None:
            pictures = tensors["slice_pixel_values"].to(accelerator.device).unsqueeze(2)
            cached["slice_features"] = slice_encoder(pictures).pooler_output.float().cpu().contiguous()
        cache.write(mine[index], cached, scan_hash)
    accelerator.wait_for_everyone()
    if missing := sum(not cache.path(row["volume_name"]).exists() for row in unique):
        raise RuntimeError(
            f"{missing} of {len(unique)} volumes that other processes preprocessed are not in cache_dir: put it on a "
            "file system that all nodes share."
        )
    return cache


def preprocessing_settings(image_processor: HSENetImageProcessor) -> dict[str, Any]:
    """All that decides which tensors a scan becomes, as JSON has it."""
    # Its arguments only: `to_dict` of a loaded processor holds more than that of the same processor before saving.
    parameters = inspect.signature(HSENetImageProcessor.__init__).parameters
    settings = {name: getattr(image_processor, name) for name in parameters if name in vars(image_processor)}
    return json.loads(json.dumps({**settings, "version": PREPROCESSING_VERSION}))


def _settings_key(image_processor: HSENetImageProcessor, slice_encoder: HSENetVisionModel | None) -> str:
    settings = preprocessing_settings(image_processor)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if slice_encoder is not None:
        # What the weights' names and shapes do not show.
        config = slice_encoder.config
        digest.update(f"{config.num_attention_heads} {config.hidden_act} {config.layer_norm_eps}".encode())
        for name, tensor in sorted(slice_encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
