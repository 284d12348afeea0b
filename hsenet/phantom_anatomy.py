"""The geometry of a procedural chest: organs as signed distances, vessels and airways as curves.

Patient coordinates are millimetres with x to the patient's right, y anterior and z superior, and the carina at the
origin (RAS+). Every distance function takes coordinates of any shape and is negative inside, so the same functions
place lesions (a few points) and draw the volume (a whole grid).
"""

from dataclasses import dataclass, replace

import numpy as np


MEDIASTINUM_HALF_WIDTH = 25.0
SPINE_CENTER_Y = -60.0
CAVITY_CENTER_Y = 4.0
SHOULDER_Z = 15.0  # above it the cavity narrows towards the apices
HEART_TOP_Z = -19.0
HEART_LONG_AXIS = (-0.74, 0.42, -0.52)  # towards the apex: left, anterior, inferior
RIGHT_LOBES = ("right upper lobe", "right middle lobe", "right lower lobe")
LEFT_LOBES = ("left upper lobe", "left lower lobe")
LOBES = RIGHT_LOBES + LEFT_LOBES


@dataclass(frozen=True)
class Anatomy:
    """Everything about one patient's chest that is not a finding. Lengths in mm, attenuations in HU, angles in rad."""

    scale: float
    half_width: float  # of the thoracic cavity, at the level of the carina
    half_depth: float
    apex_z: float
    right_dome_z: float
    left_dome_z: float
    fat_thickness: float
    muscle_thickness: float
    breast_radius: float  # 0 in men
    cardiothoracic_ratio: float
    heart_center: tuple[float, float, float]
    heart_radii: tuple[float, float, float]  # along the long axis and two axes across it
    epicardial_fat: float
    pericardial_fluid: float
    aorta_radius: float
    arch_z: float
    fissure_z: float  # height of the oblique fissures in the plane y = 0
    fissure_slope: float  # their fall in mm per mm towards anterior
    minor_fissure_z: float
    lung_hu: float
    blood_hu: float  # 30 to 50 without contrast medium, up to about 180 with it
    liver_hu: float
    bone_hu: float
    rotation: tuple[float, float, float]  # about x, y, z
    shift: tuple[float, float]  # of the patient in the gantry, x and y
    vessel_seed: int

    @property
    def cavity_half_width_at_heart(self) -> float:
        return self.half_width * 1.05


def sample_anatomy(rng: np.random.Generator, sex: str, age: int) -> Anatomy:
    """Draw a healthy chest; `sex` is "M" or "F", `age` in years."""
    scale = rng.normal(1.03 if sex == "M" else 0.94, 0.05)
    contrast = rng.random() < 0.2
    fat = float(np.clip(rng.gamma(4.0, 4.0), 5, 34))
    half_width = 128 * scale * rng.uniform(0.94, 1.06)
    anatomy = Anatomy(
        scale=scale,
        half_width=half_width,
        half_depth=84 * scale * rng.uniform(0.9, 1.12) + 0.06 * (age - 50),
        apex_z=98 * scale * rng.uniform(0.93, 1.07),
        right_dome_z=-98 * scale + rng.normal(0, 10),
        left_dome_z=-108 * scale + rng.normal(0, 10),
        fat_thickness=fat,
        muscle_thickness=rng.uniform(16, 24) * scale,
        breast_radius=rng.uniform(30, 62) if sex == "F" else 0.0,
        cardiothoracic_ratio=0.0,
        heart_center=(0.0, 0.0, 0.0),
        heart_radii=(1.0, 1.0, 1.0),
        epicardial_fat=rng.uniform(2, 3.5 + 0.12 * fat),
        pericardial_fluid=0.0,
        aorta_radius=float(np.clip(rng.normal(11.5 + 0.055 * (age - 40), 1.1), 9.5, 18)),
        arch_z=rng.uniform(28, 40) * scale,
        fissure_z=rng.uniform(-38, -22) * scale,
        fissure_slope=rng.uniform(0.85, 1.15),
        minor_fissure_z=rng.uniform(-42, -24) * scale,
        lung_hu=rng.normal(-855, 22),
        blood_hu=rng.uniform(110, 180) if contrast else rng.uniform(32, 48),
        liver_hu=rng.normal(58, 8) - (rng.uniform(15, 40) if rng.random() < 0.2 else 0) + (40 if contrast else 0),
        bone_hu=float(np.clip(rng.normal(260 - 1.7 * age, 35), 70, 300)),
        rotation=tuple(np.deg2rad(rng.normal(0, (2.2, 1.6, 3.0))).tolist()),
        shift=tuple(rng.normal(0, 5, 2).tolist()),
        vessel_seed=int(rng.integers(2**31)),
    )
    return with_heart(anatomy, float(np.clip(rng.normal(0.435, 0.03), 0.36, 0.49)))


