"""Draws the healthy chest on a canvas: body wall, skeleton, abdomen, lungs, heart, vessels, airways, table."""

from dataclasses import dataclass

import numpy as np

from .phantom_anatomy import (
    SPINE_CENTER_Y,
    Anatomy,
    aorta_path,
    cavity_distance,
    diaphragm_distance,
    ellipsoid_distance,
    heart_distance,
    lung_distance,
    mediastinum_distance,
    oblique_fissure_height,
    spine_distance,
)
from .phantom_canvas import Box, Canvas, resample_path, tube_points


FAT_HU = -98.0
MUSCLE_HU = 48.0
AIR_HU = -1000.0
FLUID_HU = 10.0
NUM_RIBS = 11
VERTEBRA_PITCH = 25.0  # mm from one disc to the next


@dataclass
class Chest:
    """What the organ painters leave for the finding painters; arrays cover `box`."""

    box: Box
    cavity: np.ndarray  # distance, mm
    diaphragm: np.ndarray
    heart: np.ndarray
    lung: np.ndarray  # coverage
    texture: np.ndarray  # smooth random field of the whole grid


def draw_chest(canvas: Canvas, anatomy: Anatomy) -> Chest:
    """Draw everything healthy up to the lungs' vessels; returns the distances that findings need."""
    texture = canvas.smooth_field((anatomy.vessel_seed, 1), 16.0)
    draw_body_wall(canvas, anatomy, texture)
    chest = _measure(canvas, anatomy, texture)
    draw_cavity_and_abdomen(canvas, anatomy, chest)
    draw_skeleton(canvas, anatomy)
    draw_lungs(canvas, anatomy, chest)
    draw_lung_vessels(canvas, anatomy, chest)
    return chest


def _measure(canvas: Canvas, anatomy: Anatomy, texture: np.ndarray) -> Chest:
    width, depth = anatomy.half_width * 1.1, anatomy.half_depth + 6
    corners = np.array([[x, y, z] for x in (-width, width) for y in (-depth, depth) for z in (-210, anatomy.apex_z)])
    box = canvas.box(corners, 4)
    x, y, z = canvas.coordinates(box)
    cavity, diaphragm = cavity_distance(anatomy, x, y, z), diaphragm_distance(anatomy, x, y, z)
    ellipsoid = heart_distance(anatomy, x, y, z, diaphragm)
    pericardium = ellipsoid - (anatomy.epicardial_fat + anatomy.pericardial_fluid)
    distance = np.maximum(cavity, diaphragm)
    np.maximum(distance, -mediastinum_distance(anatomy, x, y, z), out=distance)
    np.maximum(distance, -pericardium, out=distance)
    np.maximum(distance, -spine_distance(anatomy, x, y), out=distance)
    return Chest(box, cavity, diaphragm, ellipsoid, canvas.coverage(distance), texture)


def draw_body_wall(canvas: Canvas, anatomy: Anatomy, texture: np.ndarray) -> None:
    """Skin, subcutaneous fat, breasts and the muscles of the chest wall."""
    x, y, z = canvas.x, canvas.y, canvas.z
    half_width = anatomy.half_width + 7 + anatomy.muscle_thickness + anatomy.fat_thickness
    half_depth = anatomy.half_depth + 5 + 0.75 * anatomy.muscle_thickness + anatomy.fat_thickness
    shoulders = np.clip((z - 20) * np.float32(1 / 80), 0, 1)
    u2 = (x / half_width) ** 2 * (1 - np.float32(0.25) * shoulders)
    v2 = ((y - 2) / half_depth) ** 2
    distance = np.sqrt(u2 + v2 - np.float32(0.35) * np.minimum(u2 * v2, 1)) - 1
    distance *= np.float32(np.sqrt(half_width * half_depth))
    canvas.paint(canvas.coverage(distance), FAT_HU + 14 * texture)
    for side in (-1, 1) if anatomy.breast_radius else ():
        _draw_breast(canvas, anatomy, side, half_depth, texture)
    # Fat also lies between the muscles, most of it in the shoulders.
    planes = np.clip((texture - 1.1 + np.float32(0.5) * shoulders) * 2, 0, 1)
    muscle = canvas.coverage(distance + anatomy.fat_thickness)
    canvas.paint(muscle, MUSCLE_HU - 130 * planes)


