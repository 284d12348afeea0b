"""Procedural chest CTs with reports, questions and masks: the data that the quickstart and the tests train on.

    study = sample_study(seed=0, index=3)          # who, what findings, report, questions: no voxels yet
    image = render_study(study, reconstruction=1)  # int16 HU, RAS+ affine, mask of the findings

Everything follows from (seed, split, index); nothing is read from disk. The phantoms are synthetic: they teach and
test software, not medicine.
"""

import gzip
import zlib
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from .phantom_anatomy import Anatomy, sample_anatomy
from .phantom_canvas import Canvas, rotation_matrix
from .phantom_findings import CHRONIC, CT_RATE_LABELS, PHANTOM_LABELS, Finding, sample_findings, sample_labels
from .phantom_lesions import (
    draw_cardiomegaly,
    draw_lung_findings,
    draw_other_findings,
    draw_pericardial_effusion,
)
from .phantom_organs import draw_chest, draw_heart, draw_mediastinum, draw_table
from .phantom_questions import Question, write_questions
from .phantom_text import write_report


__all__ = [
    "CT_RATE_LABELS",
    "PHANTOM_LABELS",
    "QUICKSTART_SPACING",
    "Finding",
    "PhantomImage",
    "PhantomStudy",
    "Question",
    "nifti_bytes",
    "render_study",
    "sample_study",
]

QUICKSTART_SPACING = (3.75, 3.75, 6.0)  # x, y, z in mm
NOMINAL_FIELD_OF_VIEW = 360.0  # mm; with the spacing asked for, it sets the matrix
STUDIES_PER_CYCLE, PATIENTS_PER_CYCLE = 8, 7  # of every seven patients the last returns for a second study
ORIENTATIONS = ("LPS", "LAS", "RAS", "RPS", "LPI", "RAI", "PSR", "SLA")
ORIENTATION_WEIGHTS = (0.3, 0.3, 0.15, 0.07, 0.07, 0.05, 0.03, 0.03)
PADDING_HU = (-1024, -2048, -3024)


@dataclass(frozen=True)
class PhantomStudy:
    """One examination: the patient, what the scan shows and what the radiologist wrote about it."""

    patient_id: str
    study_id: str  # CT-RATE's form without the reconstruction: "train_12_a"
    split: str
    age: int
    sex: str  # "M" or "F"
    findings: tuple[Finding, ...]
    findings_text: str
    impression_text: str
    questions: tuple[Question, ...]
    labels: tuple[int, ...]  # 18 of 0 or 1, in the order of CT_RATE_LABELS
    num_reconstructions: int
    anatomy: Anatomy
    entropy: tuple[int, ...]  # what the renderer's random numbers start from

    def volume_name(self, reconstruction: int) -> str:
        return f"{self.study_id}_{reconstruction}"


@dataclass(frozen=True)
class PhantomImage:
    """A reconstruction as a NIfTI file holds it."""

    array: np.ndarray  # int16 HU, axes as `orientation` says
    affine: np.ndarray  # (4, 4) float64, voxel index to RAS+ mm
    mask: np.ndarray  # uint8, same shape: 0, or 1 + index into CT_RATE_LABELS
    orientation: str  # where each array axis points, e.g. "LPS"


