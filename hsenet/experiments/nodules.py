# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Does a packed token still hold a small nodule? A stress test that the paper leaves open, on phantoms."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hsenet.experiments.decision import Interval, percentile_interval, weighted_bootstrap
from hsenet.experiments.patches import canonical_mask, patch_overlap
from hsenet.phantom import PhantomStudy, render_study, sample_study
from hsenet.phantom_findings import Finding, sample_findings
from hsenet.phantom_lesions import mask_value
from modeling_hsenet import HSENetForConditionalGeneration
from processing_hsenet import HSENetImageProcessor, HSENetProcessor
from reading_hsenet import Volume, read_volume


LABEL = "Lung nodule"
NO_NODULE = 0.0  # the size of the scan without one


@dataclass
class NodulePatient:
    """One patient scanned without a nodule and with one of each size at one place: `pixel_values` by size in mm."""

    patch: tuple[int, int, int]
    pixel_values: dict[float, torch.Tensor] = field(default_factory=dict)


def nodule_auroc(
    folders: dict[str, list[Path]],
    sizes: Sequence[float],
    num_patients: int,
    spacing: tuple[float, float, float],
    seed: int = 0,
) -> dict[str, dict[float, Interval]]:
    """
    Representation -> size in mm -> AUROC of a linear probe that says whether the nodule is there.

    The probe knows where to look: it reads the one vector that stands for the nodule's place, and is fitted to half
    of the patients (all sizes at once) and tested on the other half, size by size, with a bootstrap interval over
    patients. The representations follow the global encoder's path: `voxels` of the patch, `patch` (the encoder's
    output), `packed (...)` for each trained projector, `mean of the window (...)` beside it, `mean of the volume`.

    Args:
        folders: name of a projector -> trained stages 3 with it, one a seed; all have the same frozen encoders.
        num_patients: none of any split; half of them fit the probe.
    """
    models = {
        name: [HSENetForConditionalGeneration.from_pretrained(folder).eval() for folder in of_seeds]
        for name, of_seeds in folders.items()
    }
    processor = HSENetProcessor.from_pretrained(next(iter(folders.values()))[0]).image_processor
    processor.num_slices = 0  # the global encoder takes none
    first = next(iter(models.values()))[0]
    patch_size = first.config.vision_config.patch_size
    drawn = (nodule_patient(index, sizes, processor, patch_size, spacing, seed) for index in range(num_patients))
    patients = [patient for patient in drawn if patient is not None]
    features: dict[str, list[np.ndarray]] = {}  # a representation, for each of its seeds (patients, 1 + sizes, width)
    for patient in patients:
        for name, values in _representations(models, patient).items():
            features.setdefault(name, [[] for _ in values])
            for of_seed, value in zip(features[name], values, strict=True):
                of_seed.append(value)
    return {
        name: probe_auroc([np.stack(of_seed) for of_seed in of_seeds], list(sizes))
        for name, of_seeds in features.items()
    }


def nodule_patient(
    index: int,
    sizes: Sequence[float],
    processor: HSENetImageProcessor,
    patch_size: tuple[int, int, int],
    spacing: tuple[float, float, float],
    seed: int,
) -> NodulePatient | None:
    """The scans of one patient, who has no other finding; `None` where the lung's edge cuts the nodule away."""
    study = replace(sample_study(seed, index, "nodules"), findings=())
    generator = np.random.default_rng((*study.entropy, 77))
    _, (finding,) = sample_findings({LABEL}, {LABEL: generator}, study.anatomy)
    scan, mask = _render(_with_nodule(study, finding, max(sizes)), spacing)
    if not mask.any():
        return None
    overlap = patch_overlap(processor, scan, mask, patch_size)
    patient = NodulePatient(tuple(int(i) for i in np.unravel_index(int(overlap.argmax()), overlap.shape)))
    for size in (NO_NODULE, *sizes):
        scan, _ = _render(_with_nodule(study, finding, size) if size else study, spacing)
        patient.pixel_values[size] = processor.process_volume(scan)["pixel_values"]
    return patient


