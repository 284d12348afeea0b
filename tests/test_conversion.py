"""Released checkpoints convert completely or with an error that names the tensor, and compute the same."""

import json
import pickle
import shutil

import numpy as np
import open_clip
import pytest
import released
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_hub import run_elsewhere
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from configuration_hsenet import HSENetConfig
from hsenet import HSENetImageProcessor, HSENetVisionModel, read_volume
from hsenet import checkpoint_files as hsenet_files
from hsenet.checkpoint_files import Checkpoint, read_checkpoint
from hsenet.checkpoint_names import STAGE1_CLIP, STAGE2_CLIP, TEACHER_PREFIX, VLM_ADAPTER
from hsenet.cli import main
from hsenet.conversion import convert_clip, stage1_in_stage2, stage1_model, stage2_model
from hsenet.conversion_output import Report
from hsenet.conversion_slices import read_slice_encoder
from hsenet.conversion_vlm import read_adapter
from hsenet.losses import (
    consistency_weight,
    global_similarity,
    image_text_contrastive_loss,
    semantic_consistency_loss,
)
from hsenet.name_table import Computed, ConversionError, NameTable, rename


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


# Names and shapes, all of them


def test_stage1_at_its_true_size():
    report = Report("stage1-clip")
    model = stage1_model(Checkpoint(released.meta_tensors("stage1_clip")), report)
    (part,) = report.parts
    assert part["source_tensors"] == 342 and len(part["dropped"]) == 2
    assert set(part["dropped"]) == {f"language_encoder.pooler.dense.{leaf}" for leaf in ("weight", "bias")}
    assert model.num_parameters() == 198_052_609 - (768 * 768 + 768)


def test_stage2_at_its_true_size():
    checkpoint, report = Checkpoint(released.meta_tensors("stage2_clip")), Report("stage2-clip")
    with torch.device("meta"):
        slices = HSENetVisionModel(tiny.clip_model("slices").config.slice_config.__class__(
            image_size=(1, 224, 224), patch_size=(1, 16, 16), num_channels=3, qkv_bias=True, layer_norm_eps=1e-6
        ))  # fmt: skip
    model = stage2_model(checkpoint, report, slices)
    teacher = stage1_in_stage2(checkpoint, report, keep=False)
    assert sum(part["source_tensors"] for part in report.parts) == 696
    assert len(report.parts[1]["dropped"]) == 342
    pooler = 768 * 768 + 768
    encoders = model.num_parameters() - slices.num_parameters() + teacher.num_parameters()
    assert encoders == 398_469_891 - 2 * pooler
    assert model.config.vision_config.scorer_residual == "projected_query"


def test_vlm_at_its_true_size():
    report = Report("vlm")
    tensors, peft_config = read_adapter(
        Checkpoint(released.meta_tensors("vlm_trained_only")), HSENetConfig(), 32, report
    )
    assert len(tensors) == report.parts[0]["source_tensors"] == 284 and peft_config.r == 16
    assert sum(tensor.numel() for tensor in tensors.values()) == 51_401_728


def changed(tensors: dict, name: str, change: str) -> dict:
    tensor = tensors[name]
    others = {key: value for key, value in tensors.items() if key != name}
    if change == "removed":
        return others
    if change == "renamed":
        return {**others, f"{name}_": tensor}
    return {**others, name: torch.empty((*tensor.shape, 2), device="meta")}


@pytest.fixture(scope="module")
def layouts() -> dict:
    """Of each released file: its tensors, its table, and the model's tensors."""
    stage1 = stage1_model(Checkpoint(released.meta_tensors("stage1_clip")), Report("")).state_dict()
    stage2 = released.meta_tensors("stage2_clip")
    teacher = {name: tensor for name, tensor in stage2.items() if name.startswith(TEACHER_PREFIX)}
    own = {name: tensor for name, tensor in stage2.items() if name not in teacher}
    guided = stage2_model(Checkpoint(stage2), Report("")).state_dict()
    vlm = released.meta_tensors("vlm_trained_only")
    adapter = read_adapter(Checkpoint(vlm), HSENetConfig(), 32, Report(""))[0]
    return {
        "stage1": (released.meta_tensors("stage1_clip"), STAGE1_CLIP, stage1),
        "stage2": (own, STAGE2_CLIP, guided),
        "teacher": (teacher, STAGE1_CLIP.under(TEACHER_PREFIX, ""), stage1),
        "vlm": (vlm, VLM_ADAPTER, adapter),
    }