def _draw_breast(canvas: Canvas, anatomy: Anatomy, side: int, half_depth: float, texture: np.ndarray) -> None:
    radius = anatomy.breast_radius
    center = np.array([side * 0.55 * anatomy.half_width, half_depth - 0.25 * radius, -48 * anatomy.scale])
    box = canvas.box(center, 1.3 * radius)
    distance = ellipsoid_distance(*canvas.coordinates(box), center, (1.25 * radius, 0.75 * radius, 1.1 * radius))
    glandular = np.clip(texture[box] - 0.4, 0, 1) * np.clip(-distance / 12 - 0.5, 0, 1)
    canvas.paint(canvas.coverage(distance), FAT_HU + 130 * glandular, box)


def draw_cavity_and_abdomen(canvas: Canvas, anatomy: Anatomy, chest: Chest) -> None:
    """Fill the cavity with mediastinal and abdominal fat, then liver, spleen and stomach below the diaphragm."""
    canvas.paint(canvas.coverage(chest.cavity), FAT_HU + 12 * chest.texture[chest.box], chest.box)
    s = anatomy.scale
    top = max(anatomy.right_dome_z, anatomy.left_dome_z) + 12
    slices = max(int(np.searchsorted(canvas.axes[0][chest.box[0]], top)), 1)
    box = (slice(chest.box[0].start, chest.box[0].start + slices), *chest.box[1:])
    x, y, z = canvas.coordinates(box)
    below = np.maximum(chest.cavity[:slices] + 1, 1 - chest.diaphragm[:slices])
    liver = np.maximum(below, ellipsoid_distance(x, y, z, (52 * s, 8, -172 * s), (98 * s, 92 * s, 96 * s)))
    canvas.paint(canvas.coverage(liver), anatomy.liver_hu + 5 * chest.texture[box], box)
    spleen = np.maximum(below, ellipsoid_distance(x, y, z, (-88 * s, -38 * s, -150 * s), (38 * s, 42 * s, 48 * s)))
    canvas.paint(canvas.coverage(spleen), anatomy.liver_hu * 0.3 + 38, box)
    stomach = np.maximum(below, ellipsoid_distance(x, y, z, (-62 * s, 16 * s, -152 * s), (42 * s, 40 * s, 46 * s)))
    canvas.paint(canvas.coverage(stomach), 32, box)
    # Supine, the gastric air bubble lies in front.
    content = np.where(y > 18 * s, np.float32(-960), np.float32(15))
    canvas.paint(canvas.coverage(stomach + 5), content, box)


def draw_skeleton(canvas: Canvas, anatomy: Anatomy) -> None:
    """Ribs, clavicles, scapulae, sternum and spine."""
    step = 0.5 * canvas.edge
    for points, volumes in (_rib_points(anatomy, step), _clavicle_points(anatomy, step)):
        coverage, box = canvas.splat(points, volumes)
        canvas.paint(coverage, anatomy.bone_hu + 130, box)
    s = anatomy.scale
    sternum = np.array([0.0, anatomy.half_depth + 10, -8 * s])
    box = canvas.box(sternum, 75 * s)
    distance = ellipsoid_distance(*canvas.coordinates(box), sternum, (19 * s, 6.5, 72 * s))
    canvas.paint(canvas.coverage(distance), anatomy.bone_hu + 60, box)
    for side in (-1, 1):
        scapula = np.array([side * (anatomy.half_width * 0.86), -anatomy.half_depth * 0.93, 42 * s])
        axes = np.array([[side * 0.78, 0.62, 0.0], [-side * 0.62, 0.78, 0.0], [0.0, 0.0, 1.0]])
        box = canvas.box(scapula, 68 * s)
        distance = ellipsoid_distance(*canvas.coordinates(box), scapula, (48 * s, 4.5, 66 * s), axes)
        canvas.paint(canvas.coverage(distance), anatomy.bone_hu + 120, box)
    _draw_spine(canvas, anatomy)


