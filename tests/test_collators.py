"""Rows to batches: what is trained on, what several questions of one volume see, and reports said otherwise."""

import pytest
import tiny
import torch

from hsenet.collators import ContrastiveCollator, ReportCollator, first_sentences
from hsenet.data import add_report_texts, generation_rows
from hsenet.losses import sibling_pairs
from hsenet.report_augmentation import ReportAugmentation
from processing_hsenet import HSENetProcessor


TURNS = [
    ("Is there a pericardial effusion?", "no"),
    ("Is there a nodule?", "There is a nodule of 12 mm in the left lower lobe."),
    ("Is the heart enlarged?", "yes"),
]
REPORT = {
    "findings": "The heart is enlarged. A nodule of 12.5 mm is seen. No effusion.",
    "impression": "Cardiomegaly. Nodule.",
}


@pytest.fixture(scope="module")
def model():
    return tiny.generation_model()


@pytest.fixture(scope="module")
def volumes(model):
    return tiny.image_processor()([tiny.scan(0), tiny.scan(1)], spacing=(5, 2, 2), return_tensors="pt")


def examples(volumes, turns_of_each) -> list[dict]:
    rows = [{"turns": turns, "pixel_values": volumes["pixel_values"][i]} for i, turns in turns_of_each]
    return rows


def losses(model, volumes, turns_of_each) -> torch.Tensor:
    """Loss of every answer token, in the order of the turns."""
    batch = ReportCollator(tiny.processor(model), max_length=120)(examples(volumes, turns_of_each))
    labels = batch.pop("labels")
    slices = volumes["slice_pixel_values"][[i for i, _ in turns_of_each]]
    with torch.no_grad():
        logits = model(**batch, slice_pixel_values=slices).logits[:, :-1]
    flat = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return flat[labels[:, 1:] != -100]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_questions_that_share_a_volume_have_the_losses_of_separate_rows(model, volumes, attention):
    model.set_attn_implementation(attention)
    together = losses(model, volumes, [(0, TURNS), (1, TURNS[1:])])
    apart = [losses(model, volumes, [(i, [turn])]) for i, turns in ((0, TURNS), (1, TURNS[1:])) for turn in turns]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


def test_labels_are_answers_and_end_only(model, volumes):
    processor = tiny.processor(model)
    batch = ReportCollator(processor, max_length=120)(examples(volumes, [(0, TURNS)]))
    targets = batch["labels"][batch["labels"] != -100]
    end = processor.tokenizer.eos_token
    assert processor.tokenizer.decode(targets) == "".join(f" {answer}{end}" for _, answer in TURNS)


