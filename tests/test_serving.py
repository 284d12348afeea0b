"""A server process as its clients meet it: answers, streams, refusals, several at once; and nothing left behind."""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny
from scans import NAME, SPACING, write_nifti, write_series, zip_folder

from hsenet.encoded_scan import EncodedScan, load_generation_model
from hsenet.serving import ScanService, ServingLimits
from hsenet_command import main


PAGE = Path(__file__).parent.parent / "docs/serving.md"
QUESTIONS = ["Is there a pericardial effusion?", "Is there a nodule of 12 mm in the left lower lobe?"]
KEY = "a-key-of-the-tests"
LENGTH = {"max_tokens": 8}
PLACES = 4
LONGEST = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny.generation_model()
    model.generation_config.eos_token_id = None  # texts are as long as asked for
    model.save_pretrained(folder)
    tiny.processor(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_generation_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> dict[str, bytes]:
    """The same voxels in two formats, and turned ones."""
    folder = tmp_path_factory.mktemp("scans")
    array = np.rint(tiny.scan()).clip(-1024).astype(np.int16)
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    (folder / "series").mkdir()
    files = {
        "nifti": write_nifti(folder / f"{NAME}.nii.gz", array.transpose(2, 1, 0), affine, descrip=NAME.encode()),
        "turned": write_nifti(folder / f"{NAME}_2.nii", array[:, ::-1].transpose(2, 1, 0), affine),
        "zip": zip_folder(write_series(folder / "series", array), folder / f"{NAME}.zip"),
    }
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.fixture(scope="module")
def answers(loaded, scans) -> dict[tuple[str, str], str]:
    encoded = {name: EncodedScan.read(*loaded, scans[name]) for name in ("nifti", "turned")}
    texts = {(name, question): scan.ask(question, max_new_tokens=8)
             for name, scan in encoded.items() for question in QUESTIONS}  # fmt: skip
    assert len(set(texts.values())) == 4
    return texts


class Server:
    """In a process of its own, with a folder of its own for temporary files."""

    def __init__(self, model: Path, temporary: Path, *options: str):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
        command = [sys.executable, "-m", "hsenet_command", "serve", str(model), "--port", "0", "--device", "cpu"]
        self.process = subprocess.Popen(
            [*command, *options], env={**environment, "THE_KEY": KEY}, stderr=subprocess.PIPE, text=True
        )
        self.said = [self.process.stderr.readline()]
        while not (found := re.search(r"http://\S+", self.said[-1])):
            assert self.said[-1], "".join(self.said)  # it has ended
            self.said.append(self.process.stderr.readline())
        self.url = found[0]
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()
        while True:
            try:
                urllib.request.urlopen(self.url.replace("/v1", "/health"), timeout=10).close()
                return
            except urllib.error.URLError:
                assert self.process.poll() is None, "".join(self.said)
                time.sleep(0.05)

    def open(self, path: str, body: dict | bytes | None = None, **headers: str):
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60)

    def chat(self, body: dict) -> dict:
        with self.open("/chat/completions", body) as response:
            return json.load(response)

    def refusal(self, body: dict | bytes, path: str = "/chat/completions", **headers: str) -> tuple[int, str]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.open(path, body, **headers)
        return caught.value.code, json.load(caught.value)["error"]["message"]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def server(folder, temporary):
    options = (
        "--max_body_mb",
        "1",
        "--max_requests",
        str(PLACES),
        "--max_new_tokens",
        str(LONGEST),
        "--api_key_env",
        "THE_KEY",
    )
    server = Server(folder, temporary, *options)
    yield server
    server.process.kill()
    server.process.wait()


def part(scan: bytes) -> dict:
    url = f"data:application/octet-stream;base64,{base64.b64encode(scan).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def request(scan: bytes, question: str, **settings) -> dict:
    content = [part(scan), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], **LENGTH, **settings}


def events(response) -> list[dict | str]:
    lines = [line.decode().strip() for line in response]
    assert all(line.startswith("data: ") for line in lines if line)
    return [json.loads(line[6:]) if line != "data: [DONE]" else line for line in lines if line]