def _rib_points(anatomy: Anatomy, step: float) -> tuple[np.ndarray, np.ndarray]:
    stations = max(int(290 / step), 8)
    angle = np.linspace(0.16, 0.86, stations) * np.pi  # from the spine round to the costal cartilage
    level = 86 * anatomy.scale - 24 * anatomy.scale * np.arange(NUM_RIBS)
    z = level[:, None] - 58 * (angle / np.pi) ** 1.3 + 16 * np.exp(-angle)  # (ribs, stations)
    narrowing = np.clip((z - 15) / (anatomy.apex_z - 15), 0, 0.97) ** 2
    outline = np.sqrt(1 - narrowing)
    sine, cosine = np.sin(angle), np.cos(angle)
    # The cavity is squarer than an ellipse: push the ribs out at the corners to match.
    outline = outline * (1 + 0.12 * (2 * sine * cosine) ** 2)
    x = (anatomy.half_width * (1 - 0.07 * np.clip(z / 100, -1.2, 0)) + 5) * sine * outline
    y = 4 - (anatomy.half_depth + 5) * cosine * outline
    right = np.stack([x, y, z], axis=-1)
    paths = np.concatenate([right, right * (-1, 1, 1)])
    return tube_points(paths, np.full(paths.shape[:2], 4.2 * anatomy.scale), step, (1.0, 1.0, 1.45))


def _clavicle_points(anatomy: Anatomy, step: float) -> tuple[np.ndarray, np.ndarray]:
    s, depth = anatomy.scale, anatomy.half_depth
    course = np.array([[14 * s, depth * 0.72, 62 * s], [70 * s, depth * 0.62, 84 * s], [150 * s, 6, 104 * s]])
    right = resample_path(course, step)
    paths = np.stack([right, right * (-1, 1, 1)])
    return tube_points(paths, np.full(paths.shape[:2], 6.0 * s), step)


def _draw_spine(canvas: Canvas, anatomy: Anatomy) -> None:
    s = anatomy.scale
    column = np.array([[0, SPINE_CENTER_Y * s, -250], [0, SPINE_CENTER_Y * s, 150]])
    box = canvas.box(column, 46 * s)
    x, y, z = canvas.coordinates(box)
    body = np.sqrt((x / 1.22) ** 2 + (y - SPINE_CENTER_Y * s) ** 2) - 15.5 * s
    # A disc every VERTEBRA_PITCH mm; it also marks the levels along z.
    phase = np.abs((z / (VERTEBRA_PITCH * s)) % 1 - 0.5) * (VERTEBRA_PITCH * s)
    disc = canvas.coverage(phase - 2.5)
    cortex = canvas.coverage(np.abs(body + 1.5) - 1.5)
    hu = anatomy.bone_hu * (1 - disc) + 85 * disc + 160 * cortex * (1 - disc)
    canvas.paint(canvas.coverage(body), hu, box)
    arch_y = (SPINE_CENTER_Y - 27) * s
    arch = np.sqrt(x**2 + (y - arch_y) ** 2)
    canvas.paint(canvas.coverage(np.abs(arch - 11 * s) - 3.2 * s), anatomy.bone_hu + 130, box)
    canvas.paint(canvas.coverage(arch - 8 * s), 25, box)
    spinous = np.maximum(np.abs(x) - 3.2 * s, np.abs(y - arch_y + 24 * s) - 13 * s)
    spinous = np.maximum(spinous, 6 * s - phase)
    canvas.paint(canvas.coverage(spinous), anatomy.bone_hu + 110, box)
    transverse = np.maximum(np.abs(y - arch_y + 3 * s) - 4 * s, np.abs(x) - 33 * s)
    transverse = np.maximum(np.maximum(transverse, 7.5 * s - phase), 11 * s - arch)
    canvas.paint(canvas.coverage(transverse), anatomy.bone_hu + 90, box)


def draw_lungs(canvas: Canvas, anatomy: Anatomy, chest: Chest) -> None:
    """Parenchyma, denser where it is dependent (posterior), with the fissures."""
    x, y, z = canvas.coordinates(chest.box)
    hu = anatomy.lung_hu - np.float32(0.42) * y + 14 * chest.texture[chest.box]
    height = oblique_fissure_height(anatomy, x, y, z) * np.float32(0.7)
    fissure = canvas.coverage(np.abs(height) - 0.35)
    minor = np.maximum(np.abs(z - anatomy.minor_fissure_z) - 0.3, np.maximum(-height, 20 - x))
    fissure = np.maximum(fissure, canvas.coverage(minor))
    # A fissure is under a millimetre thin: its contrast falls with the voxel's size.
    hu += fissure * np.float32(min(600, 750 / canvas.edge))
    canvas.paint(chest.lung, hu, chest.box)


