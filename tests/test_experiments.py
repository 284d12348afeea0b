"""The experiments: the rule that decides, the scores, and `train/experiment.py` from files to table."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from transformers import Phi3Config, Phi3ForCausalLM

from hsenet.collators import ReportCollator
from hsenet.experiments.alignment import ALL, LESS, summarise
from hsenet.experiments.decision import Interval, paired_difference, t_interval, verdict
from hsenet.experiments.nodules import NO_NODULE, nodule_patient, probe_auroc
from hsenet.experiments.patches import canonical_mask, patch_overlap
from hsenet.experiments.scores import answer_likelihoods
from hsenet.experiments.tables import decided_claims
from processing_hsenet import HSENetProcessor
from reading_hsenet import read_volume


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "train" / "configs" / "experiments"


# The rule


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (0.1, 0.3, "higher", "yes"),
        (-0.1, 0.3, "higher", "undecided"),
        (-0.3, -0.1, "higher", "no"),
        (0.0, 0.3, "higher", "undecided"),
        (0.1, 0.3, "lower", "no"),
        (-0.3, -0.1, "lower", "yes"),
    ],
)
def test_verdict_needs_the_whole_interval(low, high, better, expected):
    assert verdict(Interval((low + high) / 2, low, high), better) == expected


def test_t_interval_by_hand():
    interval = t_interval([1.0, 2.0, 4.0])
    half = 4.302653 * np.std([1, 2, 4], ddof=1) / 3**0.5  # Student's t of two degrees of freedom at 0.975
    assert (interval.low, interval.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-6)
    with pytest.raises(ValueError, match="at least two of them, got 1"):
        t_interval([1.0])


def test_t_interval_covers_at_its_rate_with_three_seeds():
    values = np.random.default_rng(0).normal(0.5, 1, (2000, 3))
    intervals = [t_interval(row) for row in values]
    assert np.mean([interval.low < 0.5 < interval.high for interval in intervals]) == pytest.approx(0.95, abs=0.015)


def test_pairing_takes_out_what_a_seed_does_to_both():
    of_seeds = np.array([0.1, 0.5, 0.9])
    first, second = of_seeds + [0.05, 0.06, 0.05], of_seeds
    assert verdict(paired_difference(first, second)) == "yes"
    assert t_interval(first).low < t_interval(second).high  # unpaired, the arms cannot be told apart
    with pytest.raises(ValueError, match="same seeds on both sides, got 3 and 2"):
        paired_difference(first, second[:2])


def test_claims_may_be_refuted():
    experiment = {"metric": "score", "claims": [{"claim": "a beats b", "first": "a", "second": "b"}]}
    scores = {"a": [{"score": 0.1}, {"score": 0.2}], "b": [{"score": 0.9}, {"score": 0.99}]}
    assert decided_claims(experiment, scores)[0]["held"] == "no"


# Where findings lie on the patch grid


def test_share_of_each_patch_that_a_mask_fills():
    """Without a crop and with a voxel for a voxel, the shares are those of counting."""
    scan = read_volume(tiny.scan(shape=tiny.IMAGE_SIZE), spacing=(3.0, 1.0, 1.0))
    processor = tiny.image_processor(crop_to_body=False, volume_mean=0.4, volume_std=0.7)
    mask = np.zeros(tiny.IMAGE_SIZE, dtype=bool)
    mask[2:4, 8:16, 0:8] = True  # patch (1, 1, 0) whole
    mask[4:6, 16:24, 8:12] = True  # patch (2, 2, 1) half
    expected = torch.zeros(4, 4, 4)
    expected[1, 1, 0], expected[2, 2, 1] = 1, 0.5
    torch.testing.assert_close(patch_overlap(processor, scan, mask, tiny.PATCH_SIZE), expected, atol=1e-5, rtol=0)


def test_mask_of_another_shape_is_refused():
    scan = read_volume(tiny.scan(), spacing=(3.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"\(10, 40, 36\).*\(2, 2, 2\)"):
        patch_overlap(tiny.image_processor(), scan, np.zeros((2, 2, 2), dtype=bool), tiny.PATCH_SIZE)


def test_masks_are_turned_as_scans_are():
    """A file whose axes run left, front, down: the marked voxel is found again at the same place of the scan."""
    array = tiny.scan(shape=(12, 16, 20)).astype(np.int16).transpose(2, 1, 0)
    array[3, 5, 7] = 3000
    affine = np.diag([-1.5, 1.5, -3.0, 1.0])
    scan = read_volume(array, affine=affine)
    mask = canonical_mask(array == 3000, affine)
    assert (mask == (scan.array == 3000)).all() and mask.sum() == 1


def test_alignment_of_the_mask_itself_and_of_its_opposite():
    generator = np.random.default_rng(0)
    shown = [{"Lung nodule": generator.random((4, 4, 4)) > 0.8} for _ in range(20)]
    truth = np.stack([found["Lung nodule"] for found in shown]).astype(float)
    scores = {"trained": [truth], "opposite": [1 - truth], "random": [generator.random(truth.shape)]}
    scores["both"] = [truth, 1 - truth]  # two seeds that contradict each other
    summary = summarise(scores, shown, [f"patient {number // 2}" for number in range(20)])
    means = {name: interval.mean for name, interval in summary["Lung nodule"].items()}
    assert means["trained"] == 1 and means["opposite"] == 0 and means["both"] == 0.5
    assert summary[LESS]["opposite"] == Interval(1, 1, 1) and summary[LESS]["trained"] == Interval(0, 0, 0)
    interval = summary[ALL]["random"]
    assert interval.low < 0.5 < interval.high and 0.02 < interval.high - interval.low < 0.3


# The token stress test


def test_nodule_is_where_it_is_said_to_be_and_grows():
    processor = tiny.image_processor(num_slices=0, image_size=(16, 48, 48))
    patients = [
        nodule_patient(index, [6.0, 20.0], processor, (4, 6, 6), (5.0, 5.0, 6.0), seed=0) for index in range(4)
    ]
    patients = [patient for patient in patients if patient is not None]
    assert len(patients) >= 3
    for patient in patients:
        without = patient.pixel_values[NO_NODULE]
        small, large = ((patient.pixel_values[size] - without).abs() for size in (6.0, 20.0))
        of_patches = torch.nn.functional.avg_pool3d(large, (4, 6, 6))[0]
        assert np.unravel_index(int(of_patches.argmax()), of_patches.shape) == patient.patch
        assert 0 < small.sum() < 0.3 * large.sum()


def test_probe_finds_what_is_there_and_nothing_else():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 3, 5))
    features[:, 2, 1] += 3  # the second size shows in one feature, the first does not show
    aurocs = probe_auroc([features, features[:, :, ::-1]], [4, 20])
    assert aurocs[20].low > 0.9 and aurocs[4].low < 0.5 < aurocs[4].high


# Presence questions


def test_likelihoods_of_answers_are_those_of_each_question_alone():
    model = tiny.generation_model()
    processor = HSENetProcessor(
        tiny.image_processor(), tiny.tokenizer(), image_seq_length=model.config.image_seq_length, prompt_style="plain"
    )
    generator = torch.Generator().manual_seed(1)
    cache = {
        name: {
            "pixel_values": torch.rand(1, *tiny.IMAGE_SIZE, generator=generator),
            "slice_features": torch.randn(tiny.NUM_SLICES, tiny.SLICES["hidden_size"], generator=generator),
        }
        for name in "ab"
    }
    questions = [
        {"volume_name": "a", "question": "Is there a nodule?"},
        {"volume_name": "b", "question": "Is the heart enlarged?"},
        {"volume_name": "a", "question": "Is there a pericardial effusion? yes no"},
    ]
    got = answer_likelihoods(model, processor, cache, questions, ("yes", "no"))
    collator = ReportCollator(processor, 128)
    for question, values in zip(questions, got, strict=True):
        for answer, value in zip(("yes", "no"), values, strict=True):
            batch = collator([{**cache[question["volume_name"]], "turns": [(question["question"], answer)]}])
            with torch.no_grad():
                loss = model(**batch).loss
            assert value == pytest.approx(-loss.item() * (batch["labels"] != -100).sum().item(), rel=1e-4)


# The program


def run(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Phantoms and untrained tiny models where the experiments expect trained ones."""
    folder = tmp_path_factory.mktemp("experiments")
    sizes = ("--train-studies", "8", "--validation-studies", "3", "--test-studies", "12", "--workers", "1")
    spacing = ("--spacing", "7.5", "7.5", "8")
    run(ROOT / "datasets_scripts" / "build_phantom.py", "--output", folder / "phantoms", *sizes, *spacing)
    stage1 = tiny.clip_model()
    stage1.save_pretrained(folder / "stage1")
    HSENetProcessor(tiny.image_processor(num_slices=0), tiny.tokenizer(bos_token="[CLS]")).save_pretrained(
        folder / "stage1"
    )
    stage2 = tiny.clip_model("slices")
    stage2.save_pretrained(folder / "stage2")
    HSENetProcessor(tiny.image_processor(), tiny.tokenizer()).save_pretrained(folder / "stage2")
    stage2.slice_encoder.save_pretrained(folder / "slice_encoder")
    settings = {name: value for name, value in tiny.text_config().items() if name != "model_type"}
    Phi3ForCausalLM(Phi3Config(**settings)).save_pretrained(folder / "language_model")
    tiny.tokenizer().save_pretrained(folder / "language_model")
    return folder


