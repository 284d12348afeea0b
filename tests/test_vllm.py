"""vLLM's transformers backend writes what `generate` writes: as an OpenAI-compatible server, and from the files alone.

vLLM pins its own torch and transformers, so it has an environment of its own (docs/vllm.md). The slow tests run where
`HSENET_VLLM_PYTHON` names its Python: `HSENET_VLLM_PYTHON=vllm-env/bin/python pytest -m slow tests/test_vllm.py`.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path

import nibabel
import pytest
import tiny
from transformers import AttentionInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hsenet import HSENetConfig, HSENetForConditionalGeneration, HSENetProcessor, read_volume
from modeling_hsenet import HSENetModel


ROOT = Path(__file__).parent.parent
QUESTIONS = ("a nodule?", "no pleural effusion")
NEW_TOKENS = 12
SETTINGS = {"dtype": "float32", "max_model_len": 128, "gpu_memory_utilization": 0.2, "enforce_eager": True}
STARTING_SECONDS = 300


@pytest.fixture(scope="module")
def python() -> str:
    path = os.environ.get("HSENET_VLLM_PYTHON")
    if not path:
        pytest.skip("HSENET_VLLM_PYTHON names no Python with vLLM and this package: docs/vllm.md says how to make one")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As Phi-4-mini, the language model has grouped heads, partly rotary, and its head is its embedding."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}  # of width 64, which vLLM's CPU kernels have
    text = {"hidden_size": 128, "max_position_embeddings": 256, "tie_word_embeddings": True, **heads}
    model = tiny.generation_model(text_config=tiny.text_config(**text, rope_parameters=rotary))
    folder = tmp_path_factory.mktemp("generation")
    model.save_pretrained(folder)
    tiny.processor(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scans")
    paths = []
    for seed, shape in ((0, (10, 40, 36)), (3, (12, 36, 40))):
        volume = read_volume(tiny.scan(seed, shape), spacing=(3.0, 1.0, 1.0))
        paths.append(folder / f"scan{seed}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(volume.array, volume.affine), paths[-1])
    return paths


@pytest.fixture(scope="module")
def expected(folder, scans) -> dict[tuple[Path, str], list[int]]:
    """What `generate` answers, in the project's environment."""
    model = HSENetForConditionalGeneration.from_pretrained(folder).eval()
    processor = HSENetProcessor.from_pretrained(folder)
    answers = {}
    for scan in scans:
        for question in QUESTIONS:
            inputs = processor(volumes=scan, text=question, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            answers[scan, question] = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(set(map(tuple, answers.values()))) == len(answers), "the answers should tell scans and questions apart"
    return answers


def environment_of(home: Path, **more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "VLLM_"))}
    places = {"HF_HOME": str(home / "hf"), "VLLM_CACHE_ROOT": str(home / "vllm")}
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {**own, **places, **offline, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **more}


class Server:
    """vLLM's server as documented, on the loopback interface, and the client's side of the OpenAI protocol."""

    def __init__(self, python: str, folder: Path, home: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        host, port = self.address.split(":")
        command = [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            folder,
            "--served-model-name",
            "tiny",
        ]
        command += ["--host", host, "--port", port, "--enforce-eager", *options]
        for name, value in SETTINGS.items():
            command += [] if value is True else [f"--{name.replace('_', '-')}", str(value)]
        self.log = home / "log"
        environment = environment_of(home, PYTHONPATH=str(ROOT), VLLM_MEDIA_CONNECTOR="hsenet")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        end = time.monotonic() + STARTING_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return self.get("health")
            except OSError:
                time.sleep(1)
        raise AssertionError(f"vLLM did not start:\n{self.log.read_text()[-5000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}/{path}", timeout=60) as response:
            return response.read().decode()

    def chat(self, url: str, question: str) -> dict:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS}
        body = json.dumps({**body, "temperature": 0, "return_token_ids": True}).encode()
        address, headers = f"http://{self.address}/v1/chat/completions", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=120) as response:
            return json.load(response)["choices"][0]

    def refusal(self, url: str) -> str:
        """What it says against a scan; the request is at fault, not the server."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.chat(url, QUESTIONS[0])
        assert caught.value.code == 400
        return json.load(caught.value)["error"]["message"]

    def known_scans(self) -> float:
        """How often it had a request's scan already."""
        return float(re.search(r"^vllm:mm_cache_hits_total\{.*\} (\S+)$", self.get("metrics"), re.MULTILINE)[1])


