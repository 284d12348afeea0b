"""Saved models and processors work from the files alone, in a fresh process without the package; the wheel's files."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

import hsenet
from hsenet import HSENetCLIPModel, HSENetForConditionalGeneration, HSENetProcessor, read_volume
from reading_hsenet import Volume


ROOT = Path(__file__).parent.parent
READING_FILES = ["reading_hsenet.py", "dicom_hsenet.py", "nifti_hsenet.py", "volume_hsenet.py"]
MODEL_FILES = ["configuration_hsenet.py", "modeling_hsenet.py", "attention_hsenet.py", "projectors_hsenet.py"]
HUB_FILES = [*MODEL_FILES, "processing_hsenet.py", "resampling_hsenet.py", *READING_FILES]
QUESTION = "a nodule?"
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    volume = read_volume(tiny.scan(), spacing=(3.0, 1.0, 1.0))
    nibabel.save(nibabel.Nifti1Image(volume.array, volume.affine), path)
    return path


@pytest.fixture(scope="module")
def generation_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    model = tiny.generation_model()
    model.save_pretrained(folder)
    tiny.processor(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny.clip_model("slices").save_pretrained(folder)
    HSENetProcessor(tiny.image_processor(), tiny.tokenizer()).save_pretrained(folder)
    return folder


def answer(model, processor, scan: Path | Volume) -> list[int]:
    inputs = processor(volumes=scan, text=QUESTION, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def embeddings(model, processor, scan: Path | Volume) -> torch.Tensor:
    outputs = model(**processor(volumes=scan, text=tiny.SENTENCES[:2], padding=True, return_tensors="pt"))
    return torch.cat([outputs.image_embeds, outputs.text_embeds])


def without_the_package() -> str:
    """Of a program: editable installations put the repository on the path; a Hub user's has none of its modules."""
    return f"import sys; names = {['hsenet', *(name[:-3] for name in HUB_FILES)]}\n" + (
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in names: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )


def run_elsewhere(program: str, folder: Path, *arguments: Path | str) -> dict | list:
    """Runs a program in a fresh process that has no package, no Hub and no cache; it prints its results as JSON."""
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", without_the_package() + program, *map(str, arguments)]
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


GENERATE = """
import json, torch
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, AutoImageProcessor
)
folder, scan, question, length, again = sys.argv[1:]
length = int(length)

def answer(auto_class, folder):
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    inputs = processor(volumes=scan, text=question, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False)
    return model, processor, tokens[0, inputs["input_ids"].shape[1]:].tolist()

tokens = {}
for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel):
    model, processor, tokens[auto_class.__name__] = answer(auto_class, folder)
assert len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)) == len(processor.tokenizer)
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert image_processor.to_dict() == processor.image_processor.to_dict()
model.save_pretrained(again)
processor.save_pretrained(again)
tokens["again"] = answer(AutoModel, again)[2]
assert not any(name in sys.modules for name in names)
print(json.dumps(tokens))
"""

EMBED = """
import json, torch
from transformers import AutoModel, AutoProcessor
folder, scan, sentences, again = sys.argv[1:]
for source in (folder, again):
    model = AutoModel.from_pretrained(source, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.") and type(model).__name__ == "HSENetCLIPModel"
    inputs = processor(volumes=scan, text=json.loads(sentences), padding=True, return_tensors="pt")
    outputs = model(**inputs)
    if source == folder:
        model.save_pretrained(again)
        processor.save_pretrained(again)
        first = outputs
assert torch.equal(first.image_embeds, outputs.image_embeds)
assert not any(name in sys.modules for name in names)
print(json.dumps(torch.cat([outputs.image_embeds, outputs.text_embeds]).tolist()))
"""


