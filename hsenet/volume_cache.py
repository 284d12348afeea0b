"""Preprocessed volumes and frozen slice features on disk, computed once for all stages and epochs.

Reading and resampling a scan, and running the 2D encoder over its slices, cost more than a training step and give the
same tensors every time. `cache_volumes` writes them once, one file a volume, and continues where it was interrupted.
"""

import hashlib
import inspect
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.utils.logging import tqdm

from hsenet.digests import content_hash
from hsenet.scans import read_scan, scan_identity
from modeling_hsenet import HSENetVisionModel
from processing_hsenet import HSENetImageProcessor
from reading_hsenet import HSENetInputError


_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
PREPROCESSING_VERSION = 2  # raise it when the reader or the image processor gives other tensors for the same scan


class VolumeCache:
    """
    Tensors by volume name: `pixel_values` (1, D, H, W) and, with a slice encoder, `slice_features` (S, width) or the
    slices themselves, `slice_pixel_values` (S, C, H, W).

    File names are hashes, because a volume's name may be a patient's.
    """

    def __init__(self, folder: Path, image_processor: HSENetImageProcessor | None = None):
        self.folder = folder
        self.image_processor = image_processor  # needed for slices only

    def path(self, volume_name: str) -> Path:
        return self.folder / f"{hashlib.sha256(volume_name.encode()).hexdigest()[:32]}.safetensors"

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether the row's volume is here, made from the file that is there now."""
        path = self.path(row["volume_name"])
        if not path.exists():
            return False
        return self._metadata(path)["source"] == scan_identity(row)

    def content_hash(self, volume_name: str) -> str:
        """What [`~hsenet.digests.content_hash`] says of the scan, before any resampling."""
        return self._metadata(self.path(volume_name))["content_hash"]

    @staticmethod
    def _metadata(path: Path) -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["scan"])

    def __getitem__(self, volume_name: str) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.float() for name, tensor in load_file(self.path(volume_name)).items()}
        if "slices" in tensors:
            tensors["slice_pixel_values"] = self._normalized(tensors.pop("slices"))
        return tensors

    def _normalized(self, slices: torch.Tensor) -> torch.Tensor:
        settings = (self.image_processor.image_mean, self.image_processor.image_std)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in settings)
        return (slices.unsqueeze(1) - mean) / std  # (num_slices, channels, height, width)

    def write(self, row: dict[str, Any], tensors: dict[str, torch.Tensor], content_hash: str) -> None:
        scan = {"source": scan_identity(row), "content_hash": content_hash}
        self._write(row["volume_name"], tensors, scan)

    def _write(self, volume_name: str, tensors: dict[str, torch.Tensor], scan: dict[str, str]) -> None:
        path = self.path(volume_name)
        unfinished = path.with_suffix(f".{_HOST}-{os.getpid()}.tmp")
        # One entry: safetensors writes several in any order, and the same scan should give the same file.
        metadata = {"scan": json.dumps(scan)}
        # Not by save_file, whose own unfinished files would stay behind a killed process without a trace of whose.
        unfinished.write_bytes(save(tensors, metadata))
        unfinished.rename(path)  # a file with the final name is always whole

    def remove_orphans(self) -> None:
        """Deletes what processes of this machine left unfinished when they were killed."""
        for path in self.folder.glob(f"*.{_HOST}-*.tmp"):
            if not psutil.pid_exists(int(path.stem.rpartition("-")[2])):
                path.unlink(missing_ok=True)

    def readable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows whose volume is here: without those that could not be read, where some were allowed to fail."""
        return [row for row in rows if self.path(row["volume_name"]).exists()]


class UnreadableVolumesError(HSENetInputError):
    """More volumes could not be read than were allowed to fail."""


class _Scans(Dataset):
    """Rows to preprocessed tensors and the scan's hash, or to `None` and the reason."""

    def __init__(self, rows: Sequence[dict], image_processor: HSENetImageProcessor):
        self.rows = rows
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, dict[str, torch.Tensor], str] | tuple[int, None, str]:
        row = self.rows[index]
        try:
            scan = read_scan(row)
            return index, self.image_processor.process_volume(scan), content_hash(scan)
        except HSENetInputError as error:
            # The reader names no file; the row's number in the split tells the owner of the data which it is.
            return index, None, f"row {row['row']} of {row['from_split']}: {type(error).__name__}: {error}"


