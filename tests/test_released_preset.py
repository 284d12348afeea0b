"""The `released` preset against slow references, written from the released preparation's description alone.

The references go point by point in double precision with NumPy, or plane by plane with Pillow, and share no code
with the processor.
"""

import json
from inspect import signature
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_hub import run_elsewhere

import resampling_hsenet
from hsenet import HSENetImageProcessor, HSENetProcessor, read_volume
from hsenet.volume_cache import preprocessing_settings
from processing_hsenet import RELEASED_SETTINGS
from reading_hsenet import GeometryError, UnsupportedImageError


IMAGE_SIZE, NUM_SLICES, PICTURE = (8, 32, 24), 6, 16
SIZES = {"image_size": IMAGE_SIZE, "num_slices": NUM_SLICES, "slice_size": (PICTURE, PICTURE)}
UNUSUAL = {"hu_check": "warn"}  # some scans here have few values, or none of soft tissue
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write_scan(
    path: Path,
    shape: tuple = (20, 24, 10),
    spacing: tuple = (0.9, 0.9, 3.0),
    signs: tuple = (-1, -1, 1),
    hu: tuple | None = None,
) -> np.ndarray:
    """A NIfTI file; returns its (X, Y, Z) HU: a body of noise in air, beyond all windows, or only the values `hu`."""
    generator = np.random.default_rng(0)
    array = np.full(shape, -1500.0)
    array[1:-1, 1:, 1:-1] = -998  # what the volume is cropped to: a faint rim, far below soft tissue
    inner = tuple(slice(size // 5, -size // 6) for size in shape)
    array[inner] = generator.uniform(-1200, 1400, array[inner].shape)
    if hu is not None:
        array = generator.choice(hu, shape)
    array = array.astype(np.float32)
    affine = np.diag([*(sign * size for sign, size in zip(signs, spacing, strict=True)), 1.0])
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return array.astype(np.float64)


def interpolated(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Linear along one axis after the other; sample i lies at (i + 1/2) old / new - 1/2, the ends are repeated."""
    for axis, new in enumerate(size):
        old, lines = array.shape[axis], np.moveaxis(array, axis, 0)
        rows = []
        for index in range(new):
            position = max((index + 0.5) * (old / new) - 0.5, 0.0)
            lower = int(position)
            upper = min(lower + 1, old - 1)
            rows.append(lines[lower] * (1 - (position - lower)) + lines[upper] * (position - lower))
        array = np.moveaxis(np.stack(rows), 0, axis)
    return array


def resampled(array: np.ndarray, millimetres: tuple[float, ...]) -> np.ndarray:
    targets = (1.5, 0.75, 0.75)
    sizes = [int(size * (mm / to)) for size, mm, to in zip(array.shape, millimetres, targets, strict=True)]
    return interpolated(array, tuple(sizes))


def reference_volume(array: np.ndarray, millimetres: tuple[float, ...] | None) -> np.ndarray:
    volume = np.clip(array, -1000, 200).transpose(2, 0, 1)
    if millimetres is not None:
        volume = resampled(volume, millimetres)
    volume = (volume - volume.min()) / (volume.max() - volume.min())
    indices = np.nonzero(volume > 0)
    volume = volume[tuple(slice(along.min(), along.max() + 1) for along in indices)]
    return interpolated(volume, IMAGE_SIZE)


def through_jpeg(picture: np.ndarray, degrees: int) -> np.ndarray:
    """An 8-bit picture to the 2D encoder's (3, height, width): rotation, JPEG, BiomedCLIP's resize, crop, colours."""
    file = BytesIO()
    Image.fromarray(picture).rotate(degrees, expand=True).save(file, "JPEG", quality=95)
    image = Image.open(file).convert("RGB")
    width, height = image.size
    if width < height:
        image = image.resize((PICTURE, int(PICTURE * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(PICTURE * width / height), PICTURE), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float64) / 255
    top, left = (int(round((size - PICTURE) / 2.0)) for size in pixels.shape[:2])
    pixels = pixels[top : top + PICTURE, left : left + PICTURE]
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


def ct_rate_slices(array: np.ndarray, millimetres: tuple[float, ...]) -> np.ndarray:
    planes = np.clip(array, -1000, 1000) / 1000
    if array.shape[2] < array.shape[0]:
        planes = planes.transpose(2, 0, 1)
    planes = resampled(planes, millimetres)
    if len(planes) >= NUM_SLICES:
        planes = [planes[index * (len(planes) - 1) // (NUM_SLICES - 1)] for index in range(NUM_SLICES)]
    else:
        planes = interpolated(planes, (NUM_SLICES, *planes.shape[1:]))
    # A plane of one value is black.
    eight_bits = [((plane - plane.min()) / (np.ptp(plane) or 1) * 255).astype(np.uint8) for plane in planes]
    return np.stack([through_jpeg(picture, -90) for picture in eight_bits])


def bimcv_r_slices(array: np.ndarray) -> np.ndarray:
    eight_bits = ((array - array.min()) / (array.max() - array.min()) * 255).astype(np.uint8)
    last = array.shape[2] - 1
    planes = [eight_bits[:, :, index * last // (NUM_SLICES - 1)] for index in range(NUM_SLICES)]
    return np.stack([through_jpeg(picture, 90) for picture in planes])


def assert_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


SCANS = {
    "usual": {},
    "neither end of the windows": {"hu": np.linspace(-900, 150, 999)},
    # On the grid already, in whole HU, two of which fall on an 8-bit step or just below it, by the order of rounding
    "on 8-bit steps": {"hu": (-900, -260, 380, 700), "spacing": (0.75, 0.75, 1.5)},
    "other directions": {"signs": (1, -1, -1)},
    "fewer planes than slices": {"shape": (20, 24, 9), "spacing": (0.9, 0.9, 0.8)},
    "as many planes as columns": {"shape": (12, 16, 12), "spacing": (1.1, 1.1, 1.2)},
    "rounding of the scale": {"shape": (30, 30, 10), "spacing": (0.7, 0.7, 3.3)},  # 30 * (0.7 / 0.75) is below 28
    "part of a field of view": {"shape": (32, 32, 10), "spacing": (345 / 512, 345 / 512, 1.0)},
}


@pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
def test_ct_rate(scan, tmp_path):
    array = write_scan(tmp_path / "scan.nii.gz", **scan)
    processor = HSENetImageProcessor.released("ct_rate", **SIZES)
    outputs = processor(tmp_path / "scan.nii.gz", reading=UNUSUAL, return_tensors="pt")
    x, _, z = scan.get("spacing", (0.9, 0.9, 3.0))
    assert_close(outputs["pixel_values"][0, 0], reference_volume(array, (z, x, x)))
    assert_close(outputs["slice_pixel_values"][0], ct_rate_slices(array, (z, x, x)))


def test_ct_rate_as_its_first_release_stores_it(tmp_path):
    """As in the README: the rescaling and the millimetres come from the metadata table, not from the header."""
    stored = np.random.default_rng(1).integers(0, 3000, (20, 24, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / "scan.nii.gz")
    slope, intercept, xy, z = 1.0, -1024.0, 0.871094, 2.5
    image = nibabel.load(tmp_path / "scan.nii.gz")
    hu = slope * image.get_fdata() + intercept
    processor = HSENetImageProcessor.released("ct_rate", **SIZES)
    outputs = processor(hu, affine=np.diag([xy, xy, z, 1]), return_tensors="pt")
    assert_close(outputs["pixel_values"][0, 0], reference_volume(hu, (z, xy, xy)))
    assert_close(outputs["slice_pixel_values"][0], ct_rate_slices(hu, (z, xy, xy)))


@pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
def test_bimcv_r(scan, tmp_path):
    array = write_scan(tmp_path / "scan.nii.gz", **scan)
    processor = HSENetImageProcessor.released("bimcv_r", **SIZES)
    outputs = processor(tmp_path / "scan.nii.gz", reading=UNUSUAL, return_tensors="pt")
    assert_close(outputs["pixel_values"][0, 0], reference_volume(array, None))
    assert_close(outputs["slice_pixel_values"][0], bimcv_r_slices(array))


@pytest.mark.parametrize("dataset", ["ct_rate", "bimcv_r"])
def test_full_sizes(dataset, tmp_path):
    write_scan(tmp_path / "scan.nii.gz", (40, 50, 45))
    outputs = HSENetImageProcessor.released(dataset)(tmp_path / "scan.nii.gz", return_tensors="pt")
    assert outputs["pixel_values"].shape == (1, 1, 32, 256, 256)
    assert outputs["slice_pixel_values"].shape == (1, 32, 3, 224, 224)
    assert outputs["pixel_values"].min() >= 0 and outputs["pixel_values"].max() <= 1


@pytest.mark.parametrize(
    ("header", "stated"),
    [(np.float32(0.7), 0.7), (np.float32(0.9), 0.9), (345 / 512, 345 / 512), (np.float32(0.683594), 0.683594), (3, 3)],
)
def test_spacing_as_it_was_stated(header, stated):
    assert resampling_hsenet.stated(float(header)) == stated


# Each step


def oriented(affine: np.ndarray, array: np.ndarray) -> torch.Tensor:
    processor = HSENetImageProcessor(orientation="stored")
    return processor._oriented(read_volume(array, affine=affine))[0]


@pytest.mark.parametrize("in_plane", [(0, 1), (1, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_stored_orientation_is_the_files(in_plane, signs):
    array = np.random.default_rng(0).uniform(-1000, 200, (9, 10, 11)).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(signs)[:, [*in_plane, 2]]
    np.testing.assert_array_equal(oriented(affine, array), array.transpose(2, 0, 1))


def test_stored_orientation_takes_axial_scans_only():
    array = tiny.scan(shape=(12, 12, 12))
    with pytest.raises(GeometryError, match="third axis is axial, got axes that run SPL.*affine="):
        HSENetImageProcessor.released(**SIZES)(array, spacing=(3, 1, 1))
    with pytest.raises(GeometryError, match="got axes that run ASR"):
        oriented(np.eye(4)[[2, 0, 1, 3]], array)


def test_a_scan_of_one_value_within_the_window_is_refused():
    array = np.full((12, 12, 12), 300, dtype=np.float32)
    array[5] = 900
    with pytest.raises(UnsupportedImageError, match="constant within hu_window"):
        HSENetImageProcessor.released("bimcv_r", **SIZES)(array, affine=np.eye(4), reading=UNUSUAL)


def test_a_scan_thinner_than_the_grid_is_refused():
    processor = tiny.image_processor(resample_spacing=(200, 1, 1))
    with pytest.raises(UnsupportedImageError, match="thinner than one voxel of resample_spacing"):
        processor(tiny.scan(), spacing=(3, 1, 1))


def marked_scan() -> tuple[np.ndarray, np.ndarray]:
    """RAS+ array and affine: a body with a bright column in front, on the patient's left."""
    array = np.full((40, 40, 16), -1000, dtype=np.float32)
    array[4:36, 4:36] = 0
    array[8:12, 28:32] = 900
    array += np.random.default_rng(0).integers(-20, 21, array.shape)  # no scan has three values
    return array, np.diag([1.0, 1.0, 2.0, 1.0])


def brightest(picture: torch.Tensor) -> torch.Tensor:
    """Centre of the brightest part as fractions of height and width."""
    bright = (picture > picture.max() - 0.1).nonzero().double()
    return (bright.mean(dim=0) + 0.5) / torch.tensor(picture.shape)


def test_default_slices_show_what_the_volume_shows_and_released_ones_do_not():
    array, affine = marked_scan()
    grey = {"image_mean": (0.0,), "image_std": (1.0,)}
    default = tiny.image_processor(**grey)(array, affine=affine, return_tensors="pt")
    volume, slices = default["pixel_values"][0, 0], default["slice_pixel_values"][0, :, 0]
    torch.testing.assert_close(brightest(volume[2]), brightest(slices[1]), atol=0.05, rtol=0)
    assert brightest(slices[1])[0] < 0.4 and brightest(slices[1])[1] > 0.6  # in front, left: a radiologist's view
    places = {}
    for dataset in RELEASED_SETTINGS:
        outputs = HSENetImageProcessor.released(dataset, **SIZES, **grey)(array, affine=affine, return_tensors="pt")
        volume, slices = outputs["pixel_values"][0, 0], outputs["slice_pixel_values"][0, :, 0]
        places[dataset] = brightest(slices[1])
        assert (brightest(volume[2]) - places[dataset]).abs().max() > 0.3
    torch.testing.assert_close(places["ct_rate"] + places["bimcv_r"], torch.ones(2).double(), atol=0.05, rtol=0)


def slices_with(**settings) -> torch.Tensor:
    processor = tiny.image_processor(image_mean=(0.0,), image_std=(1.0,), **settings)
    return processor(tiny.scan(), spacing=(3.0, 1.0, 1.0), return_tensors="pt")["slice_pixel_values"][0, :, 0]


def test_jpeg_is_a_small_change_and_the_smaller_the_better_its_quality():
    plain = slices_with()
    changes = [(slices_with(slice_jpeg_quality=quality) - plain).abs().mean() for quality in (100, 95, 20)]
    assert 0 < changes[0] < changes[1] < changes[2] < 0.1


@pytest.mark.parametrize("degrees", [-90, 90, 180])
def test_rotation(degrees):
    plain = slices_with(slice_size=(20, 12)).numpy()
    turned = slices_with(slice_size=(20, 12)[:: -1 if degrees % 180 else 1], slice_rotation=degrees)
    expected = [np.asarray(Image.fromarray(plane).rotate(degrees, expand=True)) for plane in plain]
    torch.testing.assert_close(turned, torch.from_numpy(np.stack(expected)))


def test_whole_planes_without_jpeg():
    """Up to 8-bit steps and JPEG the same pictures."""
    whole = slices_with(slice_fit="whole_plane")
    pictures = slices_with(slice_fit="whole_plane", slice_jpeg_quality=100)
    assert whole.shape == (tiny.NUM_SLICES, *tiny.SLICE_SIZE) and whole.min() >= 0 and whole.max() <= 1
    torch.testing.assert_close(whole, pictures, atol=4 / 255, rtol=0)
    assert (whole - slices_with()).abs().max() > 0.2


def test_field_of_view_on_a_finer_grid_is_the_same():
    plain = tiny.image_processor(spacing=(3.0, 1.1, 1.1))(tiny.scan(), spacing=(3.0, 1.0, 1.0), return_tensors="pt")
    finer = tiny.image_processor(spacing=(3.0, 1.1, 1.1), resample_spacing=(1.0, 0.5, 0.5))
    finer = finer(tiny.scan(), spacing=(3.0, 1.0, 1.0), return_tensors="pt")
    for name, tensor in plain.items():
        assert (finer[name] - tensor).abs().mean() < 0.05 * tensor.std()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"orientation": "native"}, "orientation should be 'canonical' or 'stored', got 'native'"),
        ({"volume_normalization": "none"}, "'window' or 'min_max', got 'none'"),
        ({"volume_fit": "crop"}, "'field_of_view' or 'nonzero_box', got 'crop'"),
        ({"volume_fit": "nonzero_box", "spacing": (3, 1, 1)}, "nonzero_box.*got spacing"),
        ({"volume_fit": "nonzero_box", "crop_to_body": False}, "nonzero_box.*crop_to_body False"),
        ({"resample_spacing": (1.5, 0.75)}, "resample_spacing should be 3"),
        ({"slice_axis": "width"}, "'depth' or 'depth_if_shorter', got 'width'"),
        ({"slice_axis": "depth_if_shorter"}, "needs slice_fit"),
        ({"slice_normalization": "min_max"}, "'slice_min_max'.*got 'min_max'"),
        ({"slice_hu_window": None}, "needs a slice_hu_window"),
        ({"slice_fit": "crop"}, "'field_of_view' or 'whole_plane', got 'crop'"),
        ({"slice_fit": "whole_plane", "slice_size": (16, 12)}, "square slice_size"),
        ({"slice_fit": "whole_plane", "slice_selection": "slab_mean"}, "slice_selection=.uniform"),
        ({"slice_rotation": 45}, "-90 or 0 or 90 or 180, got 45"),
        ({"slice_jpeg_quality": 0}, "from 1 to 100, got 0"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny.image_processor(**settings)


def test_unknown_dataset_is_refused():
    with pytest.raises(ValueError, match="'ct_rate' or 'bimcv_r', got 'mimic'"):
        HSENetImageProcessor.released("mimic")


# Saving and caching


ELSEWHERE = """
import json
from transformers import AutoProcessor, AutoImageProcessor
folder, scan = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules.")
processor.save_pretrained("again")
again = AutoProcessor.from_pretrained("again", trust_remote_code=True)
outputs = [each(volumes=scan, text="a nodule?", return_tensors="pt") for each in (processor, again)]
assert all((outputs[0][name] == outputs[1][name]).all() for name in outputs[0])
names = ("prompt_style", "plain_prompt_layout", "image_token")
print(json.dumps({
    "settings": {name: getattr(processor, name) for name in names},
    "image": {name: list(value) if isinstance(value, tuple) else value
              for name, value in vars(processor.image_processor).items()},
    "sums": {name: tensor.double().sum().item() for name, tensor in outputs[0].items()},
}))
"""


def test_the_preset_works_from_the_saved_files_alone(tmp_path):
    write_scan(tmp_path / "scan.nii.gz")
    image_processor = HSENetImageProcessor.released("bimcv_r", **SIZES)
    processor = HSENetProcessor(
        image_processor, tiny.tokenizer(), 7, prompt_style="plain", plain_prompt_layout="separate_line"
    )
    processor.save_pretrained(tmp_path / "saved")
    loaded = run_elsewhere(ELSEWHERE, tmp_path / "elsewhere", tmp_path / "saved", tmp_path / "scan.nii.gz")
    assert loaded["settings"] == {
        "prompt_style": "plain", "plain_prompt_layout": "separate_line", "image_token": "<image>"
    }  # fmt: skip
    expected = {**RELEASED_SETTINGS["bimcv_r"], **SIZES}
    assert {name: loaded["image"][name] for name in expected} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in expected.items()
    }
    outputs = processor(volumes=tmp_path / "scan.nii.gz", text="a nodule?", return_tensors="pt")
    assert loaded["sums"] == pytest.approx({name: tensor.double().sum().item() for name, tensor in outputs.items()})


@pytest.mark.parametrize("dataset", RELEASED_SETTINGS)
def test_no_window_is_kept(dataset, tmp_path):
    HSENetImageProcessor.released(dataset).save_pretrained(tmp_path)
    loaded = HSENetImageProcessor.from_pretrained(tmp_path)
    assert preprocessing_settings(loaded) == preprocessing_settings(HSENetImageProcessor.released(dataset))
    assert (loaded.slice_hu_window is None) == (dataset == "bimcv_r")


def test_every_setting_is_part_of_the_caches_key():
    base = {**RELEASED_SETTINGS["ct_rate"], **SIZES}
    others = {
        "image_size": (8, 16, 16), "orientation": "canonical", "resample_spacing": None, "hu_window": (-500, 500),
        "volume_normalization": "window", "volume_mean": 0.5, "volume_std": 0.5, "volume_fit": "field_of_view",
        "num_slices": 5, "slice_size": (8, 8), "slice_axis": "depth", "slice_hu_window": None,
        "slice_normalization": "volume_min_max", "slice_rotation": 90, "slice_jpeg_quality": None,
        "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3,
    }  # fmt: skip
    settings = [base, *({**base, name: value} for name, value in others.items())]
    free = {**base, "volume_fit": "field_of_view", "slice_axis": "depth"}
    settings += [{**free, **change} for change in ({}, {"spacing": (3, 1, 1)}, {"crop_to_body": False})]
    settings += [{**free, "slice_fit": "field_of_view", "slice_selection": name} for name in ("uniform", "slab_mean")]
    assert len({json.dumps(preprocessing_settings(HSENetImageProcessor(**each))) for each in settings}) == len(
        settings
    )
    named = set(others) | {"spacing", "crop_to_body", "slice_fit", "slice_selection"}
    assert named == set(signature(HSENetImageProcessor).parameters) - {"kwargs"}  # none is forgotten here
