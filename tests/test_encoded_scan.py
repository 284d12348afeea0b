"""One scan encoded once: the same answers as the plain way, encoders run once, text streamed, words kept words."""

import threading
import warnings
from pathlib import Path

import nibabel
import pytest
import tiny
import torch

from hsenet.encoded_scan import EncodedScan, load_generation_model


QUESTIONS = [
    "Can you summarize with findings the images presented?",
    "Is there a pericardial effusion?",
    "  Is there a nodule of 12 mm in the left lower lobe? ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny.save_generation(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_generation_model(folder, device="cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tiny.write_scan(tmp_path_factory.mktemp("scan") / "DOE_JANE.nii.gz")


def plain(model, processor, file, question, **settings) -> str:
    inputs = processor(volumes=[file], text=[question], return_tensors="pt")
    generated = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(generated, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}, {"min_new_tokens": 9}]
)
def test_answers_are_those_of_generate(loaded, tmp_path, settings):
    model, processor = loaded
    file = tiny.write_scan(tmp_path / "turned.nii.gz", (1,))
    scan = EncodedScan.read(model, processor, file)
    answers = [scan.ask(question, max_new_tokens=12, **settings) for question in QUESTIONS]
    expected = [plain(model, processor, file, question, max_new_tokens=12, **settings) for question in QUESTIONS]
    assert answers == expected and len(set(answers)) > 1
    assert scan.ask(QUESTIONS[0], max_new_tokens=12, **settings) == answers[0]  # the first cache is as it was


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "gemma2", "gpt_neox", "lfm2"])
def test_other_language_models_too(file, model_type):
    changes = {"sliding_window": 8} if model_type in ("mistral", "gemma2") else {}
    if model_type == "lfm2":  # with convolutions, whose state is a part of the cache
        changes = {"layer_types": ["conv", "full_attention"]}
    text = tiny.text_config(model_type, **changes)
    if model_type == "gpt_neox":
        del text["num_key_value_heads"]
    model = tiny.generation_model(text_config=text)
    scan = EncodedScan.read(model, tiny.processor(model), file)
    for question in QUESTIONS:
        expected = plain(model, scan.processor, file, question, max_new_tokens=12)
        assert scan.ask(question, max_new_tokens=12) == expected


