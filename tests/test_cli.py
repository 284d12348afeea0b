"""The command line as its users meet it: text, JSON, files, exit codes, and nobody's name anywhere."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scans import NAME, SPACING, write_nifti, write_series, zip_folder
from transformers import AutoModel, AutoProcessor

from hsenet.digests import model_digest
from hsenet.encoded_scan import EncodedScan, load_generation_model
from hsenet_command import COMMANDS, main


QUESTIONS = ["Is there a pericardial effusion?", "Is there a nodule of 12 mm in the left lower lobe?", "Describe."]
NOTICE = "Research only, not a medical device"
SHORT = ["--max_new_tokens", "8", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def hsenet(*arguments, **settings) -> subprocess.CompletedProcess:
    """In a fresh process, as a user does."""
    command = [sys.executable, "-m", "hsenet_command", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny.generation_model()
    model.save_pretrained(folder)
    tiny.processor(model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> dict[str, Path]:
    """The same voxels in two formats, others, and a broken file; a patient's name in every path and header."""
    folder = tmp_path_factory.mktemp("scans") / NAME
    folder.mkdir()
    array = np.rint(tiny.scan()).clip(-1024).astype(np.int16)
    x, y, z = SPACING[::-1]
    affine = np.diag([-x, -y, z, 1.0])
    broken = write_nifti(folder / f"{NAME}_broken.nii.gz", array.transpose(2, 1, 0), affine)
    broken.write_bytes(broken.read_bytes()[:-100])
    (folder / "series").mkdir()
    series = write_series(folder / "series", array)
    return {
        "nifti": write_nifti(folder / f"{NAME}.nii.gz", array.transpose(2, 1, 0), affine, descrip=NAME.encode()),
        "turned": write_nifti(folder / f"{NAME}_2.nii.gz", array[:, ::-1].transpose(2, 1, 0), affine),
        "series": series,
        "zip": zip_folder(series, folder / f"{NAME}.zip"),
        "broken": broken,
        "missing": folder / "nowhere.nii.gz",
    }


def assert_nobody_is_named(*texts: str) -> None:
    for text in texts:
        assert "DOE" not in text and "JANE" not in text, text


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_fresh_process_reports_scans_and_names_a_broken_one_by_its_number(model, scans, tmp_path):
    order = [scans["nifti"], scans["broken"], scans["zip"], scans["missing"]]
    arguments = ["report", model, *map(str, order), *SHORT, "--json", "--output", str(tmp_path / "out")]
    program = "import logging, sys; logging.basicConfig(level='DEBUG'); import hsenet_command as c; sys.exit(c.main())"
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**ENVIRONMENT, "TRANSFORMERS_VERBOSITY": "debug"}
    )
    assert run.returncode == 1, run.stderr
    first, broken, zipped, missing = lines(run.stdout)
    assert first["text"] and first["text"] == zipped["text"] and first["input"]["sha256"] == zipped["input"]["sha256"]
    assert first["input"]["shape"] == [10, 40, 36] and first["input"]["spacing"] == list(SPACING)
    assert first["model"]["id"] == "tiny" and len(first["model"]["weights_sha256"]) == 64
    assert first["settings"]["seed"] == 0 and first["versions"]["torch"] and NOTICE in first["notice"]
    assert set(first["seconds"]) == {"read", "encode", "write"} and all(first["seconds"].values())
    assert [one["number"] for one in (first, broken, zipped, missing)] == [1, 2, 3, 4]
    assert broken["error"]["message"].startswith("The voxel data of the NIfTI file is truncated")
    assert broken["error"]["type"] == "CorruptFileError" and missing["error"]["type"] == "MissingFileError"
    errors = [line for line in run.stderr.splitlines() if line.startswith("hsenet: ")]
    assert len(errors) == 2 and errors[0].startswith("hsenet: scan 2 of 4: ") and "scan 4 of 4" in errors[1]
    kept = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    names = ["report.json", "report.txt", "run.json"]
    assert [str(path.relative_to(tmp_path / "out")) for path in kept] == [
        f"{folder}/{name}" for folder in ("0001", "0003") for name in names
    ]
    assert_nobody_is_named(run.stdout, run.stderr, *(path.read_text() for path in kept))


