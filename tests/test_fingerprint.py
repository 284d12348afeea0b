"""Loading refuses incomplete checkpoints, and the fingerprint notices changed numbers."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_hub import run_elsewhere
from transformers import AutoModel

import hsenet  # noqa: F401  registers the Auto classes
from hsenet.cli import main
from hsenet.fingerprint import check_fingerprint, store_fingerprint


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


REFUSED = """
import json, transformers
refused = {}
for folder, auto_class in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    except ValueError as error:
        refused[f"{folder} {auto_class}"] = str(error)
print(json.dumps(refused))
"""


def test_code_from_the_folder_refuses_too(tmp_path):
    classes = {
        "vlm": ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
        "clip": ("AutoModel",),
        "vision": ("AutoModel",),
    }
    models = (tiny.generation_model(), tiny.clip_model("slices"), tiny.vision_model())
    for name, model in zip(classes, models, strict=True):
        model.save_pretrained(tmp_path / name)
        change_tensors(tmp_path / name, lambda tensors: tensors.pop(sorted(tensors)[-1]))
    pairs = [(name, auto_class) for name, group in classes.items() for auto_class in group]
    arguments = [argument for name, auto_class in pairs for argument in (tmp_path / name, auto_class)]
    refused = run_elsewhere(REFUSED, tmp_path / "elsewhere", *arguments)
    assert len(refused) == 5 and all("Expected a complete checkpoint" in error for error in refused.values())


@pytest.fixture
def folder(tmp_path):
    tiny.clip_model("slices").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "make",
    [lambda: tiny.generation_model(encoders="local"), tiny.generation_model, tiny.clip_model, tiny.vision_model],
)
def test_the_same_model_has_the_same_fingerprint(make, tmp_path, capsys):
    make().save_pretrained(tmp_path)
    assert main(["fingerprint", str(tmp_path)]) == 0
    first = capsys.readouterr().out.strip()
    assert len(first) == 12
    assert main(["fingerprint", str(tmp_path), "--check"]) == 0
    assert capsys.readouterr().out.startswith(f"{first}: as stored, largest difference 0.0e+00")
    assert main(["fingerprint", str(tmp_path), "--check", "--json"]) == 0
    out, err = capsys.readouterr()
    stored = json.loads((tmp_path / "fingerprint.json").read_text())
    assert stored.pop("weights")
    assert json.loads(out) == {**stored, "largest_difference": 0.0} and err == ""
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads < 3 else 1)
    assert check_fingerprint(tmp_path)["hash"] == first
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "part", ["logit_scale", "vision_model", "scorer", "slice_encoder", "text_model", "projection"]
)
def test_changed_weights_are_noticed(part, folder):
    stored = store_fingerprint(folder)

    def change(tensors: dict) -> None:
        name = next(name for name in sorted(tensors) if part in name and (tensors[name].ndim == 2 or part == name))
        half = tensors[name] if part == name else tensors[name][::2]  # all of a projection alike changes nothing
        half *= 1.1

    change_tensors(folder, change)
    with pytest.raises(ValueError, match=f"no longer computes.*hash {stored['hash']} stored"):
        check_fingerprint(folder)


def test_damaged_weights_and_absent_fingerprints(folder):
    with pytest.raises(FileNotFoundError, match="no fingerprint.json.*hsenet fingerprint DIR"):
        check_fingerprint(folder)
    change_tensors(folder, lambda tensors: tensors["visual_projection.bias"].fill_(float("nan")))
    with pytest.raises(ValueError, match="image embeddings are nan.*damaged"):
        store_fingerprint(folder)
