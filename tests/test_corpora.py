"""Public corpora, in tiny copies of their published layouts, from raw files to a training step and an evaluation."""

import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpora
import fake_hub
import fsspec
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from card_validation import validate
from datasets import get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard

from hsenet.card_checks import check_dataset_card, snippets
from hsenet.collators import ContrastiveCollator, ReportCollator
from hsenet.corpora import Corpus, CorpusError
from hsenet.corpora.schema import REPORT
from hsenet.corpora.volumes import coarser
from hsenet.data import VolumeRows, generation_rows, load_rows, one_per_study, report_text
from hsenet.digests import content_hash
from hsenet.evaluation import evaluate_retrieval, generate_answers
from hsenet.losses import global_similarity, image_text_contrastive_loss
from hsenet.scans import read_scan
from hsenet.scoring import program
from hsenet.volume_cache import cache_volumes
from reading_hsenet import UnsupportedImageError, Volume, read_volume


SCRIPTS = Path(__file__).parents[1] / "datasets_scripts"
M3D_ASSUMED = ["--window", "-160", "240", "--slice-spacing", "8", "4.8", "4.8", "--first-slice", "superior"]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name: str, *arguments: str | Path) -> None:
    """Runs a script in this process, as a command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments), "--workers", "1"])
        script(name).main()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "corpus" not in path.relative_to(folder).parts
    }


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for release in ("ct-rate-v1", "ct-rate-v2"):
        corpora.ct_rate(folder / release, release)
    corpora.radgenome(folder / "radgenome")
    corpora.bimcv_r(folder / "bimcv_r", zipped=False)
    corpora.m3d_cap(folder / "m3d_cap", zipped=False)
    return folder


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory) -> dict[str, Path]:
    """Each corpus as its script builds it."""
    out = tmp_path_factory.mktemp("built")
    ct_rate = ("--validation", "0.4", "--shard-rows", "4")
    v2 = raw / "ct-rate-v2"
    build("build_ct_rate", "--corpus", raw / "ct-rate-v1", "--release", "ct-rate-v1", "--output", out / "v1", *ct_rate)
    reference = ("--release", "ct-rate-v2", "--volumes", "reference")
    build("build_ct_rate", "--corpus", v2, *reference, "--output", out / "v2", *ct_rate)
    annotations = ("--annotations", raw / "radgenome")
    build("build_radgenome_chestct", *annotations, "--corpus", v2, *reference, "--output", out / "radgenome", *ct_rate)
    split = ("--validation", "0.3", "--test", "0.3")
    build("build_bimcv_r", "--corpus", raw / "bimcv_r", "--output", out / "bimcv_r", *split)
    build("build_m3d_cap", "--corpus", raw / "m3d_cap", "--output", out / "m3d_cap", *M3D_ASSUMED)
    build("build_from_table", *table_arguments(out, v2), "--output", out / "table")
    return {name: out / name for name in ("v1", "v2", "radgenome", "bimcv_r", "m3d_cap", "table")}


def table_arguments(folder: Path, corpus: Path) -> list:
    """A table of some of CT-RATE's files, as a hospital might write it."""
    rows = []
    for number, path in enumerate(sorted((corpus / "dataset/train_fixed").rglob("train_[1-7]_a_1.nii.gz"))):
        file, split = str(path.relative_to(corpus)), ("train", "train", "validation", "test")[number % 4]
        rows.append(
            {"file": file, "who": f"Doe^Jane^{number}", "text": corpora.study(number).findings_text, "set": split}
        )
    (folder / "scans.csv").write_text(corpora.table(rows))
    columns = ["--path-column", "file", "--text-column", "text", "--patient-column", "who", "--split-column", "set"]
    return ["--table", folder / "scans.csv", "--corpus", corpus, *columns]


def rows_of(dataset: Path) -> list[dict]:
    splits = [path.stem for path in (dataset / "reports").glob("*.parquet")]
    return [{**row, "split": split} for split in splits for row in load_rows(str(dataset), "reports", split)]


# What is built


