"""`train/evaluate.py` on phantoms with tiny models: the same numbers however it is run, and what it leaves behind."""

import copy
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from accelerate import Accelerator
from test_training import run
from tokenizers import normalizers

from hsenet.collators import ContrastiveCollator
from hsenet.data import load_rows
from hsenet.metrics.verdict import DOES_NOT_DEPEND
from hsenet.scoring.floors import age_and_sex_labels, constant_for_bleu, nearest_reports
from hsenet.scoring.rows import patient_of
from hsenet.scoring.volumes import BlankVolumes, shuffled_rows
from hsenet.scoring.work import Generation, answers_to, embeddings_of, model_digest, share_out
from processing_hsenet import HSENetProcessor


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    build = [str(ROOT / "datasets_scripts" / "build_phantom.py"), "--output", str(folder / "phantoms")]
    sizes = ["--train-studies", "8", "--validation-studies", "1", "--test-studies", "8", "--workers", "1"]
    run([sys.executable, *build, *sizes, "--spacing", "7.5", "7.5", "8"])
    for stage, guidance in (("stage1", "none"), ("stage2", "slices")):
        tiny.clip_model(guidance).save_pretrained(folder / stage)
        words = tiny.tokenizer(pad_token="[PAD]", cls_token="[CLS]")
        HSENetProcessor(tiny.image_processor(), words).save_pretrained(folder / stage)
    model = tiny.generation_model()
    model.save_pretrained(folder / "model")
    tiny.processor(model).save_pretrained(folder / "model")
    return folder