@pytest.mark.parametrize("change", ["removed", "renamed", "reshaped"])
@pytest.mark.parametrize("layout", ["stage1", "stage2", "teacher", "vlm"])
def test_one_wrong_tensor_is_named(layout, change, layouts):
    tensors, table, expected = layouts[layout]
    middle = [f".{number}." for number in range(1, 31)]  # of the layers, the first and last are enough
    names = [name for name in tensors if not any(part in name for part in middle) or ".11." in name]
    assert len(names) > 30
    for name in names:
        with pytest.raises(ConversionError) as error:
            rename(changed(tensors, name, change), table, expected)
        message = str(error.value)
        words = {"removed": f"{name} is missing", "renamed": f"{name}_ of shape", "reshaped": f"{name}: expected"}
        assert words[change] in message
        assert change == "renamed" or "in 1 place(s)" in message
        if change == "reshaped":
            assert str((*tensors[name].shape, 2)) in message


def test_a_table_without_a_row_is_an_error():
    table = NameTable({"a": "b"}, (Computed(("c", "d"), ("e",), lambda c, d: (c + d,)),))
    expected = {name: torch.zeros(2) for name in ("b", "e", "f")}
    tensors = {name: torch.ones(2) for name in ("a", "c", "d")}
    with pytest.raises(ConversionError, match="nothing in this layout gives f"):
        rename(tensors, table, expected)
    del expected["f"]
    assert rename(tensors, table, expected).state["e"].tolist() == [2, 2]
    with pytest.raises(ConversionError, match=r"c and d: expected what becomes e of shape \(2,\), got shape .*\(3,\)"):
        rename({**tensors, "d": torch.ones(3)}, table, expected)


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_a_scale_without_logarithm_is_refused(scale):
    tensors = {**released.meta_tensors("stage1_clip"), "logit_scale": torch.tensor(scale)}
    with pytest.raises(ConversionError, match=f"logit_scale.*positive scale, got {scale}"):
        stage1_model(Checkpoint(tensors), Report(""))


# Files


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in ("stage1", "stage2", "slices", "language_model"):
        (folder / name).mkdir()
    released.write_clip(folder / "stage1", "stage1_clip")
    released.write_clip(folder / "stage2", "stage2_clip")
    released.write_slice_encoder(folder / "slices")
    released.write_language_model(folder / "language_model")
    released.write_vlm_file(folder / "reports.bin")
    released.write_vlm_file(folder / "vqa.bin", seed=1)
    return folder