def write_experiment(base: Path, name: str, **changes) -> Path:
    """A committed experiment with the tiny models, two steps and two seeds."""
    experiment = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    settings = yaml.safe_load((CONFIGS / experiment["settings"]).read_text())
    paths = {path: str(base / path) for path in ("stage1", "stage2", "slice_encoder", "language_model")}
    settings |= {path: value for path, value in paths.items() if path in settings}
    settings |= {"dataset": str(base / "phantoms"), "cache_dir": str(base / "cache"), "max_steps": 2, "batch_size": 2}
    settings |= {"max_length": 64 if experiment["stage"] == "stage2" else 320, "packer_window_size": [1, 2, 2]}
    if experiment["stage"] == "stage2":
        settings |= {"num_slices": tiny.NUM_SLICES}
        settings.pop("packer_window_size")
    folder = base / "configs"
    folder.mkdir(exist_ok=True)
    (folder / experiment["settings"]).write_text(yaml.safe_dump(settings))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**experiment, "seeds": [0, 1], **changes}, sort_keys=False))
    return path


@pytest.mark.slow
def test_guidance_from_files_to_table_and_alignment_of_its_arms(base):
    guidance = write_experiment(base, "guidance", score_settings={"gallery_size": 5})
    alignment = write_experiment(base, "alignment")
    printed = run(ROOT / "train" / "experiment.py", guidance, alignment, "--output_dir", base)
    assert "| slices − text | R@5 |" in printed and "| mean of the findings |" in printed
    record = json.loads((base / "guidance.json").read_text())
    assert [claim["held"] in ("yes", "no", "undecided") for claim in record["claims"]] == [True] * 3
    assert all(len(runs) == 2 for runs in record["runs"].values()) and len(record["result"]) == 4
    for arm, of_seeds in record["result"].items():
        assert all(("own_report_R@5" in scores) == arm.startswith("text") for scores in of_seeds)
        assert all(0 <= scores["R@5"] <= 1 for scores in of_seeds)
    assert len(list((base / "runs").glob("stage2_*"))) == 8  # alignment has trained nothing of its own
    # Finished arms are not run again; an unfinished one is, and only that.
    runs = sorted((base / "runs").glob("stage2_*/run.json"))
    times = {path: path.stat().st_mtime_ns for path in runs}
    runs[3].unlink()
    run(ROOT / "train" / "experiment.py", guidance, "--output_dir", base)
    changed = [path for path in runs if path.stat().st_mtime_ns != times[path]]
    assert changed == [runs[3]]
    again = json.loads((base / "guidance.json").read_text())
    assert again["intervals"] == record["intervals"]
    # Started as a program of its own, as on several devices, an arm is the same arm.
    arms = {"slices": yaml.safe_load(guidance.read_text())["arms"]["slices"]}
    launched = write_experiment(base, "guidance", arms=arms, claims=[], score_settings={"gallery_size": 5})
    run(ROOT / "train" / "experiment.py", launched, "--output_dir", base / "there", "--launch", sys.executable)
    there = json.loads((base / "there" / "guidance.json").read_text())
    assert there["result"]["slices"] == record["result"]["slices"]


