"""What a run's directory holds beside the model, and what it must not hold."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_training
import yaml
from huggingface_hub import ModelCard
from tiny_training import printed, run_to_end

from hsenet.arguments import DataArguments, TrainingArguments
from hsenet.run_record import publishable
from hsenet.training_card import training_section, write_card


# By step: the best evaluation is that of step 4, and steps 6 and 8 are no better.
SCORES = {"2": 0.3, "4": 0.7, "6": 0.5, "8": 0.7, "10": 0.9, "12": 0.1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tiny_training.write_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run_to_end(cache, folder, eval_steps=4, max_steps=10) == [0], printed(folder)
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_run_directory_says_what_was_run(finished):
    config = yaml.safe_load((finished / "run_config.yaml").read_text())
    assert config["max_steps"] == 10 and config["data"]["max_shift"] == [1, 2, 2] and config["num_processes"] == 1
    (start,) = json.loads((finished / "environment.json").read_text())["starts"]
    assert start["from_step"] == 0 and start["device"] == "cpu" and start["packages"]["torch"]
    assert len(start["git_revision"]) == 40 and isinstance(start["git_changes"], bool)
    data = json.loads((finished / "data.json").read_text())
    assert (data["num_rows"], data["num_volumes"], len(data["sha256"])) == (13, 13, 64)
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    steps = [json.loads(line)["step"] for line in (finished / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 10]


def test_training_section_is_the_cards(finished, tmp_path):
    section = training_section(finished)
    assert section.startswith("## Training") and section in ModelCard.load(finished / "README.md").text
    assert "10 steps of 2 rows" in section and "on 13 rows with 13 scans" in section and "(curves.png)" in section
    shutil.copytree(finished, tmp_path / "run")
    card = tmp_path / "run" / "README.md"
    card.write_text(card.read_text().replace("# HSENet", "# Mine") + "\nMore of mine.\n")
    write_card(tmp_path / "run")  # again: in its place, and nowhere else
    assert card.read_text().count("## Training") == 1
    assert "# Mine" in card.read_text() and "More of mine." in card.read_text()


def test_fingerprint_is_of_the_content_alone(cache, finished, tmp_path):
    moved = shutil.copytree(cache, tmp_path / "moved" / cache.name)
    assert run_to_end(moved, tmp_path / "run", max_steps=1) == [0]
    assert (tmp_path / "run" / "data.json").read_text() == (finished / "data.json").read_text()


def test_settings_keep_no_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jane" / "stage1").mkdir(parents=True)
    given = {
        "output_dir": "/home/jane/runs/a",
        "stage1": "jane/stage1",  # relative, and there
        "text_encoder": "microsoft/BiomedNLP",  # of the Hub
        "data": {"dataset": "~jane/scans", "others": ["../jane/more", "C:\\jane\\most"], "batch": 3},
    }
    assert publishable(given) == {
        "output_dir": "a",
        "stage1": "stage1",
        "text_encoder": "microsoft/BiomedNLP",
        "data": {"dataset": "scans", "others": ["more", "most"], "batch": 3},
    }


def test_best_checkpoint_is_kept_and_loaded(cache, tmp_path):
    best = {"metric_for_best_model": "score", "eval_steps": 2, "save_total_limit": 1, "metrics": SCORES}
    run = tmp_path / "run"
    assert run_to_end(cache, run, **best, load_best_model_at_end=True) == [0], printed(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-10", "step-12"]
    assert "The model is that of step 10: 0.9000" in printed(run)
    assert run_to_end(cache, tmp_path / "last", **best) == [0]
    assert weights(run) != weights(tmp_path / "last")
    # Again, from its end: the last step is restored, then the best one.
    trained = weights(run)
    (run / "model.safetensors").unlink()
    assert run_to_end(cache, run, **best, load_best_model_at_end=True) == [0]
    assert weights(run) == trained


def test_early_stopping_survives_an_interruption(cache, tmp_path):
    """Step 10 would be better, but after step 4 two evaluations are not."""
    patient = {"metric_for_best_model": "eval_score", "eval_steps": 2, "early_stopping_patience": 2}
    patient |= {"metrics": SCORES, "save_steps": -1}
    assert run_to_end(cache, tmp_path / "run", **patient) == [0]
    assert "Stopped early at step 8: 2 evaluations without a better eval_score" in printed(tmp_path / "run")
    # Told to end after the first of the two.
    trouble = tiny_training.Trouble(signal_at_step=6)
    assert run_to_end(cache, tmp_path / "again", **patient, trouble=trouble) == [143]
    assert run_to_end(cache, tmp_path / "again", **patient) == [0]
    assert "Stopped early at step 8" in printed(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "run")


def test_smaller_is_better_for_a_loss(cache, tmp_path):
    scores = {step: 1 - score for step, score in SCORES.items()}
    settings = {"metric_for_best_model": "score", "greater_is_better": False, "eval_steps": 2, "metrics": scores}
    assert run_to_end(cache, tmp_path / "run", **settings, load_best_model_at_end=True) == [0]
    assert "The model is that of step 10: 0.1000" in printed(tmp_path / "run")


def test_unknown_metric_names_the_known_ones(cache, tmp_path):
    assert run_to_end(cache, tmp_path / "run", metric_for_best_model="accuracy", eval_steps=2) == [1]
    assert "metric_for_best_model is 'accuracy'; the evaluation gives loss." in printed(tmp_path / "run")


def test_choice_needs_a_metric_and_evaluations():
    with pytest.raises(ValueError, match="need metric_for_best_model"):
        TrainingArguments(load_best_model_at_end=True)
    with pytest.raises(ValueError, match="set eval_steps"):
        TrainingArguments(metric_for_best_model="loss", early_stopping_patience=2)


@pytest.mark.parametrize("split", ["test", "test[:50%]", "validation+test"])
def test_test_split_chooses_nothing(split):
    with pytest.raises(ValueError, match="eval_split is .* for the final evaluation alone"):
        DataArguments(eval_split=split)
    with pytest.raises(ValueError, match="train_split is"):
        DataArguments(train_split=split)


def test_corpus_says_what_its_test_split_is_called():
    with pytest.raises(ValueError, match="'validation' is for the final evaluation alone"):
        DataArguments(test_splits=["validation"])
    assert DataArguments(eval_split="test", test_splits=["holdout"]).eval_split == "test"
