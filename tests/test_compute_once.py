"""Whole runs of the training programs with caches and without: the same losses and weights, to rounding."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config

from hsenet.frozen_features import ComputedEmbeddings
from hsenet.phantom import nifti_bytes, render_study, sample_study
from processing_hsenet import HSENetProcessor


ROOT = Path(__file__).parents[1]
CARD = "configs:\n" + "".join(
    f"- config_name: {name}\n  data_files:\n"
    + "".join(f"  - {{split: {split}, path: {name}/{split}.parquet}}\n" for split in ("train", "validation"))
    for name in ("reports", "vqa")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset of eight phantoms, and tiny models that the stages start from."""
    root = tmp_path_factory.mktemp("compute_once")
    for name in ("volumes", "reports", "vqa"):
        (root / "data" / name).mkdir(parents=True)
    rows = []
    for index in range(8):
        phantom = render_study(sample_study(1, index), spacing=(7.5, 7.5, 8))
        name = f"volumes/{index}.nii.gz"
        (root / "data" / name).write_bytes(nifti_bytes(phantom.array, phantom.affine))
        texts = {"findings": tiny.SENTENCES[1 + index % 4], "impression": f"Left finding {index}."}
        rows.append({"volume": name, "volume_name": name, "study_id": str(index), "labels": [0] * 18, **texts})
    questions = [
        {**{key: row[key] for key in ("volume", "volume_name", "study_id")}, "question": tiny.SENTENCES[3]}
        | {"answer": ["yes", "no"][number % 2], "question_type": "presence", "label": "x"}
        for number, row in enumerate(rows)
    ]
    for name, some in (("reports", rows), ("vqa", questions)):
        Dataset.from_list(some[:6]).to_parquet(root / "data" / name / "train.parquet")
        Dataset.from_list(some[6:]).to_parquet(root / "data" / name / "validation.parquet")
    (root / "data" / "README.md").write_text(f"---\n{CARD}---\n")

    tokenizer = tiny.tokenizer(pad_token="[PAD]", cls_token="[CLS]")
    stage1, stage2 = tiny.clip_model(), tiny.clip_model("slices")
    stage1.save_pretrained(root / "stage1")
    HSENetProcessor(tiny.image_processor(num_slices=0), tokenizer).save_pretrained(root / "stage1")
    stage2.save_pretrained(root / "stage2")
    HSENetProcessor(tiny.image_processor(), tokenizer).save_pretrained(root / "stage2")
    stage2.slice_encoder.save_pretrained(root / "slice_encoder")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Phi3Config(**tiny.text_config())).save_pretrained(root / "language_model")
    tiny.tokenizer().save_pretrained(root / "language_model")
    return root


def train(stage: str, folder: Path, output: str, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step and final weights of a run in this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    parts = {
        "stage2": {"slice_encoder": str(folder / "slice_encoder"), "num_slices": tiny.NUM_SLICES, "max_length": 64},
        "stage3": {
            "stage2": str(folder / "stage2"),
            "language_model": str(folder / "language_model"),
            "packer_window_size": list(tiny.WINDOW),
            "max_length": 120,
            "lora_dropout": 0.0,
        },
    }
    common = {
        "dataset": str(folder / "data"),
        "output_dir": str(folder / output),
        "cache_dir": str(folder / "cache"),
        "stage1": str(folder / "stage1"),
        "batch_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    config = folder / f"{output}.yaml"
    config.write_text(yaml.safe_dump({**common, **parts[stage], **settings}))
    arguments, sys.argv = sys.argv, [stage, "--config", str(config)]
    try:
        runpy.run_path(str(ROOT / "train" / f"{stage}.py"), run_name="__main__")
    finally:
        sys.argv = arguments
    logged = [json.loads(line) for line in (folder / output / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in logged if "loss" in row], load_file(folder / output / "model.safetensors")


def assert_same_run(ours: tuple, theirs: tuple) -> None:
    assert len(ours[0]) >= 4 and ours[0] == pytest.approx(theirs[0], rel=1e-4)
    for name, tensor in theirs[1].items():
        # Adam makes a step of the learning rate out of a gradient that is nothing but rounding, such as a key bias'.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(ours[1][name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def stage3_computed(folder) -> tuple:
    return train("stage3", folder, "stage3_computed", slice_features="computed")


def test_stage3_from_cached_patch_features_is_the_same_run(folder, stage3_computed):
    cached = train("stage3", folder, "stage3_cached", patch_features="cached")
    assert_same_run(cached, stage3_computed)
    assert len(list((folder / "cache" / "patches").rglob("*.safetensors"))) == 8


def test_augmentation_bypasses_cached_patch_features(folder, capsys):
    moved = {"max_shift": [1, 4, 4], "slice_features": "cached", "max_steps": 2}
    bypassed = train("stage3", folder, "stage3_bypassed", patch_features="cached", **moved)
    assert "computed in every step: augmentation" in capsys.readouterr().out
    assert bypassed[0] == train("stage3", folder, "stage3_moved", **moved)[0]


def test_stage2_with_cached_slice_features_and_anchors_is_the_same_run(folder):
    cached = train("stage2", folder, "stage2_cached")
    assert list((folder / "cache" / "anchors").rglob("*0000"))
    neither = train("stage2", folder, "stage2_computed", slice_features="computed", anchor_embeddings="computed")
    assert_same_run(cached, neither)


def test_cached_anchors_are_read_by_the_next_run_and_made_anew_for_other_texts(folder):
    train("stage2", folder, "stage2_first", max_steps=1)
    before = {path: path.stat().st_mtime_ns for path in (folder / "cache" / "anchors").rglob("*") if path.is_file()}
    train("stage2", folder, "stage2_second", max_steps=1)
    files = [path for path in (folder / "cache" / "anchors").rglob("*") if path.is_file()]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    train("stage2", folder, "stage2_third", max_steps=1, report_fields=["impression"])
    assert len([path for path in (folder / "cache" / "anchors").rglob("*") if path.is_file()]) > len(before)


def test_the_anchor_sees_what_stage2_sees_unless_told_otherwise(folder):
    moved = {"max_shift": [1, 4, 4], "rewrite_reports": True, "slice_features": "cached", "max_steps": 2}
    logged = {}
    for way in ("auto", "cached"):
        train("stage2", folder, f"stage2_{way}", anchor_embeddings=way, **moved)
        rows = [json.loads(line) for line in (folder / f"stage2_{way}" / "log.jsonl").read_text().splitlines()]
        logged[way] = [row["consistency"] for row in rows if "consistency" in row]
    assert len(logged["auto"]) == 2 and logged["auto"] != logged["cached"]


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_computed_embeddings_are_those_of_the_batch_as_it_is(chunk_size):
    model, run = tiny.clip_model(), Accelerator(cpu=True)
    tokens = tiny.tokenizer(pad_token="[PAD]", cls_token="[CLS]")(
        tiny.SENTENCES[:3], padding=True, return_tensors="pt", return_token_type_ids=False
    )
    inputs = {**tokens, "pixel_values": torch.rand(3, 1, *tiny.IMAGE_SIZE), "slice_features": torch.zeros(3, 1, 24)}
    images, texts = ComputedEmbeddings(model, chunk_size, run)(torch.tensor([7, 8, 9]), inputs)
    with torch.no_grad():
        expected = model(**tokens, pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(images, expected.image_embeds)
    torch.testing.assert_close(texts, expected.text_embeds)
