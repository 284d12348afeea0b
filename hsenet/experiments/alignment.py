# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""Do the 2E3 scorer's patch scores lie where the findings are? The paper shows pictures; this counts, on phantoms."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score

from hsenet.data import VolumeRows, dataset_root, load_rows, one_per_study
from hsenet.experiments.decision import Interval, percentile_interval, weighted_bootstrap
from hsenet.experiments.patches import load_mask, patch_overlap
from hsenet.phantom import CT_RATE_LABELS
from hsenet.scans import read_scan
from hsenet.volume_cache import cache_volumes
from modeling_hsenet import HSENetCLIPModel, HSENetVisionModel
from processing_hsenet import HSENetImageProcessor, HSENetProcessor


ALL, LESS = "mean of the findings", "trained less this"
NUM_UNTRAINED = 5


def alignment(folders: list[Path], settings: dict[str, Any], min_share: float) -> dict[str, dict[str, Interval]]:
    """
    Finding -> score -> AUROC of the score against "the finding fills `min_share` of the patch or more".

    The AUROC is taken within a scan, then averaged over the scans that show the finding, with a bootstrap interval
    over patients. The scores: `trained` (mean of the seeds), `untrained` (mean of fresh scorers on stage 1's patch
    embedding, each of which looks somewhere by chance), `place` (what the trained scorer says of the same patch in the
    other scans: knowing where findings tend to be, without this scan), `intensity` (how far a patch's mean lies from
    that of the same patch in all scans), `random`. The last row is the difference of the means, patients resampled in
    pairs.

    Args:
        folders: of trained stages 2 guided by slices, one a seed.
        settings: with `dataset`, `cache_dir`, `stage1` and `max_test_rows`.
    """
    trained = [HSENetCLIPModel.from_pretrained(folder).eval() for folder in folders]
    processor = HSENetProcessor.from_pretrained(folders[0]).image_processor
    rows = one_per_study(load_rows(settings["dataset"], "reports", "test", settings.get("max_test_rows")))
    cache = cache_volumes(rows, processor, trained[0].slice_encoder, settings["cache_dir"], Accelerator(cpu=True))
    systems = {"trained": [model.vision_model for model in trained]}
    systems["untrained"] = [untrained_encoder(trained[0], settings["stage1"], seed) for seed in range(NUM_UNTRAINED)]
    scores = {name: patch_scores(encoders, VolumeRows(rows, cache)) for name, encoders in systems.items()}
    patches = mean_of_patches(VolumeRows(rows, cache), trained[0].config.vision_config.patch_size)
    scores["place"] = [(seed.sum(axis=0) - seed) / (len(seed) - 1) for seed in scores["trained"]]
    scores["intensity"] = [(patches - patches.mean(axis=0)).abs().numpy()]
    scores["random"] = [np.random.default_rng(0).random(patches.shape)]
    root = dataset_root(settings["dataset"])[0]
    found = [finding_patches(row, root, processor, patches.shape[1:], min_share) for row in rows]
    return summarise(scores, found, [row["patient_id"] for row in rows])


def untrained_encoder(trained: HSENetCLIPModel, stage1: str, seed: int) -> HSENetVisionModel:
    """Where stage 2 started: stage 1's encoder with a scorer that has learned nothing."""
    torch.manual_seed(seed)
    encoder = HSENetVisionModel(trained.config.vision_config).eval()
    scorer = {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith("scorer.")}
    encoder.load_state_dict({**HSENetCLIPModel.from_pretrained(stage1).vision_model.state_dict(), **scorer})
    return encoder


@torch.no_grad()
def patch_scores(encoders: list[HSENetVisionModel], dataset: VolumeRows) -> list[np.ndarray]:
    """Of each encoder `(num_scans, grid_d, grid_h, grid_w)`."""
    scores: list[list[np.ndarray]] = [[] for _ in encoders]
    for example in dataset:
        for encoder, of_encoder in zip(encoders, scores, strict=True):
            outputs = encoder(example["pixel_values"][None], example["slice_features"][None])
            of_encoder.append(outputs.patch_scores[0].numpy())
    return [np.stack(of_encoder) for of_encoder in scores]


def mean_of_patches(dataset: VolumeRows, patch_size: tuple[int, int, int]) -> torch.Tensor:
    """`(num_scans, grid_d, grid_h, grid_w)`."""
    pool = torch.nn.functional.avg_pool3d
    return torch.cat([pool(example["pixel_values"], tuple(patch_size)) for example in dataset])


def finding_patches(
    row: dict[str, Any], root: str, processor: HSENetImageProcessor, grid: tuple[int, ...], min_share: float
) -> dict[str, np.ndarray]:
    """Finding -> which patches show it, `grid`; only findings with patches on both sides."""
    scan, mask = read_scan(row), load_mask(f"{root}/{row['mask']}")
    patch_size = tuple(size // count for size, count in zip(processor.image_size, grid, strict=True))
    found = {}
    for value in np.unique(mask[mask > 0]):
        shown = (patch_overlap(processor, scan, mask == value, patch_size) >= min_share).numpy()
        if shown.any() and not shown.all():
            found[CT_RATE_LABELS[value - 1]] = shown
    return found


def summarise(
    scores: dict[str, list[np.ndarray]], found: list[dict[str, np.ndarray]], patients: list[str]
) -> dict[str, dict[str, Interval]]:
    """
    Args:
        scores: name (one is `trained`) -> of each seed `(num_scans, *grid)`; the AUROC is the mean of the seeds.
        found: of each scan, finding -> which patches show it.
    """
    names = sorted(set(patients))
    weights = weighted_bootstrap(len(names))[:, [names.index(name) for name in patients]]  # (resamples, num_scans)
    labels = [label for label in CT_RATE_LABELS if any(label in shown for shown in found)]
    summary: dict[str, dict[str, Interval]] = {label: {} for label in (*labels, ALL, LESS)}
    means: dict[str, tuple[float, np.ndarray]] = {}
    for name, of_seeds in scores.items():
        values, resamples = [], []
        for label in labels:
            scans = [number for number, shown in enumerate(found) if label in shown]
            aurocs = [np.mean([_auroc(found[scan][label], seed[scan]) for seed in of_seeds]) for scan in scans]
            drawn = weights[:, scans]
            with np.errstate(invalid="ignore"):  # a resample without the finding has no AUROC
                resamples.append(drawn @ np.array(aurocs) / drawn.sum(axis=1))
            values.append(np.mean(aurocs))
            summary[label][name] = percentile_interval(values[-1], resamples[-1])
        means[name] = (float(np.mean(values)), np.nanmean(resamples, axis=0))
        summary[ALL][name] = percentile_interval(*means[name])
    value, resampled = means["trained"]
    for name, (other, other_resampled) in means.items():
        summary[LESS][name] = percentile_interval(value - other, resampled - other_resampled)
    return summary


def _auroc(shown: np.ndarray, scores: np.ndarray) -> float:
    return float(roc_auc_score(shown.ravel(), scores.ravel()))
