"""`train/evaluate.py` on phantoms with tiny models: the same numbers however it is run, and what it leaves behind."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_training import run
from tokenizers import normalizers

from hsenet.collators import ContrastiveCollator
from hsenet.data import load_rows
from hsenet.digests import model_digest
from hsenet.metrics import RuleLabeller, retrieval_tally
from hsenet.metrics.verdict import DOES_NOT_DEPEND
from hsenet.phantom import CT_RATE_LABELS
from hsenet.scoring import program
from hsenet.scoring.floors import age_and_sex_labels, constant_for_bleu, nearest_reports
from hsenet.scoring.output import scorer_of
from hsenet.scoring.retrieval import compare_queries, save_queries, score_embeddings
from hsenet.scoring.rows import patient_of
from hsenet.scoring.tallies import ReportTask, question_tallies
from hsenet.scoring.volumes import BlankVolumes, shuffled_rows
from hsenet.scoring.work import Generation, answers_to, embeddings_of, share_out
from hsenet_command import main
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


def evaluate(workspace: Path, output: str, **changes) -> dict:
    program.evaluate(program.EvaluationArguments(**settings(workspace, output, **changes)))
    return json.loads((workspace / output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def metrics(workspace) -> dict:
    return evaluate(workspace, "one")


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
    between = {result["system"] for result in metrics["results"]["stage2 volume retrieval"]}
    assert between == {"stage2", "random embeddings"} and "stage2 study-level retrieval" in metrics["results"]
    for task in metrics["results"].values():
        assert all(result["protocol"] for result in task)
        assert all(result["low"] <= result["value"] + 1e-9 for result in task if result["low"] is not None)
    protocols = {result["protocol"] for result in metrics["results"]["report"] if result["score"] == "crg"}
    assert len(protocols) == 1 and "[18 labels; " in protocols.pop()
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


def test_the_hub_reads_the_cards_entries(metrics):
    for name, entries in metrics["model_index"].items():
        results = [result for entry in entries for result in model_index_to_eval_results([entry])[1]]
        assert len(results) == sum(len(result["metrics"]) for entry in entries for result in entry["results"])
        card = ModelCard.from_template(
            ModelCardData(model_name=entries[0]["name"], eval_results=results, library_name="transformers"),
            template_str="---\n{{ card_data }}\n---\n",
        )
        again = ModelCard(str(card)).data
        assert again.to_dict()["model-index"] == entries and again.eval_results == results, name


def outputs(folder: Path) -> dict[str, bytes]:
    """Of all that a run leaves; where it was left is the one thing that may differ."""
    names = ["metrics.json", "predictions.jsonl", "queries.safetensors", "table.md", "model_index.json", "ids.txt"]
    place = json.dumps(str(folder)).encode()
    return {name: (folder / name).read_bytes().replace(place, b"") for name in names}


def test_two_processes_give_the_same_numbers(metrics, workspace):
    config = workspace / "two.yaml"
    config.write_text(yaml.safe_dump(settings(workspace, "two")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "29633", str(ROOT / "train/evaluate.py"), "--config", str(config)]
    run(command, ACCELERATE_USE_CPU="true")
    assert outputs(workspace / "two") == outputs(workspace / "one")


def test_a_run_that_was_cut_off_goes_on(metrics, workspace, capsys):
    shutil.copytree(workspace / "one", workspace / "resumed")
    parts = sorted(path for path in (workspace / "resumed/parts").rglob("*") if path.is_file())
    for path in parts[::3]:
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in parts[1::3]}
    config = workspace / "resumed.yaml"
    config.write_text(yaml.safe_dump(settings(workspace, "resumed")))
    capsys.readouterr()
    assert main(["evaluate", "--config", str(config), "--json"]) == 0  # the command line, which runs the same
    out, err = capsys.readouterr()
    assert out == (workspace / "resumed/metrics.json").read_text() and "held-out studies" in err
    assert outputs(workspace / "resumed") == outputs(workspace / "one")
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_a_run_that_is_killed_again_and_again_gives_the_same_bytes(metrics, workspace):
    output = workspace / "killed"
    config = workspace / "killed.yaml"
    config.write_text(yaml.safe_dump(settings(workspace, "killed")))
    command = [sys.executable, str(ROOT / "train/evaluate.py"), "--config", str(config)]
    expected = sum(path.is_file() for path in (workspace / "one/parts").rglob("*"))
    kills = 0
    for share in (0.2, 0.8):  # in the embeddings, and among the answers
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=environment, cwd=workspace, **quiet)
        while process.poll() is None and len(finished(output)) < share * expected:
            time.sleep(0.002)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2 and not (output / "metrics.json").exists()
    before = {path: path.stat().st_mtime_ns for path in finished(output)}
    evaluate(workspace, "killed")
    assert outputs(output) == outputs(workspace / "one")
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())  # nothing is done twice


def finished(output: Path) -> list[Path]:
    return [path for path in (output / "parts").rglob("*") if path.is_file() and not path.suffix]


def test_ids_and_a_baseline(metrics, workspace, tmp_path):
    written = [json.loads(line) for line in (workspace / "one/predictions.jsonl").read_text().splitlines()]
    names = [row["volume_name"] for row in written if row["question_type"] == "report"][:6]
    assert set(names) < set((workspace / "one/ids.txt").read_text().split())
    (tmp_path / "ids.txt").write_text("\n".join(names[::-1]))
    # greedy, so another run; without questions, so that every row is in the baseline
    changes = {"tasks": ["reports"], "stage1": None, "stage2": None, "temperature": 0.0}
    names_of = dict(enumerate(CT_RATE_LABELS))
    classifier, encoder = tiny.bert(tmp_path / "reader", id2label=names_of), tiny.bert(tmp_path / "encoder")
    chosen = evaluate(
        workspace, "chosen", ids=str(tmp_path / "ids.txt"), baseline=str(workspace / "one"),
        all_reconstructions=False, labeller=classifier, bert_score_model=encoder, bert_score_layer=1, **changes,
    )  # fmt: skip
    predicted = [json.loads(line) for line in (workspace / "chosen/predictions.jsonl").read_text().splitlines()]
    assert [row["volume_name"] for row in predicted] == names[::-1] and chosen["num_questions"] == 0
    compared = {record["score"]: record for record in chosen["baseline"]}
    assert compared["findings_f1_macro"]["low"] <= compared["findings_f1_macro"]["difference"]
    protocols = " ".join({result["protocol"] for result in chosen["results"]["report"]})
    assert "bertscore/2[encoder " in protocols and "; reader " in protocols
    assert str(tmp_path) not in json.dumps([chosen["results"], chosen["model_index"]])
    (tmp_path / "ids.txt").write_text("nobody")
    with pytest.raises(ValueError, match="1 of 1 ids are not in the split, the first in line 1"):
        evaluate(workspace, "nobody", ids=str(tmp_path / "ids.txt"), **changes)


def test_a_list_is_the_pool_siblings_and_all_and_retrieval_is_compared(metrics, workspace, tmp_path):
    pool = (workspace / "one/ids.txt").read_text().split()
    (tmp_path / "ids.txt").write_text("\n".join([*pool, ""]))
    changes = {"model": None, "stage2": None, "all_reconstructions": False, "ids": str(tmp_path / "ids.txt")}
    with pytest.raises(ValueError, match="no stage1 retrieval"):
        evaluate(workspace, "listed", baseline=str(workspace / "chosen"), **changes)
    listed = evaluate(workspace, "listed", baseline=str(workspace / "one"), **changes)
    assert (
        listed["ids_digest"] == metrics["ids_digest"] and listed["stage1 study-level"] == metrics["stage1 study-level"]
    )
    assert {record["task"] for record in listed["baseline"]} == set(listed["results"])
    assert all(record["difference"] in (0, None) for record in listed["baseline"])
    (tmp_path / "ids.txt").write_text("\n".join(pool[::-1]))
    with pytest.raises(ValueError, match="among other volumes"):
        evaluate(workspace, "listed", baseline=str(workspace / "one"), **changes)
    (tmp_path / "ids.txt").write_text("\n".join([*pool, pool[0]]))
    with pytest.raises(ValueError, match=f"1 of {len(pool) + 1} ids repeat"):
        evaluate(workspace, "listed", **changes)


def test_a_better_model_is_better_than_its_baseline(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(90, 8))
    near, far = (retrieval_tally(images, images + noise * rng.normal(size=(90, 8))) for noise in (0.5, 2.0))
    save_queries(tmp_path / "queries", {"stage1 retrieval": far}, "ids")
    arguments = ({"stage1 retrieval": near}, tmp_path / "queries", "ids", list(range(90)), 200, 0)
    records = {record["score"]: record for record in compare_queries(*arguments)}
    expected = near.scores()["image_to_text_R@1"] - far.scores()["image_to_text_R@1"]
    assert records["image_to_text_R@1"]["difference"] == pytest.approx(expected)
    assert records["image_to_text_R@1"]["low"] > 0 and records["image_to_text_R@1"]["p_holm"] < 0.05


# The parts


def test_a_finding_that_nobody_has_is_still_wrong_to_claim():
    truth = np.zeros((4, 18), dtype=bool)
    truth[:2, 1] = True
    task = ReportTask(["a"] * 4, truth, RuleLabeller(), overlap=())
    invented = truth.copy()
    invented[:, 9] = True
    honest, inventing = (task.finding_tallies(found)[0].scores() for found in (truth, invented))
    assert honest["findings_f1_macro"] == inventing["findings_f1_macro"] == honest["crg"] == 1
    assert inventing["findings_f1_micro"] < 0.7 and inventing["crg"] < 0.95


def test_multiple_choice_is_scored_where_there_are_options():
    questions = [
        {"answer": "B", "question_type": "organ", "options": ["heart", "lung"]},
        {"answer": "yes", "question_type": "presence", "options": None},
    ]
    scores = {
        name: value
        for tally in question_tallies(["B. lung", "yes"], questions)
        for name, value in tally.scores().items()
    }
    assert scores["accuracy"] == 0.5 and scores["option_accuracy"] == 1 and scores["option_accuracy[type=organ]"] == 1
    assert not any(name.startswith("option") for t in question_tallies(["yes"], questions[1:]) for name in t.scores())


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


def test_memory_grows_with_the_volumes_not_with_their_square():
    def peak(number: int) -> int:
        rng = np.random.default_rng(0)
        images = rng.normal(size=(number, 4)).astype(np.float32)
        labels = (rng.random((number, 18)) < 0.2).tolist()
        rows = [{"study_id": i // 2, "labels": found} for i, found in enumerate(labels)]
        score = scorer_of([i // 4 for i in range(number)], 20, 0)
        tracemalloc.start()
        score_embeddings("stage1", rows, images, images + 1, score)
        nearest_reports(images, images, ["report"] * number)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    small, large = peak(1500), peak(4500)
    assert large < 4 * small  # three times the volumes; the square would be nine times
    assert large < 4500**2 * 8 / 2  # and no matrix of all by all


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
