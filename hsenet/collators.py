"""Examples to batches. Labels are masked here and nowhere else."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from processing_hsenet import HSENetProcessor


def _stack_volumes(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    names = [name for name in ("pixel_values", "slice_features") if name in examples[0]]
    return {name: torch.stack([example[name] for example in examples]) for name in names}


class ContrastiveCollator:
    """
    Examples with `pixel_values`, optional `slice_features` and `text` to the inputs of [`HSENetCLIPModel`].

    Texts longer than `max_length` tokens lose their end, never their order.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [example["text"] for example in examples]
        tokens = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return {**tokens, **_stack_volumes(examples), "index": torch.tensor([e["index"] for e in examples])}


class ReportCollator:
    """
    Examples with `question`, `answer` and volumes to the inputs of [`HSENetForConditionalGeneration`].

    A row is the paper's plain prompt, a space, the answer and EOS, padded on the right (training reads whole rows);
    `labels` are -100 everywhere but on answer and EOS.
    """

    def __init__(self, processor: HSENetProcessor, max_length: int):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self.tokenize(example) for example in examples]
        length = max(len(input_ids) for input_ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor(
                [
                    [-100] * prompt_length + ids[prompt_length:] + [-100] * (length - len(ids))
                    for ids, prompt_length in rows
                ]
            ),
            **_stack_volumes(examples),
        }

    def num_truncated(self, rows: list[dict[str, Any]]) -> int:
        """How many rows lose the end of their answer."""
        return sum(self.tokenize(row)[0][-1] != self.tokenizer.eos_token_id for row in rows)

    def tokenize(self, example: dict[str, Any]) -> tuple[list[int], int]:
        """Token ids of one row, cut to `max_length`, and how many of them are prompt."""
        prompt = self.processor.plain_prompt(example["question"])
        prompt = self.processor.get_text_with_replacements([prompt], [self.processor.replace_image_token({}, 0)])[0][0]
        prompt_ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = self.tokenizer(f" {example['answer']}", add_special_tokens=False)["input_ids"]
        if len(prompt_ids) >= self.max_length:
            raise ValueError(
                f"The prompt alone has {len(prompt_ids)} tokens of max_length={self.max_length}: there is no room for "
                f"an answer. A volume takes {self.processor.image_seq_length}; raise max_length."
            )
        # An answer that is cut gets no EOS: the model must not learn to stop there.
        return [*prompt_ids, *answer_ids, self.tokenizer.eos_token_id][: self.max_length], len(prompt_ids)
