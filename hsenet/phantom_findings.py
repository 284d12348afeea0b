"""What a phantom may show: the labels, how often they occur together, and each finding's side, lobe, size and place.

The 18 labels are those of CT-RATE; the phantoms draw 13 of them. A finding is sampled once per patient (chronic) or
study (acute), in patient coordinates, so that all reconstructions and later studies show the same lesion.
"""

from dataclasses import dataclass, replace

import numpy as np

from .phantom_anatomy import (
    LOBES,
    Anatomy,
    cavity_distance,
    coronary_path,
    diaphragm_distance,
    points_in_lobe,
    with_heart,
)


CT_RATE_LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)

# Odds of each finding at the age of 55 in a patient of average burden.
BASE_ODDS = {
    "Medical material": 0.15,
    "Arterial wall calcification": 0.26,
    "Cardiomegaly": 0.18,
    "Pericardial effusion": 0.12,
    "Coronary artery wall calcification": 0.22,
    "Hiatal hernia": 0.14,
    "Lymphadenopathy": 0.20,
    "Emphysema": 0.17,
    "Atelectasis": 0.22,
    "Lung nodule": 0.42,
    "Lung opacity": 0.24,
    "Pleural effusion": 0.20,
    "Consolidation": 0.20,
}
PHANTOM_LABELS = tuple(label for label in CT_RATE_LABELS if label in BASE_ODDS)

# Factor on the odds per decade beyond 55.
AGE_FACTOR = {
    "Arterial wall calcification": 2.2,
    "Coronary artery wall calcification": 2.0,
    "Emphysema": 1.45,
    "Hiatal hernia": 1.3,
    "Cardiomegaly": 1.3,
    "Medical material": 1.15,
}
MINIMUM_AGE = {"Arterial wall calcification": 40, "Coronary artery wall calcification": 40, "Emphysema": 30}
COMPANIONS = {  # what is present multiplies the odds of what follows
    "Cardiomegaly": {"Pericardial effusion": 1.8, "Pleural effusion": 1.7},
    "Pleural effusion": {"Atelectasis": 2.2},
    "Arterial wall calcification": {"Coronary artery wall calcification": 1.8},
}
CHRONIC = {
    "Arterial wall calcification",
    "Cardiomegaly",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Emphysema",
    "Lung nodule",
    "Medical material",
}
HEALTHY_FRACTION = 0.12

NODE_STATIONS = {  # centre in mm at scale 1
    "right paratracheal": (17.0, 2.0, 26.0),
    "left paratracheal": (-15.0, -4.0, 14.0),
    "prevascular": (-15.0, 30.0, 22.0),
    "subcarinal": (-1.0, -20.0, -22.0),
    "right hilar": (40.0, -14.0, -14.0),
    "left hilar": (-42.0, -14.0, -12.0),
}
DEVICES = ("central venous catheter", "port catheter", "pacemaker", "sternotomy wires")
EFFUSION_DEPTH = {"small": (11.0, 17.0), "moderate": (23.0, 33.0), "large": (42.0, 62.0)}  # mm at the base
SEVERITIES = ("mild", "moderate", "severe")


@dataclass(frozen=True)
class Lesion:
    """One focus: `center` in patient mm, `radius` in mm, `lobe` in full (e.g. "left lower lobe") where it has one."""

    center: tuple[float, float, float]
    radius: float
    lobe: str | None = None


@dataclass(frozen=True)
class Finding:
    """A finding as the report tells it (side to kind) and as the renderer draws it (lesions, seed).

    `side` is "right", "left" or "bilateral"; `lobe` that of the largest lesion, in full; `size_mm` the largest
    diameter (nodule, consolidation, hernia), short axis (nodes) or thickness (effusions); `kind` the artery, station,
    device or form.
    """

    label: str
    side: str | None = None
    lobe: str | None = None
    size_mm: int | None = None
    count: int | None = None
    severity: str | None = None
    kind: str | None = None
    lesions: tuple[Lesion, ...] = ()
    seed: int = 0