def test_weights_files(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    torch.save(tensors, tmp_path / "model_params.bin")
    assert read_checkpoint(tmp_path).tensors.keys() == tensors.keys()
    save_file({"a": tensors["a"]}, tmp_path / "one.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert torch.equal(read_checkpoint(tmp_path).tensors["b"], tensors["b"])
    assert read_checkpoint(tmp_path / "one.safetensors").tensors.keys() == {"a"}
    for weight_map, words in (
        ({"a": "one.safetensors"}, None),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "c is in the index but not in one.safetensors"),
        ({"b": "one.safetensors"}, "a is not in the index but in one.safetensors"),
        ({"a": "three.safetensors"}, "names three.safetensors, which is not there"),
        ({"a": "../one.safetensors"}, "outside its folder: ../one.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        if words is not None:
            with pytest.raises(ConversionError, match=words):
                read_checkpoint(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-1])
    with pytest.raises(ConversionError, match="cut.safetensors is not a complete safetensors file"):
        read_checkpoint(tmp_path / "cut.safetensors")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "model_params.bin").read_bytes()[:-100])
    with pytest.raises(ConversionError, match="cut.bin is not a complete PyTorch file"):
        read_checkpoint(tmp_path / "cut.bin")
    torch.save({"state_dict": tensors}, tmp_path / "nested.bin")
    with pytest.raises(
        ConversionError, match="Expected a tensor for each name in nested.bin, got dict for 'state_dict'"
    ):
        read_checkpoint(tmp_path / "nested.bin")
    with pytest.raises(ConversionError, match="Hub id like owner/name, got 'nowhere'"):
        read_checkpoint("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="Expected one of model.safetensors"):
        read_checkpoint(tmp_path / "empty")


class Trap:
    def __reduce__(self):
        return pytest.fail, ("code of the file ran",)


@pytest.mark.parametrize("plain", [False, True])
def test_a_file_that_runs_code_is_refused(plain, tmp_path):
    contents = {"a": torch.ones(2), "b": Trap()}
    if plain:
        (tmp_path / "trap.bin").write_bytes(pickle.dumps(contents, protocol=2))
    else:
        torch.save(contents, tmp_path / "trap.bin")
    with pytest.raises(ConversionError, match="trap.bin holds more than tensors.*refused"):
        read_checkpoint(tmp_path / "trap.bin")


def test_hub_ids(sources, tmp_path, monkeypatch):
    """The Hub itself is replaced by a folder."""
    repository, asked = tmp_path / "abc123", []
    shutil.copytree(sources / "stage1", repository / "clip")

    def hf_hub_download(name, file, revision):
        asked.append(file)
        if not (repository / file).exists():
            raise hsenet_files.EntryNotFoundError(file)

    monkeypatch.setattr(hsenet_files, "snapshot_download", lambda name, revision, allow_patterns: str(repository))
    monkeypatch.setattr(hsenet_files, "hf_hub_download", hf_hub_download)
    checkpoint = read_checkpoint("someone/weights/clip")
    assert checkpoint.config["model_type"] == "m3d_clip_stage1" and len(checkpoint.tensors) == 342
    assert checkpoint.label == "someone/weights/clip at abc123: model.safetensors"
    assert asked == ["clip/model.safetensors.index.json", "clip/model.safetensors"]
    assert len(read_checkpoint("someone/weights/clip/model.safetensors").tensors) == 342
    with pytest.raises(ConversionError, match="found none"):
        read_checkpoint("someone/weights/other")

    def unreachable(name, revision, allow_patterns):
        raise hsenet_files.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hsenet_files, "snapshot_download", unreachable)
    with pytest.raises(ConversionError, match="someone/weights is not in its local cache: give a local folder"):
        read_checkpoint("someone/weights")


def test_nothing_half_written_stays(sources, tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("no space left")

    monkeypatch.setattr("hsenet.conversion_output.store_fingerprint", fail)
    assert run("convert", "stage1-clip", sources / "stage1", tmp_path / "output") == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "output").mkdir()
    (tmp_path / "output/mine").write_text("kept")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_clip("stage1-clip", sources / "stage1", tmp_path / "output")
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "mine"]


# Whole models, through the command


def raw_logits(model, text_model, tensors: dict, inputs: dict, prefix: str = "") -> torch.Tensor:
    """As the public code computes them: projected tokens normalised, then times the scale as it is."""
    states = model.vision_model(inputs["pixel_values"], inputs.get("slice_features")).last_hidden_state
    texts = text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    embeds = []
    for name, tokens in (("mm_vision_proj", states), ("mm_language_proj", texts)):
        projected = tokens @ tensors[f"{prefix}{name}.weight"].t() + tensors[f"{prefix}{name}.bias"]
        embeds.append(nn.functional.normalize(projected, dim=-1)[:, 0])
    return tensors[f"{prefix}logit_scale"] * embeds[0] @ embeds[1].t()


def reference_bert(tensors: dict, prefix: str) -> BertModel:
    model = BertModel(BertConfig(**released.TEXT)).eval()
    model.load_state_dict({name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)})
    return model


LOGITS = """
import json, torch
from transformers import AutoModel, AutoProcessor
folder, inputs = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
outputs = model(**torch.load(inputs))
assert type(model).__module__.startswith("transformers_modules.") and not any(name in sys.modules for name in names)
print(json.dumps((outputs.logits_per_image if "logits_per_image" in outputs else outputs.logits).tolist()))
"""


