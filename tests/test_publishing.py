"""Pushed to a stand-in Hub, over HTTP with the real client libraries, and loaded from there by strangers.

What must not be published is planted in folders; uploads fail or their process is killed at each of their requests.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import corpora
import fake_hub
import nibabel
import numpy as np
import pyarrow.parquet
import pytest
import tiny
import torch
from hub_clients import MACHINE, Clients
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from stage_runs import ROOT, prepare
from test_hub import QUESTION, answer, embeddings, without_the_package

from hsenet import HSENetProcessor, read_volume
from hsenet.adapters import adapter_layout, lora_config, save_adapter
from hsenet.card_checks import check_model_card
from hsenet.confidential import Confidential
from hsenet.digests import model_digest
from hsenet.fingerprint import store_fingerprint


NEW_TOKENS = 6
CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# A model\n\nNot a medical device.\n"
CANARIES = ("Zwanzig", "MRN4711", "ACC0815")
USER = "mcuriesklodowska"


def save_generation(folder: Path, seed: int = 0, **saving) -> None:
    torch.manual_seed(seed)
    model = tiny.generation_model()
    if seed:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, **saving)
    tiny.processor(model).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.npy"
    np.save(path, tiny.scan())
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model that writes, in shards, with an adapter; another version of it, in one file; a contrastive model."""
    root = tmp_path_factory.mktemp("folders")
    save_generation(root / "first", max_shard_size="100KB")
    store_fingerprint(root / "first")
    model = tiny.generation_model()
    config = lora_config(model, r=2)
    layout = adapter_layout(model, config)
    torch.manual_seed(1)
    tensors = {name: 0.3 * torch.randn(tensor.shape) for name, tensor in layout.items()}
    save_adapter(tensors, config, root / "first/adapters/vqa")
    save_generation(root / "second", seed=2)
    tiny.clip_model("slices").save_pretrained(root / "clip")
    HSENetProcessor(tiny.image_processor(), tiny.tokenizer()).save_pretrained(root / "clip")
    (root / "clip/README.md").write_text(CARD)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def hub() -> Iterator[fake_hub.Hub]:
    with fake_hub.Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def clients(hub, tmp_path_factory) -> Iterator[Clients]:
    clients = Clients(hub, tmp_path_factory.mktemp("clients"))
    yield clients
    clients.close()


@pytest.fixture(autouse=True)
def no_fault(hub):
    hub.begin()


def write_nifti(path: Path) -> Path:
    array = np.rint(tiny.scan()).astype(np.int16).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 3.0, 1.0])), path)
    return path