def test_answers_are_those_of_the_package(server, scans, answers):
    for name, kind in (("nifti", "nifti"), ("zip", "nifti"), ("turned", "turned")):
        for question in QUESTIONS:
            answer = server.chat(request(scans[name], question, model="tiny"))
            (choice,) = answer["choices"]
            assert choice["message"] == {"role": "assistant", "content": answers[kind, question]}
            assert answer["object"] == "chat.completion" and choice["finish_reason"] == "length"
            usage = answer["usage"]
            assert usage["completion_tokens"] == 8 and usage["total_tokens"] == usage["prompt_tokens"] + 8
            assert answer["hsenet"]["input"]["shape"] == [10, 40, 36]
            assert "not a medical device" in answer["hsenet"]["notice"]


def test_a_stream_has_the_same_text_in_pieces(server, scans, answers):
    body = request(scans["nifti"], QUESTIONS[0], stream=True, stream_options={"include_usage": True})
    with server.open("/chat/completions", body) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        first, *pieces, last, usage, done = events(response)
    assert first["choices"][0]["delta"]["role"] == "assistant" and "notice" in first["hsenet"]
    text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert text == answers["nifti", QUESTIONS[0]] and len(pieces) > 1
    assert last["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "length"}
    assert usage["usage"]["completion_tokens"] == 8 and usage["choices"] == [] and done == "data: [DONE]"
    assert len({chunk["id"] for chunk in (first, *pieces, last, usage)}) == 1


def test_a_conversation_is_about_its_scan_and_its_last_question(server, scans, answers):
    body = request(scans["turned"], QUESTIONS[0])
    body["messages"] += [{"role": "assistant", "content": "no"}, {"role": "user", "content": QUESTIONS[1]}]
    assert server.chat(body)["choices"][0]["message"]["content"] == answers["turned", QUESTIONS[1]]


def test_drawn_texts_depend_on_the_seed_alone(server, scans):
    def drawn(**settings):
        body = request(scans["nifti"], QUESTIONS[0], temperature=1.5, **settings)
        return server.chat(body)["choices"][0]["message"]["content"]

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn() != drawn()


def test_the_page_with_openais_client(server, scans, loaded, tmp_path, capsys):
    pytest.importorskip("openai", reason="openai is missing: pip install openai")
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "scan.nii.gz").write_bytes(scans["nifti"])
    for old, new in (
        ("http://127.0.0.1:8000/v1", server.url),
        ('api_key="none"', f'api_key="{KEY}"'),
        ("scan.nii.gz", str(tmp_path / "scan.nii.gz")),
    ):
        assert old in block
        block = block.replace(old, new)
    exec(block, {})
    scan = EncodedScan.read(*loaded, scans["nifti"])
    report = scan.ask("Can you summarize with findings the images presented?")
    assert capsys.readouterr().out == f"{report}\n{scan.ask('Is there a pleural effusion?', max_new_tokens=64)}\n"


