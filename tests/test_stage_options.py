"""Options of the training programs: precision and quantisation of the language model, LoRA's targets."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import prepare, train
from transformers import AutoModel

from hsenet.adapters import load_adapters


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
    base = AutoModel.from_pretrained(folder / "chosen")
    load_adapters(base, {"reports": folder / "chosen" / "adapter"})
    with pytest.raises(ValueError, match="No layers named q_proj: expected some of down_proj, gate_up_proj, o_proj"):
        train("stage3", folder, "unknown", lora_target_modules=["q_proj", "o_proj"])


def test_fused_optimizer_takes_the_same_steps(folder, plain):
    losses, weights = train("stage3", folder, "fused", max_steps=4, optim="adamw_torch_fused")
    assert losses == pytest.approx(plain[0], rel=1e-4)
    for name, tensor in weights.items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding noise, of which Adam makes steps
            torch.testing.assert_close(tensor, plain[1][name], rtol=1e-3, atol=2e-4)
