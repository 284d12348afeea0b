"""Draws findings on a canvas that holds a healthy chest, and records where each one lies."""

import numpy as np

from .phantom_anatomy import Anatomy, aorta_path, ellipsoid_distance, heart_axes, lobe_distance
from .phantom_canvas import Box, Canvas, resample_path, tube_points
from .phantom_findings import CT_RATE_LABELS, Finding, Lesion, effusion_distance
from .phantom_organs import FAT_HU, FLUID_HU, Chest


THIN = 0.2  # of a voxel: what plaques, wires and catheters fill of it and are still seen


def mask_value(label: str) -> int:
    """What a finding's voxels hold in the mask: 1 plus the label's place among the 18."""
    return 1 + CT_RATE_LABELS.index(label)


def _lung_region(canvas: Canvas, chest: Chest, lesion: Lesion, margin: float) -> tuple[Box, np.ndarray]:
    """The box about a lesion, cut to the chest's, and the lung's coverage there."""
    box = canvas.box(np.array(lesion.center), margin)
    box = tuple(
        slice(max(a.start, b.start), max(min(a.stop, b.stop), a.start, b.start))
        for a, b in zip(box, chest.box, strict=True)
    )
    inner = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, chest.box, strict=True))
    return box, chest.lung[inner]


def draw_emphysema(canvas: Canvas, finding: Finding, chest: Chest) -> None:
    """Air-filled holes without a wall, most of them in the upper lobes."""
    _, _, z = canvas.coordinates(chest.box)
    holes = canvas.smooth_field((finding.seed, 1), 9.0)[chest.box]
    threshold = {"mild": 1.75, "moderate": 1.25, "severe": 0.8}[finding.severity]
    rim = 0.9 * np.clip(1 + chest.cavity / 16, 0, 1) if "paraseptal" in finding.kind else 0.0
    rarity = threshold + np.clip((20 - z) / 70, 0, 1.6) - rim
    coverage = np.clip((holes - rarity) * 2.5, 0, 1) * chest.lung
    canvas.paint(coverage, -985.0, chest.box)
    canvas.record(coverage, mask_value(finding.label), chest.box)


def draw_opacity(canvas: Canvas, anatomy: Anatomy, finding: Finding, chest: Chest) -> None:
    """Ground-glass patches: hazy, through which vessels stay visible."""
    field = canvas.smooth_field((finding.seed, 1), 13.0)
    for lesion in finding.lesions:
        box, lung = _lung_region(canvas, chest, lesion, 1.4 * lesion.radius)
        distance = _ragged_distance(canvas, anatomy, lesion, box, field, 0.28)
        coverage = np.clip(0.5 - distance / (canvas.edge + 5), 0, 1) * lung
        density = 1.0 + 0.25 * field[box]
        canvas.hu[box] += coverage * density * np.clip(-200 - canvas.hu[box], 0, 280)
        canvas.record(coverage, mask_value(finding.label), box)


def draw_consolidation(canvas: Canvas, anatomy: Anatomy, finding: Finding, chest: Chest) -> None:
    """Dense airspace, bounded by the fissures, with air in the bronchi that cross it."""
    rng = np.random.default_rng((finding.seed, 2))
    field = canvas.smooth_field((finding.seed, 1), 12.0)
    for lesion in finding.lesions:
        box, lung = _lung_region(canvas, chest, lesion, 1.4 * lesion.radius)
        distance = _ragged_distance(canvas, anatomy, lesion, box, field, 0.3)
        coverage = canvas.coverage(distance) * lung
        canvas.paint(coverage, 38 + 8 * field[box], box)
        canvas.record(coverage, mask_value(finding.label), box)
        ends = np.array(lesion.center) + rng.normal(0, 0.55 * lesion.radius, (3, 2, 3))
        _draw_threads(canvas, ends, 2.2, -850.0)