def sample_labels(rng: np.random.Generator, age: int) -> set[str]:
    """Draw the labels present: a latent burden makes some patients well and others ill in many ways."""
    present: set[str] = set()
    if rng.random() < HEALTHY_FRACTION:
        return present
    burden = rng.gamma(1.6, 0.85)
    for label, odds in BASE_ODDS.items():
        odds *= burden * AGE_FACTOR.get(label, 1.0) ** ((age - 55) / 10)
        for other in present:
            odds *= COMPANIONS.get(other, {}).get(label, 1.0)
        drawn = rng.random() < odds / (1 + odds)
        if drawn and age >= MINIMUM_AGE.get(label, 0):
            present.add(label)
    return present


def sample_findings(
    labels: set[str], rngs: dict[str, np.random.Generator], anatomy: Anatomy
) -> tuple[Anatomy, tuple[Finding, ...]]:
    """Give each label its attributes, drawn from that label's own generator, and change the anatomy where it must.

    Order matters: what changes the anatomy (heart, effusions) comes first, then what must avoid it.
    """
    findings: dict[str, Finding] = {}
    for label in ("Cardiomegaly", "Pericardial effusion", "Emphysema"):
        if label in labels:
            anatomy, findings[label] = _SAMPLERS_OF_ANATOMY[label](rngs[label], anatomy)
    for label, sample in _SAMPLERS.items():
        if label in labels:
            findings[label] = replace(sample(rngs[label], anatomy, findings), seed=int(rngs[label].integers(2**31)))
    return anatomy, tuple(findings[label] for label in PHANTOM_LABELS if label in findings)


def _cardiomegaly(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Anatomy, Finding]:
    ratio = rng.uniform(0.55, 0.68)
    severity = "mild" if ratio < 0.59 else "moderate" if ratio < 0.64 else "severe"
    return with_heart(anatomy, ratio), Finding("Cardiomegaly", severity=severity)


def _pericardial_effusion(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Anatomy, Finding]:
    thickness = int(rng.integers(8, 23))
    severity = "small" if thickness < 12 else "moderate" if thickness < 18 else "large"
    finding = Finding("Pericardial effusion", size_mm=thickness, severity=severity)
    return replace(anatomy, pericardial_fluid=float(thickness)), finding


def _emphysema(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Anatomy, Finding]:
    grade = int(rng.integers(3))
    kind = ("centrilobular", "paraseptal", "centrilobular and paraseptal")[int(rng.integers(3))]
    finding = Finding(
        "Emphysema", side="bilateral", severity=SEVERITIES[grade], kind=kind, seed=int(rng.integers(2**31))
    )
    flattening = (2.0, 7.0, 13.0)[grade]
    anatomy = replace(
        anatomy,
        lung_hu=anatomy.lung_hu - (8.0, 18.0, 30.0)[grade],
        right_dome_z=anatomy.right_dome_z - flattening,
        left_dome_z=anatomy.left_dome_z - flattening,
    )
    return anatomy, finding