@pytest.mark.parametrize("kind", ["stage1-clip", "m3d-clip", "stage2-clip"])
def test_clip_computes_the_same(kind, sources, tmp_path, capsys):
    source = sources / ("stage2" if kind == "stage2-clip" else "stage1")
    options = ["--slice_encoder", sources / "slices", "--num_slices", 4] if kind == "stage2-clip" else []
    if kind == "stage2-clip":
        options += ["--teacher", tmp_path / "teacher"]
    assert run("convert", kind, source, tmp_path / "clip", *options) == 0
    printed = capsys.readouterr().out
    assert "dropped, 2: never used" in printed and "computed, 1: logarithm" in printed and "\nfingerprint " in printed
    model, processor = (auto.from_pretrained(tmp_path / "clip") for auto in (AutoModel, AutoProcessor))
    inputs = dict(processor(text=tiny.SENTENCES[:3], return_tensors="pt"))
    inputs["pixel_values"] = torch.rand(2, 1, *tiny.IMAGE_SIZE)
    if kind == "stage2-clip":
        inputs["slice_features"] = torch.rand(2, 4, 32)
    tensors = load_file(source / "model.safetensors")
    bert = reference_bert(tensors, "language_encoder.")
    logits = model(**inputs).logits_per_image
    torch.testing.assert_close(logits, raw_logits(model, bert, tensors, inputs), atol=1e-5, rtol=0)
    if kind == "stage2-clip":
        teacher = AutoModel.from_pretrained(tmp_path / "teacher")
        assert json.loads((tmp_path / "teacher/config.json").read_text())["guidance"] == "none"
        bert = reference_bert(tensors, f"{TEACHER_PREFIX}language_encoder.")
        del inputs["slice_features"]
        expected = raw_logits(teacher, bert, tensors, inputs, TEACHER_PREFIX)
        torch.testing.assert_close(teacher(**inputs).logits_per_image, expected, atol=1e-5, rtol=0)
        inputs["slice_features"] = torch.rand(2, 4, 32)
        logits = model(**inputs).logits_per_image
    if kind != "stage2-clip":  # one fresh process is enough for all three
        return
    torch.save(inputs, tmp_path / "inputs.pt")
    values = run_elsewhere(LOGITS, tmp_path / "elsewhere", tmp_path / "clip", tmp_path / "inputs.pt")
    torch.testing.assert_close(torch.tensor(values), logits, atol=1e-6, rtol=0)


def stage2_loss(tensors: dict, images: torch.Tensor, texts: torch.Tensor, frozen: tuple, step: int) -> torch.Tensor:
    """The public code's: unit features of stage 2 and of the frozen stage 1, the file's own scale."""
    scale = tensors["logit_scale"]
    logits, teacher = scale * images @ texts.T, scale * frozen[0] @ frozen[1].T
    labels = torch.arange(len(logits))
    contrastive = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2
    weight = 0.1 * (1 - step / 5000) if step < 5000 else 0.0
    return contrastive + weight * ((logits - teacher) ** 2).mean()