def test_turns_of_a_chat_template_share_what_precedes_the_volumes_end(model, volumes):
    template = (
        "{% for m in messages %}<|{{m.role}}|>{{m.content}}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer, length = tiny.tokenizer(chat_template=template), model.config.image_seq_length
    processor = HSENetProcessor(tiny.image_processor(), tokenizer, length)
    batch = ReportCollator(processor, max_length=200)(examples(volumes, [(0, TURNS)]))
    labels = batch["labels"]
    assert tokenizer.decode(labels[labels != -100]) == "".join(f"{answer}<|end|>" for _, answer in TURNS)
    turns = [f"{question}<|end|><|assistant|>{answer}<|end|>" for question, answer in TURNS]
    assert tokenizer.decode(batch["input_ids"][0]) == "<|user|>" + "<image>" * length + "".join(turns)
    alone = ReportCollator(processor, max_length=200)(examples(volumes, [(0, TURNS[:1])]))
    inference = processor.tokenize_prompts([processor.prompt(TURNS[0][0])])["input_ids"][0]
    assert torch.equal(alone["input_ids"][0, : len(inference)], inference)  # training sees what generation gets


def test_a_cut_answer_has_no_end(model, volumes):
    collator = ReportCollator(tiny.processor(model), max_length=model.config.image_seq_length + 20)
    rows = examples(volumes, [(0, [TURNS[0], ("Why?", TURNS[1][1] * 3)])])
    labels = collator(rows)["labels"]
    assert (labels == collator.tokenizer.eos_token_id).sum() <= 1
    assert collator.num_truncated(rows) == 1


def test_no_room_for_an_answer_is_an_error(model, volumes):
    collator = ReportCollator(tiny.processor(model), max_length=model.config.image_seq_length + 2)
    with pytest.raises(ValueError, match="no room for an answer"):
        collator(examples(volumes, [(0, TURNS)]))


@pytest.mark.parametrize(("per_row", "expected"), [(1, [1, 1, 1, 1]), (2, [2, 1, 1]), (9, [3, 1])])
def test_questions_are_grouped_by_volume(per_row, expected):
    questions = [{"volume_name": "a", "question": q, "answer": a} for q, a in TURNS]
    questions.append({"volume_name": "b", "question": "Why?", "answer": "no"})
    report = {"volume_name": "a", **REPORT}
    rows = generation_rows([report], questions, ("findings",), per_row)
    assert [len(row["turns"]) for row in rows] == [1, *expected]
    assert rows[0]["turns"][0][1] == "Findings: " + REPORT["findings"]
    assert sorted(turn for row in rows[1:] for turn in row["turns"]) == sorted([*TURNS, ("Why?", "no")])


def rewritten(drop_sentences: float, index: int, epoch: int = 0) -> str:
    rewrite = ReportAugmentation(("findings", "impression"), drop_sentences, seed=3)
    return rewrite([{**REPORT, "index": index, "epoch": epoch}])[0]


def test_rewritten_reports_keep_their_sentences():
    versions = {rewritten(0.0, index) for index in range(40)}
    everything = "".join(REPORT.values())
    assert len(versions) > 5
    for version in versions:
        for heading in ("Findings: ", "Impression: "):
            version = version.replace(heading, "")
        assert all(sentence + "." in everything for sentence in version.rstrip(".").split(". "))
    assert any("Findings" not in version for version in versions)
    assert any("Findings" in version and "Impression" in version for version in versions)


def test_rewritten_reports_follow_from_seed_epoch_and_rows():
    assert rewritten(0.3, 5) == rewritten(0.3, 5)
    assert len({rewritten(0.3, 5, epoch) for epoch in range(20)}) > 3


def test_a_section_never_becomes_empty():
    assert all(text for text in (rewritten(1.0, index) for index in range(10)))


def test_the_contrastive_collator_rewrites_only_when_asked():
    example = {**REPORT, "text": "as it is", "index": 0, "epoch": 0, "pixel_values": torch.zeros(1, 2, 2, 2)}
    plain = ContrastiveCollator(tiny.tokenizer(), 64)([example])
    rewrite = ReportAugmentation(("impression",), 0.0, seed=0)
    other = ContrastiveCollator(tiny.tokenizer(), 64, rewrite)([example])
    decode = tiny.tokenizer().decode
    assert decode(plain["input_ids"][0]) == "as it is"
    assert decode(other["input_ids"][0]) in ("Impression: Cardiomegaly. Nodule.", "Impression: Nodule. Cardiomegaly.")


def test_siblings_share_a_number_however_their_reports_are_rewritten():
    """The same study, or the same report but for line breaks; other reports and studies have other numbers."""
    other = {"findings": "No effusion.", "impression": "Normal."}
    broken = {**REPORT, "findings": REPORT["findings"].replace(". ", ".\n")}
    rows = [{**REPORT, "study_id": "a"}, {**other, "study_id": "a"}, {**broken, "study_id": "b"}]
    add_report_texts(rows, ("findings", "impression"))
    volume = {"epoch": 0, "pixel_values": torch.zeros(1, 2, 2, 2)}
    examples = [{**row, **volume, "index": index} for index, row in enumerate(rows)]
    rewrite = ReportAugmentation(("findings", "impression"), 0.3, seed=0)
    for collator in (ContrastiveCollator(tiny.tokenizer(), 64), ContrastiveCollator(tiny.tokenizer(), 64, rewrite)):
        ids = collator(examples)["sibling_ids"]
        assert sibling_pairs(ids).tolist() == [[False, True, True], [True, False, False], [True, False, False]]


@pytest.mark.parametrize("max_length", range(8, 40))
def test_long_texts_keep_their_first_whole_sentences(max_length):
    tokenizer = tiny.tokenizer(pad_token="[PAD]")
    sentences = ["A nodule of 12.5 mm is seen.", "No effusion!", "Is it new?", "The heart is enlarged."]
    text = " ".join(sentences)
    kept = first_sentences(text, tokenizer, max_length)
    assert len(tokenizer(kept)["input_ids"]) <= max_length or kept == text
    whole = [" ".join(sentences[:count]) for count in range(1, 5)]
    fitting = [some for some in whole if len(tokenizer(some)["input_ids"]) <= max_length]
    assert kept == (fitting[-1] if fitting else text)  # a first sentence that is too long is cut by tokens
    example = {"text": text, "index": 0, "pixel_values": torch.zeros(1, 2, 2, 2)}
    batch = ContrastiveCollator(tokenizer, max_length, whole_sentences=True)([example])
    assert batch["input_ids"].shape[1] <= max_length
    assert tokenizer.decode(batch["input_ids"][0]) == (
        fitting[-1] if fitting else tokenizer.decode(tokenizer(text)["input_ids"][:max_length])
    )


def test_reports_are_asked_for_by_one_of_several_prompts(model, volumes):
    prompts = ("Write the report.", "What does it show?", "Describe it.")
    report = {"volume_name": "a", **REPORT}
    (row,) = generation_rows([report], [], ("findings",), prompts=prompts)
    assert row["turns"][0][0] == prompts[0]

    def asked(index: int, epoch: int, seed: int | None) -> str:
        collator = ReportCollator(tiny.processor(model), 400, seed)
        batch = collator(
            [
                {**row, **examples(volumes, [(0, row["turns"])])[0], "index": index, "epoch": epoch}
                | {"prompts": row["prompts"]}
            ]
        )
        text = collator.tokenizer.decode(batch["input_ids"][0])
        (found,) = (prompt for prompt in prompts if prompt in text)
        return found

    assert {asked(index, 0, 3) for index in range(12)} == set(prompts)
    assert {asked(0, epoch, 3) for epoch in range(12)} == set(prompts)
    assert all(asked(index, 1, 3) == asked(index, 1, 3) for index in range(4))
    assert {asked(index, 0, None) for index in range(12)} == {prompts[0]}  # as evaluation asks