def test_generation_from_the_files_alone(generation_folder, scan, tmp_path):
    model = HSENetForConditionalGeneration.from_pretrained(generation_folder).eval()
    expected = answer(model, HSENetProcessor.from_pretrained(generation_folder), scan)
    assert len(set(expected)) > 1
    arguments = (generation_folder, scan, QUESTION, str(NEW_TOKENS), tmp_path / "again")
    tokens = run_elsewhere(GENERATE, tmp_path / "elsewhere", *arguments)
    names = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "again")
    assert tokens == dict.fromkeys(names, expected)
    # What the loaded classes saved is read by the package as well.
    model = HSENetForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert answer(model, HSENetProcessor.from_pretrained(tmp_path / "again"), scan) == expected
    assert json.loads((tmp_path / "again/config.json").read_text())["auto_map"].keys() >= set(names[:3])


def test_embeddings_from_the_files_alone(clip_folder, scan, tmp_path):
    model = HSENetCLIPModel.from_pretrained(clip_folder).eval()
    expected = embeddings(model, HSENetProcessor.from_pretrained(clip_folder), scan)
    sentences = json.dumps(tiny.SENTENCES[:2])
    values = run_elsewhere(EMBED, tmp_path / "elsewhere", clip_folder, scan, sentences, tmp_path / "again")
    torch.testing.assert_close(torch.tensor(values), expected, atol=1e-6, rtol=0)


def test_saved_files(generation_folder, clip_folder):
    for folder in (generation_folder, clip_folder):
        for name in HUB_FILES:
            assert (folder / name).read_text() == (ROOT / name).read_text()
        assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= set(
            os.listdir(folder)
        )
    config = json.loads((generation_folder / "config.json").read_text())
    model_class = "modeling_hsenet.HSENetForConditionalGeneration"
    auto_classes = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM")
    assert config["auto_map"] == {
        "AutoConfig": "configuration_hsenet.HSENetConfig",
        **dict.fromkeys(auto_classes, model_class),
    }
    assert (generation_folder / "chat_template.jinja").exists()


def test_package_needs_no_remote_code(generation_folder, clip_folder, scan):
    """After `import hsenet` the installed classes load without `trust_remote_code`."""
    processor = AutoProcessor.from_pretrained(generation_folder)
    assert type(processor) is HSENetProcessor
    assert type(processor.image_processor) is hsenet.HSENetImageProcessor
    assert type(AutoImageProcessor.from_pretrained(clip_folder)) is hsenet.HSENetImageProcessor
    answers = []
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto_class.from_pretrained(generation_folder).eval()
        assert type(model) is HSENetForConditionalGeneration
        answers.append(answer(model, processor, scan))
    assert answers[0] == answers[1] == answers[2]
    clip_model = AutoModel.from_pretrained(clip_folder).eval()
    assert type(clip_model) is HSENetCLIPModel
    assert embeddings(clip_model, AutoProcessor.from_pretrained(clip_folder), scan).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_survive_saving(dtype, generation_folder, tmp_path):
    model = tiny.generation_model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded, report = HSENetForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and loaded.dtype == dtype
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {name.split(".")[1] for name in names if name != "lm_head.weight"} == {
        "global_encoder", "local_encoder", "slice_encoder", "multi_modal_projector", "language_model"
    }  # fmt: skip


def test_shared_file_names_without_the_package(tmp_path):
    """The configuration, model and processor modules also import as plain modules, in any order."""
    program = "import processing_hsenet, modeling_hsenet, sys; assert 'hsenet' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)


def test_wheel_holds_the_hub_files_and_the_package(tmp_path):
    """Built from a copy without the caches and outputs that setuptools leaves in the source tree."""
    source = tmp_path / "source"
    source.mkdir()
    tracked = [ROOT / name for name in (*HUB_FILES, "pyproject.toml", "README.md", "LICENSE", "NOTICE.md")]
    tracked += [path for path in (ROOT / "hsenet").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in tracked:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    build = "from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", f"import sys; {build}", str(tmp_path)], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        licenses = {Path(name).name for name in file.namelist() if "/licenses/" in name}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "hsenet").rglob("*.py")}
    data = {str(path.relative_to(ROOT)) for path in tracked if path.parts[-2] == "templates"}
    assert names == {*HUB_FILES, *package, *data}
    assert licenses == {"LICENSE", "NOTICE.md"}
