"""The interfaces of transformers, accelerate and bitsandbytes around the model that writes, and their page."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_hub import run_elsewhere
from torch._dynamo.utils import counters
from transformers import CompileConfig, pipeline

from hsenet.encoded_scan import EncodedScan, load_generation_model
from hsenet.quantization import NOT_QUANTIZED, quantization_config
from hsenet_command import main


PAGE = Path(__file__).parent.parent / "docs/inference.md"
QUESTION = "Is there a pleural effusion?"
GREEDY = {"max_new_tokens": 64, "do_sample": False}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason='bitsandbytes is missing: pip install -e ".[quantization]"',
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Widths that 4 bits can hold."""
    model = tiny.generation_model(text_config=tiny.text_config(hidden_size=64, intermediate_size=128))
    model.generation_config.eos_token_id = None  # all texts have the same length
    return str(tiny.save_generation(tmp_path_factory.mktemp("models") / "tiny", model))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_generation_model(folder, device="cpu")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[str]:
    """Two that the model answers differently about."""
    folder = tmp_path_factory.mktemp("scans")
    return [
        str(tiny.write_scan(folder / name, flips)) for name, flips in (("scan.nii.gz", ()), ("turned.nii.gz", (1,)))
    ]


@pytest.fixture(scope="module")
def inputs(loaded, scans) -> dict:
    return dict(loaded[1](volumes=scans, text=[QUESTION, QUESTION], return_tensors="pt"))


