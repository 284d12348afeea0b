"""Whole runs of the training programs in the tests' own process, on a tiny dataset and tiny models."""

import json
import runpy
import sys
from pathlib import Path

import tiny
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config

from hsenet.phantom import nifti_bytes, render_study, sample_study
from processing_hsenet import HSENetProcessor


ROOT = Path(__file__).parents[1]
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit weights come in blocks of 64
CARD = "configs:\n" + "".join(
    f"- config_name: {name}\n  data_files:\n"
    + "".join(f"  - {{split: {split}, path: {name}/{split}.parquet}}\n" for split in ("train", "validation"))
    for name in ("reports", "vqa")
)


def prepare(root: Path) -> Path:
    """A dataset of eight phantoms, and tiny models that the stages start from."""
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
    stage1.text_model.save_pretrained(root / "text_encoder")
    tokenizer.save_pretrained(root / "text_encoder")
    HSENetProcessor(tiny.image_processor(num_slices=0), tokenizer).save_pretrained(root / "stage1")
    stage2.save_pretrained(root / "stage2")
    HSENetProcessor(tiny.image_processor(), tokenizer).save_pretrained(root / "stage2")
    stage2.slice_encoder.save_pretrained(root / "slice_encoder")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Phi3Config(**tiny.text_config(**WIDE))).save_pretrained(root / "language_model")
    tiny.tokenizer().save_pretrained(root / "language_model")
    return root


def train(stage: str, folder: Path, output: str, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step and final weights of a run in this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    parts = {
        "stage1": {
            "text_encoder": str(folder / "text_encoder"),
            "vision_config": {**tiny.VISION, "image_size": list(tiny.IMAGE_SIZE)},
            "projection_dim": 16,
            "max_length": 64,
        },
        "stage2": {
            "stage1": str(folder / "stage1"),
            "slice_encoder": str(folder / "slice_encoder"),
            "num_slices": tiny.NUM_SLICES,
            "max_length": 64,
        },
        "stage3": {
            "stage1": str(folder / "stage1"),
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
    shards = map(load_file, (folder / output).glob("model*.safetensors"))
    weights = {name: tensor for shard in shards for name, tensor in shard.items()}
    return [row["loss"] for row in logged if "loss" in row], weights
