"""Loading refuses incomplete checkpoints, and the fingerprint notices changed numbers."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import hsenet  # noqa: F401  registers the Auto classes


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("make", [tiny.generation_model, tiny.clip_model, tiny.vision_model])
def test_a_missing_weight_is_refused_with_its_name(make, tmp_path):
    make().save_pretrained(tmp_path)
    name = sorted(load_file(tmp_path / "model.safetensors"))[-1]
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"1 weights of HSENet.* {name}. Expected a complete"):
        AutoModel.from_pretrained(tmp_path)


def test_a_weight_of_another_shape_is_refused_even_on_request(tmp_path):
    tiny.vision_model().save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({"norm.bias": torch.zeros(5)}))
    with pytest.raises(ValueError, match="norm.bias"):
        AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