def settings(workspace: Path, output: str, **changes) -> dict:
    return {
        "dataset": str(workspace / "phantoms"),
        "cache_dir": str(workspace / "cache"),
        "output_dir": str(workspace / output),
        **{name: str(workspace / name) for name in ("stage1", "stage2", "model")},
        "max_new_tokens": 6,
        "batch_size": 3,
        "num_resamples": 100,
        "temperature": 1.0,
        "all_reconstructions": True,
        **changes,
    }


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("evaluate_program", ROOT / "train" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def evaluate(program, workspace: Path, output: str, **changes) -> dict:
    program.main(program.EvaluationArguments(**settings(workspace, output, **changes)))
    return json.loads((workspace / output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def metrics(program, workspace) -> dict:
    return evaluate(program, workspace, "one")


def test_every_system_stands_beside_the_floors(metrics, workspace):
    systems = {result["system"] for result in metrics["results"]["report"]}
    assert systems == {
        "model",
        "model, another patient's scan",
        "model, blank scan",
        "random training report",
        "constant report, best for BLEU",
        "constant report, best for F1",
        "nearest training report (stage1)",
        "nearest training report (stage2)",
        "all findings claimed",
        "age and sex alone",
        "true reports",
    }
    assert {"majority of type", "random of type"} < {result["system"] for result in metrics["results"]["vqa"]}
    assert {result["system"] for result in metrics["results"]["stage1 retrieval"]} == {"stage1", "chance"}
    assert "stage2 volume retrieval" in metrics["results"] and "stage2 study-level retrieval" in metrics["results"]
    for task in metrics["results"].values():
        assert all(result["protocol"] for result in task)
        assert all(result["low"] <= result["value"] + 1e-9 for result in task if result["low"] is not None)
    assert metrics["num_patients"] <= metrics["num_studies"] == 8
    assert (workspace / "one/recall_curves.png").stat().st_size > 5000
    assert (workspace / "one/findings.png").stat().st_size > 5000


def test_an_untrained_model_fails_loudly(metrics, workspace):
    assert metrics["verdict"]["depends"] is False
    assert "### vqa, by type and anatomy" in (workspace / "one/table.md").read_text()
    assert (workspace / "one/table.md").read_text().startswith(f"**{DOES_NOT_DEPEND}")


def test_the_cards_entries(metrics):
    (entry,) = metrics["model_index"]["model"][:1]
    assert {results["task"]["name"] for results in entry["results"]} == {"report", "vqa"}
    assert {results["dataset"]["type"] for results in entry["results"]} == {"phantoms"}
    shown = {metric["type"]: metric for results in entry["results"] for metric in results["metrics"]}
    assert shown["bleu-coco.bleu_4"]["config"] == "bleu-coco/1" and len(shown["accuracy"]["args"]["interval_95"]) == 2
    assert (
        set(metrics["model_index"]) == {"stage1", "stage2", "model"}
        and len(metrics["models"]["model"]["sha256"]) == 64
    )


def outputs(folder: Path) -> dict:
    written = json.loads((folder / "metrics.json").read_text())
    written["settings"].pop("output_dir")
    return {"metrics": written, "predictions": (folder / "predictions.jsonl").read_text()}


def test_two_processes_give_the_same_numbers(metrics, workspace):
    config = workspace / "two.yaml"
    config.write_text(yaml.safe_dump(settings(workspace, "two")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "29633", str(ROOT / "train/evaluate.py"), "--config", str(config)]
    run(command, ACCELERATE_USE_CPU="true")
    assert outputs(workspace / "two") == outputs(workspace / "one")


def test_a_run_that_was_cut_off_goes_on(program, metrics, workspace):
    shutil.copytree(workspace / "one", workspace / "resumed")
    parts = sorted(path for path in (workspace / "resumed/parts").rglob("*") if path.is_file())
    for path in parts[::3]:
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in parts[1::3]}
    evaluate(program, workspace, "resumed")
    assert outputs(workspace / "resumed") == outputs(workspace / "one")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_ids_and_a_baseline(program, metrics, workspace, tmp_path):
    written = [json.loads(line) for line in (workspace / "one/predictions.jsonl").read_text().splitlines()]
    names = [row["volume_name"] for row in written if row["question_type"] == "report"][:6]
    assert set(names) < set((workspace / "one/ids.txt").read_text().split())
    (tmp_path / "ids.txt").write_text("\n".join(names[::-1]))
    # greedy, so another run; without questions, so that every row is in the baseline
    changes = {"tasks": ["reports"], "stage1": None, "stage2": None, "temperature": 0.0}
    chosen = evaluate(
        program, workspace, "chosen", ids=str(tmp_path / "ids.txt"), baseline=str(workspace / "one"),
        all_reconstructions=False, **changes,
    )  # fmt: skip
    predicted = [json.loads(line) for line in (workspace / "chosen/predictions.jsonl").read_text().splitlines()]
    assert [row["volume_name"] for row in predicted] == names[::-1] and chosen["num_questions"] == 0
    compared = {record["score"]: record for record in chosen["baseline"]}
    assert compared["findings_f1_macro"]["low"] <= compared["findings_f1_macro"]["difference"]
    (tmp_path / "ids.txt").write_text("nobody")
    with pytest.raises(ValueError, match="1 of 1 ids are not in the split, the first in line 1"):
        evaluate(program, workspace, "nobody", ids=str(tmp_path / "ids.txt"), **changes)


# The parts


def test_nobody_keeps_their_own_scan(workspace):
    rows = load_rows(str(workspace / "phantoms"), "reports", "test")
    swapped = shuffled_rows([*rows, *rows[:5]], seed=3)
    patient = {row["volume_name"]: patient_of(row) for row in rows}
    for row, other in zip([*rows, *rows[:5]], swapped, strict=True):
        assert patient[other["volume_name"]] != patient_of(row) and row["findings"] == other["findings"]
        assert Path(other["volume"]).name.startswith(other["volume_name"])
    assert [row["volume_name"] for row in swapped[:5]] == [row["volume_name"] for row in swapped[len(rows) :]]
    with pytest.raises(ValueError, match="too few to swap"):
        shuffled_rows(rows[:1], seed=0)


def test_a_blank_scan_is_what_the_processor_makes_of_air():
    model, processor = tiny.generation_model(), tiny.image_processor(crop_to_body=False)
    air = processor.process_volume(tiny_air())
    blank = BlankVolumes(processor, model)["any"]
    assert torch.equal(blank["pixel_values"], air["pixel_values"])
    with torch.no_grad():
        features = model.slice_encoder(air["slice_pixel_values"].unsqueeze(2)).pooler_output
    assert torch.allclose(blank["slice_features"], features, atol=1e-6)


def tiny_air():
    from reading_hsenet import read_volume

    array = np.full((10, 40, 36), -1000, dtype=np.float32)
    array[0, 0, 0] = -1001  # the reader refuses a constant
    return read_volume(array, spacing=(3.0, 1.0, 1.0), hu_check="warn")


def test_age_and_sex_know_what_goes_with_age_and_nothing_else():
    rng = np.random.default_rng(0)
    rows = [{"age": int(age), "sex": "FM"[i % 2]} for i, age in enumerate(rng.integers(20, 90, 400))]
    old = np.array([row["age"] >= 60 for row in rows])
    labels = np.stack([old, rng.random(400) < 0.02, np.zeros(400, bool)], axis=1)
    guessed = age_and_sex_labels(rows[:300], labels[:300], rows[300:])
    assert (guessed[:, 0] == old[300:]).mean() > 0.95 and not guessed[:, 2].any()
    assert age_and_sex_labels(rows, labels, [{"age": None, "sex": "F"}]) is None


def test_constant_and_nearest_reports():
    assert constant_for_bleu(["x y z w v", "a b c d e"], ["a b c d e", "a b c d f"], seed=0) == "a b c d e"
    assert nearest_reports(np.eye(3)[[2, 0]], np.eye(3), ["r0", "r1", "r2"]) == ["r2", "r0"]


def test_a_batch_that_fails_leaves_no_file(tmp_path):
    def write(number: int, path: Path) -> None:
        path.write_text("half")
        if number == 1:
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        share_out(tmp_path / "task/key", 3, write, Accelerator(cpu=True))
    assert [path.name for path in (tmp_path / "task/key").iterdir() if path.suffix == ""] == ["000000"]


def lower_casing(words):
    words.backend_tokenizer.normalizer = normalizers.Lowercase()


def with_other_heads(model):
    """The same weights, read otherwise."""
    config = copy.deepcopy(model.config)
    for part in (config.text_config, config.slice_config or config.vision_config):
        part.num_attention_heads = part.num_key_value_heads = 8
        part.head_dim = part.hidden_size // 8
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("changed", ["nothing", "tokenizer", "generation defaults", "heads"])
def test_answers_are_taken_up_only_where_nothing_has_changed(workspace, tmp_path, changed):
    rows = load_rows(str(workspace / "phantoms"), "vqa", "test", 4)
    kept = tmp_path / "kept"

    def answers(folder: Path, change: str = "nothing") -> list[str]:
        model = tiny.generation_model(text_config=tiny.text_config(num_key_value_heads=4))
        processor = tiny.processor(model)
        if change == "tokenizer":
            lower_casing(processor.tokenizer)
        if change == "generation defaults":
            model.generation_config.repetition_penalty = 3.0
        if change == "heads":
            model = with_other_heads(model)
        shown = BlankVolumes(processor.image_processor, model)
        how = Generation(max_new_tokens=6, temperature=0.0, batch_size=2, seed=0)
        return answers_to(rows, model, model_digest(model), processor, shown, how, folder, Accelerator(cpu=True))

    first = answers(kept)
    assert answers(kept, changed) == answers(tmp_path / "fresh", changed)
    assert (answers(kept, changed) == first) == (changed == "nothing")
    assert len(list(kept.iterdir())) == (1 if changed == "nothing" else 2)


@pytest.mark.parametrize("changed", ["tokenizer", "length", "heads"])
def test_embeddings_are_taken_up_only_where_nothing_has_changed(workspace, tmp_path, changed):
    rows = [{**row, "text": row["findings"]} for row in load_rows(str(workspace / "phantoms"), "reports", "test", 4)]

    def embeddings(folder: Path, change: str = "nothing") -> torch.Tensor:
        model, words = tiny.clip_model(), tiny.tokenizer(pad_token="[PAD]", cls_token="[CLS]")
        if change == "tokenizer":
            lower_casing(words)
        if change == "heads":
            model = with_other_heads(model)
        shown = BlankVolumes(tiny.image_processor(), model)
        collator = ContrastiveCollator(words, 8 if change == "length" else 64)
        return embeddings_of(rows, model, model_digest(model), collator, shown, 2, folder, Accelerator(cpu=True))[1]

    first, again = embeddings(tmp_path / "kept"), embeddings(tmp_path / "kept", changed)
    assert torch.equal(again, embeddings(tmp_path / "fresh", changed)) and not torch.allclose(again, first)