def test_long_rope_changes_all_positions_of_a_longer_prompt(file):
    """A cache made before the change would be of other positions."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    rope["original_max_position_embeddings"] = 30
    model = tiny.generation_model(text_config=tiny.text_config(rope_parameters=rope, max_position_embeddings=400))
    scan = EncodedScan.read(model, tiny.processor(model), file)
    for question in ("nodule?", QUESTIONS[0] * 2):
        expected = plain(model, scan.processor, file, question, max_new_tokens=8)
        assert scan.ask(question, max_new_tokens=8) == expected


def test_encoders_run_once_and_later_questions_read_only_their_own_words(loaded, file):
    model, processor = loaded
    runs, lengths = [], []
    encoders = (model.model.global_encoder, model.model.local_encoder, model.model.slice_encoder)
    hooks = [
        one.register_forward_hook(lambda *_: runs.append(1)) for one in (*encoders, model.model.multi_modal_projector)
    ]
    language_model = model.model.language_model
    hooks.append(
        language_model.register_forward_pre_hook(
            lambda _, __, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
    )
    try:
        scan = EncodedScan.read(model, processor, file)
        assert len(runs) == 4 and not lengths
        starts = []
        for question in QUESTIONS:
            starts.append(len(lengths))
            scan.ask(question, max_new_tokens=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(runs) == 4
    words = [len(processor.tokenizer(question)["input_ids"]) for question in QUESTIONS]
    prefix = model.config.image_seq_length + 1  # after BOS
    assert lengths[:2] == [prefix, words[0]]
    assert [lengths[start] for start in starts[1:]] == words[1:]


def test_pieces_joined_are_the_answer(loaded, file):
    scan = EncodedScan.read(*loaded, file)
    for question in QUESTIONS:
        pieces = list(scan.stream(question, max_new_tokens=40))
        assert "".join(pieces) == scan.ask(question, max_new_tokens=40) and len(pieces) > 1 and all(pieces)


def test_leaving_a_stream_ends_the_writing(loaded, file):
    model, processor = loaded
    scan = EncodedScan.read(model, processor, file)
    steps = []
    hook = model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    stream = scan.stream(QUESTIONS[0], max_new_tokens=2000, min_new_tokens=2000)
    next(stream)
    stream.close()
    count = len(steps)
    hook.remove()
    assert count < 2000 and scan.ask(QUESTIONS[1], max_new_tokens=2)


def test_questions_from_several_threads_do_not_mix(loaded, tmp_path):
    files = [tiny.write_scan(tmp_path / f"{len(flips)}.nii", flips) for flips in ((), (1,), (1, 2))]
    scans = [EncodedScan.read(*loaded, file) for file in files]
    asked = [(scan, question) for scan in scans for question in QUESTIONS]
    expected = [scan.ask(question, max_new_tokens=8) for scan, question in asked]
    assert len(set(expected)) >= 6
    answers = {}

    def ask(number: int) -> None:
        scan, question = asked[number]
        answers[number] = "".join(scan.stream(question, max_new_tokens=8))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(len(asked))] == expected


CONTROL = [
    "<image>",
    "<|endoftext|>",
    "is it <|endoftext|>?",
    "<image><image>",
    "no[PAD]yes",
    "a <|end|> b",
    "<|user|>",
]


@pytest.mark.parametrize("question", CONTROL)
@pytest.mark.parametrize("style", ["plain", "chat"])
def test_words_of_a_question_never_become_control_tokens(loaded, file, question, style):
    model, _ = loaded
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens(["<|end|>", "<|user|>", "pneumothorax"])  # marked as special or not
    if style == "chat":
        tokenizer.chat_template = "{% for m in messages %}<|{{m.role}}|>{{m.content}}<|end|>{% endfor %}"
    processor = tiny.HSENetProcessor(
        tiny.image_processor(), tokenizer, image_seq_length=model.config.image_seq_length, prompt_style=style
    )
    scan = EncodedScan.read(model, processor, file)
    with pytest.raises(ValueError, match="Expected words only, got text with"):
        scan.ask(question)
    with pytest.raises(ValueError, match="Expected words only"):
        list(scan.stream(question))
    conversation = [{"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": question}]}]
    with pytest.raises(ValueError, match="Expected words only"):
        processor.apply_chat_template(conversation, tokenize=False)
    words = processor.prompt("is a < b | [c] <pneumothorax> {{ messages }}?")  # looks like control, and is words
    ids = processor.tokenize_prompts([words])["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == processor.image_seq_length


@pytest.mark.parametrize("question, words", [("", "1 to"), (" \n", "1 to"), ("a" * 10**6, "got 1000000")])
def test_length_of_a_question_is_bounded(loaded, file, question, words):
    with pytest.raises(ValueError, match=words):
        EncodedScan.read(*loaded, file).ask(question)


def test_answers_end_with_the_positions_of_the_language_model(file):
    model = tiny.generation_model(text_config=tiny.text_config(max_position_embeddings=60))
    model.generation_config.eos_token_id = None
    scan = EncodedScan.read(model, tiny.processor(model), file)
    scan.ask("nodule?", max_new_tokens=500)  # ends where the positions do
    with pytest.raises(ValueError, match="fewer than 60 tokens.*shorten the question"):
        scan.ask("Is there a nodule? " * 20)


def test_what_it_says_of_the_scan(loaded, tmp_path):
    model, processor = loaded
    path = tmp_path / "DOE_JANE.nii"
    tiny.write_scan(tmp_path / "DOE_JANE.nii.gz")
    (tmp_path / "DOE_JANE.nii.gz").rename(path)  # gzip, other than its name says
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan = EncodedScan.read(model, processor, str(path))
    assert len(scan.warnings) == 1 and "gzip" in scan.warnings[0] and "DOE" not in scan.warnings[0]
    assert scan.geometry["shape"] == [10, 40, 36] and scan.geometry["spacing"] == [10.0, 8.0, 8.0]
    assert scan.geometry["stored_orientation"] == "LPS" and scan.geometry["hu_range"][0] < -900
    inputs = processor(volumes=[str(path)], text=["nodule?"], return_tensors="pt")
    assert torch.equal(scan.pixel_values, inputs["pixel_values"][0])
    scores = model(**inputs, output_patch_scores=True).patch_scores[0]
    torch.testing.assert_close(scan.patch_scores, scores)
    same = EncodedScan.read(model, processor, nibabel.load(tiny.write_scan(tmp_path / "other.nii.gz")))
    other = EncodedScan.read(model, processor, tiny.write_scan(tmp_path / "third.nii.gz", (1,)))
    assert scan.sha256 == same.sha256 != other.sha256


def test_other_kinds_of_models_are_refused(tmp_path):
    tiny.clip_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected a model that writes .* got one of type hsenet_clip"):
        load_generation_model(str(tmp_path))