def test_both_releases_of_ct_rate_give_the_same_hounsfield_units(built):
    first, second = ({row["volume_name"]: row for row in rows_of(built[name])} for name in ("v1", "v2"))
    assert first.keys() == second.keys() and len(first) == 12
    for name, row in first.items():
        array, affine = corpora.scan(corpora.VOLUMES[name])
        truth = read_volume(array, affine=affine)
        for release in (row, second[name]):
            volume = read_scan(release)
            np.testing.assert_array_equal(volume.array, truth.array)
            np.testing.assert_allclose(volume.affine, truth.affine, atol=1e-3)
            assert release["content_hash"] == content_hash(truth)
        assert row["hu_slope"] is None and second[name]["hu_slope"] is None


def test_stored_values_stay_in_the_file_when_rows_point_to_it(raw, tmp_path):
    arguments = ("--corpus", raw / "ct-rate-v1", "--release", "ct-rate-v1", "--volumes", "reference")
    build("build_ct_rate", *arguments, "--output", tmp_path / "data")
    for row in rows_of(tmp_path / "data"):
        assert row["hu_slope"] == 1 and row["hu_intercept"] in corpora.INTERCEPTS
        assert row["content_hash"] == content_hash(read_scan(row))
        assert read_scan(row).array.min() >= -1024


def test_two_sources_of_hounsfield_units_are_refused(tmp_path):
    content = bytearray(gzip.decompress(corpora.nifti(0)))
    content[112:120] = np.array([1, -1024], dtype="<f4").tobytes()  # scl_slope and scl_inter
    path = tmp_path / "scan.nii"
    path.write_bytes(content)
    with pytest.raises(UnsupportedImageError, match="one source of HU"):
        read_scan({"volume": str(path), "hu_slope": 1.0, "hu_intercept": -1024.0})


def test_ct_rate_rows_hold_what_its_tables_say(built):
    rows = {row["volume_name"]: row for row in rows_of(built["v1"])}
    row, phantom = rows["train_2_a_1"], corpora.study(2)
    assert (row["age"], row["sex"], row["labels"]) == (phantom.age, phantom.sex, list(phantom.labels))
    assert (row["findings"], row["impression"]) == (phantom.findings_text, phantom.impression_text)
    assert row["clinical_information"] is None and row["technique"].startswith("Non-contrast")
    assert rows["train_1_a_2"]["sibling_of"] == "train_1_a_1" and rows["train_1_a_1"]["sibling_of"] is None
    assert {rows["train_2_a_1"]["duplicate_of"], rows["train_4_a_1"]["duplicate_of"]} & {"train_2_a", "train_4_a"}
    assert rows["train_1_a_2"]["duplicate_of"] is None  # a sibling's report is no duplicate
    split = {name: row["split"] for name, row in rows.items()}
    assert {name for name in split if split[name] == "test"} == {"valid_1_a_1", "valid_1_a_2", "valid_2_a_1"}
    assert split["train_1_a_1"] == split["train_1_b_1"] and set(split.values()) == {"train", "validation", "test"}


def test_what_is_left_out_is_listed_with_its_reason(built):
    reasons = {
        name: [line.split(",") for line in (built[name] / "excluded.csv").read_text().splitlines()[1:]]
        for name in ("v1", "bimcv_r", "m3d_cap")
    }
    assert {(name, reason) for name, _, reason in reasons["v1"]} == {
        ("train_8_a_1", "not a chest scan"),
        ("train_9_a_1", "blank header"),
        ("train_10_a_1", "no findings"),
    }
    assert sorted(reason for _, _, reason in reasons["bimcv_r"]) == ["no such file in the corpus", "not a chest scan"]
    assert [reason for _, _, reason in reasons["m3d_cap"]] == ["not an axial series"]


def test_questions_of_every_type_and_region_reports(built):
    questions = load_rows(str(built["radgenome"]), "vqa", "test")
    by_type = {row["question_type"]: row for row in questions if row["volume_name"] == "valid_1_a_1"}
    assert {name: (row["question"], row["answer"]) for name, row in by_type.items()} == {
        "abnormality": ("What is abnormal in the right lung?", "nodule, consolidation"),
        "location": ("Where is the nodule?", "lung/lung/right lung"),
        "presence": ("Is there pleural effusion in this scan?", "no"),
        "size": ("How large is the nodule in the right lung?", "6x4 mm"),
        "region_report": ("Describe the right lung.", "There is a nodule. Ventilation is normal."),
    }
    assert {row["volume_name"] for row in questions} == {"valid_1_a_1", "valid_2_a_1"}
    assert Path(questions[0]["volume"]).exists()
    assert len(load_rows(str(built["radgenome"]), "vqa", "test", 2, ["location"])) == 2
    ours, theirs = ({row["patient_id"]: row["split"] for row in rows_of(built[name])} for name in ("radgenome", "v2"))
    assert ours.items() <= theirs.items()


