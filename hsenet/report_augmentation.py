"""Reports said otherwise, but true: what stages 1 and 2 may see instead of the same words again."""

import re
from typing import Any

import torch

from hsenet.data import report_text


class ReportAugmentation:
    """
    Rewrites the reports of a batch: sentences in random order, some left out, often one section instead of all.

    Which sections are kept is drawn once for the batch, since a batch of impressions alone costs a fraction of one of
    whole reports; one section alone is drawn as often as the whole report. All follows from seed, epoch and rows.

    Args:
        fields (`tuple[str, ...]`): the report's sections.
        drop_sentences (`float`): chance of each sentence to be left out; a section keeps at least one.
        seed (`int`).
    """

    def __init__(self, fields: tuple[str, ...], drop_sentences: float, seed: int):
        self.choices = [(field,) for field in fields]
        if len(fields) > 1:
            self.choices.append(tuple(fields))
        self.drop_sentences = drop_sentences
        self.seed = seed

    def __call__(self, examples: list[dict[str, Any]]) -> list[str]:
        """Reports of examples with the report's fields, `index` and `epoch`."""
        indices = tuple(example["index"] for example in examples)
        generator = torch.Generator().manual_seed(hash((self.seed, examples[0]["epoch"], indices)))
        fields = self.choices[int(torch.randint(len(self.choices), (), generator=generator))]
        return [
            report_text({field: self._rewrite(example[field] or "", generator) for field in fields}, fields)
            for example in examples
        ]

    def _rewrite(self, section: str, generator: torch.Generator) -> str:
        sentences = re.split(r"(?<=[.!?])\s+", section.strip())
        order = torch.randperm(len(sentences), generator=generator).tolist()
        kept = torch.rand(len(sentences), generator=generator) >= self.drop_sentences
        return " ".join(sentences[i] for i in order if kept[i]) or sentences[order[0]]