def with_heart(anatomy: Anatomy, cardiothoracic_ratio: float) -> Anatomy:
    """The same chest with a heart whose transverse width is `cardiothoracic_ratio` of the cavity's width."""
    half_extent = cardiothoracic_ratio * anatomy.cavity_half_width_at_heart
    # A large heart grows more along its long axis than towards sternum and spine, which bound it.
    across = (0.44 / cardiothoracic_ratio) ** 0.5
    radii = np.array([1.28, across, 0.95 * across])
    axis_x = heart_axes()[:, 0]
    radii *= half_extent / np.sqrt(((axis_x * radii) ** 2).sum())
    extent_z = np.sqrt(((heart_axes()[:, 2] * radii) ** 2).sum())
    # The great vessels hold its upper border: a heart grows downwards and to the left.
    center = (-0.30 * half_extent, 16 * anatomy.scale, HEART_TOP_Z * anatomy.scale - extent_z)
    return replace(
        anatomy,
        cardiothoracic_ratio=cardiothoracic_ratio,
        heart_center=tuple(float(value) for value in center),
        heart_radii=tuple(float(value) for value in radii),
    )


def heart_axes() -> np.ndarray:
    """Rows: unit vectors of the heart's long axis and of two axes across it, (3, 3)."""
    long_axis = np.array(HEART_LONG_AXIS) / np.linalg.norm(HEART_LONG_AXIS)
    across = np.cross(long_axis, (0.0, 0.0, 1.0))
    across /= np.linalg.norm(across)
    return np.stack([long_axis, across, np.cross(long_axis, across)])


def ellipsoid_distance(x, y, z, center, radii, axes=None) -> np.ndarray:
    """Approximate signed distance (mm) to an ellipsoid; `axes` holds unit vectors as rows."""
    dx, dy, dz = x - center[0], y - center[1], z - center[2]
    if axes is not None:
        dx, dy, dz = (float(a[0]) * dx + float(a[1]) * dy + float(a[2]) * dz for a in axes)
    norm = np.sqrt((dx / radii[0]) ** 2 + (dy / radii[1]) ** 2 + (dz / radii[2]) ** 2)
    return (norm - 1) * float(np.prod(radii) ** (1 / 3))


def heart_distance(anatomy: Anatomy, x, y, z, diaphragm: np.ndarray) -> np.ndarray:
    """Distance to the myocardium's outer surface; the diaphragm (its distance) flattens the heart from below."""
    ellipsoid = ellipsoid_distance(x, y, z, anatomy.heart_center, anatomy.heart_radii, heart_axes())
    return np.maximum(ellipsoid, diaphragm - 4)


def cavity_distance(anatomy: Anatomy, x, y, z) -> np.ndarray:
    """Distance to the inner chest wall (the parietal pleura), without its floor."""
    widening = 1 - 0.07 * np.clip(z / 100, -1.2, 0)
    u2 = (x / (anatomy.half_width * widening)) ** 2
    v2 = ((y - CAVITY_CENTER_Y) / anatomy.half_depth) ** 2
    w2 = np.clip((z - SHOULDER_Z) / (anatomy.apex_z - SHOULDER_Z), 0, None) ** 2
    # The product squares the ellipse off, as ribs do.
    norm = np.sqrt(u2 + v2 + w2 - 0.35 * np.minimum(u2 * v2, 1))
    return (norm - 1) * float(np.sqrt(anatomy.half_width * anatomy.half_depth))


def diaphragm_distance(anatomy: Anatomy, x, y, z) -> np.ndarray:
    """Positive below the two domes of the diaphragm."""
    top = np.where(x > 0, np.float32(anatomy.right_dome_z), np.float32(anatomy.left_dome_z))
    drop = ((np.abs(x) - 60 * anatomy.scale) / 78) ** 2 + ((y - 12) / 84) ** 2
    return (top - 68 * drop - z) * 0.8


def mediastinum_distance(anatomy: Anatomy, x, y, z) -> np.ndarray:
    """Negative between the lungs: narrow in front (anterior junction line) and below the hila."""
    half_width = MEDIASTINUM_HALF_WIDTH * anatomy.scale
    half_width = half_width - 15 * np.clip((y - 20) / 40, 0, 1) - 7 * np.clip(-z / 60, 0, 1)
    half_width = half_width - 6 * np.clip((z - 40) / 50, 0, 1)
    return np.abs(x + 2) - half_width