def push(clients: Clients, folder: Path, repo: str, *options: str, **environment: str) -> dict:
    done = clients.hsenet("push", folder, repo, "--json", *options, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(clients: Clients, folder: Path, repo: str, *options: str, **environment: str) -> str:
    done = clients.hsenet("push", folder, repo, *options, **environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


STRANGER = """
import contextlib, io, json, os, re, sys
import numpy as np
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor
repo, scan, question, length, first, clip, sentences = sys.argv[1:]
affine = np.diag([1.0, 1.0, 3.0, 1.0])

def answer(model, processor):
    inputs = processor(volumes=np.load(scan), spacing=(3.0, 1.0, 1.0), text=question, return_tensors="pt")
    options = {"max_new_tokens": int(length), "min_new_tokens": int(length), "do_sample": False}
    return model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1]:].tolist()

def load(**options):
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, **options).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model, AutoProcessor.from_pretrained(repo, trust_remote_code=True, **options)

said = {"main": answer(*load()), "pinned": answer(*load(revision=first))}
model, processor = load(revision=first)
model.load_adapter(repo, adapter_kwargs={"subfolder": "adapters/vqa", "revision": first})
said["adapter"] = answer(model, processor)
model = AutoModel.from_pretrained(clip, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(clip, trust_remote_code=True)
inputs = processor(volumes=np.load(scan), spacing=(3.0, 1.0, 1.0), text=json.loads(sentences), padding=True,
                   return_tensors="pt")
said["embeddings"] = model(**inputs).image_embeds.tolist()
said["snippets"] = []
for name in (repo, clip):
    card = ModelCard.load(name)
    card.validate()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(re.search(r"^```python\\n(.*?)^```", card.text, re.DOTALL | re.MULTILINE)[1], {})
    said["snippets"].append(output.getvalue())
try:
    AutoModel.from_pretrained(repo, trust_remote_code=True, token=False, cache_dir="empty")
except OSError as error:
    said["without token"] = str(error)
assert not any(name in sys.modules for name in names)
print(json.dumps(said))
"""


def test_strangers_load_what_was_pushed(hub, clients, folders, scan, tmp_path):
    """In a fresh process with an empty cache, without the package: the same tokens, from main and from a pinned
    revision; an adapter; the embeddings of a contrastive model; the cards validate, and their snippets run. Nothing of
    it without the owner's token."""
    from transformers import AutoModel

    def local(folder: Path, adapter: Path | None = None) -> list[int]:
        model = AutoModel.from_pretrained(folder).eval()
        if adapter:
            model.load_adapter(adapter)
        processor = HSENetProcessor.from_pretrained(folder)
        return answer(model, processor, read_volume(np.load(scan), spacing=(3.0, 1.0, 1.0)))

    expected = {"pinned": local(folders["first"]), "main": local(folders["second"])}
    expected["adapter"] = local(folders["first"], folders["first"] / "adapters/vqa")
    assert len(set(map(tuple, expected.values()))) == 3  # so that each could be another
    here = Path(shutil.copytree(folders["first"].parent, tmp_path / "here"))
    first = push(clients, here / "first", "someone/reports")
    assert sum(name.endswith(".safetensors") for name in first["files"]) > 3
    second = push(clients, here / "second", "someone/reports")
    push(clients, here / "clip", "someone/retrieval")
    shutil.rmtree(here)
    assert all(hub.repositories[f"models/someone/{name}"].private for name in ("reports", "retrieval"))

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {**hub.environment(tmp_path / "empty"), "OMP_NUM_THREADS": "1"}
    sentences = json.dumps(tiny.SENTENCES[:2])
    write_nifti(tmp_path / "scan.nii.gz")
    words = ("someone/reports", scan, QUESTION, str(NEW_TOKENS), first["revision"], "someone/retrieval", sentences)
    command = [sys.executable, "-c", without_the_package() + STRANGER, *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    written, embedded = said.pop("snippets")
    assert len(written.strip()) > 5 and "torch.Size([1, 16]) torch.Size([2, 16])" in embedded
    refused = said.pop("without token")
    assert "someone/reports" in refused and "private" in refused
    model, processor = (load(folders["clip"]) for load in (AutoModel.from_pretrained, HSENetProcessor.from_pretrained))
    embedded = embeddings(model.eval(), processor, read_volume(np.load(scan), spacing=(3.0, 1.0, 1.0)))[:1]
    torch.testing.assert_close(torch.tensor(said.pop("embeddings")), embedded, atol=1e-6, rtol=0)
    assert said == expected
    # Nothing of the earlier version lies beside the later one, and the commit stays what it was.
    repository = hub.repositories["models/someone/reports"]
    assert set(repository.files()) == {*second["files"], ".gitattributes"}
    assert set(repository.files(first["revision"])) == {*first["files"], ".gitattributes"}


ADAPTERS = """
import json
from transformers import AutoModel
from hsenet.adapters import load_adapters
repo, folder, revision = arguments
outputs = []
for base, chosen in ((folder, None), (repo, revision)):
    model = AutoModel.from_pretrained(base, revision=chosen)
    model = load_adapters(model, {"vqa": f"{base}/adapters/vqa"}, revision=chosen)
    outputs.append({name: tensor.sum().item() for name, tensor in model.named_parameters()})
assert any("lora_A.vqa" in name for name in outputs[0])
print(outputs[0] == outputs[1])
"""


def test_the_package_takes_base_and_adapters_from_the_hub(clients, folders):
    """As they were, though the repository has gone on without them."""
    revision = push(clients, folders["first"], "someone/with-adapters")["revision"]
    push(clients, folders["second"], "someone/with-adapters")
    done = clients.run(ADAPTERS, "someone/with-adapters", folders["first"], revision)
    assert done.stdout.strip() == "True", done.stderr[-3000:]


def test_the_command_line_reports_with_a_pinned_revision(clients, folders, tmp_path):
    file = write_nifti(tmp_path / "scan.nii.gz")

    def report(model: str | Path, *options: str) -> dict:
        done = clients.hsenet("report", model, file, "--max_new_tokens", "6", "--json", *options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = push(clients, folders["first"], "someone/pinned")["revision"]
    second = push(clients, folders["second"], "someone/pinned")["revision"]
    pinned, newest = report("someone/pinned", "--revision", first), report("someone/pinned")
    assert pinned["model"] == {"id": "someone/pinned", "revision": first} and newest["model"]["revision"] == second
    assert pinned["text"] == report(folders["first"])["text"] != newest["text"]


def test_what_the_hub_does_not_have_is_said_in_a_sentence(clients, folders, tmp_path):
    push(clients, folders["first"], "someone/there")
    for arguments, words in (
        (["someone/nothing"], "model: there is no such folder, and the Hub shows you no model of that name"),
        (["someone/there", "--revision", "v9"], "model: its repository on the Hub has no such revision."),
    ):
        done = clients.hsenet("report", *arguments, tmp_path / "scan.nii.gz")
        assert done.returncode == 1 and done.stderr.startswith(f"hsenet: {words}") and done.stderr.count("\n") == 1
    done = clients.hsenet("evaluate", "--dataset", "someone/there", "--model", "someone/there")
    assert done.returncode == 1 and "dataset: there is no such folder, and the Hub shows you no dataset" in done.stderr


def test_documented_remote_code_is_pinned():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    calls = [call for page in pages for call in re.findall(r'from_pretrained\(\s*"[^"]+/[^)]*\)', page.read_text())]
    from_hub = [call for call in calls if "trust_remote_code" in call and '"outputs/' not in call]
    assert from_hub and not [call for call in from_hub if "revision=" not in call]


def test_what_is_there_already_is_not_sent_again(hub, clients, folders):
    first = push(clients, folders["second"], "someone/twice")
    hub.begin()
    assert push(clients, folders["second"], "someone/twice")["revision"] == first["revision"]
    assert not any(request.startswith("PUT") or "/commit/" in request for request in hub.requests)


def test_a_branch_of_its_own(hub, clients, folders):
    main = push(clients, folders["first"], "someone/branches")["revision"]
    branch = push(clients, folders["second"], "someone/branches", "--revision", "trial")["revision"]
    assert hub.repositories["models/someone/branches"].branches == {"main": main, "trial": branch}
    assert "name of a branch" in refusal(clients, folders["first"], "someone/branches", "--revision", main)


def test_an_evaluation_goes_without_its_paths(hub, clients, folders, tmp_path):
    from transformers import AutoModel

    sha = model_digest(AutoModel.from_pretrained(folders["first"]))
    metrics = {
        "dataset": str(tmp_path),
        "split": "test",
        **{f"num_{what}": 7 for what in ("studies", "patients", "questions")},
        "settings": {"dataset": str(tmp_path), "num_resamples": 0},
        "versions": {},
        "models": {"model": {"folder": str(folders["first"]), "sha256": sha}},
        "results": {},
        "model_index": {"model": []},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "table.md").write_text("| task | f1 |\n|---|---|\n| report | 0.5 |\n")
    push(clients, folders["first"], "someone/evaluated", "--evaluation", str(tmp_path))
    files = hub.repositories["models/someone/evaluated"].files()
    said = json.loads(files["metrics.json"])
    assert said["num_studies"] == 7 and said["models"]["model"] == {"folder": "first", "sha256": sha}
    assert str(tmp_path).encode() not in b"".join(files.values()) and b"0.5" in files["table.md"]
    assert b"7 studies" in files["README.md"]
    assert "of other weights" in refusal(
        clients, folders["second"], "someone/evaluated", "--evaluation", str(tmp_path)
    )


def test_the_card_is_written_where_none_is_and_people_are_heard(hub, clients, folders, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "model")
    push(clients, tmp_path / "model", "someone/carded")
    card = hub.repositories["models/someone/carded"].files()["README.md"].decode()
    assert check_model_card(card) == [] and "# A model" in card and "someone/carded" in card
    assert (tmp_path / "model/README.md").read_text() == CARD
    (tmp_path / "model/README.md").unlink()
    push(clients, tmp_path / "model", "someone/uncarded")
    assert check_model_card(hub.repositories["models/someone/uncarded"].files()["README.md"].decode()) == []
    assert not (tmp_path / "model/README.md").exists()


def test_a_card_that_the_hub_does_not_take_is_said(hub, clients, folders, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "model")
    (tmp_path / "model/README.md").write_text(CARD.replace("apache-2.0", "apache 2"))
    said = refusal(clients, tmp_path / "model", "someone/unlicensed")
    assert "does not take the card" in said and '"license" must be one of' in said
    assert set(hub.repositories["models/someone/unlicensed"].files()) == {".gitattributes"}


def test_files_of_others_in_the_repository_stay(hub, clients, folders):
    push(clients, folders["first"], "someone/shared")
    repository = hub.repositories["models/someone/shared"]
    files = repository.commits[repository.branches["main"]]
    repository.commit("main", {**files, "figure.svg": fake_hub.File(b"<svg/>")})
    push(clients, folders["second"], "someone/shared")
    assert repository.files()["figure.svg"] == b"<svg/>" and "model.safetensors.index.json" not in repository.files()


# Failures


@pytest.mark.parametrize("how", ["kill", "lost", "refuse", "drop"])
def test_an_upload_that_fails_anywhere_leaves_the_old_or_the_new(how, hub, clients, folders):
    push(clients, folders["first"], "someone/fragile")
    repository = hub.repositories["models/someone/fragile"]
    start, old = repository.branches["main"], repository.files()
    push(clients, folders["second"], "someone/fragile")
    new = repository.files()
    objects = {oid: content for oid, content in hub.objects.items() if content in old.values()}
    outcomes = set()
    for number in count(1):
        repository.branches["main"], hub.objects = start, dict(objects)
        hub.begin(fake_hub.Fault(number, how, lambda: os.kill(clients.pid, signal.SIGKILL)))
        done = clients.hsenet("push", folders["second"], "someone/fragile")
        state = repository.files()
        assert state in (old, new)
        assert done.returncode or state == new
        assert "Traceback" not in done.stderr, done.stderr
        if hub.fault is not None:  # there are not so many requests
            break
        outcomes.add((done.returncode == 0, state == new))
        if done.returncode:
            arrived = set(hub.objects)
            hub.begin()
            push(clients, folders["second"], "someone/fragile")
            assert repository.files() == new
            sent = {request.split("/")[-1] for request in hub.requests if request.startswith("PUT")}
            assert not sent & arrived  # the second try goes on where the first ended
    assert number > 10 and (False, False) in outcomes
    assert ((False, True) in outcomes) == (how == "lost")  # the answer to the commit itself was lost


def test_somebody_else_commits_meanwhile(hub, clients, folders):
    push(clients, folders["first"], "someone/busy")
    repository = hub.repositories["models/someone/busy"]
    files = repository.commits[repository.branches["main"]]

    def change():
        repository.commit("main", {**files, "config.json": fake_hub.File(b"{}")})

    hub.begin(fake_hub.Fault("/commit/", "meanwhile", change))
    assert "has just changed" in refusal(clients, folders["second"], "someone/busy")
    assert repository.files()["config.json"] == b"{}" and "model.safetensors" not in repository.files()


# What is refused before the Hub is asked


@pytest.mark.parametrize(
    ("repo", "environment", "words"),
    [
        ("no owner", {}, "OWNER/NAME"),
        ("reports", {}, "OWNER/NAME"),
        ("someone/a/b", {}, "OWNER/NAME"),
        ("someone/reports", {"HF_TOKEN": ""}, "hf auth login"),
        ("someone/reports", {"HF_TOKEN": "hf_read"}, "may only read"),
        ("someone/reports", {"HF_TOKEN": "hf_unknown"}, "does not accept your token"),
        ("other/reports", {}, "does not let you write"),
    ],
)
def test_names_and_tokens(repo, environment, words, hub, clients, folders):
    assert words in refusal(clients, folders["clip"], repo, **environment)
    assert not any("preupload" in request or "/commit/" in request for request in hub.requests)


def test_a_public_repository_is_asked_for(hub, clients, folders):
    push(clients, folders["clip"], "someone/open", "--public")
    repository = hub.repositories["models/someone/open"]
    state = repository.branches["main"]
    assert not repository.private
    assert "exists and is public" in refusal(clients, folders["first"], "someone/open")
    assert repository.branches["main"] == state
    push(clients, folders["first"], "someone/kept")
    push(clients, folders["first"], "someone/kept", "--public")
    assert hub.repositories["models/someone/kept"].private  # as it was made


def test_a_metric_is_a_private_space(hub, clients, tmp_path):
    program = "from hsenet.metrics import push_module; push_module('ct_vqa', 'someone/ct_vqa', folder=arguments[0])"
    done = clients.run(program, tmp_path / "space")
    assert done.returncode == 0, done.stderr[-3000:]
    space = hub.repositories["spaces/someone/ct_vqa"]
    assert space.private and {"ct_vqa.py", "app.py", "requirements.txt", "README.md"} <= set(space.files())


def test_a_dry_run_asks_nobody(hub, clients, folders):
    said = push(clients, folders["first"], "someone/new", "--dry_run", HF_TOKEN="")
    assert "config.json" in said["files"] and "revision" not in said and hub.requests == []


@pytest.mark.parametrize(
    ("breaking", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "adapters/NAME"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "card cannot be written"),
        (lambda folder: (folder / "processor_config.json").unlink(), "processor_config.json is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja is missing"),
        (lambda folder: (folder / "generation_config.json").unlink(), "generation_config.json is missing"),
        (lambda folder: (folder / "nifti_hsenet.py").unlink(), "nifti_hsenet.py is missing"),
        (lambda folder: (folder / "modeling_hsenet.py").open("a").write("import os\n"), "not the installed package's"),
        (lambda folder: next(folder.glob("model-00002-*")).unlink(), "model-00002-of-"),
        (lambda folder: truncate(next(folder.glob("model-00002-*"))), "not a whole safetensors file"),
        (lambda folder: shutil.copy(next(folder.glob("model-0*")), folder / "model.safetensors"), "does not belong"),
        (lambda folder: rename_tensor(next(folder.glob("model-00001-*"))), "would start at random"),
        (lambda folder: rewrite(folder / "config.json", auto_map={}), "no auto_map"),
        (lambda folder: rewrite(folder / "config.json", model_type="bert"), "model_type 'bert'"),
        (lambda folder: (folder / "adapters/vqa/adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    ],
)
def test_incomplete_folders(breaking, words, hub, clients, folders, tmp_path):
    shutil.copytree(folders["first"], tmp_path / "model")
    breaking(tmp_path / "model")
    said = refusal(clients, tmp_path / "model", "someone/incomplete")
    assert words in said and str(tmp_path) not in said
    assert hub.requests == []


def test_an_older_folder_is_saved_again_as_documented(clients, folders, tmp_path):
    """By the page's own lines; the weights stay to the byte, and with them the fingerprint."""
    [lines] = [
        textwrap.dedent(code)
        for code in re.findall(r"^ *```python\n(.*?)```", (ROOT / "docs/publishing.md").read_text(), re.DOTALL | re.M)
        if "HSENetProcessor.from_pretrained" in code
    ]
    folder = Path(shutil.copytree(folders["second"], tmp_path / "model"))
    store_fingerprint(folder)
    weights = (folder / "model.safetensors").read_bytes()
    for path in folder.glob("*_hsenet.py"):
        path.write_text(f"{path.read_text()}\n# of an earlier version\n")
    assert "not the installed package's" in refusal(clients, folder, "someone/older")
    done = clients.run(lines.replace("outputs/quickstart/stage3", str(folder)))
    assert done.returncode == 0, done.stderr[-3000:]
    push(clients, folder, "someone/older", "--dry_run")
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_fingerprint_of_other_weights(hub, clients, folders, tmp_path):
    folder = Path(shutil.copytree(folders["first"], tmp_path / "model"))
    path, file = sorted(folder.glob("model-*.safetensors"))[0], folder / "fingerprint.json"
    stored = json.loads(file.read_text())
    save_file({name: 1.5 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    said = refusal(clients, folder, "someone/stale")
    assert "fingerprint is of other weights" in said and "`hsenet fingerprint DIR`" in said and hub.requests == []
    file.write_text(json.dumps({name: value for name, value in stored.items() if name != "weights"}))
    push(clients, folder, "someone/stale")
    card = hub.repositories["models/someone/stale"].files()["README.md"].decode()
    assert "does not say of which weights it is" in card and stored["hash"] not in card


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors["another"] = tensors.pop(sorted(tensors)[0])
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What must not leave the machine

LEFT_OUT = (
    "optimizer.pt",
    "rng_state_0.pth",
    "scheduler.bin",
    "training_args.bin",
    "pytorch_model.bin",
    "events.out.tfevents.1.machine",
    "scan.nii.gz",
    "series/1.dcm",
    "patients.csv",
    "predictions.jsonl",
    "mine.salt",
    "mine.names.csv",
    "checkpoints/step-2/model.safetensors",
    "cache.npy",
    ".env",
    "notes.txt",
    "adapter/README.md",
)


def test_files_that_are_not_the_model_stay_here(hub, clients, folders, tmp_path):
    shutil.copytree(folders["first"], tmp_path / "model")
    for name in LEFT_OUT:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        text = "file,volume_name\n" if name == "mine.names.csv" else f"{CANARIES[0]} secret of the hospital"
        (tmp_path / "model" / name).write_text(text)
    before = sorted(path.name for path in (tmp_path / "model").rglob("*"))
    said = push(clients, tmp_path / "model", "someone/allowed")
    assert set(said["left_out"]) == set(LEFT_OUT)
    files = hub.repositories["models/someone/allowed"].files()
    assert set(files) == {*(name for name in said["files"]), ".gitattributes"}
    assert not any(b"secret of the hospital" in content for content in [*hub.objects.values(), *files.values()])
    assert sorted(path.name for path in (tmp_path / "model").rglob("*")) == before


def in_json(name: str, value: str):
    return lambda folder: rewrite(folder / name, planted=value)


def in_card(text: str):
    return lambda folder: (folder / "README.md").write_text(f"{CARD}\n{text}\n")


def in_weights(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    save_file(load_file(path), path, metadata={"format": "pt", "made_from": "/data/hospital/weights"})


def in_picture(folder: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", USER)
    Image.new("L", (2, 2)).save(folder / "curves.png", pnginfo=info)


def in_log(folder: Path) -> None:
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "note": "D:\\\\data\\\\x"}\n')


def in_record(folder: Path) -> None:
    (folder / "run_config.yaml").write_text("data:\n  dataset: /hospital/corpus/ct\n")


@pytest.fixture(scope="module")
def clean(folders, clients, tmp_path_factory) -> tuple[Path, tuple[str, ...], dict[str, str]]:
    """A model with nothing to hide, near keys and tables of names; options and environment of a push that finds so."""
    root = tmp_path_factory.mktemp("clean")
    shutil.copytree(folders["first"], root / "model")
    (root / "data.salt").write_text("0123456789abcdef0123456789abcdef")
    names = "".join(f"v{number},{name}_CT/{name}.nii.gz,study 90,Eva^Ey\n" for number, name in enumerate(CANARIES))
    (root / "data.names.csv").write_text(f"volume_name,file,study_id,patient_id\n{names}")
    (root / "list.txt").write_text("listed-1234\n")
    options = ("--identifiers", str(root / "list.txt"))
    environment = {"USER": USER, "LOGNAME": USER, "HOME": f"/elsewhere/{USER}"}
    push(clients, root / "model", "someone/clean", "--dry_run", *options, **environment)
    return root, options, environment


@pytest.mark.parametrize(
    ("plant", "file", "kind"),
    [
        (in_json("config.json", "/hospital3/models/base"), "config.json", "a local path"),
        (in_json("fingerprint.json", "~/weights/base"), "fingerprint.json", "a local path"),
        (in_card("Trained on `/mnt/archive/ct`."), "README.md", "a local path"),
        (in_card(r"Trained on C:\Users\me\ct."), "README.md", "a local path"),
        (in_json("config.json", "//archive01/ct"), "config.json", "a local path"),
        (in_record, "run_config.yaml", "a local path"),
        (in_log, "log.jsonl", "a local path"),
        (in_weights, "model-00001-of-", "a local path"),
        (in_card(f"Made by {USER}."), "README.md", "the name of a user"),
        (in_picture, "curves.png", "the name of a user"),
        (in_card(f"On {MACHINE}."), "README.md", "the name of this machine"),
        (in_card(f"On {MACHINE.split('.')[0]}."), "README.md", "the name of this machine"),
        (in_card(f"/elsewhere/{USER}"), "README.md", "the home or working folder"),
        (in_card("key 0123456789abcdef0123456789abcdef"), "README.md", "the key of pseudonyms"),
        (in_card(f"Not {CANARIES[0]}, {CANARIES[2]}."), "README.md", "an identifier"),
        (in_json("fingerprint.json", f"{CANARIES[1]}_CT"), "fingerprint.json", "an identifier"),
        (in_json("config.json", "listed-1234"), "config.json", "an identifier"),
        (in_card("Frau Eva Ey, 1947."), "README.md", "an identifier"),
        (in_json("config.json", "thorax 12.nii.gz"), "config.json", "the name of a scan's file"),
        (in_card("1.2.840.113619.2.55.3.604688119.969"), "README.md", "a DICOM UID"),
        (in_card("Zwanzig^Max"), "README.md", "a person's name"),
        (lambda folder: rewrite(folder / "config.json", PatientID="7"), "config.json", "a field of a DICOM header"),
    ],
)
def test_planted_leaks_never_arrive_and_are_named(plant, file, kind, hub, clients, clean, tmp_path):
    root, options, environment = clean
    shutil.copytree(root, tmp_path / "planted")
    plant(tmp_path / "planted/model")
    said = refusal(clients, tmp_path / "planted/model", "someone/leaky", *options, **environment)
    assert file in said and kind in said
    assert hub.requests == [] and "models/someone/leaky" not in hub.repositories
    planted = (*CANARIES, USER, str(tmp_path), "0123456789abcdef", "hospital", "listed-1234", "archive", MACHINE)
    assert not [value for value in planted if value in said]


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        *(
            (f"Trained on `{path}`.", True)
            for path in ("//nas01/scans/doe", "/fsx/u/doe", "/lscratch2/doe", "/gpfs/a")
        ),
        (r"From \\nas01\scans\doe.", True),
        (json.dumps({"note": r"from \\nas01\scans\doe"}), True),
        ("See https://nas01/scans/doe, (http://a.org//data/x), hf://datasets/a/b and [b](/datasets/a/b).", False),
        (r"And/or, 1 // 2/3, a//b/c, // a/b, \\ \alpha\beta, \\d\\w, 5 mm/scratch.", False),
        (json.dumps({"pattern": r"\d+\w\alpha\beta \S\d"}), False),
    ],
)
def test_what_is_a_path(text, is_path, tmp_path):
    known = Confidential.around(tmp_path, (), ())
    assert known.found_in("NOTICE", text.encode()) == (["a local path"] if is_path else [])


# Training programs

TRAIN = """
import json
from pathlib import Path
import stage_runs
stage, folder, output, settings = arguments
stage_runs.train(stage, Path(folder), output, **json.loads(settings))
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("parts"))


def train(clients: Clients, stage: str, folder: Path, output: str, **settings):
    words = (stage, folder, output, json.dumps({"num_train_epochs": 1, **settings}))
    return clients.run(TRAIN, *words)


def test_training_ends_on_the_hub(hub, clients, parts):
    (parts / "trained").mkdir()
    (parts / "trained/model.safetensors").write_bytes(b"of an earlier run")
    done = train(clients, "stage3", parts, "trained", push_to_hub="someone/trained", max_shard_size="200KB")
    assert done.returncode == 0, done.stderr[-3000:]
    repository = hub.repositories["models/someone/trained"]
    files = repository.files()
    assert repository.private and repository.branches["main"] in done.stdout
    expected = {"run_config.yaml", "log.jsonl", "curves.png", "README.md", "chat_template.jinja", "fingerprint.json"}
    assert expected <= set(files)
    assert json.loads(files["fingerprint.json"])["hash"] in files["README.md"].decode()
    assert not [name for name in files if name.startswith(("adapter/", "checkpoints/"))]
    for name in [name for name in files if name.endswith(".safetensors")]:
        assert files[name] == (parts / "trained" / name).read_bytes()
    assert sum(name.startswith("model-00") for name in files) > 3 and "model.safetensors" not in files


def test_a_failed_upload_loses_no_training(hub, clients, parts):
    (parts / "kept").mkdir()
    (parts / "kept/model.safetensors.index.json").write_text("of an earlier run")
    hub.begin(fake_hub.Fault("/commit/", "refuse"))
    done = train(clients, "stage2", parts, "kept", push_to_hub="someone/kept-run", hub_private=False)
    assert done.returncode == 1 and f"hsenet push {parts / 'kept'} someone/kept-run --public" in done.stderr
    assert set(hub.repositories["models/someone/kept-run"].files()) == {".gitattributes"}
    push(clients, parts / "kept", "someone/kept-run", "--public")
    assert "model.safetensors" in hub.repositories["models/someone/kept-run"].files()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"push_to_hub": "no owner"}, "OWNER/NAME"), ({"push_to_hub": "other/model"}, "does not let you write")],
)
def test_a_wrong_name_is_refused_before_training(settings, words, hub, clients, parts):
    done = train(clients, "stage2", parts, "never", **settings)
    assert done.returncode == 1 and words in done.stderr
    assert not (parts / "never").exists()


# Datasets

BUILD = """
import runpy, sys
sys.argv = arguments
runpy.run_path(arguments[0], run_name="__main__")
"""
LOAD = """
import contextlib, io, json
from datasets import load_dataset
from huggingface_hub import DatasetCard
from hsenet.card_checks import snippets
card = DatasetCard.load(arguments[0])
card.validate()
with contextlib.redirect_stdout(io.StringIO()) as output:
    for snippet in snippets(card.text):
        exec(snippet, {})
findings = list(load_dataset(arguments[0], "reports", split="train")["findings"])
if len(arguments) > 1:
    volumes = load_dataset(arguments[0], arguments[1], split="train")
    assert volumes[0]["volume"].shape
print(json.dumps({"findings": findings, "snippet": output.getvalue()}))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return corpora.ct_rate(tmp_path_factory.mktemp("corpus"), "ct-rate-v2")


@pytest.fixture(scope="module")
def dataset(hub, clients, corpus, tmp_path_factory) -> Path:
    """Built and pushed by the script; with pseudonyms, so that its key and its table of names lie beside it."""
    output = tmp_path_factory.mktemp("dataset") / "ct"
    words = ("--corpus", corpus, "--release", "ct-rate-v2", "--output", output, "--workers", "1", "--shard-rows", "4")
    script = ROOT / "datasets_scripts/build_ct_rate.py"
    done = clients.run(BUILD, script, *words, "--deidentify", "--push-to-hub", "someone/ct")
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_a_dataset_is_loaded_from_the_hub(hub, clients, dataset):
    repository = hub.repositories["datasets/someone/ct"]
    files = repository.files()
    assert repository.private and len(repository.commits) == 2
    assert {name.split("/")[0] for name in files} == {
        ".gitattributes", "README.md", "excluded.csv", "leakage.json", "preview", "reports", "volumes"
    }  # fmt: skip
    key = dataset.with_name("ct.salt").read_bytes()
    assert not any(key in content or b"train_1_a" in content for content in files.values())
    stranger = clients.run(
        'from datasets import load_dataset; load_dataset(arguments[0], "reports")', "someone/ct", HF_TOKEN=""
    )
    assert stranger.returncode == 1 and "someone/ct' doesn't exist on the Hub or cannot be accessed" in stranger.stderr
    done = clients.run(LOAD, "someone/ct", "volumes")
    assert done.returncode == 0, done.stderr[-3000:]
    reports = pyarrow.parquet.read_table(dataset / "reports/train.parquet")["findings"].to_pylist()
    said = json.loads(done.stdout)
    assert said["findings"] == reports and reports[0] in said["snippet"]
    card = files["README.md"].decode()
    assert 'dataset_id = "someone/ct"' in card and "os.getcwd()" in (dataset / "README.md").read_text()


def test_a_dataset_that_was_built_anew_leaves_no_old_shards(hub, clients, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "ct")
    first = push(clients, tmp_path / "ct", "someone/rebuilt", "--dataset")
    for path in (tmp_path / "ct/volumes").glob("train-*"):
        path.rename(path.with_name(path.name.replace("of-0000", "of-0010")))
    second = push(clients, tmp_path / "ct", "someone/rebuilt", "--dataset")
    assert set(hub.repositories["datasets/someone/rebuilt"].files()) == {*second["files"], ".gitattributes"}
    assert set(second["files"]) != set(first["files"]) and "build.json" in second["left_out"]


def test_names_in_the_columns_of_a_dataset(hub, clients, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "ct")
    for name in ("ct.salt", "ct.names.csv"):
        shutil.copy(dataset.with_name(name), tmp_path / name)
    push(clients, tmp_path / "ct", "someone/leaky-ct", "--dataset", "--dry_run")
    path = tmp_path / "ct/reports/train.parquet"
    rows = pyarrow.parquet.read_table(path)
    texts = rows["impression"].to_pylist()
    texts[1] += " Compare train_5_a_1."
    column = rows.schema.get_field_index("impression")
    pyarrow.parquet.write_table(rows.set_column(column, rows.schema.field(column), [texts]), path)
    said = refusal(clients, tmp_path / "ct", "someone/leaky-ct", "--dataset")
    assert "reports/train.parquet holds an identifier" in said and "train_5" not in said
    assert hub.requests == []


def test_datasets_that_are_not_whole(hub, clients, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "ct")
    (tmp_path / "ct/reports/train.parquet").unlink()
    assert "names reports/train.parquet" in refusal(clients, tmp_path / "ct", "someone/part", "--dataset")
    path = tmp_path / "ct/README.md"
    card = path.read_text()
    shutil.copy(dataset / "reports/train.parquet", tmp_path / "ct/reports")
    for old, new, words in (
        ("## Source and licence", "## Source", "no section 'Source and licence'"),
        ("Not a medical device.", "A device.", "does not say 'Not a medical device.'"),
        ("license: cc-by-nc-sa-4.0\n", "", "no license in the metadata"),
        ("pretty_name:", "name:", "no pretty_name"),
        ("---\n", "---\na: [\n", "metadata of README.md cannot be read"),
    ):
        assert old in card
        path.write_text(card.replace(old, new, 1))
        said = clients.hsenet("push", tmp_path / "ct", "someone/part", "--dataset", "--dry_run")
        assert said.returncode == 1 and words in said.stderr, said.stderr
    (tmp_path / "ct/corpus").symlink_to(tmp_path)
    assert "local copy" in refusal(clients, tmp_path / "ct", "someone/part", "--dataset")
    assert hub.requests == []


def test_scans_with_words_in_their_headers(hub, clients, tmp_path):
    """Phantoms go as files; nothing makes such a header, and nothing with one goes."""
    script = ROOT / "datasets_scripts/build_phantom.py"
    words = ("--train-studies", "2", "--validation-studies", "0", "--test-studies", "0", "--workers", "1")
    done = clients.run(BUILD, script, "--output", tmp_path / "p", *words, "--spacing", "9", "9", "9", "--push-to-hub",
                       "someone/phantoms", "--public")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not hub.repositories["datasets/someone/phantoms"].private
    done = clients.run(LOAD, "someone/phantoms")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["findings"][0] in said["snippet"]
    path = next((tmp_path / "p/volumes").rglob("*.nii.gz"))
    image = nibabel.load(path)
    image.header["descrip"] = CANARIES[0]
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header), path)
    hub.begin()
    said = refusal(clients, tmp_path / "p", "someone/phantoms", "--dataset", "--public")
    assert "words in the header of a scan" in said and CANARIES[0] not in said and hub.requests == []