def test_pictures_get_the_geometry_that_is_assumed(built):
    rows = {row["volume_name"]: row for row in rows_of(built["m3d_cap"])}
    volume = read_scan(rows["ct_case_000001_Axial_non-contrast"])
    array, affine = corpora.scan(1)
    truth = np.clip(read_volume(array, affine=affine).array, -160, 240)
    np.testing.assert_allclose(volume.array, truth, atol=1.5)  # 8 bits, then whole HU
    assert volume.spacing == pytest.approx((8, 4.8, 4.8))
    assert rows["ct_case_000005_Axial_non-contrast"]["split"] == "test"  # the corpus has it in train, too
    fourth = rows["ct_case_000004_Axial_non-contrast"]
    assert fourth["findings"] == " ".join(corpora.study(4).impression_text.split())
    assert (fourth["age"], fourth["sex"], fourth["clinical_information"]) == (60, "F", "Cough.")


def test_names_in_a_table_are_hashed_unless_asked_for(built, raw, tmp_path):
    written = contents(built["table"])
    for secret in (b"Doe^Jane", b"train_2", b"scans.csv"):
        assert [name for name, content in written.items() if secret in content or secret.decode() in name] == []
    arguments = table_arguments(tmp_path, raw / "ct-rate-v2")
    build("build_from_table", *arguments, "--output", tmp_path / "kept", "--no-deidentify")
    assert {row["patient_id"] for row in rows_of(tmp_path / "kept")} == {f"Doe^Jane^{number}" for number in range(7)}


@pytest.mark.parametrize("name", ["v1", "v2", "radgenome", "bimcv_r", "m3d_cap", "table"])
def test_card_and_configurations_load(built, name, monkeypatch, capsys):
    folder = built[name]
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license and card.data.pretty_name and "Leakage" in card.text and "Left out" in card.text
    assert str(folder.parent) not in card.content and "/tmp" not in card.content
    assert check_dataset_card(card.content) == [] and validate(card.content, "dataset") == ([], [])
    monkeypatch.chdir(folder)
    capsys.readouterr()
    (snippet,) = snippets(card.text)
    exec(snippet, {})
    assert next(row for row in rows_of(folder) if row["split"] == "train")["findings"] in capsys.readouterr().out
    configs = get_dataset_config_names(str(folder))
    assert set(configs) >= {"preview", "reports"} and ("vqa" in configs) == (name == "radgenome")
    preview = load_dataset(str(folder), "preview", split="test", streaming=True)
    assert next(iter(preview))["image"].height == 256
    row = next(iter(load_dataset(str(folder), "reports", split="train", streaming=True)))
    assert list(row) == list(REPORT)
    if "volumes" in configs:
        image = next(iter(load_dataset(str(folder), "volumes", split="train", streaming=True)))["volume"]
        assert image.header["descrip"].tobytes().strip(b"\0") == b"" and image.ndim == 3


def test_voxels_are_averaged_to_the_spacing_asked_for(raw, tmp_path):
    volume = Volume(np.arange(8 * 4 * 5, dtype=np.float32).reshape(8, 4, 5), np.diag([1.0, 2.0, 3.0, 1.0]))
    coarse = coarser(volume, (2.5, 2.0, 6.1))
    np.testing.assert_allclose(coarse.array, volume.array[:, :, :4].reshape(4, 2, 4, 2, 2).mean((1, 4)))
    np.testing.assert_allclose(coarse.affine @ [0, 0, 0, 1], [0.5, 0, 1.5, 1])
    assert coarse.spacing == (2.0, 2.0, 6.0)
    sized = ("--spacing", "9", "9.9", "9.9", "--max-patients", "1", "--validation", "0.4")
    arguments = ("--corpus", raw / "ct-rate-v2", "--release", "ct-rate-v2", "--output", tmp_path / "data", *sized)
    build("build_ct_rate", *arguments)
    rows = rows_of(tmp_path / "data")
    assert len({row["patient_id"] for row in rows}) == 3  # one of each split
    assert all(9.9 / 2 < read_scan(row).spacing[1] <= 9.9 for row in rows)


