"""Model cards of tiny runs: they validate, their snippets run, they keep what people wrote, they invent nothing."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import nibabel
import pytest
import released
import stage_runs
import tiny
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from card_validation import validate
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_hub import run_elsewhere

from hsenet.card_checks import check_model_card, snippets
from hsenet.cards import write_model_card
from hsenet.cli import main
from hsenet.conversion_vlm import convert_vlm
from hsenet.metrics.table import as_cell
from hsenet.model_facts import sha256_of
from reading_hsenet import read_volume


ROOT = Path(__file__).parents[1]
PATIENT = "DOE_JANE_19500131"  # in the path of everything
LICENSE = "cc-by-nc-sa-4.0"
DATASET = "Eight | <b>phantoms</b>"


def write_metadata(path: Path, **values) -> None:
    text = path.read_text() if path.exists() else "---\n---\n"
    path.write_text(text.replace("---\n", f"---\n{yaml.safe_dump(values)}", 1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Stages 2 and 3, trained one on the other, and their evaluation."""
    folder = stage_runs.prepare(tmp_path_factory.mktemp(PATIENT))
    names = {"pretty_name": DATASET, "language": "en", "tags": ["synthetic"]}
    write_metadata(folder / "data/README.md", license=LICENSE, **names)
    for name in ("stage1", "slice_encoder"):
        write_metadata(folder / name / "README.md", license=LICENSE, base_model="owner/start")
    settings = {"num_train_epochs": 1, "eval_steps": 1}
    stage_runs.train("stage2", folder, "run2", **settings)
    stage_runs.train("stage3", folder, "run3", **settings, stage2=str(folder / "run2"))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    options = {"dataset": "data", "cache_dir": "cache", "output_dir": "evaluation", "stage2": "run2", "model": "run3"}
    command = [word for name, value in options.items() for word in (f"--{name}", str(folder / value))]
    command += ["--split", "validation", "--num_resamples", "50", "--max_new_tokens", "8", "--temperature", "0.5"]
    arguments, sys.argv = sys.argv, ["evaluate", *command, "--overlap", "bleu-13a"]
    try:
        runpy.run_path(str(ROOT / "train/evaluate.py"), run_name="__main__")
    finally:
        sys.argv = arguments
    return folder


def copied(runs: Path, name: str, target: Path) -> Path:
    return shutil.copytree(runs / name, target, ignore=shutil.ignore_patterns("checkpoints"))


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> Path:
    """Converted weights with an adapter, from files named after a patient."""
    folder = tmp_path_factory.mktemp("converted")
    sources = {"stage2": released.write_clip, "slices": released.write_slice_encoder}
    sources["language_model"] = released.write_language_model
    for name, write in sources.items():
        (folder / name).mkdir()
        write(folder / name, *(["stage2_clip"] if name == "stage2" else []))
    released.write_vlm_file(folder / f"{PATIENT}.bin")
    sizes = {"packer_window_size": (1, 2, 2), "num_slices": 4}
    parts = {name: folder / name for name in ("stage2", "language_model")}
    convert_vlm(
        folder / f"{PATIENT}.bin", folder / "vlm", **parts, slice_encoder=folder / "slices", adapter="a", **sizes
    )
    return folder / "vlm"


@pytest.mark.parametrize("name", ["run2", "run3", "run3/adapter"])
def test_training_programs_leave_whole_cards(runs, name):
    card = card_of(runs / name)
    assert check_model_card(card.content) == []
    assert PATIENT not in card.content and str(ROOT) not in card.content
    assert card.content.count("\n# ") == 1 and "More Information Needed" not in card.content
    assert "### Hardware and time" in card.text
    assert (
        "steps of 3 rows" in card.text
        and "1 process(es) on" in card.text
        and re.search(r"\d min, 1 process", card.text)
    )


def test_card_says_what_it_learned_from(runs):
    card = card_of(runs / "run2")
    # Dataset, stage 1 and slice encoder all have this licence.
    assert card.data.license == LICENSE and card.data.language == "en"
    assert card.data.base_model == ["owner/start"]
    assert "| dataset | Eight \\| &lt;b&gt;phantoms&lt;/b&gt; | cc-by-nc-sa-4.0 |" in card.text
    assert "knows nothing of real disease" in card.text
    # The language model has no card.
    card = card_of(runs / "run3")
    assert card.data.license == "other" and card.data.license_name
    assert "| language model | local, without a name on a card | unknown" in card.text
    # Stage 2 has a record of its run, the stage 1 that was given to it has none.
    assert f"| stage2 | local, without a name on a card | {LICENSE} | {as_cell(DATASET)} |" in card.text
    assert f"| stage1 | local, without a name on a card | {LICENSE} | unknown |" in card.text