def _ragged_distance(
    canvas: Canvas, anatomy: Anatomy, lesion: Lesion, box: Box, field: np.ndarray, raggedness: float
) -> np.ndarray:
    """Distance to a lesion with an uneven outline that stops at its lobe's fissures."""
    x, y, z = canvas.coordinates(box)
    radius = lesion.radius * (1 + raggedness * np.clip(field[box], -1.2, 1.2))
    cx, cy, cz = lesion.center
    distance = np.sqrt((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) - radius
    return np.maximum(distance, lobe_distance(anatomy, lesion.lobe, x, y, z))


def _draw_threads(canvas: Canvas, ends: np.ndarray, radius: float, hu: float) -> tuple[np.ndarray, Box]:
    """Straight tubes between pairs of patient points (threads, 2, 3)."""
    step = 0.5 * canvas.edge
    t = np.linspace(0, 1, max(int(np.abs(ends[:, 1] - ends[:, 0]).max() / step), 6))[None, :, None]
    paths = ends[:, :1] * (1 - t) + ends[:, 1:] * t
    coverage, box = canvas.splat(*tube_points(paths, np.full(paths.shape[:2], radius), step))
    canvas.paint(coverage, hu, box)
    return coverage, box


def draw_atelectasis(canvas: Canvas, anatomy: Anatomy, finding: Finding, chest: Chest) -> None:
    """A dense plate (linear) or a thicker, wedge-like slab (subsegmental) of collapsed lung, oblique to the slices."""
    rng = np.random.default_rng((finding.seed, 1))
    lesion = finding.lesions[0]
    tilt, turn = rng.uniform(0.45, 1.1), rng.uniform(0, 2 * np.pi)
    normal = np.array([np.sin(tilt) * np.cos(turn), np.sin(tilt) * np.sin(turn), np.cos(tilt)])
    first = np.cross(normal, (0.0, 1.0, 0.0))
    first /= np.linalg.norm(first)
    axes = np.stack([first, np.cross(normal, first), normal])
    half_thickness = rng.uniform(2.5, 4.0) if finding.kind == "linear" else rng.uniform(6.0, 9.0)
    box, lung = _lung_region(canvas, chest, lesion, lesion.radius * 1.2)
    x, y, z = canvas.coordinates(box)
    # Two factors rather than one ellipsoid: its distance would be wrong across so flat a body.
    dx, dy, dz = x - lesion.center[0], y - lesion.center[1], z - lesion.center[2]
    u, v, w = (float(a[0]) * dx + float(a[1]) * dy + float(a[2]) * dz for a in axes)
    across = np.sqrt((u / 1.1) ** 2 + (v * 1.15) ** 2) - lesion.radius
    thinning = np.clip(-across / lesion.radius + 0.25, 0, 1)
    distance = np.maximum(np.abs(w + 0.004 * u * v) - half_thickness * thinning, across)
    distance = np.maximum(distance, lobe_distance(anatomy, lesion.lobe, x, y, z))
    coverage = canvas.coverage(distance) * lung
    canvas.paint(coverage, 45.0, box)
    canvas.record(coverage, mask_value(finding.label), box)


def draw_nodules(canvas: Canvas, finding: Finding, chest: Chest) -> None:
    """Round solid nodules, some spiculated or with a calcified core."""
    rng = np.random.default_rng((finding.seed, 1))
    for lesion in finding.lesions:
        radii = lesion.radius * np.array([1.0, *rng.uniform(0.8, 1.0, 2)])[rng.permutation(3)]
        box, lung = _lung_region(canvas, chest, lesion, lesion.radius * 1.1)
        distance = ellipsoid_distance(*canvas.coordinates(box), lesion.center, radii.tolist())
        coverage = canvas.coverage(distance) * lung
        canvas.paint(coverage, rng.uniform(25, 65), box)
        if finding.kind == "calcified":
            canvas.paint(canvas.coverage(distance + 0.55 * lesion.radius), 420.0, box)
        if finding.kind == "spiculated":
            directions = rng.normal(size=(9, 3))
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            center = np.array(lesion.center)
            tips = center + directions * (lesion.radius * rng.uniform(1.4, 1.9, (9, 1)))
            _draw_threads(canvas, np.stack([np.broadcast_to(center, tips.shape), tips], axis=1), 0.8, 20.0)
        canvas.record(coverage, mask_value(finding.label), box)


def draw_pleural_effusion(canvas: Canvas, anatomy: Anatomy, finding: Finding, chest: Chest) -> None:
    """Free fluid behind and below one lung or both."""
    x, y, z = canvas.coordinates(chest.box)
    wall = np.maximum(chest.cavity, chest.diaphragm)
    coverage = canvas.coverage(effusion_distance(anatomy, finding, wall, y, z)) * chest.lung
    if finding.side != "bilateral":
        coverage *= (x > 0) == (finding.side == "right")
    canvas.paint(coverage, FLUID_HU, chest.box)
    canvas.record(coverage, mask_value(finding.label), chest.box)


def draw_hernia(canvas: Canvas, finding: Finding) -> None:
    """Stomach behind the heart, with air in front of fluid, or omental fat."""
    lesion = finding.lesions[0]
    radii = (lesion.radius, 0.85 * lesion.radius, 0.95 * lesion.radius)
    box = canvas.box(np.array(lesion.center), lesion.radius)
    x, y, z = canvas.coordinates(box)
    distance = ellipsoid_distance(x, y, z, lesion.center, radii)
    coverage = canvas.coverage(distance)
    canvas.paint(coverage, 38.0, box)
    in_front = y > lesion.center[1] + 0.15 * lesion.radius
    content = {
        "containing an air-fluid level": np.where(in_front, np.float32(-950), np.float32(FLUID_HU)),
        "containing air": np.where(y > lesion.center[1] - 0.3 * lesion.radius, np.float32(-950), np.float32(30)),
        "with fat and soft tissue": np.where(x > lesion.center[0], np.float32(FAT_HU), np.float32(38)),
    }[finding.kind]
    canvas.paint(canvas.coverage(distance + 5.5), content, box)
    canvas.record(coverage, mask_value(finding.label), box)


def draw_nodes(canvas: Canvas, finding: Finding) -> None:
    """Enlarged lymph nodes: oval, the short axis as reported."""
    rng = np.random.default_rng((finding.seed, 1))
    for lesion in finding.lesions:
        radii = lesion.radius * np.array([1.0, rng.uniform(1.0, 1.25), rng.uniform(1.2, 1.6)])
        box = canvas.box(np.array(lesion.center), 1.7 * lesion.radius)
        coverage = canvas.coverage(ellipsoid_distance(*canvas.coordinates(box), lesion.center, radii.tolist()))
        canvas.paint(coverage, rng.uniform(30, 60), box)
        canvas.record(coverage, mask_value(finding.label), box)


def draw_arterial_calcification(canvas: Canvas, anatomy: Anatomy, finding: Finding) -> None:
    """Plaques on the wall of the arch and the descending aorta."""
    rng = np.random.default_rng((finding.seed, 1))
    path = resample_path(aorta_path(anatomy), 1.0)
    first, last = {
        "aortic arch": (0.24, 0.42),
        "descending aorta": (0.42, 0.74),
        "aortic arch and descending aorta": (0.24, 0.74),
    }[finding.kind]
    tangent = np.gradient(path, axis=0)
    threads = []
    for _ in range(finding.count):
        station = int(rng.uniform(first, last) * len(path))
        outward = np.cross(tangent[station], rng.normal(size=3))
        outward *= anatomy.aorta_radius * 0.92 / np.linalg.norm(outward)
        along = tangent[station] / np.linalg.norm(tangent[station]) * rng.uniform(2, 5)
        threads.append([path[station] + outward - along, path[station] + outward + along])
    coverage, box = _draw_threads(canvas, np.array(threads), rng.uniform(1.5, 2.2), rng.uniform(600, 1000))
    canvas.record(coverage, mask_value(finding.label), box, fullness=THIN)


def draw_coronary_calcification(canvas: Canvas, finding: Finding) -> None:
    """Short bright stretches along the coronary arteries."""
    rng = np.random.default_rng((finding.seed, 1))
    threads = []
    for lesion in finding.lesions:
        direction = rng.normal(size=3)
        direction *= lesion.radius / np.linalg.norm(direction)
        threads.append([np.array(lesion.center) - direction, np.array(lesion.center) + direction])
    coverage, box = _draw_threads(canvas, np.array(threads), rng.uniform(1.3, 1.9), rng.uniform(600, 1100))
    canvas.record(coverage, mask_value(finding.label), box, fullness=THIN)


def _device_course(anatomy: Anatomy, finding: Finding) -> np.ndarray:
    """Course of a catheter or lead from the chest wall to the heart, (points, 3)."""
    s, side = anatomy.scale, -1 if finding.side == "left" else 1
    depth = anatomy.half_depth
    entry = [side * 72, (depth + 12) / s, 48]
    course = [entry, [side * 60, 52, 72], [side * 28, 22, 80], [22, 14, 52], [25, 14, 10], [26, 13, -20]]
    if finding.kind == "pacemaker":
        tip = np.array(anatomy.heart_center) / s + 0.5 * heart_axes()[0] * anatomy.heart_radii[0] / s
        course += [[24, 14, -50], tip.tolist()]
    if finding.kind == "central venous catheter":
        course[0] = [side * 45, 40, 120]
        course[1] = [side * 36, 30, 100]
    return np.array(course) * s


def draw_device(canvas: Canvas, anatomy: Anatomy, finding: Finding) -> None:
    """Metal and plastic: wires in the sternum, or a catheter or lead with its port or generator."""
    value = mask_value(finding.label)
    if finding.kind == "sternotomy wires":
        for points, volumes in _sternal_wires(anatomy, 0.5 * canvas.edge):
            coverage, box = canvas.splat(points, volumes)
            canvas.paint(coverage, 3000.0, box)
            canvas.record(coverage, value, box, fullness=THIN)
        return
    step = 0.5 * canvas.edge
    path = resample_path(_device_course(anatomy, finding), step)
    hu, radius = {"pacemaker": (3000.0, 1.1)}.get(finding.kind, (1300.0, 1.35))
    coverage, box = canvas.splat(*tube_points(path[None], np.full((1, len(path)), radius), step))
    canvas.paint(coverage, hu, box)
    canvas.record(coverage, value, box, fullness=THIN)
    if finding.kind == "central venous catheter":
        return
    radii = (23.0, 5.0, 20.0) if finding.kind == "pacemaker" else (12.0, 6.0, 12.0)
    center = _device_course(anatomy, finding)[0]
    box = canvas.box(center, max(radii))
    coverage = canvas.coverage(ellipsoid_distance(*canvas.coordinates(box), center.tolist(), radii))
    canvas.paint(coverage, hu, box)
    canvas.record(coverage, value, box, fullness=THIN)


def _sternal_wires(anatomy: Anatomy, step: float):
    """Loops of steel about the sternum, one (points, volumes) a loop."""
    angle = np.linspace(0, 2 * np.pi, max(int(70 / step), 12))
    for level in (38, 18, -4, -26, -48):
        loop = np.stack(
            [
                17 * anatomy.scale * np.cos(angle),
                anatomy.half_depth + 10 + 8.5 * np.sin(angle),
                level * anatomy.scale + 4 * np.cos(angle),
            ],
            axis=-1,
        )
        yield tube_points(loop[None], np.full((1, len(loop)), 0.75), step)


def draw_cardiomegaly(canvas: Canvas, finding: Finding, chest: Chest) -> None:
    """Nothing to draw, the heart is drawn already: record it whole."""
    inside = canvas.coverage(chest.heart) * canvas.coverage(chest.cavity)
    canvas.record(inside, mask_value(finding.label), chest.box)


def draw_pericardial_effusion(canvas: Canvas, finding: Finding, chest: Chest, fluid: np.ndarray) -> None:
    """Record the fluid drawn with the heart."""
    canvas.record(fluid, mask_value(finding.label), chest.box)


def draw_lung_findings(canvas: Canvas, anatomy: Anatomy, findings: dict[str, Finding], chest: Chest) -> None:
    """Findings of lung and pleura, from the spread-out to the small so that the small stay visible."""
    if finding := findings.get("Emphysema"):
        draw_emphysema(canvas, finding, chest)
    if finding := findings.get("Lung opacity"):
        draw_opacity(canvas, anatomy, finding, chest)
    if finding := findings.get("Pleural effusion"):
        draw_pleural_effusion(canvas, anatomy, finding, chest)
    if finding := findings.get("Consolidation"):
        draw_consolidation(canvas, anatomy, finding, chest)
    if finding := findings.get("Atelectasis"):
        draw_atelectasis(canvas, anatomy, finding, chest)
    if finding := findings.get("Lung nodule"):
        draw_nodules(canvas, finding, chest)


def draw_other_findings(canvas: Canvas, anatomy: Anatomy, findings: dict[str, Finding]) -> None:
    """Findings of heart, mediastinum, vessels and chest wall."""
    if finding := findings.get("Hiatal hernia"):
        draw_hernia(canvas, finding)
    if finding := findings.get("Lymphadenopathy"):
        draw_nodes(canvas, finding)
    if finding := findings.get("Arterial wall calcification"):
        draw_arterial_calcification(canvas, anatomy, finding)
    if finding := findings.get("Coronary artery wall calcification"):
        draw_coronary_calcification(canvas, finding)
    if finding := findings.get("Medical material"):
        draw_device(canvas, anatomy, finding)
