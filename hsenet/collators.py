"""Examples to batches. Labels are masked here and nowhere else."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hsenet.report_augmentation import ReportAugmentation
from processing_hsenet import HSENetProcessor


VOLUME_TENSORS = (
    "pixel_values",
    "slice_pixel_values",
    "slice_features",
    "global_patch_features",
    "local_patch_features",
)


def _stack_volumes(examples: list[dict[str, Any]], names: Sequence[str] = VOLUME_TENSORS) -> dict[str, torch.Tensor]:
    present = [name for name in names if name in examples[0]]
    return {name: torch.stack([example[name] for example in examples]) for name in present}


class ContrastiveCollator:
    """
    Examples with `pixel_values`, optional slices and `text` to the inputs of [`HSENetCLIPModel`].

    Texts longer than `max_length` tokens lose their end, never their order; with `whole_sentences`, from the first
    sentence that does not fit whole. With `rewrite`, the texts are what it
    makes of the examples' reports. `with_slices=False` is for a model without slice guidance. `index` and, where
    examples have it, `sibling_ids` say which rows these are, and are not for the model.
    """

    NOT_INPUTS = ("index", "sibling_ids")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        rewrite: ReportAugmentation | None = None,
        *,
        with_slices: bool = True,
        whole_sentences: bool = False,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.rewrite = rewrite
        self.whole_sentences = whole_sentences
        self.tensors = VOLUME_TENSORS if with_slices else ("pixel_values",)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = self.rewrite(examples) if self.rewrite is not None else [example["text"] for example in examples]
        if self.whole_sentences:
            texts = [first_sentences(text, self.tokenizer, self.max_length) for text in texts]
        tokens = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        names = [name for name in self.NOT_INPUTS if name in examples[0]]
        rows = {name: torch.tensor([example[name] for example in examples]) for name in names}
        return {**tokens, **_stack_volumes(examples, self.tensors), **rows}


_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")  # not in "1.5 cm"


def first_sentences(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """The whole sentences from the start that fit in `max_length` tokens; the text as it is if not even one fits."""
    tokens = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    end = max(last for _, last in tokens["offset_mapping"])  # of the text that fits, in characters
    if end >= len(text.rstrip()):
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() <= end]
    return text[: ends[-1]] if ends else text


@dataclass
class _Row:
    """Token ids of one volume with its questions; `turns` is 0 for what all of them see, else the turn's number."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    turns: list[int]
    is_cut: bool = False


class ReportCollator:
    """
    Examples with `turns`, (question, answer) pairs, and volumes to the inputs of [`HSENetForConditionalGeneration`].

    A row is the processor's prompt and the answer with its end token, padded on the right (training reads whole
    rows); `labels` are -100 everywhere but on answers and end tokens. Where rows have several turns, each turn sees
    the volume and itself but no other turn, at the positions that it would have alone: the losses are those of
    separate rows, while the volume is read once.

    With `seed`, a report that may be asked for by several `prompts` is asked for by one of them, which follows from
    seed, epoch and row; without, by the one in its turn.
    """

    def __init__(self, processor: HSENetProcessor, max_length: int, seed: int | None = None):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.seed = seed

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self.tokenize(self._asked(example)) for example in examples]
        length = max(len(row.input_ids) for row in rows)
        turns = _pad([row.turns for row in rows], length, -1)
        batch = {
            "input_ids": _pad([row.input_ids for row in rows], length, self.tokenizer.pad_token_id),
            "labels": _pad([row.labels for row in rows], length, -100),
            "attention_mask": (turns >= 0).long(),
            **_stack_volumes(examples),
        }
        if turns.max() > 1:
            batch["position_ids"] = _pad([row.position_ids for row in rows], length, 0)
            batch["attention_mask"] = _mask_of_turns(turns)
        return batch

    def _asked(self, example: dict[str, Any]) -> dict[str, Any]:
        if self.seed is None or "prompts" not in example:
            return example
        generator = torch.Generator().manual_seed(hash((self.seed, example["epoch"], example["index"])))
        chosen = example["prompts"][int(torch.randint(len(example["prompts"]), (), generator=generator))]
        return {**example, "turns": [(chosen, answer) for _, answer in example["turns"]]}

    def num_truncated(self, rows: list[dict[str, Any]]) -> int:
        """How many rows lose the end of an answer."""
        return sum(self.tokenize(row).is_cut for row in rows)

    def tokenize(self, example: dict[str, Any]) -> _Row:
        """One row; each turn is cut to what is left of `max_length` beside the volume."""
        volume = self._volume_ids()
        row = _Row(list(volume), [-100] * len(volume), list(range(len(volume))), [0] * len(volume))
        for number, (question, answer) in enumerate(example["turns"], start=1):
            question_ids = self._prompt_ids(question)[len(volume) :]
            answer_ids = self._ids(self.processor.answer(question, answer))
            room = self.max_length - len(volume)
            if len(question_ids) >= room:
                raise ValueError(
                    f"The prompt alone has {len(volume) + len(question_ids)} tokens of max_length={self.max_length}: "
                    f"there is no room for an answer. A volume takes {self.processor.image_seq_length}; raise "
                    "max_length."
                )
            # An answer that is cut gets no end token: the model must not learn to stop there.
            input_ids = [*question_ids, *answer_ids][:room]
            row.is_cut |= len(question_ids) + len(answer_ids) > room
            row.input_ids += input_ids
            row.labels += [-100] * len(question_ids) + input_ids[len(question_ids) :]
            row.position_ids += range(len(volume), len(volume) + len(input_ids))
            row.turns += [number] * len(input_ids)
        return row

    def _volume_ids(self) -> list[int]:
        """What all turns share: the prompt up to the volume's last token."""
        prompt = self._prompt_ids("")
        return prompt[: len(prompt) - prompt[::-1].index(self.processor.image_token_id)]

    def _prompt_ids(self, question: str) -> list[int]:
        prompt = self.processor.prompt(question)
        prompt = self.processor.get_text_with_replacements([prompt], [self.processor.replace_image_token({}, 0)])[0][0]
        return self._ids(prompt)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _pad(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])  # (batch, length)


def _mask_of_turns(turns: torch.Tensor) -> torch.Tensor:
    """Turn numbers `(batch, length)` to what attention adds to its scores, `(batch, 1, length, length)`."""
    earlier = torch.ones(turns.shape[1], turns.shape[1], dtype=torch.bool).tril()
    same_turn = turns.unsqueeze(2) == turns.unsqueeze(1)  # (batch, query, key); padding sees padding
    allowed = earlier & (same_turn | (turns == 0).unsqueeze(1))
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min).unsqueeze(1)
