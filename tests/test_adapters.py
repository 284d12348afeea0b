"""The models that write: converted with LoRA merged or as adapters on one base; switched, merged, unmerged."""

import json

import nibabel
import numpy as np
import pytest
import released
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_conversion import LOGITS, run
from test_hub import run_elsewhere
from transformers import AutoModel, AutoProcessor

from hsenet.adapters import load_adapters, merge_adapter
from hsenet.conversion_vlm import convert_vlm, convert_vlm_adapter
from hsenet.fingerprint import check_fingerprint
from hsenet.name_table import ConversionError
from hsenet_command import main


WINDOW = (1, 2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The sources, a base with the adapter for reports, the adapter for VQA, and VQA merged."""
    folder = tmp_path_factory.mktemp("vlm")
    for name in ("stage2", "slices", "language_model"):
        (folder / name).mkdir()
    released.write_clip(folder / "stage2", "stage2_clip")
    released.write_slice_encoder(folder / "slices")
    released.write_language_model(folder / "language_model")
    released.write_vlm_file(folder / "reports.bin")
    released.write_vlm_file(folder / "vqa.bin", seed=1)
    options = [f"--{name}={folder / path}" for name, path in (
        ("stage2", "stage2"), ("slice_encoder", "slices"), ("language_model", "language_model"))]  # fmt: skip
    options += ["--packer_window_size", *WINDOW, "--num_slices", 4]
    assert run("convert", "vlm", folder / "reports.bin", folder / "base", *options, "--adapter", "reports") == 0
    assert run("convert", "vlm", folder / "vqa.bin", folder / "base/adapters/vqa", "--base", folder / "base") == 0
    assert run("convert", "vlm", folder / "vqa.bin", folder / "merged", *options) == 0
    return folder


@pytest.fixture(scope="module")
def inputs(folder) -> dict:
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(folder / "base")
    prompts = processor.tokenize_prompts([processor.prompt(text) for text in tiny.SENTENCES[:2]])
    names = ("input_ids", "attention_mask")
    return {
        **{name: prompts[name] for name in names},
        "pixel_values": torch.rand(2, 1, *tiny.IMAGE_SIZE),
        "slice_features": torch.rand(2, 4, 32),
    }


@torch.no_grad()
def expected_logits(folder, inputs: dict, file: str) -> torch.Tensor:
    """Without PEFT and without the tables: the base's weights plus alpha / r B A, and the file's packers by hand."""
    model = AutoModel.from_pretrained(folder / "base").eval()
    tensors = torch.load(folder / file)
    for name, module in model.model.language_model.named_modules():
        prefix = f"base_model.model.model.{name}"
        if f"{prefix}.lora_A.default.weight" in tensors:
            lora_a, lora_b = (tensors[f"{prefix}.lora_{letter}.default.weight"] for letter in "AB")
            module.weight += 32 / 16 * lora_b @ lora_a
    projector = model.model.multi_modal_projector
    for source, packer in (("mm_projector", projector.global_packer), ("mm_projector2", projector.local_packer)):
        attention = packer.attention
        for old, module in (
            ("resolution_attention.Wq", attention.q_proj),
            ("resolution_attention.Wk", attention.k_proj),
            ("resolution_attention.Wv", attention.v_proj),
            ("resolution_attention.output_linear", attention.out_proj),
            ("resolution_attention.norm", attention.norm),
            ("proj_mpls.0", packer.fc1),
            ("proj_mpls.2", packer.fc2),
        ):
            for leaf, parameter in module.named_parameters():
                parameter.copy_(tensors[f"base_model.model.model.{source}.{old}.{leaf}"])
    return model(**inputs).logits


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)  # of logits up to about 5, after 32 layers


@torch.no_grad()
def test_adapters_are_switched_merged_and_taken_off(folder, inputs):
    base = AutoModel.from_pretrained(folder / "base").eval()
    plain = base(**inputs).logits
    expected = {name: expected_logits(folder, inputs, f"{name}.bin") for name in ("reports", "vqa")}
    assert min((a - b).abs().max() for a, b in ((plain, expected["reports"]), (*expected.values(),))) > 0.1
    model = load_adapters(base, {name: folder / "base/adapters" / name for name in expected})
    assert isinstance(model, PeftModel)
    for name in ("reports", "vqa", "reports"):
        model.set_adapter(name)
        assert_same(model(**inputs).logits, expected[name])
    with model.disable_adapter():
        assert_same(model(**inputs).logits, plain)
    assert_same(model(**inputs).logits, expected["reports"])
    merged = merge_adapter(model, "vqa")
    assert type(merged) is type(base) and not any("lora" in name for name in merged.state_dict())
    assert_same(merged(**inputs).logits, expected["vqa"])


@torch.no_grad()
def test_converted_with_lora_merged(folder, inputs, tmp_path):
    expected = expected_logits(folder, inputs, "vqa.bin")
    model = AutoModel.from_pretrained(folder / "merged").eval()
    assert_same(model(**inputs).logits, expected)
    assert not (folder / "merged/adapters").exists()
    torch.save(inputs, tmp_path / "inputs.pt")
    values = run_elsewhere(LOGITS, tmp_path / "elsewhere", folder / "merged", tmp_path / "inputs.pt")
    assert_same(torch.tensor(values), expected)


@torch.no_grad()
def test_each_part_computes_what_it_did(folder, inputs):
    """The base's language model on text alone, cut to the tokenizer's words; both encoders; the packers' input."""
    model = AutoModel.from_pretrained(folder / "base").eval()
    original = released.write_language_model(folder / "language_model")
    words = model.config.text_config.vocab_size - 3  # <image> is one of the tiny tokenizer's words already
    ids = torch.randint(2, words, (1, 9))
    assert_same(model(input_ids=ids).logits[..., :words], original(input_ids=ids).logits[..., :words])
    embeddings = model.get_input_embeddings().weight
    assert_same(embeddings[words:], original.get_input_embeddings().weight[:words].mean(dim=0).expand(3, -1))
    assert run("convert", "stage2-clip", folder / "stage2", folder / "clip2", "--teacher", folder / "clip1",
               "--slice_encoder", folder / "slices", "--num_slices", 4) == 0  # fmt: skip
    stage1, stage2 = (AutoModel.from_pretrained(folder / name) for name in ("clip1", "clip2"))
    volumes, slices = inputs["pixel_values"], inputs["slice_features"]
    states = model.model.global_encoder(volumes).last_hidden_state
    assert torch.equal(states, stage1.vision_model(volumes).last_hidden_state)
    states = model.model.local_encoder(volumes, slices).last_hidden_state
    assert torch.equal(states, stage2.vision_model(volumes, slices).last_hidden_state)


def test_the_encoders_also_come_from_converted_folders(folder, inputs, tmp_path):
    if not (folder / "clip1").exists():
        assert run("convert", "stage2-clip", folder / "stage2", folder / "clip2", "--teacher", folder / "clip1",
                   "--slice_encoder", folder / "slices", "--num_slices", 4) == 0  # fmt: skip
    settings = {"language_model": folder / "language_model", "packer_window_size": WINDOW}
    with pytest.raises(ConversionError, match="no stage 1 in .*--stage1"):
        convert_vlm(folder / "vqa.bin", tmp_path / "vlm", stage2=folder / "clip2", **settings)
    convert_vlm(folder / "vqa.bin", tmp_path / "vlm", stage2=folder / "clip2", stage1=folder / "clip1", **settings)
    one, other = (load_file(path / "model.safetensors") for path in (folder / "merged", tmp_path / "vlm"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_without_a_slice_encoder(folder, inputs, tmp_path):
    settings = {"language_model": folder / "language_model", "packer_window_size": WINDOW, "num_slices": 4}
    convert_vlm(folder / "vqa.bin", tmp_path / "vlm", stage2=folder / "stage2", slice_encoder=None, **settings)
    model, other = (AutoModel.from_pretrained(path).eval() for path in (tmp_path / "vlm", folder / "merged"))
    assert model.slice_encoder is None
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    check_fingerprint(tmp_path / "vlm")


def test_generation_is_greedy_and_ends_where_the_public_evaluation_does(folder):
    generation_config = AutoModel.from_pretrained(folder / "merged").generation_config
    assert generation_config.eos_token_id == generation_config.pad_token_id == 0
    assert not generation_config.do_sample


def test_what_the_folder_holds(folder):
    files = {str(path.relative_to(folder / "base")) for path in (folder / "base").rglob("*") if path.is_file()}
    assert {f"adapters/{name}/adapter_{file}" for name in ("reports", "vqa") for file in ("config.json",
            "model.safetensors")} <= files  # fmt: skip
    for path in (folder / "base").rglob("*.json"):
        assert str(folder) not in path.read_text(), path.name
    report = json.loads((folder / "merged/conversion.json").read_text())
    assert {part["what"] for part in report["parts"]} == {"CLIP", "frozen stage 1", "packers and LoRA"}
    assert any("embeddings cut from 410 to" in note for note in report["notes"])
    processor = AutoProcessor.from_pretrained(folder / "base")
    assert processor.prompt("Why?") == "<|endoftext|><image>Why?" and processor.prompt_style == "plain"
    assert processor.image_seq_length == 2 * 4 * 2 * 2


def test_incomplete_adapters_are_refused(folder, tmp_path):
    convert_vlm_adapter(folder / "vqa.bin", tmp_path / "adapter", base=folder / "base")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    for name in ("multi_modal_projector.local_packer.fc2.bias", "language_model.layers.3.mlp.down_proj.lora_B.weight"):
        full_name = f"base_model.model.model.{name}"
        save_file({key: tensor for key, tensor in tensors.items() if key != full_name}, file)
        base = AutoModel.from_pretrained(folder / "base")
        with pytest.raises(ValueError, match=f"Adapter 'vqa' does not fit.* 1 tensor.*{name}: expected .*, got None"):
            load_adapters(base, {"vqa": tmp_path / "adapter"})
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    with pytest.raises(ValueError, match="its own packers.*got None"):
        load_adapters(AutoModel.from_pretrained(folder / "base"), {"vqa": tmp_path / "adapter"})
    with pytest.raises(ValueError, match="at least one adapter"):
        load_adapters(base, {})


def test_options_that_do_not_go_together(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("convert", "vlm", folder / "vqa.bin", tmp_path / "x", "--base", folder / "base", "--stage2", "y")
    assert "these have no use: stage2" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("convert", "vlm", folder / "vqa.bin", tmp_path / "x")
    assert "Expected --stage2" in capsys.readouterr().err
    torch.save({"a": torch.ones(1)}, tmp_path / "other.bin")
    with pytest.raises(ConversionError, match="no tensor named .*lora_A"):
        convert_vlm_adapter(tmp_path / "other.bin", tmp_path / "x", base=folder / "base")


def test_the_command_line_takes_an_adapter(folder, tmp_path, capsys):
    path = tmp_path / "scan.nii.gz"
    array = np.rint(tiny.scan(shape=(40, 80, 80))).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([-2.0, -2.0, 5.0, 1.0])), path)

    def report(model: str, *options: str) -> dict:
        command = ["report", str(folder / model), str(path), "--max_new_tokens", "12", "--json", *options]
        assert main(command) == 0
        return json.loads(capsys.readouterr().out)

    merged = report("merged")
    adapted = report("base", "--adapter", str(folder / "base/adapters/vqa"))
    assert adapted["text"] == merged["text"] != report("base")["text"]
    for adapter in ("reports", "vqa"):
        command = ["report", str(folder / "merged"), str(path), "--adapter", str(folder / "base/adapters" / adapter)]
        assert main(command) == 1
        assert "was trained on other weights than this model's" in capsys.readouterr().err
    assert adapted["model"]["id"] == "base" and adapted["model"]["adapter"] == "vqa"
    assert adapted["model"]["merged_weights_sha256"] != adapted["model"].get("weights_sha256")
