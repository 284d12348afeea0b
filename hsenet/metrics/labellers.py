"""What reads findings out of reports: our rules, or any sequence-classification model such as RadBERT.

    labeller = RuleLabeller()
    labeller = ClassifierLabeller("FOLDER_OR_HUB_ID")           # one output for each finding, sigmoid
    labeller(reports)                                            # (num_reports, 18)

A labeller is a function with a name, which becomes part of the protocol of the scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..digests import public_name
from ..phantom import CT_RATE_LABELS
from .bertscore import longest_input
from .labeller import Uncertainty, label_vector


class Labeller(Protocol):
    name: str

    def __call__(self, texts: Sequence[str | None], labels: Sequence[str] = CT_RATE_LABELS) -> np.ndarray:
        """Booleans `(num_texts, num_labels)`: which findings each text asserts; an empty or missing text, none."""


@dataclass(frozen=True)
class RuleLabeller:
    """`label_report` as a labeller: negation and uncertainty aware, not validated against human labels."""

    uncertain: Uncertainty = "positive"

    @property
    def name(self) -> str:
        return f"hsenet rules/2, uncertain={self.uncertain}"

    def __call__(self, texts: Sequence[str | None], labels: Sequence[str] = CT_RATE_LABELS) -> np.ndarray:
        rows = [label_vector(text, labels=labels, uncertain=self.uncertain) for text in texts]
        return np.array(rows, dtype=bool).reshape(len(texts), len(labels))


class ClassifierLabeller:
    """
    A sequence-classification model of transformers with one output for each finding.

    CT-RATE's own scores use RadBERT this way (18 outputs, sigmoid, 0.5, 512 tokens). Its weights are a pickle of
    another layout: convert them first; nothing is unpickled here.

    Args:
        model: folder or Hub id.
        output_labels: the findings in the order of the outputs; by default what the model's configuration says.
        threshold: a finding is asserted from this probability on.
        max_length: tokens of a report that are read, or as many as the model takes; the rest is lost.

    Raises:
        ValueError: outputs without names or of another number than `output_labels`; a finding that is not among them.
    """

    def __init__(
        self,
        model: str,
        *,
        output_labels: Sequence[str] | None = None,
        threshold: float = 0.5,
        max_length: int = 512,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
    ):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model).to(device).eval()
        names = self.model.config.id2label
        self.outputs = list(output_labels or (names[i] for i in range(len(names))))
        if len(self.outputs) != self.model.config.num_labels or "LABEL_0" in self.outputs:
            raise ValueError(
                f"The model has {self.model.config.num_labels} outputs named {list(names.values())[:3]}...: give "
                "output_labels, the findings in their order."
            )
        self.threshold, self.batch_size = threshold, batch_size
        self.max_length = min(max_length, longest_input(self.tokenizer, self.model))
        self.name = f"{public_name(model, self.model)}, threshold {threshold}, {self.max_length} tokens"

    @torch.no_grad()
    def __call__(self, texts: Sequence[str | None], labels: Sequence[str] = CT_RATE_LABELS) -> np.ndarray:
        if unknown := [label for label in labels if label not in self.outputs]:
            raise ValueError(f"The model has no output for {unknown}.")
        columns = [self.outputs.index(label) for label in labels]
        found = np.zeros((len(texts), len(labels)), dtype=bool)
        written = [index for index, text in enumerate(texts) if (text or "").strip()]
        for start in range(0, len(written), self.batch_size):
            batch = written[start : start + self.batch_size]
            inputs = self.tokenizer(
                [texts[index] for index in batch],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            probabilities = self.model(**inputs).logits.float().sigmoid().cpu().numpy()
            found[batch] = probabilities[:, columns] >= self.threshold
        return found