def sample_study(seed: int, index: int, split: str = "train") -> PhantomStudy:
    """Draw study number `index` of a split; every eighth is the second study of the patient before it.

    Args:
        seed (`int`): of the whole data set.
        index (`int`): from 0, without end.
        split (`str`): patients of different splits are different people.
    """
    cycle, place = divmod(index, STUDIES_PER_CYCLE)
    scan = int(place == STUDIES_PER_CYCLE - 1)
    number = cycle * PATIENTS_PER_CYCLE + place - scan
    patient_entropy = (seed, zlib.crc32(split.encode()), number)
    entropy = (*patient_entropy, 1 + scan)
    patient_rng = np.random.default_rng((*patient_entropy, 0))
    sex = "M" if patient_rng.random() < 0.55 else "F"
    first_age = int(np.clip(patient_rng.normal(56, 16), 19, 90))
    healthy_anatomy = sample_anatomy(patient_rng, sex, first_age)
    age = first_age + scan * int(patient_rng.integers(0, 4))
    anatomy, findings = _study_findings(patient_entropy, scan, age, healthy_anatomy)
    text_rng = np.random.default_rng((*entropy, 1))
    findings_text, impression_text = write_report(text_rng, findings)
    present = {finding.label for finding in findings}
    return PhantomStudy(
        patient_id=f"{split}_{number + 1}",
        study_id=f"{split}_{number + 1}_{'ab'[scan]}",
        split=split,
        age=age,
        sex=sex,
        findings=findings,
        findings_text=findings_text,
        impression_text=impression_text,
        questions=write_questions(text_rng, findings),
        labels=tuple(int(label in present) for label in CT_RATE_LABELS),
        num_reconstructions=1 + int(text_rng.random() < 0.4),
        anatomy=anatomy,
        entropy=entropy,
    )


def _study_findings(
    patient_entropy: tuple[int, ...], scan: int, age: int, anatomy: Anatomy
) -> tuple[Anatomy, tuple[Finding, ...]]:
    """Findings of a first study, or of a second: what is chronic stays as it was, what is acute is drawn anew."""
    labels = sample_labels(np.random.default_rng((*patient_entropy, 1, 2)), age)
    if scan:
        later = sample_labels(np.random.default_rng((*patient_entropy, 2, 2)), age)
        labels = (labels & CHRONIC) | (later - CHRONIC)
    rngs = {
        label: np.random.default_rng((*patient_entropy, 0 if label in CHRONIC else 1 + scan, 3, number))
        for number, label in enumerate(PHANTOM_LABELS)
    }
    return sample_findings(labels, rngs, anatomy)


def render_study(
    study: PhantomStudy, reconstruction: int = 1, *, spacing: tuple[float, float, float] | None = None
) -> PhantomImage:
    """Draw one reconstruction of a study.

    Args:
        study (`PhantomStudy`): from `sample_study`.
        reconstruction (`int`): from 1 to `study.num_reconstructions`; they differ in kernel, spacing and offset.
        spacing (`tuple`): nominal (x, y, z) voxel size in mm, `QUICKSTART_SPACING` if None. The true spacing varies
            about it: in plane by the field of view, along z by the reconstruction's increment.
    """
    if not 1 <= reconstruction <= study.num_reconstructions:
        available = study.num_reconstructions
        raise ValueError(f"{study.study_id} has reconstructions 1 to {available}, got {reconstruction}")
    rng = np.random.default_rng((*study.entropy, 10 + reconstruction))
    canvas = _make_canvas(study.anatomy, rng, spacing or QUICKSTART_SPACING)
    _draw(canvas, study)
    _apply_kernel_and_noise(canvas, rng)
    hu = np.clip(canvas.hu, -1024, 3071)
    _pad_outside_circle(canvas, hu, rng)
    isocentre = np.random.default_rng((*study.entropy, 9)).normal((0, -160, -400), (2, 40, 200))
    orientation = ORIENTATIONS[rng.choice(len(ORIENTATIONS), p=ORIENTATION_WEIGHTS)]
    array, affine = _store(np.rint(hu).astype(np.int16), canvas, isocentre, orientation)
    mask, _ = _store(canvas.mask, canvas, isocentre, orientation)
    return PhantomImage(array, affine, mask, orientation)


def _make_canvas(anatomy: Anatomy, rng: np.random.Generator, spacing: tuple[float, float, float]) -> Canvas:
    """Lay a grid over the chest: field of view, increment and offsets are the reconstruction's."""
    columns, rows = (max(round(NOMINAL_FIELD_OF_VIEW / spacing[axis]), 8) for axis in (0, 1))
    field_of_view = rng.uniform(338, 384)
    dz = spacing[2] * rng.uniform(0.9, 1.12)
    center_x, center_y = rng.normal(0, 3, 2) + np.array(anatomy.shift)
    top = anatomy.apex_z + rng.uniform(6, 22)
    bottom = anatomy.left_dome_z - rng.uniform(42, 58) * anatomy.scale
    x = center_x + (np.arange(columns) - (columns - 1) / 2) * field_of_view / columns
    y = center_y + (np.arange(rows) - (rows - 1) / 2) * field_of_view / rows
    z = np.arange(bottom, top, dz)
    return Canvas((z, y, x), rotation_matrix(anatomy.rotation), np.array([*anatomy.shift, 0.0]))


