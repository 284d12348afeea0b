"""The search index, from phantoms and tables of scans to hits: ranking, filters, guard, identity, command line."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_hub
import nibabel
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from datasets import load_from_disk

from hsenet.cli import main
from hsenet.data import load_rows
from hsenet.embedding import Embedder
from hsenet.index import SearchIndex
from hsenet.index_filters import Filter
from hsenet.phantom import CT_RATE_LABELS
from hsenet.scans import read_scan
from hsenet.volume_cache import cache_volumes
from processing_hsenet import HSENetProcessor
from reading_hsenet import HSENetInputError


ROOT = Path(__file__).parents[1]
TEXT = "There is a nodule of 12 mm in the left lower lobe."


def save(folder: Path, model=None, **image_processor) -> Path:
    (model or tiny.clip_model("slices")).save_pretrained(folder)
    HSENetProcessor(tiny.image_processor(**image_processor), tiny.tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """train_7 has two studies, the second with two reconstructions."""
    spec = importlib.util.spec_from_file_location("build_phantom", ROOT / "datasets_scripts" / "build_phantom.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    sizes = ["--train-studies", "8", "--validation-studies", "0", "--test-studies", "3", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["build_phantom", "--output", str(folder), *sizes, "--spacing", "7.5", "7.5", "8"])
        module.main()
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def index(phantoms, model, tmp_path_factory) -> SearchIndex:
    folder = tmp_path_factory.mktemp("index")
    return SearchIndex.build(folder / "kept", phantoms, model, cache_dir=folder / "cache", keep_ids=True)


@pytest.fixture(scope="module")
def rows(phantoms) -> dict[str, dict]:
    return {
        row["volume_name"]: {**row, "split": split}
        for split in ("train", "test")
        for row in load_rows(str(phantoms), "reports", split)
    }


def names(result) -> list[str]:
    return [hit.volume_id for hit in result.hits]


# What is stored and how it is ranked


def test_the_index_holds_the_dataset(index, rows):
    assert index.dataset["volume_id"][:] == list(rows)
    for stored in index.dataset:
        row = rows[stored["volume_id"]]
        assert {name: stored[name] for name in ("row", "split", "age", "sex", "study_id", "patient_id")} == {
            name: row[name] for name in ("row", "split", "age", "sex", "study_id", "patient_id")
        }
        assert row["findings"] in stored["report"] and row["impression"] in stored["report"]
        assert [int(label in stored["labels"]) for label in CT_RATE_LABELS] == row["labels"]
    studies = len({row["study_id"] for row in rows.values()})
    assert index.info["studies"] == studies < index.info["volumes"] == len(rows)
    assert index.info["with_identical_volume"] == 0 and index.info["dataset"]["splits"] == ["test", "train"]


def test_the_stored_embeddings_are_the_models(index, rows, model):
    clip, processor = tiny.clip_model("slices"), HSENetProcessor.from_pretrained(model)
    row = rows["train_7_b_2"]
    stored = next(stored for stored in index.dataset if stored["volume_id"] == row["volume_name"])
    text = {"text": [stored["report"]], "truncation": True, "max_length": 64, "return_token_type_ids": False}
    inputs = processor(volumes=[row["volume"]], return_tensors="pt", **text)
    with torch.no_grad():
        outputs = clip(**inputs)
    np.testing.assert_allclose(stored["image_embedding"], outputs.image_embeds[0], atol=2e-3)  # cached as halves
    np.testing.assert_allclose(stored["text_embedding"], outputs.text_embeds[0], atol=1e-5)
    np.testing.assert_allclose(index.embedder.volume(read_scan(row)), stored["image_embedding"], atol=1e-6)


@pytest.mark.parametrize("target, column", [("volumes", "image_embedding"), ("reports", "text_embedding")])
def test_exact_search_is_brute_force(index, rows, target, column):
    row = rows["test_1_a_1"]
    text, volume = index.embedder.texts([TEXT])[0], index.embedder.volume(read_scan(row))
    queries = {"text": ({"text": TEXT}, text), "volume": ({"volume": row["volume"]}, volume)}
    queries["both"] = ({"text": TEXT, "volume": row["volume"], "text_weight": 0.3}, 0.3 * text + 0.7 * volume)
    for arguments, query in queries.values():
        stored = np.array(index.dataset[column][:], dtype=np.float64)
        cosines = stored @ query / np.linalg.norm(query)
        result = index.search(**arguments, target=target, k=5, include_same_patient=True)
        order = np.argsort(-cosines, kind="stable")[:5]
        if target == "volumes":  # siblings share a report, so those ties are in the order of the index up to rounding
            assert names(result) == [index.dataset[int(number)]["volume_id"] for number in order]
        np.testing.assert_allclose([hit.score for hit in result.hits], cosines[order], atol=1e-6)
        assert [hit.rank for hit in result.hits] == [1, 2, 3, 4, 5]


def test_weights_of_one_and_zero_are_text_and_volume_alone(index, rows):
    volume = rows["test_1_a_1"]["volume"]
    for weight, alone in ((1, {"text": TEXT}), (0, {"volume": volume})):
        fused = index.search(TEXT, volume, text_weight=weight, include_same_patient=True)
        assert names(fused) == names(index.search(**alone, include_same_patient=True))


@pytest.mark.parametrize("target", ["volumes", "reports"])
def test_one_per_study_keeps_the_best_of_siblings(index, target):
    everything, best = index.search(TEXT, target=target, k=100), {}
    for hit in everything.hits:
        best.setdefault(hit.study_id, hit.volume_id)
    found = index.search(TEXT, target=target, k=4, one_per_study=True)
    assert names(found) == list(best.values())[:4] and len(best) < len(everything.hits)


def test_faiss_finds_what_exact_search_finds(index, rows):
    pytest.importorskip("faiss")
    faiss = SearchIndex.load(index.folder, index.embedder, engine="faiss")
    for query in ({"text": TEXT}, {"volume": rows["train_7_b_1"]}, {"text": TEXT, "where": Filter(splits=["test"])}):
        for found, expected in zip(faiss.search(**query).hits, index.search(**query).hits, strict=True):
            assert found.volume_id == expected.volume_id and found.score == pytest.approx(expected.score, abs=1e-6)
    assert faiss.search(TEXT, where=Filter(min_age=200)).hits == []


# Filters


def test_filters_keep_what_they_say(index, rows):
    label = next(CT_RATE_LABELS[i] for row in rows.values() for i, present in enumerate(row["labels"]) if present)
    has_label = {name for name, row in rows.items() if row["labels"][CT_RATE_LABELS.index(label)]}
    expected = {
        Filter(): set(rows),
        Filter(sex="F"): {name for name, row in rows.items() if row["sex"] == "F"},
        Filter(min_age=57, max_age=63): {name for name, row in rows.items() if 57 <= row["age"] <= 63},
        Filter(splits=("test",)): {name for name in rows if name.startswith("test")},
        Filter(labels=(label,)): has_label,
        Filter(without_labels=(label,)): set(rows) - has_label,
        Filter(labels=(label,), without_labels=(label,)): set(),
        Filter(sex="F", splits=("test",)): {n for n, row in rows.items() if row["sex"] == "F" and n[:4] == "test"},
    }
    for where, passing in expected.items():
        result = index.search(TEXT, k=100, where=where)
        assert set(names(result)) == passing and result.num_candidates == len(passing), where


@pytest.mark.parametrize(
    "where, message",
    [
        (Filter(labels=["Pneumonia"]), "has the label Pneumonia: expected one of .*Emphysema"),
        (Filter(splits=["dev"]), "has the split dev: expected one of test, train"),
        (Filter(sex="X"), "has the sex X: expected one of F, M"),
    ],
)
def test_filters_that_nothing_could_pass_are_errors(index, where, message):
    with pytest.raises(ValueError, match=message):
        index.search(TEXT, where=where)


# The guard


def test_the_querys_patient_is_left_out(index, rows):
    volume = rows["train_7_b_1"]["volume"]
    guarded = index.search(volume=volume, k=100)
    assert set(names(guarded)) == {name for name in rows if not name.startswith("train_7_")}
    assert guarded.left_out == {"identical volume": 1, "same study": 1, "same patient": 1} and guarded.is_guarded
    everything = index.search(volume=volume, k=100, include_same_patient=True)
    assert everything.left_out == {} and set(names(everything)) == set(rows)
    assert everything.hits[0].volume_id == "train_7_b_1" and everything.hits[0].score == pytest.approx(1, abs=1e-5)
    relation = {hit.volume_id: hit.relation for hit in everything.hits if hit.relation}
    assert relation == {
        "train_7_b_1": "identical volume",
        "train_7_b_2": "same study",
        "train_7_a_1": "same patient",
    }


def test_the_guard_knows_a_scan_by_its_voxels_however_it_is_stored(index, rows, tmp_path):
    image = nibabel.load(rows["train_7_a_1"]["volume"])
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = image.shape[0] - 1
    flipped = nibabel.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine @ flip)
    flipped.to_filename(tmp_path / "other.nii")
    result = index.search(volume=tmp_path / "other.nii", k=100)
    assert sum(result.left_out.values()) == 3 and not any(name.startswith("train_7_") for name in names(result))


def test_the_guard_takes_ids_and_says_when_it_knows_nobody(index, tmp_path):
    assert index.search(TEXT, patient_id="train_7").left_out == {"same patient": 3}
    assert index.search(TEXT, study_id="train_7_b").left_out == {"same study": 2, "same patient": 1}
    nibabel.Nifti1Image(tiny.scan().transpose(2, 1, 0), np.diag([5.0, 5, 8, 1])).to_filename(tmp_path / "new.nii")
    unknown = index.search(volume=tmp_path / "new.nii")
    assert not unknown.is_guarded and unknown.left_out == {}
    told = index.search(volume={"volume": str(tmp_path / "new.nii"), "patient_id": "train_7"})
    assert told.is_guarded and told.left_out == {"same patient": 3}


# A table of scans; identical volumes


@pytest.fixture
def table(tmp_path) -> Path:
    """Three patients, the second with the first one's scan under another name, and no report."""
    affine = np.diag([5.0, 5, 8, 1])
    (tmp_path / "scans").mkdir()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        array = np.rint(tiny.scan(seed)).transpose(2, 1, 0).astype(np.int16)
        nibabel.Nifti1Image(array, affine).to_filename(tmp_path / "scans" / f"{name}.nii.gz")
    lines = [
        "volume,patient_id,age,sex,findings,labels",
        "scans/a.nii.gz,Doe^Jane,061Y,F,A nodule.,Lung nodule; Emphysema",
        "scans/b.nii.gz,Roe^Richard,,M,,",
        "scans/c.nii.gz,Poe^Edgar,40,M,No effusion.,",
    ]
    (tmp_path / "scans.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "scans.csv"


def build(table: Path, model: Path, **options) -> SearchIndex:
    return SearchIndex.build(table.parent / "index", table, model, cache_dir=table.parent / "cache", **options)


def test_identical_volumes_are_marked_and_left_out(table, model):
    index = build(table, model)
    assert (index.info["with_identical_volume"], index.info["with_report"], index.info["patients"]) == (2, 2, 3)
    result = index.search(TEXT)
    first, second = (hit for hit in result.hits if hit.row in (0, 1))
    assert (first.row, first.copy_of, second.copy_of) == (0, None, first.rank) and first.score == second.score
    assert first.labels == ["Lung nodule", "Emphysema"] and (first.age, second.age) == (61, None)
    assert [hit.row for hit in index.search(volume=table.parent / "scans" / "b.nii.gz").hits] == [2]
    assert {hit.row for hit in index.search(TEXT, target="reports").hits} == {0, 2}
    assert [hit.row for hit in index.search(TEXT, where=Filter(min_age=1)).hits if hit.age is None] == []


def test_a_dataset_may_say_which_scan_a_coarser_one_was_made_of(table, model):
    header, *lines = table.read_text().splitlines()
    table.write_text(
        "\n".join([f"{header},content_hash", f"{lines[0]},0123abcd", *(f"{line}," for line in lines[1:])])
    )
    index = build(table, model)
    assert [len(hashes) for hashes in index.dataset["content_hashes"]] == [2, 1, 1]
    other = {"volume": str(table.parent / "scans" / "c.nii.gz"), "content_hash": "0123abcd"}
    assert [hit.row for hit in index.search(volume=other).hits] == [1]


def test_nothing_local_and_nobodys_name_is_saved(table, model):
    index = build(table, model)
    saved = b"".join(path.read_bytes() for path in index.folder.rglob("*") if path.is_file())
    for secret in (b"Doe", b"Roe", b"scans/", b"a.nii", str(table.parent).encode(), str(model).encode()):
        assert secret not in saved
    salt = table.parent / "index.salt"
    assert salt.stat().st_mode & 0o077 == 0 and salt.read_bytes() not in saved
    assert [path.name for path in table.parent.glob(".index*")] == []
    assert index.search(TEXT, patient_id="Doe^Jane").left_out == {"same patient": 1}
    salt.unlink()
    with pytest.raises(ValueError, match="their key.*is not beside it"):
        index.search(TEXT, patient_id="Doe^Jane")
    kept = SearchIndex.build(
        table.parent / "kept", table, index.embedder, cache_dir=table.parent / "cache", keep_ids=True
    )
    assert kept.search(TEXT, patient_id="Doe^Jane").left_out == {"same patient": 1}


def test_tables_that_lack_something_are_refused(table, model):
    content = table.read_text()
    for wrong, message in (
        (content.replace("patient_id", "name"), "no column patient_id"),
        (content.replace("Roe^Richard", ""), "Row 2 of the table lacks volume or patient_id"),
        (content.replace("scans/b", "scans/a"), "1 rows repeat a volume_name"),
        (content.splitlines()[0] + "\n", "no row to index"),
    ):
        table.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            build(table, model)
        assert not (table.parent / "index").exists()


def test_a_broken_scan_stops_the_build_and_the_rerun_goes_on(table, model):
    scan = table.parent / "scans" / "c.nii.gz"
    whole = scan.read_bytes()
    scan.write_bytes(whole[:200])
    with pytest.raises(HSENetInputError, match="row 2 of scans: "):
        build(table, model)
    assert not (table.parent / "index").exists() and [*table.parent.glob(".index*")] == []
    done = {path: path.stat().st_mtime_ns for path in (table.parent / "cache").rglob("*.safetensors")}
    assert len(done) == 2
    scan.write_bytes(whole)
    assert build(table, model).info["volumes"] == 3
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    with pytest.raises(FileExistsError, match="exists already"):
        build(table, model)


def test_the_cache_tells_the_content_of_a_scan(rows, tmp_path):
    twins = [rows["train_1_a_1"], {**rows["train_1_a_1"], "volume_name": "twin"}, rows["train_2_a_1"]]
    cache = cache_volumes(twins, tiny.image_processor(), None, tmp_path, Accelerator(cpu=True))
    first, second, other = (cache.content_hash(row["volume_name"]) for row in twins)
    assert first == second != other


# The wrong model


def test_another_model_or_preprocessing_is_refused(index, model, tmp_path):
    torch.manual_seed(1)
    other = tiny.clip_model("slices")
    with torch.no_grad():
        other.text_projection.weight[0, 0] += 1e-3
    for folder, message in (
        (save(tmp_path / "weights", other), "weights: made with [0-9a-f]{12}, given"),
        (save(tmp_path / "window", hu_window=(-900, 200)), "image_processor: made with .'hu_window': .-1000, 200"),
    ):
        with pytest.raises(ValueError, match=f"made with another model or preprocessing .{message}"):
            SearchIndex.load(index.folder, folder)
    changed = tiny.tokenizer()
    changed.add_tokens(["nodule"])
    processor = HSENetProcessor(tiny.image_processor(), changed)
    with pytest.raises(ValueError, match="tokenizer: made with"):
        SearchIndex(index.folder, Embedder(tiny.clip_model("slices"), processor))
    again = save(tmp_path / "again", tiny.clip_model("slices"))
    assert names(SearchIndex.load(index.folder, again).search(TEXT)) == names(index.search(TEXT))


def test_heads_that_the_weights_do_not_show_are_part_of_the_model(index, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "heads")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights: made with"):
        SearchIndex.load(index.folder, folder)


def test_a_model_that_writes_is_no_model_to_search_with(index, tmp_path):
    tiny.generation_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected a contrastive model .*got one of type hsenet."):
        SearchIndex.load(index.folder, tmp_path)


def test_queries_that_cannot_be_meant_are_errors(index, tmp_path):
    for arguments, message in (
        ({}, "a text, a volume or both to search by, got neither"),
        ({"text": "  "}, "text to search by is empty"),
        ({"text": TEXT, "k": 0}, "k of at least 1"),
        ({"text": TEXT, "text_weight": 2}, "text_weight from 0 to 1"),
        ({"text": TEXT, "target": "images"}, "target should be volumes or reports"),
        ({"volume": tmp_path / "nothing.nii.gz"}, "no file"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(**arguments)
    with pytest.raises(ValueError, match="no search index in this folder"):
        SearchIndex.load(tmp_path, "no/model")


# The command line


FRESH = """
import json, sys
from hsenet.cli import main

for command in json.loads(sys.argv[1]):
    assert main(command) == 0
    print("END")
"""


def test_a_fresh_process_searches_and_indexes_from_the_hub(index, model, phantoms, rows, tmp_path):
    shutil.copytree(phantoms, tmp_path / "hub" / "someone" / "phantoms")
    query = ["--text", TEXT, "--volume", rows["train_7_b_1"]["volume"], "-k", "3", "--json"]
    options = ["--splits", "test", "--keep_ids", "--cache_dir", "cache", "--json"]
    commands = [
        ["search", str(model), str(index.folder), *query],
        ["index", str(model), "someone/phantoms", "from_hub", *options],
    ]
    with fake_hub.serve(tmp_path / "hub") as (endpoint, _):
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", FRESH, json.dumps(commands)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **environment},
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    found, info = (json.loads(part) for part in done.stdout.split("END\n")[:2])
    expected = index.search(TEXT, rows["train_7_b_1"]["volume"], k=3).to_dict()
    for hit, same in zip(found.pop("hits"), expected.pop("hits"), strict=True):
        assert hit.pop("score") == pytest.approx(same.pop("score"), abs=1e-5) and hit == same
    assert found == expected
    assert info["dataset"]["id"] == f"someone/phantoms@{fake_hub.SHA}"
    from_hub = SearchIndex.load(tmp_path / "from_hub", index.embedder)
    local = [row for row in index.dataset if row["split"] == "test"]
    for row, same in zip(from_hub.dataset, local, strict=True):
        np.testing.assert_allclose(row.pop("image_embedding"), same.pop("image_embedding"), atol=1e-5)
        np.testing.assert_allclose(row.pop("text_embedding"), same.pop("text_embedding"), atol=1e-5)
        assert row == same


def test_the_commands_from_a_dataset_to_hits(phantoms, model, index, tmp_path, capsys):
    folder, cache = str(tmp_path / "index"), str(index.folder.parent / "cache")
    assert main(["index", str(model), str(phantoms), folder, "--splits", "train", "--cache_dir", cache]) == 0
    out = capsys.readouterr().out
    assert "volumes of 8 studies and 7 patients" in out and f"their key is {folder}.salt" in out
    dataset = load_from_disk(folder)
    assert set(dataset["split"]) == {"train"}
    search = ["search", str(model), folder, "--text", TEXT]
    assert main([*search, "-k", "2", "--sex", "M", "--min_age", "50", "--patient_id", "train_7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 of ") and "left out, same patient: 3" in lines[0]
    assert lines[1].startswith("  1  ") and "| train row" in lines[1] and "Findings: " in lines[2]
    label = next(label for labels in dataset["labels"] for label in labels)
    assert main([*search, "--target", "reports", "--labels", label, "--json"]) == 0
    assert all(label in hit["labels"] for hit in json.loads(capsys.readouterr().out)["hits"])
    assert main([*search, "--min_age", "120"]) == 0
    assert capsys.readouterr().out == "0 of 0 candidates\n"
    assert main(["index", str(model), str(phantoms), f"{folder}2", "--cache_dir", cache, "--json", "--keep_ids"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == "kept"


def test_what_is_no_terminal_sees_no_bars(phantoms, model, index, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hsenet_command", "index", model, phantoms, tmp_path / "index"]
    command += ["--splits", "test", "--cache_dir", index.folder.parent / "cache"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


def test_errors_are_for_people(phantoms, model, index, tmp_path, capsys):
    stage = ["search", str(model)]
    other = save(tmp_path / "other", tiny.clip_model("none"))
    for command, message in (
        ([*stage, str(tmp_path), "--text", TEXT], "hsenet: There is no search index in this folder"),
        (["search", str(other), str(index.folder), "--text", TEXT], "hsenet: The index was made with another model"),
        (["index", str(model), str(phantoms), str(index.folder)], "exists already: remove it"),
        (["index", str(model), str(phantoms), str(tmp_path / "x"), "--splits", "dev"], "no split dev: expected some"),
        (["index", str(model), str(tmp_path), str(tmp_path / "x")], "hsenet: Found no dataset with `reports` rows"),
        (
            ["index", str(model), str(tmp_path / "a.csv"), str(tmp_path / "x")],
            "hsenet: There is no table at the given",
        ),
    ):
        assert main(command) == 1
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == ""
    for options, message in ((["--sex", "X"], "invalid choice"), ([], "nothing to search by")):
        with pytest.raises(SystemExit, match="2"):
            main([*stage, str(index.folder), *options])
        assert message in capsys.readouterr().err