# From far, interrupted, damaged


def to_memory(folder: Path, name: str) -> str:
    files = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"memory://{name}"


def without_source(folder: Path) -> dict[str, bytes]:
    """All but what names the corpus' place."""
    return {name: data for name, data in contents(folder).items() if name not in ("build.json", "README.md")}


def test_corpus_elsewhere_gives_the_dataset_of_the_local_copy(raw, built, tmp_path):
    url = to_memory(raw / "ct-rate-v1", "ct-rate")
    arguments = ("--release", "ct-rate-v1", "--validation", "0.4", "--shard-rows", "4")
    build("build_ct_rate", "--corpus", url, *arguments, "--output", tmp_path / "data")
    assert without_source(tmp_path / "data") == without_source(built["v1"])
    row = rows_of(tmp_path / "data")[0]
    shard, _, number = row["volume"].rpartition("#")
    fsspec.filesystem("memory").pipe_file("/shard.parquet", Path(shard).read_bytes())
    far = read_scan({"volume": f"memory://shard.parquet#{number}"})
    np.testing.assert_array_equal(far.array, read_scan(row).array)
    with pytest.raises(CorpusError, match="REVISION"):
        Corpus("hf://datasets/owner/name")


def test_archives_are_read_member_by_member(built, tmp_path):
    url = to_memory(corpora.bimcv_r(tmp_path / "zips", zipped=True), "bimcv")
    split = ("--validation", "0.3", "--test", "0.3", "--archives", "*.zip")
    build("build_bimcv_r", "--corpus", url, "--output", tmp_path / "bimcv", *split)
    hashes = [
        {row["volume_name"]: row["content_hash"] for row in rows_of(path)}
        for path in (tmp_path / "bimcv", built["bimcv_r"])
    ]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 10
    corpora.m3d_cap(tmp_path / "pictures", zipped=True)
    for _ in range(2):  # again: nothing is left to do
        build("build_m3d_cap", "--corpus", tmp_path / "pictures", "--output", tmp_path / "m3d", *M3D_ASSUMED)
    assert without_source(tmp_path / "m3d") == without_source(built["m3d_cap"])