def tokens(model, inputs: dict, **settings) -> list[list[int]]:
    return model.generate(**inputs, **{**GREEDY, **settings})[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def greedy(loaded, inputs) -> list[list[int]]:
    greedy = tokens(loaded[0], inputs)
    assert greedy[0] != greedy[1]
    return greedy


def relative_error(model, reference, inputs: dict) -> float:
    with torch.no_grad():
        expected, got = (one(**inputs).logits.float() for one in (reference, model))
    return ((got - expected).square().mean().sqrt() / expected.std()).item()


# The page's blocks in one namespace, as its reader would run them one after the other.
BLOCKS = """
import contextlib, io, json
import torch
printed, quantized = [], []
namespace = {}
for block in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(block, namespace)
    printed.append(out.getvalue())
    linear = {n: type(m).__name__ for n, m in namespace["model"].named_modules() if isinstance(m, torch.nn.Linear)}
    quantized.append(sorted({n[:n.index(".layers")] for n, kind in linear.items() if kind != "Linear"}))
assert not any(name in sys.modules for name in names)
print(json.dumps([printed, quantized]))
"""


def test_the_page_runs_without_the_package(loaded, folder, scans, greedy, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    run = [block for block in blocks if ".compile(" not in block]  # a test of its own is shorter
    if importlib.util.find_spec("bitsandbytes") is None:
        run = [block for block in run if "BitsAndBytesConfig" not in block]
    run = [block.replace("outputs/quickstart/stage3", folder).replace("scan.nii.gz", scans[0]) for block in run]
    printed, quantized = run_elsewhere(BLOCKS, tmp_path / "elsewhere", json.dumps(run))
    decode = loaded[1].tokenizer.decode
    text = decode(greedy[0], skip_special_tokens=True)
    plain, ways, streamed, piped, half, *eight_bits = printed
    assert plain == streamed == piped == f"{text}\n"
    assert ways.startswith(f"{text}\n") and len(ways) > 3 * len(text)
    assert len(half) > 1 and quantized[:5] == [[]] * 5
    assert not eight_bits or (len(eight_bits[0]) > 1 and quantized[5] == ["model.language_model"])


def test_the_pipeline_writes_in_batches(loaded, scans, greedy):
    model, processor = loaded
    write = pipeline("image-text-to-text", model=model, processor=processor)
    question = {"type": "text", "text": QUESTION}
    chats = [[{"role": "user", "content": [{"type": "volume", "volume": scan}, question]}] for scan in scans]
    outputs = write(text=chats, batch_size=2, return_full_text=False, **GREEDY)
    written = [output[0]["generated_text"] for output in outputs]
    assert written == processor.batch_decode(greedy, skip_special_tokens=True)


def test_placeholders_without_a_volume_are_refused(loaded, inputs, scans):
    model, processor = loaded
    alone = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="no volume was given"):
        tokens(model, alone)
    write = pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    content = [{"type": "volume", "volume": scans[0]}, {"type": "text", "text": QUESTION}]
    with pytest.raises(ValueError, match="of the pipelines use image-text-to-text"):
        write([{"role": "user", "content": content}])


def test_beams_and_samples_have_the_shape_of_greedy_text(loaded, inputs, greedy):
    model = loaded[0]
    shape = np.shape(greedy)
    assert np.shape(tokens(model, inputs, num_beams=3)) == shape
    torch.manual_seed(0)
    drawn = tokens(model, inputs, do_sample=True, top_p=0.9, num_return_sequences=2)
    assert np.shape(drawn) == (2 * shape[0], shape[1]) and drawn[0] != drawn[1]
    torch.manual_seed(0)
    assert tokens(model, inputs, do_sample=True, top_p=0.9, num_return_sequences=2) == drawn


def test_static_cache_also_with_a_compiled_step(loaded, inputs, greedy):
    assert tokens(loaded[0], inputs, cache_implementation="static") == greedy
    compile_config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True  # on a GPU it is done without being asked
    counters.clear()
    compiled = tokens(loaded[0], inputs, cache_implementation="static", compile_config=compile_config)
    assert compiled == greedy and counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_forward_pass(folder, loaded, inputs, backend):
    model, _ = load_generation_model(folder, device="cpu")
    model.compile(fullgraph=True, backend=backend)
    counters.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, loaded[0](**inputs).logits, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("max_memory", [None, {"cpu": "300KB"}], ids=["memory", "disk"])
def test_device_map(folder, scans, inputs, greedy, max_memory, tmp_path):
    settings = {"max_memory": max_memory, "offload_folder": str(tmp_path)} if max_memory else {}
    model, processor = load_generation_model(folder, device_map="auto", **settings)
    if max_memory:
        assert {"cpu", "disk"} == set(model.hf_device_map.values())
        assert model.lm_head.weight.device.type == "meta"  # it comes from the disk when its turn comes
    assert tokens(model, inputs) == greedy
    answer = processor.tokenizer.decode(greedy[0], skip_special_tokens=True).strip()
    assert EncodedScan.read(model, processor, scans[0]).ask(QUESTION, max_new_tokens=64) == answer


def test_loading_in_bfloat16(folder, loaded, inputs, greedy):
    model, _ = load_generation_model(folder, device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert 0 < relative_error(model, loaded[0], inputs) < 0.03
    assert np.shape(tokens(model, inputs)) == np.shape(greedy)


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "dtype", "error"), [("8bit", None, 0.06), ("4bit", "bfloat16", 0.5)])
def test_only_the_language_model_is_on_fewer_bits(folder, loaded, inputs, greedy, bits, dtype, error):
    config = quantization_config(bits, dtype, NOT_QUANTIZED)
    model, _ = load_generation_model(folder, device="cpu", dtype=dtype, quantization_config=config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_rounded = type(module) is not torch.nn.Linear
            assert is_rounded == name.startswith("model.language_model."), name
            assert module.weight.dtype == (
                {"8bit": torch.int8, "4bit": torch.uint8}[bits] if is_rounded else model.dtype
            )
    assert model.get_memory_footprint() < loaded[0].get_memory_footprint()
    assert 0.001 < relative_error(model, loaded[0], inputs) < error
    assert np.shape(tokens(model, inputs)) == np.shape(greedy)


@needs_bitsandbytes
def test_the_encoders_can_be_on_8_bits_too(folder, loaded, inputs):
    config = quantization_config("8bit")
    model, _ = load_generation_model(folder, device="cpu", quantization_config=config)
    assert model.model.global_encoder.embeddings.projection.weight.dtype == torch.int8
    assert 0.001 < relative_error(model, loaded[0], inputs) < 0.1


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_the_command_line_on_fewer_bits(folder, scans, capfd, bits):
    command = ["report", folder, scans[0], "--device", "cpu", "--max_new_tokens", "8", "--json"]
    assert main([*command, "--load_in", bits]) == 0
    out, err = capfd.readouterr()
    record = json.loads(out)
    assert record["text"] and record["settings"]["load_in"] == bits and record["settings"]["dtype"] == "float32"
    assert "bitsandbytes" not in err and "MatMul" not in err and "kernels" not in err


def test_fewer_bits_are_refused_where_they_cannot_be(folder, scans, capsys, monkeypatch):
    command = ["ask", folder, scans[0], QUESTION, "--load_in", "4bit"]
    with pytest.raises(SystemExit) as ending:
        main([*command, "--adapter", folder])
    assert ending.value.code == 2 and "--adapter is merged" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    assert main(command) == 1
    assert 'pip install "hsenet[quantization]"' in capsys.readouterr().err