def test_projectors_and_nodules_from_files_to_table(base):
    arms = {"packer": {"projector": "spatial_packer"}, "qformer": {"projector": "qformer", "qformer_num_layers": 1}}
    claim = {"claim": "the packer beats the Q-Former", "first": "packer", "second": "qformer"}
    projectors = write_experiment(base, "projectors", arms=arms, claims=[claim])
    sizes = {"sizes": [6, 20], "num_patients": 6, "spacing": [6.0, 6.0, 8.0]}
    nodules = write_experiment(base, "nodules", arms={"packer": arms["packer"]}, score_settings=sizes)
    printed = run(ROOT / "train" / "experiment.py", projectors, nodules, "--output_dir", base)
    assert "| packer − qformer | presence_auroc |" in printed and "| packed (packer) |" in printed
    record = json.loads((base / "projectors.json").read_text())
    for of_seeds in record["result"].values():
        assert all(0 <= scores["presence_auroc"] <= 1 and scores["answer_loss"] > 0 for scores in of_seeds)
        assert all(0 <= scores["other_scan_auroc"] <= 1 for scores in of_seeds)
    assert len(list((base / "runs").glob("stage3_*"))) == 4


def test_a_new_stage_1_or_dataset_makes_new_arms(tmp_path):
    spec = importlib.util.spec_from_file_location("experiment_program", ROOT / "train" / "experiment.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    (tmp_path / "phantoms" / "reports").mkdir(parents=True)
    (tmp_path / "stage1").mkdir()
    settings = {"seed": 0, "stage1": str(tmp_path / "stage1"), "dataset": str(tmp_path / "phantoms")}
    folders = [program.run_folder("stage2", settings, tmp_path)]
    for path in ("stage1/model.safetensors", "phantoms/reports/train.parquet"):
        for content in (b"one", b"another"):
            (tmp_path / path).write_bytes(content)
            folders.append(program.run_folder("stage2", settings, tmp_path))
    assert len(set(folders)) == 5 and folders[-1] == program.run_folder("stage2", settings, tmp_path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_experiments_are_consistent(path):
    experiment = yaml.safe_load(path.read_text())
    if "arms" not in experiment:  # settings that several experiments share
        return
    assert len(experiment["seeds"]) >= 3 and (CONFIGS / experiment["settings"]).exists()
    for claim in experiment.get("claims", []):
        assert {claim["first"], claim["second"]} <= set(experiment["arms"]), claim["claim"]
        assert experiment["metric"] in experiment["columns"]