def test_sizes_and_preparation_are_the_models(runs):
    card, model = card_of(runs / "run3"), tiny.generation_model()
    tensors = load_file(runs / "run3/model.safetensors")
    assert f"{sum(tensor.numel() for tensor in tensors.values()):,} parameters" in card.text
    encoder = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("model.local_encoder"))
    assert f" {encoder:,} |" in card.text
    depth, height, width = model.config.vision_config.image_size
    assert f"{depth} x {height} x {width} voxels (depth, height, width)" in card.text
    assert "from -1000 to 200 HU" in card.text and f"{tiny.NUM_SLICES} of" in card.text
    for name in ("modeling_hsenet.py", "model.safetensors"):
        assert f"| {name} | {sha256_of(runs / 'run3' / name)} |" in card.text


def test_evaluation_becomes_entries_and_a_table(runs, tmp_path, capsys):
    metrics = json.loads((runs / "evaluation/metrics.json").read_text())
    for name, role in (("run2", "stage2"), ("run3", "model")):
        folder = copied(runs, name, tmp_path / name)
        capsys.readouterr()
        assert main(["card", str(folder), "--evaluation", str(runs / "evaluation"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"written": str(folder / "README.md"), "still_to_do": []}
        card = card_of(folder)
        assert check_model_card(card.content) == [] and PATIENT not in card.content
        values = {result.metric_name: result for result in card.data.eval_results}
        expected = {
            row["score"]: row
            for of_task in metrics["results"].values()
            for row in of_task
            if row["system"] == role and row["score"] in values
        }
        assert len(values) > 5 and {n: r.metric_value for n, r in values.items()} == {
            score: round(row["value"], 4) for score, row in expected.items()
        }
        score = "image_to_text_R@5" if role == "stage2" else "bleu-13a.bleu_4"
        assert values[score].metric_config == expected[score]["protocol"] and values[score].dataset_name == DATASET
        rows = [row for of_task in metrics["results"].values() for row in of_task if row["score"] == score]
        told = values[score].metric_args
        floor = next(row for row in rows if row["system"] == told["best_floor_is"])
        assert (
            told["best_floor"] == round(floor["value"], 4) and f"{floor['value']:.3f}: {floor['system']}" in card.text
        )
        assert told["interval_95"][0] <= values[score].metric_value <= told["interval_95"][1]
        assert validate(card.content, "model") == ([], [])
        assert (
            f"| {score} | {expected[score]['value']:.3f}" in card.text
            and f"| {expected[score]['protocol']} |" in card.text
        )
    assert metrics["verdict"]["text"] in card.text
    assert "another patient's scan" in card.text and "sampled at temperature 0.5" in card.text
    assert metrics["models"]["model"]["sha256"] in card.text


def test_evaluation_stays_with_its_weights(runs, tmp_path):
    folder = copied(runs, "run2", tmp_path / "run2")
    write_model_card(folder, evaluation=runs / "evaluation")
    first = (folder / "README.md").read_text()
    write_model_card(folder)
    assert (folder / "README.md").read_text() == first and "Fingerprint of what it computes" in first
    tensors = load_file(folder / "model.safetensors")
    tensors["visual_projection.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="of other weights"):
        write_model_card(folder, evaluation=runs / "evaluation")
    write_model_card(folder)
    assert card_of(folder).data.eval_results is None and "None of these weights is on record" in card_of(folder).text
    assert "fingerprint that is stored is of other weights" in card_of(folder).text
    assert json.loads((folder / "fingerprint.json").read_text())["hash"] not in card_of(folder).text
    with pytest.raises(FileNotFoundError, match="no metrics.json"):
        write_model_card(folder, evaluation=tmp_path)


def test_what_people_wrote_stays(runs, tmp_path):
    folder = copied(runs, "run2", tmp_path / "run2")
    path = folder / "README.md"
    text = path.read_text()
    text = text.replace(f"license: {LICENSE}", "license: mit\nthumbnail: mine.png").replace("language: en\n", "")
    path.write_text(
        text.replace("<!-- summary", "# My model\n\nMine.\n\n<!-- summary", 1).replace("## Files", "## Fi")
    )
    for _ in range(2):
        write_model_card(folder, repo_id="owner/name")
        card = card_of(folder)
        assert card.data.license == "mit" and card.data.thumbnail == "mine.png" and card.data.language is None
        assert "# My model\n\nMine.\n" in card.text and card.text.count("\n# ") + card.text.startswith("# ") == 1
        assert card.text.count("## Files") == card.text.count("## Training\n") == 1
        assert "hub_id" not in card.text and 'model_id = "owner/name"' in card.text
    (folder / "README.md").write_text("# Only mine\n\nNo metadata, no marks.\n")
    write_model_card(folder)
    assert check_model_card(path.read_text()) == [] and "# Only mine\n\nNo metadata, no marks.\n" in path.read_text()
    path.write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="cannot be read"):
        write_model_card(folder)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json and no adapter_config.json"):
        write_model_card(tmp_path)
    tiny.clip_model().save_pretrained(tmp_path)
    card = ModelCard(write_model_card(tmp_path).read_text())
    assert check_model_card(card.content) == [] and card.data.license == "other"
    for words in (
        "Unknown: nothing beside the weights says what they were trained on",
        "Unknown: there is no record of a run",
        "There is no processor among these files",
        "None of these weights is on record",
        "No fingerprint is stored",
    ):
        assert words in card.text
    assert card.data.eval_results is None and "apache" not in card.content


def test_conversions_leave_cards(vlm, monkeypatch, capsys):
    card = card_of(vlm)
    assert check_model_card(card.content) == [] and PATIENT not in card.content
    assert "Converted from released weights" in card.text and "a local file" in card.text
    assert json.loads((vlm / "fingerprint.json").read_text())["hash"] in card.text
    assert "Adapters in this repository: `adapters/a`" in card.text and "as stored" in card.text
    adapter = card_of(vlm / "adapters/a")
    assert check_model_card(adapter.content) == [] and "LoRA of the language model" in adapter.text
    monkeypatch.chdir(vlm / "adapters/a")
    values = {}
    exec(snippets(adapter.text)[0], values)
    assert type(values["model"]).__name__ == "HSENetForConditionalGeneration"
    published = write_model_card(vlm / "adapters/a", repo_id="owner/adapter").read_text()
    assert '{"adapter": model_id}, revision=revision)' in snippets(published)[0]
    assert "trust_remote_code" not in published and "needs the package" in published


RUN = """
import contextlib, io, json, os
said = []
for folder in sys.argv[1:]:
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(open("snippet.py").read(), {})
    said.append(output.getvalue())
print(json.dumps(said))
"""


def test_snippets_run(runs, tmp_path):
    """In a fresh process without the package, on a NIfTI file."""
    volume = read_volume(tiny.scan(), spacing=(3.0, 1.0, 1.0))
    folders = [copied(runs, name, tmp_path / name) for name in ("run2", "run3", "stage1", "slice_encoder")]
    for folder in folders:
        write_model_card(folder)
        nibabel.save(nibabel.Nifti1Image(volume.array, volume.affine), folder / "scan.nii.gz")
        (snippet,) = snippets((folder / "README.md").read_text())
        (folder / "snippet.py").write_text(snippet)
    retrieval, report, stage1, encoder = run_elsewhere(RUN, tmp_path / "elsewhere", *folders)
    assert "torch.Size([1, 16]) torch.Size([2, 16])" in retrieval and "torch.Size([1, 16])" in stage1
    assert len(report.strip()) > 5 and "torch.Size" in encoder


def test_models_without_a_slice_encoder_say_what_they_take(tmp_path, monkeypatch):
    model = tiny.clip_model("slices")
    model.slice_encoder = model.config.slice_config = None
    width = model.config.vision_config.slice_hidden_size
    model.save_pretrained(tmp_path)
    tiny.image_processor(num_slices=0).save_pretrained(tmp_path)
    write_model_card(tmp_path)
    volume = read_volume(tiny.scan(), spacing=(3.0, 1.0, 1.0))
    nibabel.save(nibabel.Nifti1Image(volume.array, volume.affine), tmp_path / "scan.nii.gz")
    torch.save(torch.rand(1, model.config.num_slices, width), tmp_path / "slice_features.pt")
    (snippet,) = snippets((tmp_path / "README.md").read_text())
    assert f"(volumes, {model.config.num_slices}, {width})" in snippet and "AutoImageProcessor" in snippet
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


def test_problems_of_a_card(runs):
    text = (runs / "run2/README.md").read_text()
    for old, new, words in (
        ("Not a medical device.", "A device.", "it does not say 'Not a medical device.'"),
        (f"license: {LICENSE}\n", "", "no license in the metadata"),
        (f"license: {LICENSE}\n", "license: other\n", '"other" without a license_name'),
        ("## Known failures and limits", "## Known", "no section 'Known failures and limits'"),
        ("```python", "```", "no Python snippet"),
        ("tags:\n- hsenet", "tags:\n- 3", "tags of the metadata should be names"),
        (
            "---\n",
            "---\nmodel-index: [{name: a, results: [{task: 1}]}]\n",
            "the metadata between the --- lines cannot be",
        ),
        ("## Citation", "/home/jane/scans\n## Citation", "a path of a local folder"),
    ):
        assert old in text
        assert words in " ".join(check_model_card(text.replace(old, new, 1)))


@pytest.mark.parametrize("text", ["=1+2", "+1", "-1+2", "@SUM(A1)"])
def test_cells_are_no_formulas(text):
    assert as_cell(text) == f"\\{text}"


def test_citation_is_that_of_the_package(runs):
    article = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]
    text = card_of(runs / "run2").text
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in article["authors"])
    assert f"title = {{{article['title']}}}" in text and f"author = {{{names}}}" in text
