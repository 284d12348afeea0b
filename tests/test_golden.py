"""The 2E3 encoder and the spatial packers, converted by the released layouts' tables, reproduce the public tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from configuration_hsenet import HSENetConfig, HSENetVisionConfig
from hsenet.checkpoint_names import LOCAL_ENCODER, PACKER
from hsenet.name_table import rename
from modeling_hsenet import HSENetVisionModel
from projectors_hsenet import HSENetSpatialPacker


DATA = Path(__file__).parent / "data"


def load_golden(name: str) -> tuple[dict, dict, dict]:
    """The configuration, the weights, and the recorded inputs and outputs."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    weights = {key[2:]: tensors.pop(key) for key in list(tensors) if key.startswith("w.")}
    return config, weights, tensors


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_local_encoder(attention):
    golden, weights, tensors = load_golden("vit_stage2")
    config = HSENetVisionConfig(
        image_size=golden["img_size"],
        patch_size=golden["patch_size"],
        hidden_size=golden["hidden_size"],
        intermediate_size=golden["mlp_dim"],
        num_hidden_layers=golden["num_layers"],
        num_attention_heads=golden["num_heads"],
        slice_hidden_size=tensors["slice_features"].shape[-1],
        attn_implementation=attention,
    )
    model = HSENetVisionModel(config).eval()
    model.load_state_dict(rename(weights, LOCAL_ENCODER, model.state_dict()).state)
    outputs = model(tensors["image"], tensors["slice_features"], output_hidden_states=True)
    torch.testing.assert_close(model.embeddings(tensors["image"]), tensors["patch_embedding"], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.patch_scores.flatten(1), tensors["patch_scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.last_hidden_state, tensors["out"], atol=1e-5, rtol=0)
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    torch.testing.assert_close(outputs.hidden_states[0], tensors["tokens_in"], atol=1e-5, rtol=0)
    if attention == "eager":
        torch.testing.assert_close(outputs.slice_attentions, tensors["attention_map"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["packer_1_4_4", "packer_2_2_2"])
def test_spatial_packer(name):
    golden, weights, tensors = load_golden(name)
    grid, width = golden["grid"], golden["in_dim"]
    vision_config = {"image_size": grid, "patch_size": (1, 1, 1), "hidden_size": width, "num_attention_heads": 4}
    config = HSENetConfig(
        encoders="global",
        vision_config=vision_config,
        packer_window_size=golden["kernel"],
        text_config={"model_type": "llama", "hidden_size": golden["out_dim"], "num_attention_heads": 4},
        attn_implementation="eager",
    )
    packer = HSENetSpatialPacker(config, config.vision_config).eval()
    packer.load_state_dict(rename(weights, PACKER, packer.state_dict()).state)
    packed, attention = packer(tensors["features"])
    assert packed.shape[1] == golden["proj_out_num"] == config.image_seq_length
    torch.testing.assert_close(packed, tensors["out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(attention.flatten(), tensors["attention_map"].flatten(), atol=1e-5, rtol=0)
