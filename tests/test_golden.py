"""The 2E3 encoder and the spatial packers reproduce the public implementation's tensors, to 1e-5."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from configuration_hsenet import HSENetConfig, HSENetVisionConfig
from modeling_hsenet import HSENetSpatialPacker, HSENetVisionModel


DATA = Path(__file__).parent / "data"

VISION_NAMES = {
    "patch_embedding.patch_embeddings.1": "embeddings.projection",
    "patch_embedding.position_embeddings": "embeddings.position_embeddings",
    "slice_guided_attention.Wq": "scorer.attention.q_proj",
    "slice_guided_attention.Wk": "scorer.attention.k_proj",
    "slice_guided_attention.Wv": "scorer.attention.v_proj",
    "slice_guided_attention.output_linear": "scorer.attention.out_proj",
    "slice_guided_attention.norm": "scorer.attention.norm",
    "patch_score_proj": "scorer.score_proj",
    "blocks.": "layers.",
    "mlp.linear": "mlp.fc",
    "attn.": "attention.",
}
PACKER_NAMES = {
    "resolution_attention.Wq": "attention.q_proj",
    "resolution_attention.Wk": "attention.k_proj",
    "resolution_attention.Wv": "attention.v_proj",
    "resolution_attention.output_linear": "attention.out_proj",
    "resolution_attention.norm": "attention.norm",
    "proj_mpls.0": "fc1",
    "proj_mpls.2": "fc2",
}


def load_golden(name: str, names: dict[str, str]) -> tuple[dict, dict, dict]:
    """The configuration, our state dict, and the recorded inputs and outputs."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    weights = {key[2:]: tensors.pop(key) for key in list(tensors) if key.startswith("w.")}
    for source, target in names.items():
        weights = {key.replace(source, target): value for key, value in weights.items()}
    return config, weights, tensors


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_local_encoder(attention):
    golden, weights, tensors = load_golden("vit_stage2", VISION_NAMES)
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
    model.load_state_dict(weights)
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
    golden, weights, tensors = load_golden(name, PACKER_NAMES)
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
    packer.load_state_dict(weights)
    packed, attention = packer(tensors["features"])
    assert packed.shape[1] == golden["proj_out_num"] == config.image_seq_length
    torch.testing.assert_close(packed, tensors["out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(attention.flatten(), tensors["attention_map"].flatten(), atol=1e-5, rtol=0)