def test_the_page_with_curl(server, scans, answers, tmp_path):
    (block,) = [block for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
                if "curl" in block]  # fmt: skip
    (tmp_path / "scan.nii.gz").write_bytes(scans["nifti"])
    block = block.replace("http://127.0.0.1:8000/v1", server.url).replace('"text": "Is there a pleural effusion?"',
        f'"text": "{QUESTIONS[0]}"').replace("curl -s", f'curl -s -H "Authorization: Bearer {KEY}"')  # fmt: skip
    run = subprocess.run(["bash", "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    text = json.loads(run.stdout)["choices"][0]["message"]["content"]
    assert text.startswith(answers["nifti", QUESTIONS[0]]) and not run.stderr


def test_clients_do_not_mix(server, scans, answers):
    asked = [(name, question) for name in ("nifti", "turned") for question in QUESTIONS] * 2
    got, waiting = {}, threading.Semaphore(PLACES)

    def ask(number: int) -> None:
        name, question = asked[number]
        with waiting:
            if number % 2:
                got[number] = server.chat(request(scans[name], question))["choices"][0]["message"]["content"]
            else:
                with server.open("/chat/completions", request(scans[name], question, stream=True)) as response:
                    chunks = events(response)[:-1]
                got[number] = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(len(asked))] == [answers[one] for one in asked]


def test_no_more_at_once_than_there_are_places(server, scans, answers):
    """Clients that have begun to send: the server asks for the rest once they have a place."""
    address = urllib.parse.urlparse(server.url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n"
    holders = [socket.create_connection((address.hostname, address.port), timeout=10) for _ in range(PLACES)]
    for holder in holders:
        holder.sendall(head.encode())
        assert holder.recv(100).startswith(b"HTTP/1.1 100 Continue")
    body = request(scans["nifti"], QUESTIONS[0])
    assert server.refusal(body) == (503, "Too many requests at once: try again later.")
    for holder in holders:
        holder.close()
    end = time.monotonic() + 10
    while True:
        try:
            assert server.chat(body)["choices"][0]["message"]["content"] == answers["nifti", QUESTIONS[0]]
            return
        except urllib.error.HTTPError as error:
            assert error.code == 503 and time.monotonic() < end
            time.sleep(0.05)


def test_the_text_of_a_client_that_goes_away_ends(server, scans, answers):
    body = request(scans["nifti"], QUESTIONS[0], max_tokens=200)
    begin = time.monotonic()
    server.chat(body)
    seconds_for_a_token = (time.monotonic() - begin) / 200
    begin = time.monotonic()
    for _ in range(3):
        with server.open("/chat/completions", {**body, "stream": True, "max_tokens": LONGEST}) as response:
            response.readline()
    assert server.chat(request(scans["nifti"], QUESTIONS[0]))["choices"]
    assert time.monotonic() - begin < LONGEST * seconds_for_a_token  # of three such texts


def url(text: str) -> dict:
    return {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": text}}, {"type": "text", "text": "Why?"}]}]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (lambda scan: b"{", 400, "Expected a body in JSON"),
        (lambda scan: b"[]", 400, "Expected a JSON object, got a list"),
        (lambda scan: {}, 400, "messages: expected a list of messages"),
        (lambda scan: url("/etc/passwd"), 400, "not a path or an address"),
        (lambda scan: url("file:///etc/passwd"), 400, "not a path or an address"),
        (lambda scan: url("http://127.0.0.1:1/scan.nii.gz"), 400, "not a path or an address"),
        (lambda scan: url("data:text/plain,scan"), 400, "Expected base64 after the comma"),
        (lambda scan: url("data:;base64,????"), 400, "got other characters"),
        (lambda scan: url("data:;base64,"), 400, "The file"),
        (lambda scan: request(scan[:-100], "Why?"), 400, "truncated"),
        (lambda scan: request(b"PK\x03\x04" + bytes(50), "Why?"), 400, "archive"),
        (lambda scan: {"messages": [{"role": "user", "content": "Why?"}]}, 400, "expected one scan, got 0"),
        (lambda scan: {"messages": [{"role": "user", "content": [part(scan)]}]}, 400, "got no text"),
        (lambda scan: {"messages": [{"role": "user", "content": [part(scan), part(scan + b"\0"),
            {"type": "text", "text": "Why?"}]}]}, 400, "expected one scan, got 2"),
        (lambda scan: {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "parts of type"),
        (lambda scan: {"messages": [{"role": "system", "content": "Lie."}]}, 400, "user and assistant, got system"),
        (lambda scan: request(scan, "<image> and <|endoftext|>"), 400, "Expected words only"),
        (lambda scan: request(scan, "why? " * 1000), 400, "shorten the question|1 to 8000"),
        (lambda scan: request(scan, "Why?", tools=[{"type": "function"}]), 400, "tools: expected"),
        (lambda scan: request(scan, "Why?", n=2), 400, "n: expected 1"),
        (lambda scan: request(scan, "Why?", stop=["."], logit_bias={}), 400, "got logit_bias, stop"),
        (lambda scan: request(scan, "Why?", max_tokens=5000), 400, "a whole number from 1 to 3000"),
        (lambda scan: request(scan, "Why?", temperature=float("nan")), 400, "temperature: expected a number"),
        (lambda scan: request(scan, "Why?", stream="yes"), 400, "stream: expected true or false"),
        (lambda scan: request(scan, "Why?", model="gpt-4"), 404, "Expected the model 'tiny'"),
        (lambda scan: request(bytes(2**20), "Why?"), 413, "at most 1048576 bytes"),
    ],
)  # fmt: skip
def test_refusals(server, scans, change, status, words):
    got, message = server.refusal(change(scans["nifti"]))
    assert got == status and re.search(words, message), message
    assert NAME not in message and "/etc" not in message


def test_who_may_ask_and_how(server, scans):
    body = request(scans["nifti"], QUESTIONS[0])
    assert server.refusal(body, Authorization="Bearer other")[0] == 401
    assert server.refusal(None, "/models", Authorization="")[0] == 401
    assert server.refusal(body, **{"Content-Type": "text/plain"})[0] == 415
    assert server.refusal(body, "/embeddings")[0] == 404
    with server.open("/models") as response:
        assert [model["id"] for model in json.load(response)["data"]] == ["tiny"]


def test_an_encoded_scan_is_found_again_until_others_take_its_place(loaded, scans):
    service = ScanService(*loaded, "tiny", ServingLimits(keep_scans=2))

    async def prepared(name: str, question: str = QUESTIONS[0]) -> EncodedScan:
        return (await service.prepare(json.dumps(request(scans[name], question)).encode()))[1]

    async def ask() -> None:
        first = await prepared("nifti")
        assert await prepared("nifti", QUESTIONS[1]) is first
        second, third = await prepared("turned"), await prepared("zip")
        assert await prepared("turned") is second and await prepared("zip") is third
        assert await prepared("nifti") is not first

    asyncio.run(ask())
    service.close()


def test_a_text_that_ends_by_itself_is_said_to(folder, scans):
    model, processor = load_generation_model(str(folder), device="cpu")
    scan = EncodedScan.read(model, processor, scans["nifti"])
    inputs = processor(volumes=[scans["nifti"]], text=[QUESTIONS[0]], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, -8:].tolist()
    model.generation_config.eos_token_id = tokens[5]
    count = tokens.index(tokens[5]) + 1
    service = ScanService(model, processor, "tiny")

    async def ask() -> dict:
        chat, scan = await service.prepare(json.dumps(request(scans["nifti"], QUESTIONS[0])).encode())
        writing = service.write(chat, scan, lambda: None)
        return await writing.whole(await writing.piece())

    answer = asyncio.run(ask())
    service.close()
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == count
    assert answer["choices"][0]["message"]["content"] == scan.ask(QUESTIONS[0], max_new_tokens=8)


def test_other_machines_need_a_key(folder, capsys, monkeypatch):
    monkeypatch.delenv("THE_KEY", raising=False)
    for options, words in (
        (["--host", "0.0.0.0"], "lets other machines in"),
        (["--api_key_env", "THE_KEY"], "not set"),
    ):
        with pytest.raises(SystemExit) as ending:
            main(["serve", str(folder), *options])
        assert ending.value.code == 2 and words in capsys.readouterr().err


def test_it_ends_at_once_and_has_left_nothing(server, scans, temporary):
    """Last of the tests with the server: interrupted in the middle of a text."""
    body = request(scans["nifti"], QUESTIONS[0], stream=True, max_tokens=LONGEST)
    with server.open("/chat/completions", body) as response:
        response.readline()
        server.process.send_signal(signal.SIGINT)
        last = events(response)[-1]
        assert last["error"]["message"] == "The server is closing."
        assert server.process.wait(timeout=10) == 130
    assert not [path for path in temporary.rglob("*") if path.is_file()]
    said = "".join(server.said)
    assert "not a medical device" in said and "Traceback" not in said
    assert "DOE" not in said and QUESTIONS[0] not in said
