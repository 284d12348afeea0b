"""Options of the training programs: precision, quantisation, LoRA's targets, optimiser, compilation, patch dropout."""

import copy
import json
import runpy
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from stage_runs import ROOT, prepare, train
from torch._dynamo.utils import counters
from transformers import AutoModel

from hsenet.adapters import load_adapters, merge_adapter
from hsenet.compilation import compile_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def plain(folder) -> tuple:
    return train("stage3", folder, "plain", max_steps=4)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({"language_model_dtype": "bfloat16"}, 0.02), ({"quantization": "8bit"}, 0.05), ({"quantization": "4bit"}, 0.2)],
    ids=["bfloat16", "8bit", "4bit"],
)
def test_frozen_weights_in_less_precision(folder, plain, settings, tolerance):
    name = next(iter(settings.values()))
    losses, weights = train("stage3", folder, name, max_steps=4, **settings)
    assert losses != plain[0] and losses[0] == pytest.approx(plain[0][0], rel=tolerance)
    # What is saved is a plain model, that of the adapter on the weights as they were.
    config = json.loads((folder / name / "config.json").read_text())
    assert "quantization_config" not in json.dumps(config)
    assert all(tensor.is_floating_point() for tensor in weights.values())
    trained = "model.language_model.layers.0.self_attn.qkv_proj.weight"
    moved = (weights[trained].float() - plain[1][trained]).abs()
    assert moved.max() < 0.02  # LoRA's steps and the rounding, not another model
    adapter = load_file(folder / name / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    AutoModel.from_pretrained(folder / name, trust_remote_code=True)


def test_lora_on_chosen_layers(folder):
    train("stage3", folder, "chosen", max_steps=2, lora_target_modules=["o_proj", "down_proj"], lora_r=4)
    adapter = load_file(folder / "chosen" / "adapter" / "adapter_model.safetensors")
    lora = {name.split(".lora_")[0].rpartition(".")[2]: tensor for name, tensor in adapter.items() if "lora_A" in name}
    assert set(lora) == {"o_proj", "down_proj"} and all(tensor.shape[0] == 4 for tensor in lora.values())
    with pytest.raises(ValueError, match="No layers named q_proj: expected some of down_proj, gate_up_proj, o_proj"):
        train("stage3", folder, "unknown", lora_target_modules=["q_proj", "o_proj"])


def test_an_adapter_goes_on_its_base_alone(folder, plain):
    """In any precision; never on the model that stage 3 has merged it into."""
    adapters = {"reports": folder / "plain" / "adapter"}
    program = runpy.run_path(str(ROOT / "train/stage3.py"))
    parts = {name: str(folder / name) for name in ("stage1", "stage2", "language_model")}
    arguments = program["ModelArguments"](**parts, packer_window_size=list(tiny.WINDOW))
    stages = [AutoModel.from_pretrained(folder / name) for name in ("stage1", "stage2")]
    program["assemble"](*stages, arguments, torch.device("cpu"))[0].save_pretrained(folder / "base")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = load_adapters(AutoModel.from_pretrained(folder / "base", dtype=dtype), adapters)
    merged = merge_adapter(model, "reports").state_dict()
    for name, tensor in plain[1].items():
        torch.testing.assert_close(merged[name], tensor)
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match="'reports' was trained on other weights.* merged into"):
            load_adapters(AutoModel.from_pretrained(folder / "plain", dtype=dtype), adapters)


def test_fused_optimizer_takes_the_same_steps(folder, plain):
    losses, weights = train("stage3", folder, "fused", max_steps=4, optim="adamw_torch_fused")
    assert losses == pytest.approx(plain[0], rel=1e-4)
    for name, tensor in weights.items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding noise, of which Adam makes steps
            torch.testing.assert_close(tensor, plain[1][name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_patch_dropout_of_a_stage(folder, stage):
    """Of what trains, by the option alone: the loss of the same first batch is another one."""
    losses = {}
    for share in (0.5, None):
        losses[share], _ = train(stage, folder, f"{stage}_{share}", max_steps=1, patch_dropout=share)
        config = json.loads((folder / f"{stage}_{share}" / "config.json").read_text())["vision_config"]
        assert config.get("patch_dropout", 0.0) == (share or 0.0)
    assert losses[0.5] != pytest.approx(losses[None], rel=1e-3)
    with pytest.raises(ValueError, match="patch_dropout should be at least 0 and below 1"):
        train(stage, folder, f"{stage}_all", patch_dropout=1.0)


def without_its_last_step(folder: Path) -> None:
    """As if the run had ended after its second step of three."""
    shutil.rmtree(folder / "checkpoints" / "step-3")
    (folder / "model.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [("stage2", {"chunk_size": 2}), ("stage3", {}), ("stage3", {"gradient_checkpointing": True})],
    ids=["stage 2 in chunks", "stage 3", "stage 3 with checkpointing"],
)
def test_compiled_run_is_the_plain_one(folder, tmp_path, stage, settings):
    """In losses, with dropout; in files; and each goes on where the other was."""
    settings = {"max_steps": 3, "save_steps": 1, **settings}
    names = [f"{tmp_path.name}_{way}" for way in ("off", "on")]
    off, on = (train(stage, folder, names[way], torch_compile=way, **settings) for way in (False, True))
    assert on[0] == pytest.approx(off[0], rel=1e-4)
    kept = [load_file(folder / name / "checkpoints" / "step-2" / "trained.safetensors").keys() for name in names]
    assert kept[0] == kept[1]
    for name, way in zip(names, (True, False), strict=True):
        without_its_last_step(folder / name)
        losses, weights = train(stage, folder, name, torch_compile=way, **settings)
        assert losses == pytest.approx(off[0], rel=1e-4) and weights.keys() == off[1].keys()
        for tensor_name, tensor in weights.items():
            if not tensor_name.endswith(("k_proj.bias", "key.bias")):  # rounding noise, of which Adam makes steps
                torch.testing.assert_close(tensor, off[1][tensor_name], rtol=1e-3, atol=2e-4)


def test_deepspeed_is_refused_at_the_start(folder, monkeypatch):
    """Without a GPU too, where accelerate would train without it and say nothing."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed is not supported.*FSDP2"):
        train("stage1", folder, "deepspeed")


def test_layers_compile_in_place():
    model, volumes = tiny.clip_model().vision_model, torch.rand(2, 1, *tiny.IMAGE_SIZE)
    names, plain = list(model.state_dict()), model(volumes).last_hidden_state
    counters.clear()
    compile_layers(model)
    compiled = model(volumes).last_hidden_state
    assert counters["stats"]["unique_graphs"] == 1  # of all layers
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names and list(copy.deepcopy(model).state_dict()) == names