@torch.no_grad()
def test_stage2_without_a_slice_encoder(sources, tmp_path, monkeypatch, capsys):
    """Cached features of another width than the encoder's, no slice encoder, no network; up to the training loss."""
    monkeypatch.setattr(hsenet_files, "snapshot_download", None)
    shutil.copytree(sources / "stage2", tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    for part in ("Wk", "Wv"):
        name = f"vision_encoder.slice_guided_attention.{part}.weight"
        tensors[name] = tensors[name][:, :20].contiguous()
    save_file(tensors, tmp_path / "source/model.safetensors")
    options = ("--slice_encoder", "none", "--num_slices", 5, "--teacher", tmp_path / "teacher")
    assert run("convert", "stage2-clip", tmp_path / "source", tmp_path / "clip", *options) == 0
    assert "takes cached slice_features (volumes, 5, 20) instead of slices" in capsys.readouterr().out
    assert run("fingerprint", tmp_path / "clip", "--check") == 0
    model, teacher = (AutoModel.from_pretrained(tmp_path / name) for name in ("clip", "teacher"))
    assert model.slice_encoder is None and model.config.slice_config is None
    processor = AutoProcessor.from_pretrained(tmp_path / "clip")
    inputs = dict(processor(text=tiny.SENTENCES[:3], return_tensors="pt"))
    inputs["pixel_values"], features = torch.rand(3, 1, *tiny.IMAGE_SIZE), torch.rand(3, 7, 20)
    outputs, frozen = model(**inputs, slice_features=features), teacher(**inputs)
    bert = reference_bert(tensors, "language_encoder.")
    expected = raw_logits(model, bert, tensors, {**inputs, "slice_features": features})
    torch.testing.assert_close(outputs.logits_per_image, expected, atol=1e-5, rtol=0)
    embeds = [(each.image_embeds, each.text_embeds) for each in (outputs, frozen)]
    similarity, anchor = (global_similarity(*pair) for pair in embeds)
    scale = model.logit_scale.exp()
    contrastive = image_text_contrastive_loss(similarity, scale)
    consistency = semantic_consistency_loss(similarity, anchor, scale)
    for step in (0, 1000, 2500, 4999, 5000, 7000):
        loss = contrastive + consistency_weight(step, 0.1, "linear_decay", 5000) * consistency
        torch.testing.assert_close(loss, stage2_loss(tensors, *embeds[0], embeds[1], step), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no 2D encoder of slices.*pass cached slice_features"):
        model(**inputs, slice_pixel_values=torch.rand(3, 5, 3, 16, 16))
    assert processor.image_processor.num_slices == 0
    assert set(processor(volumes=tiny.scan(), affine=np.eye(4))) == {"pixel_values"}


def test_a_configuration_that_names_code_does_not_ask_to_run_it(sources, tmp_path, monkeypatch):
    shutil.copytree(sources / "stage1", tmp_path / "m3d")
    config = json.loads((tmp_path / "m3d/config.json").read_text())
    auto_map = {"AutoConfig": "configuration_m3d_clip.M3DCLIPConfig", "AutoModel": "modeling_m3d_clip.M3DCLIP"}
    (tmp_path / "m3d/config.json").write_text(json.dumps({**config, "model_type": "m3d_clip", "auto_map": auto_map}))
    asked = []
    monkeypatch.setattr("builtins.input", asked.append)
    assert run("convert", "m3d-clip", tmp_path / "m3d", tmp_path / "clip") == 0
    assert not asked and (tmp_path / "clip/tokenizer.json").exists()


def test_tokenizer_of_words_alone(tmp_path):
    """BERT's as transformers 4 left it beside the released CLIPs, without tokenizer.json."""
    released.write_clip(tmp_path, "stage1_clip", tokenizer=False)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "pleural", "ef", "##fusion", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer",
              "extra_special_tokens": {}, "do_basic_tokenize": True, "never_split": None}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert run("convert", "stage1-clip", tmp_path, tmp_path / "clip") == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "clip")
    assert processor(text="No pleural effusion.")["input_ids"] == [[2, 5, 6, 7, 8, 9, 3]]


def test_what_a_converted_folder_holds(sources, tmp_path, capsys):
    arguments = ("--slice_encoder", sources / "slices", "--num_slices", 4, "--dtype", "bfloat16")
    assert run("convert", "stage2-clip", sources / "stage2", tmp_path / "clip", *arguments) == 0
    report = json.loads((tmp_path / "clip/conversion.json").read_text())
    names = released.shapes("stage2_clip").keys()
    seen = [name for part in report["parts"] for row in part["mapped"] for name in row["sources"]]
    dropped = {name: reason for part in report["parts"] for name, reason in part["dropped"].items()}
    assert sorted([*seen, *dropped]) == sorted(names)
    assert dropped[f"{TEACHER_PREFIX}logit_scale"] == "the frozen stage 1, which only training needs"
    assert report["fingerprint"] == json.loads((tmp_path / "clip/fingerprint.json").read_text())["hash"]
    for file in (tmp_path / "clip").iterdir():
        assert str(sources).encode() not in file.read_bytes(), file.name
        assert file.stat().st_mode & 0o044 == 0o044, file.name
    assert {tensor.dtype for tensor in load_file(tmp_path / "clip/model.safetensors").values()} == {torch.bfloat16}
    image_processor = HSENetImageProcessor.from_pretrained(tmp_path / "clip")
    expected = HSENetImageProcessor.released(image_size=tiny.IMAGE_SIZE, num_slices=4, slice_size=tiny.SLICE_SIZE)
    assert {**image_processor.to_dict(), "auto_map": None} == {**expected.to_dict(), "auto_map": None}


