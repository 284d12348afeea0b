"""Wrong images on purpose: another patient's volume, and no volume at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hsenet.digests import digest
from hsenet.scoring.rows import patient_of
from modeling_hsenet import HSENetForConditionalGeneration
from processing_hsenet import HSENetImageProcessor


def shuffled_rows(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """
    Every row with the volume of another patient, the same one for all rows of a volume.

    Raises:
        ValueError: one patient has more than half of the volumes, so that not everybody can get another's.
    """
    patients: dict[str, dict[str, dict]] = {}
    for row in rows:
        patients.setdefault(patient_of(row), {})[row["volume_name"]] = row
    names = list(patients)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    volumes = [row for index in order for row in patients[names[index]].values()]
    largest = max(len(of_patient) for of_patient in patients.values())
    if 2 * largest > len(volumes):
        raise ValueError(f"One patient has {largest} of {len(volumes)} volumes: others' are too few to swap them.")
    # Volumes lie patient by patient; a turn by the largest patient's number leaves nobody with their own.
    other = {row["volume_name"]: volumes[i - largest] for i, row in enumerate(volumes)}
    scan = ("volume", "volume_name", "hu_slope", "hu_intercept", "row")
    swapped = []
    for row in rows:
        replacement = other[row["volume_name"]]
        swapped.append({**row, **{name: replacement[name] for name in scan if name in replacement}})
    return swapped


class BlankVolumes:
    """In place of a `VolumeCache`: for every name the same empty field of view, air everywhere."""

    @torch.no_grad()
    def __init__(self, image_processor: HSENetImageProcessor, model: HSENetForConditionalGeneration):
        air = (torch.zeros(1, *image_processor.image_size) - image_processor.volume_mean) / image_processor.volume_std
        self.tensors = {"pixel_values": air}
        if model.slice_encoder is not None:
            mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
            shape = (image_processor.num_slices, len(mean), 1, *image_processor.slice_size)
            black = (-mean / std).view(1, -1, 1, 1, 1).expand(shape).to(model.device)
            self.tensors["slice_features"] = model.slice_encoder(black).pooler_output.float().cpu()
        shown = [[name, list(tensor.shape), tensor.sum().item()] for name, tensor in self.tensors.items()]
        self.folder = Path(f"blank-{digest(shown)}")  # no folder, but a name for what depends on these tensors

    def __getitem__(self, volume_name: str) -> dict[str, torch.Tensor]:
        return dict(self.tensors)