def test_interrupted_build_goes_on_to_the_same_files(raw, built, tmp_path):
    """Killed once the first shard is there, then with what a kill elsewhere leaves."""
    output = tmp_path / "data"
    arguments = ["--corpus", str(raw / "ct-rate-v1"), "--release", "ct-rate-v1", "--output", str(output)]
    arguments += ["--validation", "0.4", "--shard-rows", "4"]
    process = subprocess.Popen([sys.executable, SCRIPTS / "build_ct_rate.py", *arguments, "--workers", "1"])
    deadline = time.monotonic() + 60
    while not list(output.glob("volumes/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(output.glob("volumes/*.parquet"))
    time.sleep(0.5)  # the workers notice that their parent is gone
    (output / "volumes/.train-00000-of-00002.parquet.77.partial").write_bytes(b"half")
    build("build_ct_rate", *arguments)
    assert contents(output) == contents(built["v1"])

    next(output.glob("volumes/train-*.parquet")).unlink()
    (output / "reports/train.parquet").unlink()
    build("build_ct_rate", *arguments)
    assert contents(output) == contents(built["v1"])
    with pytest.raises(SystemExit, match="was built with"):
        build("build_ct_rate", *arguments, "--spacing", "8", "8", "8")


def test_damaged_scans_end_the_build_unless_some_may(raw, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(raw / "ct-rate-v2", corpus)
    damaged = corpus / "dataset/train_fixed/train_2/train_2_a/train_2_a_1.nii.gz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-100])
    arguments = ["--corpus", corpus, "--release", "ct-rate-v2", "--output", tmp_path / "data"]
    with pytest.raises(SystemExit, match="1 scans could not be read, 0 may") as error:
        build("build_ct_rate", *arguments)
    assert "train_2_a_1: " in str(error.value) and "truncated" in str(error.value)
    build("build_ct_rate", *arguments, "--allow-unreadable", "1")
    assert "train_2_a_1" not in {row["volume_name"] for row in rows_of(tmp_path / "data")}
    shutil.rmtree(tmp_path / "data")
    damaged.unlink()
    build("build_ct_rate", *arguments, "--present-only")
    assert "not in the local copy" in (tmp_path / "data/README.md").read_text()

    shutil.rmtree(tmp_path / "data")
    with pytest.raises(SystemExit, match="not in the corpus"):
        build("build_ct_rate", *arguments)
    damaged.write_bytes(whole)
    build("build_ct_rate", *arguments)  # goes on
    assert "train_2_a_1" in {row["volume_name"] for row in rows_of(tmp_path / "data")}


def test_tables_of_another_layout_are_refused(raw, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(raw / "ct-rate-v2", corpus)
    arguments = ["--corpus", corpus, "--release", "ct-rate-v2", "--output", tmp_path / "data"]
    reports = corpus / "dataset/radiology_text_reports/train_reports.csv"
    text = reports.read_text()
    reports.write_text(text.replace("Findings_EN", "Findings"))
    with pytest.raises(CorpusError, match="has no column Findings_EN"):
        build("build_ct_rate", *arguments)
    reports.write_text(text.replace("train_3_a_1.nii.gz", "scan 3"))
    with pytest.raises(CorpusError, match="names no volume"):
        build("build_ct_rate", *arguments)
    reports.write_bytes(text.replace("Non-contrast", "Sans contraste, é").encode("latin-1"))
    with pytest.raises(CorpusError, match="not in UTF-8"):
        build("build_ct_rate", *arguments)
    reports.unlink()
    with pytest.raises(CorpusError, match="has no dataset/radiology_text_reports/train_reports.csv"):
        build("build_ct_rate", *arguments)


def test_upload_needs_the_scans(raw, tmp_path):
    """What is uploaded: tests/test_publishing.py."""
    arguments = ("--corpus", raw / "ct-rate-v2", "--release", "ct-rate-v2", "--output", tmp_path / "data")
    with pytest.raises(SystemExit, match="no use on the Hub"):
        build("build_ct_rate", *arguments, "--volumes", "reference", "--push-to-hub", "somebody/ct")


# Training and evaluation


def cached(rows: list[dict], folder: Path):
    slices = tiny.generation_model().model.slice_encoder
    return cache_volumes(rows, tiny.image_processor(), slices, folder, Accelerator(cpu=True))


@pytest.mark.parametrize("name", ["v1", "v2", "radgenome", "bimcv_r", "m3d_cap", "table"])
def test_training_step_and_retrieval(built, name, tmp_path):
    train, test = (load_rows(str(built[name]), "reports", split) for split in ("train", "test"))
    test = one_per_study(test)
    for row in train + test:
        row["text"] = report_text(row)
    cache = cached(train + test, tmp_path)
    model = tiny.clip_model()
    tokenizer = tiny.tokenizer(pad_token="[PAD]", cls_token="[CLS]")
    collator = ContrastiveCollator(tokenizer, 64, with_slices=False)
    dataset = VolumeRows(train, cache)
    batch = collator([dataset[index] for index in range(2)])
    batch.pop("index")
    outputs = model(**batch)
    similarity = global_similarity(outputs.image_embeds, outputs.text_embeds)
    image_text_contrastive_loss(similarity, model.logit_scale.exp()).backward()
    gradient = model.vision_model.layers[0].mlp.fc1.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    metrics = evaluate_retrieval(model, VolumeRows(test, cache), collator, 2)
    assert np.isfinite(metrics["loss"]) and 0 <= metrics["image_to_text_R@5"] <= 1


@pytest.mark.parametrize("name", ["v1", "radgenome"])
def test_generation_step_and_answers(built, name, tmp_path):
    reports = load_rows(str(built[name]), "reports", "test")
    questions = load_rows(str(built[name]), "vqa", "test") if name == "radgenome" else []
    cache = cached(reports + questions, tmp_path)
    model = tiny.generation_model()
    processor = tiny.processor(model)
    rows = generation_rows(reports, questions, ("findings",))
    collator = ReportCollator(processor, 400)
    dataset = VolumeRows(rows, cache)
    loss = model(**collator([dataset[0], dataset[len(rows) - 1]])).loss
    loss.backward()
    assert torch.isfinite(loss)
    asked = questions[:2] or [{**reports[0], "question": "What does this chest CT show?"}]
    answers = list(generate_answers(model.eval(), processor, VolumeRows(asked, cache), 2, 4))
    assert len(answers) == len(asked) and all(isinstance(answer, str) for _, answer in answers)


def test_programs_take_a_built_dataset(built, tmp_path):
    """Stage 1 as a user runs it, on rows without questions."""
    settings = {
        "dataset": str(built["bimcv_r"]),
        "output_dir": str(tmp_path / "stage1"),
        "cache_dir": str(tmp_path / "cache"),
        "max_steps": 1,
        "batch_size": 2,
    }
    text_encoder = tmp_path / "text"
    tiny.clip_model().text_model.save_pretrained(text_encoder)
    tiny.tokenizer(pad_token="[PAD]", cls_token="[CLS]").save_pretrained(text_encoder)
    vision = json.dumps(tiny.VISION)
    command = [sys.executable, str(SCRIPTS.parent / "train/stage1.py"), "--text_encoder", str(text_encoder)]
    command += ["--vision_config", vision, "--max_length", "64", "--projection_dim", "16"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "stage1/model.safetensors").exists()


@pytest.mark.parametrize("name", ["v1", "bimcv_r", "radgenome"])
def test_evaluation_with_and_without_questions_and_labels(built, name, tmp_path):
    model = tiny.generation_model()
    model.save_pretrained(tmp_path / "model")
    tiny.processor(model).save_pretrained(tmp_path / "model")
    arguments = program.EvaluationArguments(
        dataset=str(built[name]),
        model=str(tmp_path / "model"),
        tasks=["reports", "vqa"] if name == "radgenome" else ["reports"],
        question_types=["location", "size"],
        output_dir=str(tmp_path / "evaluation"),
        cache_dir=str(tmp_path / "cache"),
        max_new_tokens=4,
    )
    program.evaluate(arguments)
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert metrics["num_studies"] >= 1 and metrics["model"]["report"]["num_reports"] == metrics["num_studies"]
    assert metrics["num_questions"] == (4 if name == "radgenome" else 0)


FROM_THE_HUB = """
import json, sys
sys.path.insert(0, {scripts!r})
import build_ct_rate
from hsenet.digests import content_hash
from hsenet.data import load_rows
from hsenet.scans import read_scan

corpus = "hf://datasets/someone/CT-RATE@{sha}"
sys.argv = ["build_ct_rate.py", "--corpus", corpus, "--release", "ct-rate-v2", "--output", {output!r}]
sys.argv += ["--validation", "0.4", "--shard-rows", "4", "--workers", "1"]
build_ct_rate.main()
rows = load_rows("someone/built", "reports", "test")
print("RESULT", json.dumps([[row["content_hash"], content_hash(read_scan(row)), row["volume"]] for row in rows[:2]]))
"""


def test_hub_is_read_file_by_file(raw, built, tmp_path):
    """In a fresh process, since huggingface_hub reads its settings when it is imported."""
    repositories = tmp_path / "hub/someone"
    shutil.copytree(raw / "ct-rate-v2", repositories / "CT-RATE")
    shutil.copytree(built["v1"], repositories / "built")
    program = FROM_THE_HUB.format(scripts=str(SCRIPTS), sha=fake_hub.SHA, output=str(tmp_path / "data"))
    with fake_hub.serve(tmp_path / "hub") as (endpoint, transferred):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {name: data for name, data in without_source(tmp_path / "data").items() if "volumes" in name} == {
        name: data for name, data in without_source(built["v1"]).items() if "volumes" in name
    }
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
    assert all(said == found for said, found, _ in result)
    assert all(f"someone/built@{fake_hub.SHA}/volumes/test-" in volume for _, _, volume in result)
    assert "README.md" in {name for name, _ in transferred}
    left = [path for path in (tmp_path / "home").rglob("*.nii.gz") if path.is_file()]
    assert left == []  # no scan stays on disk