def spine_distance(anatomy: Anatomy, x, y) -> np.ndarray:
    """Distance to the vertebral column with its paravertebral tissue."""
    return np.sqrt(x**2 + (y - SPINE_CENTER_Y * anatomy.scale) ** 2) - 21 * anatomy.scale


def lung_distance(anatomy: Anatomy, x, y, z) -> np.ndarray:
    """Negative inside either lung."""
    diaphragm = diaphragm_distance(anatomy, x, y, z)
    pericardium = heart_distance(anatomy, x, y, z, diaphragm) - anatomy.epicardial_fat - anatomy.pericardial_fluid
    distance = np.maximum(cavity_distance(anatomy, x, y, z), diaphragm)
    distance = np.maximum(distance, -mediastinum_distance(anatomy, x, y, z))
    return np.maximum(distance, np.maximum(-pericardium, -spine_distance(anatomy, x, y)))


def oblique_fissure_height(anatomy: Anatomy, x, y, z) -> np.ndarray:
    """Height (mm) above the oblique fissure; negative in the lower lobes."""
    bowing = 0.22 * (np.abs(x) - 55 * anatomy.scale)
    return z - anatomy.fissure_z + anatomy.fissure_slope * y - bowing


def lobe_distance(anatomy: Anatomy, lobe: str, x, y, z) -> np.ndarray:
    """Distance to the part of the cavity that belongs to `lobe`: negative inside it (not clipped to the lung)."""
    side = -x if lobe.startswith("right") else x
    above = oblique_fissure_height(anatomy, x, y, z) * 0.7
    if "lower" in lobe:
        return np.maximum(side, above)
    distance = np.maximum(side, -above)
    if lobe == "right upper lobe":
        return np.maximum(distance, anatomy.minor_fissure_z - z)
    if lobe == "right middle lobe":
        return np.maximum(distance, z - anatomy.minor_fissure_z)
    return distance


def points_in_lobe(anatomy: Anatomy, lobe: str, rng: np.random.Generator, depth: float) -> np.ndarray:
    """Random points of a lobe at least `depth` mm from its border where it has any, else its deepest; (points, 3)."""
    side, count = (1 if lobe.startswith("right") else -1), 256
    x = side * rng.uniform(8, anatomy.half_width, count)
    y = rng.uniform(-anatomy.half_depth, anatomy.half_depth, count) + CAVITY_CENTER_Y
    z = rng.uniform(-125 * anatomy.scale, anatomy.apex_z, count)
    distance = np.maximum(lung_distance(anatomy, x, y, z), lobe_distance(anatomy, lobe, x, y, z))
    inside = distance < -depth
    if not inside.any():
        inside = distance <= distance.min()
    return np.stack([x, y, z], axis=-1)[inside]


def aorta_path(anatomy: Anatomy) -> np.ndarray:
    """Centre line of the thoracic aorta from its root over the arch to the hiatus, (points, 3)."""
    s, arch = anatomy.scale, anatomy.arch_z
    posterior = SPINE_CENTER_Y * s + 21 * s + anatomy.aorta_radius * 0.45
    return np.array(
        [
            [4 * s, 14 * s, -42 * s],
            [14 * s, 20 * s, -14 * s],
            [13 * s, 18 * s, arch - 16],
            [5 * s, 10 * s, arch - 3],
            [-10 * s, -6 * s, arch],
            [-20 * s, -24 * s, arch - 8],
            [-23 * s, posterior, arch - 26],
            [-22 * s, posterior - 1, -50 * s],
            [-16 * s, posterior - 2, -110 * s],
            [-8 * s, posterior, -190 * s],
        ]
    )


def coronary_path(anatomy: Anatomy, artery: str) -> np.ndarray:
    """A course on the heart's surface for "LAD", "LCX" or "RCA", (points, 3)."""
    t = np.linspace(0, 1, 24)
    # Angles on the ellipsoid: `along` from its base (negative) to its apex, `around` its long axis.
    along = {"LAD": -0.75 + 1.25 * t, "LCX": -0.70 + 0.55 * t, "RCA": -0.70 + 0.6 * t}[artery]
    around = {"LAD": -1.45 + 0.35 * t, "LCX": -2.2 - 1.3 * t, "RCA": -0.1 + 1.3 * t}[artery]
    radius = np.sqrt(1 - along**2)
    local = np.stack([along, radius * np.cos(around), radius * np.sin(around)], axis=-1)
    surface = (local * (np.array(anatomy.heart_radii) + 1.0)) @ heart_axes()
    return surface + np.array(anatomy.heart_center)