def test_text_streams_and_is_what_json_says(model, scans, capsys):
    extras = ["accelerate", "datasets", "matplotlib", "pandas", "peft", "psutil", "pyarrow", "pydicom", "scipy"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({extras})); import hsenet_command as c; sys.exit(c.main())"
    )
    command = [sys.executable, "-c", program, "report", model, str(scans["turned"]), *SHORT]
    text = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)  # with the core alone
    assert main(["report", model, str(scans["turned"]), *SHORT, "--json"]) == 0
    record = lines(capsys.readouterr().out)[0]
    assert text.returncode == 0, text.stderr
    assert text.stdout.rstrip("\n") == record["text"]
    assert text.stderr.count(NOTICE) == 1
    assert_nobody_is_named(text.stdout, text.stderr)
    loaded = load_generation_model(model, device="cpu")
    scan = EncodedScan.read(*loaded, scans["turned"])
    answer = scan.ask("Can you summarize with findings the images presented?", max_new_tokens=8, do_sample=False)
    assert record["answers"][0]["text"] == answer


def test_manifest_beside_the_report_says_what_decided_it(model, scans, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--temperature", "0.7", "--seed", "3", "--output", str(output), "--series", "1.2.840.99", "--json"]
    assert main(["report", model, str(scans["nifti"]), *SHORT, *options]) == 0
    manifest = json.loads((output / "0001/run.json").read_text())
    report = json.loads((output / "0001/report.json").read_text())
    text = (output / "0001/report.txt").read_text()
    assert manifest["settings"] == {
        "max_new_tokens": 8,
        "temperature": 0.7,
        "seed": 3,
        "device": "cpu",
        "dtype": "float32",
        "load_in": None,
        "trust_remote_code": False,
        "reading": {"series": "by its UID"},
    }
    assert manifest["report_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert text.startswith(NOTICE) and text.rstrip().endswith(report["text"].rstrip())
    assert manifest["input"]["sha256"] and manifest["model"] and manifest["versions"]["hsenet"]
    assert report["answers"][0]["question"] in manifest["questions"]
    assert "name" not in manifest and lines(capsys.readouterr().out)[0]["text"] == report["text"]

    assert main(["report", model, str(scans["nifti"]), *SHORT, "--output", str(output)]) == 1
    assert "already holds 0001" in capsys.readouterr().err
    options = ["--output", str(tmp_path / "named"), "--keep_names"]
    assert main(["report", model, str(scans["nifti"]), *SHORT, *options]) == 0
    assert json.loads((tmp_path / "named/0001/run.json").read_text())["name"] == f"{NAME}.nii.gz"


def test_what_is_drawn_depends_on_the_seed_and_not_on_other_scans(model, scans, capsys):
    def texts(*arguments) -> list[str]:
        assert main(["report", model, *map(str, arguments), *SHORT, "--json", "--temperature", "2"]) == 0
        return [record["text"] for record in lines(capsys.readouterr().out)]

    turned = texts(scans["turned"])
    assert texts(scans["nifti"], scans["turned"])[1:] == turned == texts(scans["turned"], "--seed", "0")
    assert texts(scans["turned"], "--seed", "1") != turned
    assert main(["report", model, str(scans["turned"]), *SHORT, "--temperature", "2"]) == 0
    assert capsys.readouterr().out.strip() == turned[0].strip()  # also as it is written


def test_several_questions_encode_once(model, scans, capsys):
    assert main(["ask", model, str(scans["turned"]), *QUESTIONS, *SHORT]) == 0
    printed = capsys.readouterr().out
    scan = EncodedScan.read(*load_generation_model(model, device="cpu"), scans["turned"])
    answers = [scan.ask(question, max_new_tokens=8) for question in QUESTIONS]
    assert main(["ask", model, str(scans["turned"]), *QUESTIONS, *SHORT, "--json"]) == 0
    record = lines(capsys.readouterr().out)[0]
    assert [one["text"] for one in record["answers"]] == answers
    assert printed.rstrip("\n").count("> ") == 3 and all(f"> {question}\n" in printed for question in QUESTIONS)


def test_questions_are_typed_one_a_line_until_the_end(model, scans, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTIONS[0]}\n\nand <image>?\n{QUESTIONS[1]}"))
    assert main(["ask", model, str(scans["turned"]), *SHORT, "--json"]) == 0
    out, err = capsys.readouterr()
    assert [one["question"] for one in lines(out)[0]["answers"]] == QUESTIONS[:2]
    assert err.count("\n") == 1 and "Expected words only, got text with <image>" in err


def test_no_question_at_all_is_wrong_usage(model, scans, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SystemExit, match="2"):
        main(["ask", model, str(scans["turned"]), *SHORT])
    assert "no question was given" in capsys.readouterr().err


def test_control_tokens_are_refused_before_a_scan_is_read(model, scans, capsys):
    assert main(["ask", model, str(scans["missing"]), "a <|endoftext|> b", *SHORT]) == 1
    assert "Expected words only" in capsys.readouterr().err


def test_figure_of_the_patch_scores(model, scans, tmp_path, capsys):
    figure = tmp_path / "scores.png"
    assert main(["report", model, str(scans["nifti"]), *SHORT, "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        main(["report", model, str(scans["nifti"]), str(scans["turned"]), *SHORT, "--figure", str(figure)])
    assert "--figure shows one scan, got 2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "clip"
    tiny.clip_model("slices").save_pretrained(folder)
    tiny.HSENetProcessor(tiny.image_processor(), tiny.tokenizer()).save_pretrained(folder)
    return str(folder)


def test_embeddings_of_scans_and_texts(clip, scans, tmp_path, capsys):
    output, texts = tmp_path / "embeddings.safetensors", ["Small nodule.", "No effusion."]
    order = [str(scans[name]) for name in ("nifti", "broken", "turned", "series")]
    options = ["--text", texts[0], "--text", texts[1], "--output", str(output), "--device", "cpu"]
    assert main(["embed", clip, *order, *options, "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    model, processor = AutoModel.from_pretrained(clip).eval(), AutoProcessor.from_pretrained(clip)
    inputs = processor(volumes=[order[0], order[2]], text=texts, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    tensors = load_file(output)
    assert result["read"] == tensors["numbers"].tolist() == [1, 3, 4]
    torch.testing.assert_close(tensors["volumes"][:2], outputs.image_embeds, atol=1e-4, rtol=0)  # of half precision
    torch.testing.assert_close(tensors["texts"], outputs.text_embeds, atol=1e-5, rtol=0)
    cosines = outputs.image_embeds @ outputs.text_embeds.T
    np.testing.assert_allclose(result["text_similarity"][:2], cosines, atol=1e-4)
    assert result["volume_similarity"][0][2] == pytest.approx(1, abs=1e-5)  # the same voxels
    assert "error" in result["scans"][1] and "scan 2 of 4" in err
    with safe_open(output, "pt") as file:
        metadata = json.loads(file.metadata()["embeddings"])
    assert metadata["scans"] == result["scans"] and metadata["texts"] == texts
    assert_nobody_is_named(out, err, json.dumps(metadata))

    assert main(["embed", clip, order[0], order[2], *options[:4], "--device", "cpu"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "text 1: Small nodule." and f"{result['text_similarity'][0][0]:+.3f}" in table[3]
    assert main(["embed", clip, order[0], *options]) == 1 and "already there" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["embed", clip, order[0]])
    assert main(["embed", clip, order[0], "--text", "a", "--hu_source", "ct-rate-v1"]) == 1


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--max_new_tokens", "0"], "expected 1 or more"),
        (["--temperature", "-1"], "expected 0 or more"),
        (["--hu_source", "guess"], "invalid choice"),
    ],
)
def test_wrong_usage_ends_with_2(model, scans, wrong, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["report", model, str(scans["nifti"]), *wrong])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, words",
    [
        (["search", "no-model", "no-index"], "nothing to search by"),
        (["search", "no-model", "no-index", "--text", " "], "--text is empty"),
        (["search", "no-model", "no-index", "--text", "a", "-k", "0"], "expected 1 or more"),
        (["search", "no-model", "no-index", "--text", "a", "--text_weight", "2"], "expected 0 to 1"),
        (["report", "no-model", "no-scan", "--question", "  "], "a question is empty"),
        (["ask", "no-model", "no-scan", "Where?", ""], "a question is empty"),
        (["evaluate", "--model", "no-model"], "--dataset is missing"),
        (["evaluate", "--config"], "expected a file"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(command, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert words in capsys.readouterr().err


def test_wrong_usage_ends_with_2_in_a_process_of_its_own():
    run = hsenet("convert", "vlm", "source", "output")  # told by the command, not by argparse
    assert run.returncode == 2 and "Expected --stage2" in run.stderr


def test_other_mistakes_end_with_1_and_a_sentence(model, scans, tmp_path, capsys):
    tiny.clip_model().save_pretrained(tmp_path / "clip")
    for arguments, words in (
        ([str(tmp_path / "clip"), str(scans["nifti"])], "Expected a model that writes (stage 3, hsenet)"),
        ([model, str(scans["nifti"]), "--device", "nonsense"], "--device nonsense cannot be used here"),
        ([model, str(scans["nifti"]), "--adapter", str(tmp_path)], "adapter_model.safetensors"),
    ):
        assert main(["report", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("hsenet: ") and words in error and "Traceback" not in error


NO_FOLDER = "there is no such folder, and it is no Hub id OWNER/NAME.\n"


@pytest.mark.parametrize("missing", ["/nonexistent", "outputs/quickstart/stage3", "stage3", "no--such/model"])
def test_a_folder_that_is_missing_is_not_called_a_repository(missing, scans, capsys):
    scan = str(scans["nifti"])
    commands = [["report", missing, scan], ["ask", missing, scan, "a"], ["embed", missing, scan, "--json"]]
    commands.append(["evaluate", "--dataset", str(scans["series"]), "--stage2", missing])
    for command in commands:
        assert main(command) == 1
        what = "stage2" if "evaluate" in command else "model"
        assert capsys.readouterr() == ("", f"hsenet: {what}: {NO_FOLDER}")


def test_other_folders_without_a_model(model, scans, tmp_path, capsys):
    for command, words in (
        (["fingerprint", "/nonexistent"], "model: there is no such folder."),
        (["fingerprint", "/nonexistent", "--check"], "model: there is no such folder."),
        (["report", str(tmp_path), str(scans["nifti"])], "model: the folder has no config.json"),
        (["evaluate", "--dataset", "/nonexistent", "--model", model], f"dataset: {NO_FOLDER}"),
    ):
        assert main(command) == 1
        assert f"hsenet: {words}" in capsys.readouterr().err
    code, found = checks(capsys, "/nonexistent")
    assert code == 1 and NO_FOLDER.strip() in found["model files"]["found"] and "smoke test" not in found


def test_a_hub_that_does_not_answer_is_one_sentence(scans, tmp_path):
    nobody = {**ENVIRONMENT, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "hsenet_command", "report", "no-such/model", str(scans["nifti"])]
    run = subprocess.run(command, capture_output=True, text=True, env=nobody, timeout=120)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "nor did the Hub answer (ConnectError)" in run.stderr  # and no retries


def test_a_device_that_is_not_there_is_said_to_be_missing(model, scans, monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert main(["report", model, str(scans["nifti"]), "--device", "cuda:77"]) == 1
    error = capsys.readouterr().err
    assert "--device cuda:77 cannot be used here" in error and "No GPU was found: expected cpu" in error


def test_remedies_of_the_reader_are_options_of_the_command(model, scans, tmp_path, capsys):
    x, y, z = SPACING[::-1]
    windowed = tiny.scan().clip(0, 255).astype(np.int16)
    file = write_nifti(tmp_path / "windowed.nii.gz", windowed.transpose(2, 1, 0), np.diag([-x, -y, z, 1.0]))
    assert main(["report", model, str(file), *SHORT, "--json"]) == 1
    out, err = capsys.readouterr()
    for message in (lines(out)[0]["error"]["message"], err):
        assert "pass --hu_check warn." in message and "hu_check=" not in message


@pytest.mark.parametrize(
    "said, expected",
    [
        ("choose with series=NUMBER, the SeriesInstanceUID or 'largest'", "choose with --series NUMBER, the"),
        ("pass resample=True to interpolate", "pass --resample to interpolate"),
        ("pass nan_to=-1000.", "pass --nan_to -1000."),
        ("hu_source='ct-rate-v1' needs rescale=(slope, intercept): ", "--hu_source ct-rate-v1 needs --rescale slope"),
        ("Check hu_source= and rescale=; if", "Check --hu_source and --rescale; if"),
        ("at most 5 are read: raise max_bytes= if that is", "raise --max_bytes if that is"),
        ("a spacing=3 of its own", "a spacing=3 of its own"),
    ],
)
def test_each_form_of_a_remedy(said, expected):
    from hsenet.cli_scan import with_options

    assert expected in with_options(said)


def test_ctrl_c_ends_without_a_traceback(model, scans, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.readline", interrupt, raising=False)
    assert main(["ask", model, str(scans["nifti"]), *SHORT]) == 130
    assert capsys.readouterr().err.endswith("hsenet: interrupted\n")


def test_text_of_a_model_cannot_steer_a_terminal():
    from hsenet.report_record import printable

    assert printable("a\x1b[31mb\x07\tc\n\u202ed\x9b1m") == "a[31mb\tc\nd1m"


def test_help_is_there_at_once_and_for_each_command(capsys):
    begin = time.perf_counter()
    run = hsenet("--help")
    assert run.returncode == 0 and time.perf_counter() - begin < 1.5  # importing the package takes longer
    for name in COMMANDS:
        assert name in run.stdout
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: hsenet {name}")
    assert hsenet("repot").returncode == 2


def test_a_missing_package_is_a_sentence_with_the_extra(model, scans, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "hsenet.adapters", raising=False)
    assert main(["report", model, str(scans["nifti"]), *SHORT, "--adapter", model]) == 1
    assert capsys.readouterr().err == (
        'hsenet: This command needs peft, which is not installed: pip install "hsenet[convert]".\n'
    )


def doctor(*arguments, **environment) -> tuple[int, dict[str, dict]]:
    """Exit code, and the checks by name; a broken one wins over others of its name."""
    command = [sys.executable, "-m", "hsenet_command", "doctor", *map(str, arguments), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, timeout=120)
    result = json.loads(run.stdout)
    problems = [check for check in result["checks"] if check["state"] == "problem"]
    assert len(problems) == result["problems"] and all(check["remedy"] for check in problems)
    return run.returncode, {check["name"]: check for check in [*result["checks"], *problems]}


def checks(capsys, *arguments) -> tuple[int, dict[str, dict]]:
    """The same in this process."""
    code = main(["doctor", *arguments, "--device", "cpu", "--json"])
    return code, {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_doctor_of_a_sound_installation(clip, capsys):
    code, found = doctor("--device", "cpu")
    assert code == 0 and found["torch"]["found"] == torch.__version__.partition("+")[0]
    assert "reported on" in found["smoke test"]["found"] and found["extra dicom"]["state"] == "ok"
    assert {"processor", "memory", "accelerator", "bfloat16", "disk", "torchvision"} <= set(found)
    assert "Hub" not in found
    code, found = checks(capsys, clip)
    assert code == 0 and found["model files"]["found"].startswith("complete")
    assert "compared with a text" in found["smoke test"]["found"]


@pytest.mark.parametrize("damage", ["cut", "a weight is missing", "numbers"])
def test_doctor_finds_damaged_weights(model, damage, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors = load_file(file)
        name = "model.global_encoder.norm.weight"
        if damage == "numbers":
            tensors[name][3] = float("nan")
        else:
            del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
    assert main(["doctor", str(folder), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    expected = {"cut": "not a whole safetensors file", "numbers": "damaged"}
    assert expected.get(damage, "norm.weight") in out and "PROBLEM" in out and "->" in out
    assert out.endswith("1 problem found\n")


def test_a_manifest_repeats_no_fingerprint_of_other_weights(model, scans, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    assert main(["fingerprint", str(folder)]) == 0
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["report", str(folder), str(scans["nifti"]), *SHORT, "--json"]) == 0
    [found] = lines(capsys.readouterr().out)
    sha256 = model_digest(AutoModel.from_pretrained(folder))
    assert found["model"] == {"id": "model", "revision": None, "weights_sha256": sha256}


def test_doctor_compares_with_the_fingerprint(model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    assert main(["fingerprint", str(folder)]) == 0
    capsys.readouterr()
    assert checks(capsys, str(folder), "--check")[0] == 0
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, found = checks(capsys, str(folder))
    assert code == 0 and "reported on" in found["smoke test"]["found"]  # sound, but another
    code, found = checks(capsys, str(folder), "--check")
    assert code == 1 and "no longer computes" in found["fingerprint"]["found"]


def test_doctor_knows_a_torchvision_that_does_not_fit(tmp_path):
    """What a torchvision beside another build of PyTorch does, by one that says the same."""
    (tmp_path / "torchvision").mkdir()
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision/__init__.py").write_text(code)
    (tmp_path / "torchvision-0.99.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.99.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, found = doctor(PYTHONPATH=path)
    assert code == 1 and "nms does not exist" in found["torchvision"]["found"]
    assert "pip uninstall torchvision" in found["torchvision"]["remedy"]
    assert found["package"]["state"] == "problem" and "smoke test" not in found
    run = subprocess.run(
        [sys.executable, "-m", "hsenet_command", "report", "a", "b"],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": path},
    )
    assert run.returncode == 1 and "hsenet doctor" in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