@torch.no_grad()
def cache_volumes(
    rows: Sequence[dict[str, Any]],
    image_processor: HSENetImageProcessor,
    slice_encoder: HSENetVisionModel | None,
    cache_dir: str | Path,
    accelerator: Accelerator,
    num_workers: int = 0,
    max_failures: int = 0,
    *,
    keep_slices: bool = False,
) -> VolumeCache:
    """
    Every readable volume is written before it counts how many were not: a rerun has to do only these again.

    Args:
        rows: with `volume_name` (unique) and what `read_scan` takes; a name that repeats is done once.
        image_processor ([`HSENetImageProcessor`]): its settings are part of the cache's key.
        slice_encoder ([`HSENetVisionModel`], *optional*): frozen; its weights are part of the cache's key.
        cache_dir: other settings or weights get another folder in it; a scan that changed on disk is done again. All
            processes, on all nodes, have to see the same folder.
        max_failures: how many volumes may be unreadable; [`VolumeCache.readable`] leaves their rows out.
        keep_slices: keep the slices in place of their features, for augmentation that moves them.

    Raises:
        UnreadableVolumesError: more volumes than `max_failures` could not be read; each is listed with its reason.
        RuntimeError: this process does not see what the others wrote.
    """
    slice_encoder = None if keep_slices else slice_encoder
    folder = Path(cache_dir) / _settings_key(image_processor, slice_encoder, keep_slices=keep_slices)
    cache = VolumeCache(folder, image_processor)
    cache.folder.mkdir(parents=True, exist_ok=True)
    cache.remove_orphans()
    # Shared out before anybody looks at the disk: processes that saw different files would leave gaps.
    unique = list({row["volume_name"]: row for row in rows}.values())
    share = unique[accelerator.process_index :: accelerator.num_processes]
    mine = [row for row in share if not cache.holds(row)]
    loader = DataLoader(_Scans(mine, image_processor), batch_size=None, num_workers=num_workers)
    if slice_encoder is not None:
        slice_encoder = slice_encoder.to(accelerator.device).eval()
    failures = []
    for index, tensors, note in tqdm(loader, "volumes", disable=not mine or not accelerator.is_main_process):
        if tensors is None:
            failures.append(note)
            cache.path(mine[index]["volume_name"]).unlink(missing_ok=True)  # of the scan before it was damaged
            continue
        cached = {"pixel_values": tensors["pixel_values"].half().contiguous()}
        if slice_encoder is not None:
            pictures = tensors["slice_pixel_values"].to(accelerator.device).unsqueeze(2)
            cached["slice_features"] = slice_encoder(pictures).pooler_output.float().cpu().contiguous()
        if keep_slices:
            # Its channels differ by their normalisation only.
            mean, std = image_processor.image_mean[0], image_processor.image_std[0]
            cached["slices"] = (tensors["slice_pixel_values"][:, 0] * std + mean).contiguous()
        cache.write(mine[index], cached, content_hash=note)
    failures = gather_object(failures)  # waits for everyone
    _report(failures, len(unique), max_failures, accelerator)
    if missing := len(unique) - len(failures) - len(cache.readable(unique)):
        raise RuntimeError(
            f"{missing} of {len(unique)} volumes that other processes preprocessed are not in cache_dir: put it on a "
            "file system that all nodes share."
        )
    return cache


def _report(failures: list[str], num_volumes: int, max_failures: int, accelerator: Accelerator) -> None:
    for failure in failures:
        accelerator.print(f"Not read: {failure}")
    if len(failures) > max_failures:
        first = "".join(f"\n- {failure}" for failure in failures[:10])
        raise UnreadableVolumesError(
            f"{len(failures)} of {num_volumes} volumes could not be read, expected at most {max_failures}. Mend these "
            f"scans, leave them out of the dataset, or raise max_failures; all others are cached.{first}"
        )


def preprocessing_settings(image_processor: HSENetImageProcessor) -> dict[str, Any]:
    """All that decides which tensors a scan becomes, as JSON has it."""
    # Its arguments only: `to_dict` of a loaded processor holds more than that of the same processor before saving.
    parameters = inspect.signature(HSENetImageProcessor.__init__).parameters
    settings = {name: getattr(image_processor, name) for name in parameters if name in vars(image_processor)}
    return json.loads(json.dumps({**settings, "version": PREPROCESSING_VERSION}))


def update_with_weights(digest: Any, model: nn.Module) -> None:
    """All weights in float32 with their names, into a hash."""
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())


def _settings_key(
    image_processor: HSENetImageProcessor, slice_encoder: HSENetVisionModel | None, *, keep_slices: bool
) -> str:
    settings = preprocessing_settings(image_processor)
    if keep_slices:
        settings["kept"] = "slices"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if slice_encoder is not None:
        # What the weights' names and shapes do not show.
        config = slice_encoder.config
        digest.update(f"{config.num_attention_heads} {config.hidden_act} {config.layer_norm_eps}".encode())
        update_with_weights(digest, slice_encoder)
    return digest.hexdigest()[:16]