def _draw(canvas: Canvas, study: PhantomStudy) -> None:
    anatomy = study.anatomy
    findings = {finding.label: finding for finding in study.findings}
    chest = draw_chest(canvas, anatomy)
    if finding := findings.get("Cardiomegaly"):
        draw_cardiomegaly(canvas, finding, chest)
    draw_lung_findings(canvas, anatomy, findings, chest)
    fluid = draw_heart(canvas, anatomy, chest)
    if finding := findings.get("Pericardial effusion"):
        draw_pericardial_effusion(canvas, finding, chest, fluid)
    draw_mediastinum(canvas, anatomy)
    draw_other_findings(canvas, anatomy, findings)
    back = -(anatomy.half_depth + 5 + 0.75 * anatomy.muscle_thickness + anatomy.fat_thickness)
    draw_table(canvas, anatomy, back - 2)


def _apply_kernel_and_noise(canvas: Canvas, rng: np.random.Generator) -> None:
    """A soft kernel blurs and correlates the noise, a sharp one enhances edges and is noisy."""
    sharpness = rng.uniform(-0.12, 0.16)
    hu = canvas.hu
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    noise[:, :, 1:] += np.float32(0.45 - 2 * sharpness) * noise[:, :, :-1]
    noise[:, 1:] += np.float32(0.45 - 2 * sharpness) * noise[:, :-1]
    inner = hu[:, 1:-1, 1:-1]
    laplacian = hu[:, :-2, 1:-1] + hu[:, 2:, 1:-1] + hu[:, 1:-1, :-2] + hu[:, 1:-1, 2:] - 4 * inner
    inner -= np.float32(sharpness) * laplacian
    level = rng.gamma(4.0, 3.2) * (1 + 2.5 * max(sharpness, 0))
    # Shoulders absorb more, so the slices through them are noisier.
    profile = 1 + 0.7 * np.clip((canvas.axes[0] - 30) / 60, 0, 1)
    hu += noise * (level * profile).astype(np.float32)[:, None, None]


def _pad_outside_circle(canvas: Canvas, hu: np.ndarray, rng: np.random.Generator) -> None:
    """Some scanners fill what lies outside the reconstruction circle with a value below air."""
    padded, value = rng.random() < 0.45, PADDING_HU[int(rng.integers(len(PADDING_HU)))]
    if padded:
        _, y, x = (axis - axis.mean() for axis in canvas.axes)
        hu[:, x[None, :] ** 2 + y[:, None] ** 2 > (x[-1] + 0.5 * canvas.spacing[2]) ** 2] = value


def _store(
    volume: np.ndarray, canvas: Canvas, isocentre: np.ndarray, orientation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Turn a (z, y, x) volume into the array a file stores and its affine: the anatomy stays where it is."""
    array = volume.T  # (x, y, z), RAS
    spacing = canvas.spacing[::-1]
    origin = np.array([axis[0] for axis in canvas.axes[::-1]]) + isocentre
    world_axes = ["RAS".find(letter) if letter in "RAS" else "LPI".find(letter) for letter in orientation]
    affine = np.eye(4)
    affine[:3, :3] = 0
    flips = []
    for column, (letter, axis) in enumerate(zip(orientation, world_axes, strict=True)):
        sign = 1 if letter in "RAS" else -1
        affine[axis, column] = sign * spacing[axis]
        flips.append(slice(None, None, sign))
        if sign < 0:
            origin[axis] += spacing[axis] * (array.shape[axis] - 1)
    affine[:3, 3] = origin
    return np.asfortranarray(array.transpose(world_axes)[tuple(flips)]), affine


def nifti_bytes(array: np.ndarray, affine: np.ndarray) -> bytes:
    """A .nii.gz file's content, the same bytes for the same input (gzip stamps no time) and fast (level 1)."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
