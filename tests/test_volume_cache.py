"""The cache of preprocessed volumes: killed and run again, and with scans that cannot be read."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator

from hsenet.data import VolumeRows
from hsenet.frozen_features import PatchFeatureCache, cache_patch_features
from hsenet.phantom import nifti_bytes, render_study, sample_study
from hsenet.volume_cache import UnreadableVolumesError, cache_volumes


NUM_SCANS = 6
BUILD = """
import sys, tiny
from accelerate import Accelerator
from hsenet.volume_cache import cache_volumes
names = sorted(sys.argv[3:])
rows = [{"volume": v, "volume_name": v, "row": i, "from_split": "train"} for i, v in enumerate(names)]
processor = tiny.image_processor(image_size=(64, 256, 256), num_slices=0)
cache_volumes(rows, processor, None, sys.argv[1], Accelerator(cpu=True), num_workers=int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scans")
    for index in range(NUM_SCANS):
        phantom = render_study(sample_study(1, index), spacing=(5, 5, 8))
        (folder / f"{index}.nii.gz").write_bytes(nifti_bytes(phantom.array, phantom.affine))
    return sorted(folder.iterdir())


def rows_of(scans: list[Path]) -> list[dict]:
    return [
        {"volume": str(scan), "volume_name": scan.name, "row": number, "from_split": "train"}
        for number, scan in enumerate(scans)
    ]


def build(folder: Path, scans: list[Path], workers: int) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(folder), str(workers), *map(str, scans)]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_build_goes_on_to_the_same_files(scans, tmp_path, workers):
    assert build(tmp_path / "undisturbed", scans, workers).wait() == 0
    whole = files(tmp_path / "undisturbed")
    assert len(whole) == NUM_SCANS
    moments = random.Random(workers)
    for number in (1, 3):
        process = build(tmp_path / "killed", scans, workers)
        while len(files(tmp_path / "killed")) < number and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.wait()
        found = {name: content for name, content in files(tmp_path / "killed").items() if name in whole}
        assert found == {name: whole[name] for name in found}  # what has its final name is whole
    (folder,) = (tmp_path / "killed").iterdir()
    assert build(tmp_path / "killed", scans, workers).wait() == 0
    assert files(tmp_path / "killed") == whole, folder


def test_unreadable_scans_are_listed_and_left_out_if_allowed(scans, tmp_path, capsys):
    broken = tmp_path / "smith_john.nii.gz"
    broken.write_bytes(scans[0].read_bytes()[:2000])
    rows = rows_of([scans[0], broken, *scans[1:3]])
    arguments = (tiny.image_processor(num_slices=0), None, tmp_path / "cache", Accelerator(cpu=True))
    with pytest.raises(
        UnreadableVolumesError, match="(?s)1 of 4 .*at most 0.*row 1 of train: CorruptFileError"
    ) as error:
        cache_volumes(rows, *arguments)
    assert "smith" not in str(error.value) + capsys.readouterr().out
    before = files(tmp_path / "cache")
    assert len(before) == 3  # the others were not lost
    cache = cache_volumes(rows, *arguments, max_failures=1)
    assert "row 1 of train" in capsys.readouterr().out
    assert [row["row"] for row in cache.readable(rows)] == [0, 2, 3]
    shutil.copy(scans[3], broken)  # mended
    assert len(cache_volumes(rows, *arguments).readable(rows)) == 4
    assert {name: files(tmp_path / "cache")[name] for name in before} == before
    broken.write_bytes(scans[0].read_bytes()[:2000])  # again: what the cache holds of it is no longer true
    assert len(cache_volumes(rows, *arguments, max_failures=1).readable(rows)) == 3


def test_kept_slices_are_those_that_the_features_come_from(scans, tmp_path):
    rows, processor, run = rows_of(scans[:2]), tiny.image_processor(), Accelerator(cpu=True)
    encoder = tiny.vision_model(**tiny.SLICES)
    features = cache_volumes(rows, processor, encoder, tmp_path / "cache", run)
    slices = cache_volumes(rows, processor, encoder, tmp_path / "cache", run, keep_slices=True)
    assert features.folder != slices.folder
    for name in (row["volume_name"] for row in rows):
        assert set(slices[name]) == {"pixel_values", "slice_pixel_values"}
        with torch.no_grad():
            expected = encoder(slices[name]["slice_pixel_values"].unsqueeze(2)).pooler_output
        torch.testing.assert_close(features[name]["slice_features"], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(features[name]["pixel_values"], slices[name]["pixel_values"])


def patch_features(rows: list[dict], folder: Path, model=None, dtype: str = "float32") -> PatchFeatureCache:
    run, model = Accelerator(cpu=True), model if model is not None else tiny.generation_model()
    volumes = cache_volumes(rows, tiny.image_processor(), model.slice_encoder, folder, run)
    return cache_patch_features(rows, volumes, model, run, batch_size=2, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_patch_features_are_those_of_the_models_encoders(scans, tmp_path, dtype, tolerance):
    rows, model = rows_of(scans[:3]), tiny.generation_model()
    cache = patch_features(rows, tmp_path, model, dtype)
    example = VolumeRows(rows, cache)[1]
    volume = {name: tensor.unsqueeze(0) for name, tensor in cache.volumes[rows[1]["volume_name"]].items()}
    with torch.no_grad():
        expected = model.get_patch_features(**volume)
    for name in ("global_patch_features", "local_patch_features"):
        assert example[name].dtype == torch.float32
        torch.testing.assert_close(example[name], expected[name][0], rtol=tolerance, atol=tolerance)


def test_patch_features_are_made_once_and_anew_when_something_changes(scans, tmp_path):
    rows = rows_of(scans[:2])
    own = tmp_path / "scan.nii.gz"
    shutil.copy(scans[2], own)
    rows = [*rows, {**rows_of([own])[0], "row": 2}]
    first = patch_features(rows, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert len(before) == 3

    again = patch_features(rows, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before  # nothing was done

    shutil.copy(scans[3], own)
    stale = first["scan.nii.gz"]["global_patch_features"]
    changed = patch_features(rows, tmp_path / "cache")
    rewritten = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed.folder == first.folder and rewritten == [first.path("scan.nii.gz")]
    assert not torch.equal(changed["scan.nii.gz"]["global_patch_features"], stale)

    model = tiny.generation_model()
    model.model.local_encoder.norm.bias.data += 1
    assert patch_features(rows, tmp_path / "cache", model).folder != first.folder
    assert patch_features(rows, tmp_path / "cache", dtype="float16").folder != first.folder
    turned = tiny.generation_model(vision_config={**tiny.VISION, "num_attention_heads": 2})
    turned.load_state_dict(tiny.generation_model().state_dict())  # the same weights that compute something else
    assert patch_features(rows, tmp_path / "cache", turned).folder != first.folder