def test_text_encoder_and_tokenizer_from_elsewhere(sources, tmp_path):
    (tmp_path / "bare").mkdir()
    released.write_clip(tmp_path / "bare", "stage1_clip", tokenizer=False)
    config = json.loads((tmp_path / "bare/config.json").read_text())
    (tmp_path / "bare/config.json").write_text(json.dumps({**config, "language_model_name_or_path": "/nowhere"}))
    arguments = ("convert", "stage1-clip", tmp_path / "bare", tmp_path / "clip")
    assert run(*arguments) == 1  # not bert-base-uncased
    bert = tmp_path / "bare/bert/config.json"
    assert run(*arguments, "--text_config", bert, "--tokenizer", tmp_path / "bare/bert") == 1  # a configuration alone
    assert not (tmp_path / "clip").exists()
    assert run(*arguments, "--text_config", bert) == 0
    assert "tokenizer.json" not in [path.name for path in (tmp_path / "clip").iterdir()]
    HSENetImageProcessor.from_pretrained(tmp_path / "clip")


# The 2D encoder


def randomize(model: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def pictures(size: int) -> torch.Tensor:
    """Slices (2, 3, size, size) of a scan, as BiomedCLIP sees them."""
    processor = HSENetImageProcessor(image_size=tiny.IMAGE_SIZE, num_slices=2, slice_size=(size, size))
    return processor.process_volume(read_volume(tiny.scan(), spacing=(3, 1, 1)))["slice_pixel_values"]


def test_biomedclip(tmp_path):
    source = tmp_path / "source"
    BertConfig(**{**released.TEXT, "num_hidden_layers": 1}).save_pretrained(source / "bert")
    tiny.tokenizer().save_pretrained(source / "bert")
    text = {"hf_model_name": str(source / "bert"), "hf_tokenizer_name": str(source / "bert"), "hf_proj_type": "mlp"}
    vision = {"timm_model_name": "vit_base_patch16_224", "timm_model_pretrained": False, "timm_pool": "",
              "timm_proj": "linear", "image_size": 224}  # fmt: skip
    config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": {**text, "context_length": 64}}}
    (source / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": {}}))
    original = open_clip.create_model(f"local-dir:{source}", pretrained_hf=False, load_weights=False).eval()
    randomize(original)
    save_file({k: v.contiguous() for k, v in original.state_dict().items()}, source / "open_clip_model.safetensors")
    assert run("convert", "biomedclip", source, tmp_path / "slices") == 0
    slices = pictures(224)
    with torch.no_grad():
        expected = original.visual.trunk(slices)
        got = AutoModel.from_pretrained(tmp_path / "slices")(slices.unsqueeze(2)).pooler_output
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    dropped = json.loads((tmp_path / "slices/conversion.json").read_text())["parts"][0]["dropped"]
    assert len([name for name in released_trunk(original) if name in dropped]) == 0
    assert "visual.head.proj.weight" in dropped and "logit_scale" in dropped
    tensors = load_file(source / "open_clip_model.safetensors")
    tensors["visual.trunk.pos_embed"] = tensors["visual.trunk.pos_embed"][:, 1:].contiguous()
    save_file(tensors, source / "open_clip_model.safetensors")
    with pytest.raises(ConversionError, match=r"pos_embed: expected .*\(1, 196, 768\), got shape .*\(1, 196, 768\)"):
        read_slice_encoder(source, Report(""))


def released_trunk(model) -> list[str]:
    return [name for name in model.state_dict() if name.startswith("visual.trunk.")]


@pytest.mark.parametrize("model_class", [ViTModel, ViTForImageClassification])
def test_plain_vit(model_class, tmp_path, capsys):
    config = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32,
                       patch_size=8, qkv_bias=model_class is ViTModel, layer_norm_eps=1e-6)  # fmt: skip
    original = model_class(config).eval()
    randomize(original)
    original.save_pretrained(tmp_path / "source")
    assert run("convert", "vit", tmp_path / "source", tmp_path / "slices") == 0
    config = json.loads((tmp_path / "source/config.json").read_text())
    assert config.pop("hidden_act") == "gelu"  # transformers' default, which old files leave out
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert run("convert", "vit", tmp_path / "source", tmp_path / "again", "--json") == 0
    assert capsys.readouterr() == ((tmp_path / "again/conversion.json").read_text(), "")
    assert json.loads((tmp_path / "again/config.json").read_text())["hidden_act"] == "gelu"
    slices = pictures(32)
    vit = original if model_class is ViTModel else original.vit
    expected = vit(slices).last_hidden_state
    got = AutoModel.from_pretrained(tmp_path / "slices")(slices.unsqueeze(2)).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