def _lung_trees(anatomy: Anatomy, stations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Curves from the hila to the periphery: trunks and twigs with their radii."""
    rng = np.random.default_rng(anatomy.vessel_seed)
    t = np.linspace(0, 1, stations)[:, None]
    trunks, twigs = [], []
    for side in (1, -1):
        hilum = np.array([side * 36.0, -14.0, -14.0]) * anatomy.scale
        points = rng.uniform((4, -95, -170), (150, 95, 105), (900, 3)) * (side, 1, 1)
        ends = points[lung_distance(anatomy, *points.T) < -5]
        ends, leaves = ends[:18], ends[18:84]
        bend = hilum + (ends - hilum) * 0.5 + rng.normal(0, 9, ends.shape)
        paths = (1 - t) ** 2 * hilum + 2 * t * (1 - t) * bend[:, None] + t**2 * ends[:, None]
        trunks.append(paths)
        parent = np.argmin(np.linalg.norm(leaves[:, None] - bend[None], axis=-1), axis=1)
        fork = paths[parent, rng.integers(stations // 4, 3 * stations // 4, len(leaves))]
        knee = 0.5 * (fork + leaves) + rng.normal(0, 6, fork.shape)
        twigs.append((1 - t) ** 2 * fork[:, None] + 2 * t * (1 - t) * knee[:, None] + t**2 * leaves[:, None])
    trunk, twig = np.concatenate(trunks), np.concatenate(twigs)
    calibre = rng.uniform(0.7, 1.25, (len(trunk), 1)) * anatomy.scale
    trunk_radii = calibre * (4.3 - 3.4 * t[:, 0] ** 0.7)
    twig_radii = rng.uniform(0.7, 1.3, (len(twig), 1)) * (1.7 - 1.2 * t[:, 0])
    return trunk, trunk_radii, twig, twig_radii


def draw_lung_vessels(canvas: Canvas, anatomy: Anatomy, chest: Chest) -> None:
    """Arteries and veins that fade towards the pleura, and the larger bronchi beside some of them."""
    step = 0.55 * canvas.edge
    trunk, trunk_radii, twig, twig_radii = _lung_trees(anatomy, max(int(75 / step), 12))
    vessel_points = [tube_points(trunk, trunk_radii, step), tube_points(twig, twig_radii, step)]
    points, volumes = (np.concatenate(parts) for parts in zip(*vessel_points, strict=True))
    coverage, box = canvas.splat(points, volumes)
    canvas.paint(coverage, 0.85 * anatomy.blood_hu, box)
    bronchi = trunk[::3] + np.array([0.0, 4.0, 5.0])
    points, volumes = tube_points(bronchi, np.clip(trunk_radii[::3] * 0.75 - 0.8, 0.05, None), step)
    coverage, box = canvas.splat(points, volumes)
    canvas.paint(0.8 * coverage, AIR_HU, box)


def draw_heart(canvas: Canvas, anatomy: Anatomy, chest: Chest) -> np.ndarray:
    """Pericardial fat, fluid (normally none) and the heart; returns the fluid's coverage over the chest's box."""
    box = chest.box
    # The pericardium rests on the diaphragm and does not pass through it.
    inside = canvas.coverage(np.maximum(chest.cavity, chest.diaphragm - 6 - 0.6 * anatomy.pericardial_fluid))
    outer = anatomy.pericardial_fluid + anatomy.epicardial_fat
    canvas.paint(canvas.coverage(chest.heart - outer) * inside, FAT_HU, box)
    fluid = np.zeros((), np.float32)
    if anatomy.pericardial_fluid:
        # Free fluid is deepest behind and below the heart of a supine patient.
        _, y, z = canvas.coordinates(box)
        center = anatomy.heart_center
        dependent = 0.72 - 0.28 * np.clip((y - center[1] + z - center[2]) / 60, -1, 1)
        depth = anatomy.pericardial_fluid * dependent + anatomy.epicardial_fat
        fluid = canvas.coverage(np.maximum(chest.heart - depth, anatomy.epicardial_fat - chest.heart)) * inside
        canvas.paint(fluid, FLUID_HU, box)
    muscle = 0.25 * anatomy.blood_hu + 34
    canvas.paint(canvas.coverage(chest.heart) * inside, muscle, box)
    canvas.paint(canvas.coverage(chest.heart + 11) * inside, anatomy.blood_hu, box)
    return fluid


def draw_mediastinum(canvas: Canvas, anatomy: Anatomy) -> None:
    """Great vessels, oesophagus, trachea and main bronchi, and a few lymph nodes of normal size."""
    s, blood = anatomy.scale, anatomy.blood_hu
    arch = anatomy.arch_z
    radius = 0.83 * anatomy.aorta_radius
    _draw_tube(canvas, [(26, 12, -55), (25, 14, 10), (20, 16, 55), (24, 8, 80)], 8.5 * s, blood, s)  # superior cava
    _draw_tube(canvas, [(-14, 34, -46), (-20, 20, -18), (-22, 4, -8)], 12.5 * s, blood, s)  # pulmonary trunk
    _draw_tube(canvas, [(-20, 4, -10), (4, -6, -16), (40, -14, -16)], 9 * s, blood, s)
    _draw_tube(canvas, [(-22, 4, -8), (-34, -12, -4), (-44, -18, -12)], 9.5 * s, blood, s)
    for x, top_x, y in ((9, 22, 14), (-4, -12, 4), (-15, -28, -10)):  # the arch's three branches
        _draw_tube(canvas, [(x, y, arch / s), (x, y, 60), (top_x, y, 95), (top_x, y, 130)], 4.2 * s, blood, s)
    wall = resample_path(aorta_path(anatomy), 0.5 * canvas.edge)
    calibre = np.interp(np.linspace(0, 1, len(wall)), (0, 0.3, 1), (1.35 * radius, 1.1 * radius, radius))
    _paint_tube(canvas, wall, calibre, blood)
    _draw_tube(canvas, [(-3, -22, 120), (-4, -32, 10), (-6, -34, -60), (-10, -26, -130)], 6.2 * s, 36, s)
    rng = np.random.default_rng((anatomy.vessel_seed, 2))
    if rng.random() < 0.4:  # swallowed air
        _draw_tube(canvas, [(-4, -31, 40), (-5, -33, -20)], 2.5 * s, -700, s)
    for _ in range(int(rng.integers(3, 9))):
        center = rng.uniform((-20, -24, -30), (24, 34, 42)) * s
        radii = tuple(rng.uniform(1.8, 3.8, 3).tolist())
        box = canvas.box(center, 5)
        canvas.paint(canvas.coverage(ellipsoid_distance(*canvas.coordinates(box), center, radii)), 40, box)
    _draw_airways(canvas, anatomy)


def _draw_airways(canvas: Canvas, anatomy: Anatomy) -> None:
    s = anatomy.scale
    courses = (
        ([(3, 4, 130), (2, -4, 60), (0, -10, 0)], 8.6),
        ([(0, -10, 2), (18, -15, -14), (40, -18, -30), (44, -42, -58)], 6.2),
        ([(0, -10, 2), (-20, -17, -18), (-44, -22, -32), (-46, -45, -58)], 5.6),
        ([(20, -14, -12), (44, -12, 4), (56, -10, 26)], 4.0),
        ([(-38, -20, -28), (-54, -8, -12), (-60, 2, 8)], 3.8),
    )
    for wall_mm, hu in ((1.8, 20.0), (0.0, AIR_HU)):
        for course, radius in courses:
            _draw_tube(canvas, course, radius * s + wall_mm, hu, s)


def _draw_tube(canvas: Canvas, course: list[tuple], radius: float, hu: float, scale: float) -> None:
    """A tube along `course`, given in mm at scale 1."""
    path = resample_path(np.array(course, dtype=float) * scale, 0.5 * canvas.edge)
    _paint_tube(canvas, path, np.full(len(path), radius), hu)


def _paint_tube(canvas: Canvas, path: np.ndarray, radii: np.ndarray, hu: float) -> None:
    coverage, box = canvas.splat(*tube_points(path[None], radii[None], 0.5 * canvas.edge))
    canvas.paint(coverage, hu, box)


def draw_table(canvas: Canvas, anatomy: Anatomy, height: float) -> None:
    """The scanner's table: a shallow trough of carbon fibre and foam, fixed to the gantry."""
    _, y, x = (axis.astype(np.float32) for axis in canvas.axes)
    surface = height + np.float32(0.0009) * x**2  # (x,)
    depth = surface[None, :] - y[:, None]  # (y, x), positive inside the table
    shell = canvas.coverage(np.abs(depth - 1.5) - 1.5) + canvas.coverage(np.abs(depth - 22) - 1.5)
    foam = canvas.coverage(np.maximum(-depth, depth - 22))
    reach = canvas.coverage(np.abs(x)[None, :] - 205)
    air = canvas.hu < -900
    table = np.float32(-1000) + reach * (np.minimum(shell, 1) * 880 + foam * 60)
    canvas.hu[:] = np.where(air & (depth > -canvas.edge), np.maximum(canvas.hu, table), canvas.hu)