@pytest.fixture(scope="module")
def server(python, folder, scans, tmp_path_factory):
    server = Server(
        python, folder, tmp_path_factory.mktemp("server"), "--allowed-local-media-path", str(scans[0].parent)
    )
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def data_url(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{b64encode(content).decode()}"


@pytest.mark.slow
def test_served_answers_are_those_of_generate(server, scans, expected):
    for (scan, question), tokens in expected.items():
        assert server.chat(data_url(scan.read_bytes()), question)["token_ids"] == tokens


@pytest.mark.slow
def test_the_second_question_finds_the_scan_read(server, scans, expected):
    url = data_url(scans[0].read_bytes())
    server.chat(url, "is a")
    before = server.known_scans()
    assert server.chat(url, QUESTIONS[1])["token_ids"] == expected[scans[0], QUESTIONS[1]]
    assert server.known_scans() == before + 1


@pytest.mark.slow
def test_refusals_are_the_readers_and_repeat_nothing(server, scans):
    name = b"PATIENT^NAME"  # twelve bytes, so that its Base64 stands in that of its repetition
    message = server.refusal(data_url(name * 50))
    assert "not NIfTI" in message
    assert "truncated" in server.refusal(data_url(scans[0].read_bytes()[:-500]))
    for said in (message, server.log.read_text()):
        assert name.decode() not in said and b64encode(name).decode() not in said


@pytest.mark.slow
def test_files_that_the_server_may_read(server, scans, expected):
    for (scan, question), tokens in expected.items():
        assert server.chat(scan.as_uri(), question)["token_ids"] == tokens
    folder = scans[0].parent / "series"
    folder.mkdir()
    message = server.refusal(folder.as_uri())
    assert "expected one file, a DICOM series as a zip" in message and str(folder) not in message


FROM_THE_FILES = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, questions, new_tokens, settings, *scans = sys.argv[1:]
    settings = {"skip_mm_profiling": True, **json.loads(settings)}  # vLLM would measure memory with a picture
    model = LLM(folder, trust_remote_code=True, model_impl="transformers", **settings)
    prompts = [
        {"prompt": f"<|endoftext|><image>{question}", "multi_modal_data": {"image": [Path(scan).read_bytes()]}}
        for scan in scans
        for question in json.loads(questions)
    ]
    outputs = model.generate(prompts, SamplingParams(temperature=0, max_tokens=int(new_tokens)))
    assert not {"hsenet", "modeling_hsenet"} & set(sys.modules)
    Path("tokens.json").write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.slow
def test_from_the_files_alone(python, folder, scans, expected, tmp_path):
    """Without the plugin vLLM takes the model's own code, and scans through its Python interface."""
    (tmp_path / "program.py").write_text(FROM_THE_FILES)
    arguments = [folder, json.dumps(QUESTIONS), str(NEW_TOKENS), json.dumps(SETTINGS), *scans]
    run = subprocess.run(
        [python, "program.py", *map(str, arguments)],
        cwd=tmp_path,
        env=environment_of(tmp_path, VLLM_PLUGINS=""),
        capture_output=True,
        text=True,
        timeout=STARTING_SECONDS,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    assert json.loads((tmp_path / "tokens.json").read_text()) == list(expected.values())


def test_a_server_that_brings_the_head_gets_the_model_without_one():
    AttentionInterface.register("vllm", sdpa_attention_forward)
    settings = tiny.generation_model().config.to_dict()
    assert type(AutoModel.from_config(HSENetConfig(**settings))) is HSENetForConditionalGeneration
    config = HSENetConfig(**settings)
    config.text_config._attn_implementation = "vllm"
    model = AutoModel.from_config(config)
    assert type(model) is HSENetModel
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "global_encoder", "local_encoder", "slice_encoder", "multi_modal_projector", "language_model"
    }  # fmt: skip