def _with_nodule(study: PhantomStudy, finding: Finding, size: float) -> PhantomStudy:
    """One smooth solid nodule of this diameter in mm."""
    lesion = replace(finding.lesions[0], radius=size / 2)
    return replace(study, findings=(replace(finding, kind="smooth", count=1, lesions=(lesion,)),))


def _render(study: PhantomStudy, spacing: tuple[float, float, float]) -> tuple[Volume, np.ndarray]:
    image = render_study(study, spacing=tuple(spacing))
    mask = canonical_mask(image.mask, image.affine) == mask_value(LABEL)
    return read_volume(image.array, affine=image.affine), mask


@torch.no_grad()
def _representations(
    models: dict[str, list[HSENetForConditionalGeneration]], patient: NodulePatient
) -> dict[str, list[np.ndarray]]:
    """Name -> for each seed `(1 + sizes, width)`, the scan without a nodule first."""
    pixel_values = torch.stack(list(patient.pixel_values.values()))  # (1 + sizes, 1, D, H, W)
    first = next(iter(models.values()))[0]
    config = first.config.vision_config
    states = first.model.global_encoder(pixel_values).last_hidden_state[:, 1:]  # (1 + sizes, num_patches, hidden)
    corner = [place * size for place, size in zip(patient.patch, config.patch_size, strict=True)]
    d, h, w = (slice(start, start + size) for start, size in zip(corner, config.patch_size, strict=True))
    patch = np.ravel_multi_index(patient.patch, config.grid_size)
    found = {"voxels": [pixel_values[:, 0, d, h, w].flatten(1)], "patch": [states[:, patch]]}
    for name, of_seeds in models.items():
        packers = [model.model.multi_modal_projector.global_packer for model in of_seeds]
        window = packers[0].window_size
        windows = tuple(size // step for size, step in zip(config.grid_size, window, strict=True))
        place = tuple(place // step for place, step in zip(patient.patch, window, strict=True))
        token = np.ravel_multi_index(place, windows)
        found[f"packed ({name})"] = [packer(states)[0][:, token] for packer in packers]
        means = packers[0].split_windows(states).mean(dim=1).unflatten(0, (len(states), -1))
        found[f"mean of the window ({name})"] = [means[:, token]]
    found["mean of the volume"] = [states.mean(dim=1)]
    return {name: [value.numpy() for value in values] for name, values in found.items()}


def probe_auroc(of_seeds: list[np.ndarray], sizes: list[float]) -> dict[float, Interval]:
    """`(patients, 1 + sizes, width)` of each seed to AUROC by size, the mean of the seeds."""
    num_patients = len(of_seeds[0])
    is_fitted = np.arange(num_patients) % 2 == 0
    scores = []
    for features in of_seeds:
        truth = np.broadcast_to(np.arange(features.shape[1]) > 0, features.shape[:2])
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=1000, class_weight="balanced"))
        probe.fit(features[is_fitted].reshape(-1, features.shape[2]), truth[is_fitted].ravel())
        tested = features[~is_fitted]
        scores.append(probe.decision_function(tested.reshape(-1, features.shape[2])).reshape(tested.shape[:2]))
    weights = weighted_bootstrap(len(scores[0])).astype(float)
    result = {}
    for column, size in enumerate(sizes, start=1):
        # wins[i, j]: patient i with the nodule scores above patient j without, ties half.
        wins = np.mean([_wins(of_seed[:, column], of_seed[:, 0]) for of_seed in scores], axis=0)
        resampled = np.einsum("ri,ij,rj->r", weights, wins, weights) / len(wins) ** 2
        result[size] = percentile_interval(wins.mean(), resampled)
    return result


def _wins(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    difference = positive[:, None] - negative[None, :]
    return (difference > 0) + 0.5 * (difference == 0)