def _pleural_effusion(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    side = ("right", "left", "bilateral")[rng.choice(3, p=(0.37, 0.33, 0.30))]
    severity = tuple(EFFUSION_DEPTH)[rng.choice(3, p=(0.4, 0.38, 0.22))]
    return Finding("Pleural effusion", side, size_mm=round(rng.uniform(*EFFUSION_DEPTH[severity])), severity=severity)


def _hiatal_hernia(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    size = int(rng.integers(32, 84))
    severity = "small" if size < 45 else "moderate" if size < 65 else "large"
    center = (rng.uniform(-12, 2), -27 * anatomy.scale - 0.06 * size, -112 * anatomy.scale + 0.22 * size)
    kind = ("containing an air-fluid level", "containing air", "with fat and soft tissue")[int(rng.integers(3))]
    return Finding("Hiatal hernia", size_mm=size, severity=severity, kind=kind, lesions=(Lesion(center, size / 2),))


def _lymphadenopathy(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    stations = list(rng.permutation(list(NODE_STATIONS))[: rng.choice((1, 2, 3), p=(0.5, 0.3, 0.2))])
    short_axes = sorted(rng.uniform(11.5, 27, len(stations)), reverse=True)
    lesions = []
    for station, short_axis in zip(stations, short_axes, strict=True):
        center = np.array(NODE_STATIONS[station]) * anatomy.scale + rng.normal(0, 1.5, 3)
        lesions.append(Lesion(tuple(center.tolist()), short_axis / 2))
    sides = {station.split()[0] for station in stations if station.split()[0] in ("right", "left")}
    side = None if not sides else sides.pop() if len(sides) == 1 else "bilateral"
    return Finding(
        "Lymphadenopathy",
        side,
        size_mm=round(short_axes[0]),
        count=len(stations),
        kind=", ".join(str(station) for station in stations),
        lesions=tuple(lesions),
    )


def _arterial_calcification(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    grade = int(rng.integers(3))
    place = ("aortic arch", "descending aorta", "aortic arch and descending aorta")[int(rng.integers(3))]
    count = int(rng.integers(*((2, 5), (6, 11), (13, 22))[grade]))
    return Finding("Arterial wall calcification", count=count, severity=SEVERITIES[grade], kind=place)


def _coronary_calcification(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    grade = int(rng.integers(3))
    arteries = rng.permutation(["LAD", "LCX", "RCA"])[: grade + 1]
    lesions = []
    for artery in arteries:
        path = coronary_path(anatomy, str(artery))[1:17]
        above = diaphragm_distance(anatomy, *path.T) < -3  # the diaphragm cuts the ellipsoid's lower surface off
        path = path[above] if above.any() else path[:2]
        for _ in range(int(rng.integers(1, 3)) + grade):
            point = path[int(rng.integers(len(path)))]
            lesions.append(Lesion(tuple(point.tolist()), rng.uniform(2.2, 4.5)))
    kind = ", ".join(name for name in ("LAD", "LCX", "RCA") if name in arteries)
    return Finding("Coronary artery wall calcification", severity=SEVERITIES[grade], kind=kind, lesions=tuple(lesions))


def _medical_material(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    kind = DEVICES[int(rng.integers(len(DEVICES)))]
    side = {"pacemaker": "left", "sternotomy wires": None}.get(kind, ("right", "left")[int(rng.random() < 0.35)])
    return Finding("Medical material", side, kind=kind)


def _free_points(
    rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding], lobe: str, radius: float
) -> np.ndarray:
    """Points of a lobe where a lesion of this radius is not drowned in fluid nor in another lesion, (points, 3)."""
    points = points_in_lobe(anatomy, lobe, rng, depth=radius + 1)
    clearance = np.full(len(points), np.inf)
    effusion = others.get("Pleural effusion")
    if effusion and effusion.side in ("bilateral", lobe.split()[0]):
        x, y, z = points.T
        wall = np.maximum(cavity_distance(anatomy, x, y, z), diaphragm_distance(anatomy, x, y, z))
        clearance = effusion_distance(anatomy, effusion, wall, y, z) - radius - 2
    for finding in others.values():
        if finding.label in ("Lung nodule", "Consolidation", "Lung opacity", "Atelectasis", "Hiatal hernia"):
            for lesion in finding.lesions:
                gap = np.linalg.norm(points - lesion.center, axis=1) - lesion.radius - radius
                clearance = np.minimum(clearance, gap)
    free = clearance > 0
    return points[free] if free.any() else points[[int(np.argmax(clearance))]]


def _place(
    rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding], lobes: list[str], radii: list[float]
) -> tuple[Lesion, ...]:
    """Put one lesion in each lobe named, largest first."""
    lesions: list[Lesion] = []
    for lobe, radius in zip(lobes, radii, strict=True):
        placed = {**others, "placed": Finding("Lung nodule", lesions=tuple(lesions))}
        point = _free_points(rng, anatomy, placed, lobe, radius)[0]
        lesions.append(Lesion(tuple(point.tolist()), float(radius), lobe))
    return tuple(lesions)


def _side_of(lesions: tuple[Lesion, ...]) -> str:
    sides = {lesion.lobe.split()[0] for lesion in lesions}
    return sides.pop() if len(sides) == 1 else "bilateral"


def _in_lobes(
    label: str, rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding], lobes: list[str], radii
) -> Finding:
    """A finding made of lesions, of which the first is the largest."""
    lesions = _place(rng, anatomy, others, lobes, list(radii))
    size = round(2 * lesions[0].radius)
    return Finding(label, _side_of(lesions), lobes[0], size, len(lesions), lesions=lesions)


def _consolidation(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    count = 1 + int(rng.random() < 0.25)
    lobes = [str(lobe) for lobe in rng.permutation(LOBES)[:count]]
    return _in_lobes("Consolidation", rng, anatomy, others, lobes, sorted(rng.uniform(16, 38, count))[::-1])


def _lung_opacity(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    count = int(rng.choice((1, 2, 3, 4), p=(0.35, 0.25, 0.2, 0.2)))
    lobes = [str(lobe) for lobe in rng.permutation(LOBES)[:count]]
    return _in_lobes("Lung opacity", rng, anatomy, others, lobes, sorted(rng.uniform(14, 34, count))[::-1])


def _atelectasis(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    basal = ("right lower lobe", "left lower lobe", "right middle lobe", "left upper lobe")
    lobe = basal[rng.choice(4, p=(0.32, 0.32, 0.21, 0.15))]
    finding = _in_lobes("Atelectasis", rng, anatomy, others, [lobe], rng.uniform(20, 36, 1))
    return replace(finding, size_mm=None, count=None, kind=("linear", "subsegmental")[int(rng.random() < 0.5)])


def _lung_nodule(rng: np.random.Generator, anatomy: Anatomy, others: dict[str, Finding]) -> Finding:
    count = int(rng.choice((1, 2, 3, 4), p=(0.5, 0.22, 0.15, 0.13)))
    radii = 2.5 + 12.5 * rng.beta(1.0, 2.3, count)
    # Sizes close to a class border of the questions (10 and 20 mm) are decided by noise: move them off it.
    radii = [radius + 0.7 if abs(2 * radius - round(2 * radius, -1)) < 0.7 else radius for radius in radii]
    lobes = [str(lobe) for lobe in rng.choice(LOBES, count)]
    finding = _in_lobes("Lung nodule", rng, anatomy, others, lobes, sorted(radii, reverse=True))
    return replace(finding, kind=("smooth", "spiculated", "calcified")[rng.choice(3, p=(0.7, 0.2, 0.1))])


def effusion_distance(anatomy: Anatomy, finding: Finding, wall: np.ndarray, y, z) -> np.ndarray:
    """Negative in free fluid: a crescent, thick behind and at the base, that thins out upwards.

    `wall` is the distance (mm, negative inside) to the walls that fluid layers on: chest wall and diaphragm.
    """
    posterior = np.clip((25 - y) / 75, 0, 1)
    basal = np.clip((finding.size_mm * 1.6 + 10 - z / anatomy.scale - 90) / 90, 0, 1)
    return -wall - finding.size_mm * (0.15 + 0.85 * posterior) * basal


_SAMPLERS_OF_ANATOMY = {
    "Cardiomegaly": _cardiomegaly,
    "Pericardial effusion": _pericardial_effusion,
    "Emphysema": _emphysema,
}
_SAMPLERS = {
    "Pleural effusion": _pleural_effusion,
    "Hiatal hernia": _hiatal_hernia,
    "Lymphadenopathy": _lymphadenopathy,
    "Arterial wall calcification": _arterial_calcification,
    "Coronary artery wall calcification": _coronary_calcification,
    "Medical material": _medical_material,
    "Consolidation": _consolidation,
    "Lung opacity": _lung_opacity,
    "Atelectasis": _atelectasis,
    "Lung nodule": _lung_nodule,
}
