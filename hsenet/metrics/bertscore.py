"""BERTScore (Zhang et al., arXiv 1904.09675) with any encoder of transformers, here or on the Hub.

    bert_score_tally(predictions, references, model="roberta-large", layer=17)     # what HSENet and M3D report

As in the reference implementation without idf weights and without rescaling: every word piece is matched to the most
similar one of the other text (of all pieces, the special ones too); special pieces themselves are not counted. Texts
are stripped; for tokenizers whose pieces begin with the space before a word, the first word gets one, as the reference
implementation gives it with transformers 4 (with 5 it asks for it in vain).
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
)

from ..digests import public_name
from .tally import Tally, mean_tally


@torch.no_grad()
def bert_score_tally(
    predictions: Sequence[str | None],
    references: Sequence[str],
    *,
    model: str,
    layer: int,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
) -> Tally:
    """
    Mean precision, recall and F1 over the reports, under `bertscore/2[MODEL layer N]`.

    Args:
        layer: the hidden layer to compare, from 1; texts are cut to what the model takes.

    Raises:
        ValueError: lists of different length, or a layer that the model doesn't have.
    """
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"predictions and references must be of one length, not empty, got {len(predictions)}, {len(references)}."
        )
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AutoModel.from_pretrained(model).to(device).eval()
    if not 1 <= layer <= encoder.config.num_hidden_layers:
        raise ValueError(f"layer must be in 1..{encoder.config.num_hidden_layers}, got {layer}.")
    scores = []
    for start in range(0, len(references), batch_size):
        said, truth = (
            _pieces([(text or "").strip() for text in texts[start : start + batch_size]], tokenizer, encoder, layer)
            for texts in (predictions, references)
        )
        scores += [_match(*pair) for pair in zip(said, truth, strict=True)]
    names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
    return mean_tally(
        f"bertscore/2[{public_name(model, encoder)} layer {layer}]", dict(zip(names, np.array(scores).T, strict=True))
    )


def longest_input(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel) -> int:
    """How many pieces an encoder takes, the special ones included."""
    positions = encoder.config.max_position_embeddings
    if encoder.config.model_type in ("roberta", "xlm-roberta", "camembert"):  # their positions start after padding's
        positions -= encoder.config.pad_token_id + 1
    return min(tokenizer.model_max_length, positions)


def _pieces(texts: list[str], tokenizer, encoder, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each text, unit vectors `(num_pieces, hidden_size)` and which of them count `(num_pieces,)`."""
    if isinstance(tokenizer, (RobertaTokenizer, GPT2Tokenizer)):
        texts = [f" {text}" if text else "" for text in texts]
    inputs = tokenizer(
        texts,
        padding=True,
        truncation=True,
        max_length=longest_input(tokenizer, encoder),
        return_tensors="pt",
        return_special_tokens_mask=True,
    ).to(encoder.device)
    special = inputs.pop("special_tokens_mask").bool()
    hidden = encoder(**inputs, output_hidden_states=True).hidden_states[layer]  # (batch, num_pieces, hidden_size)
    unit = torch.nn.functional.normalize(hidden.float(), dim=-1)
    present = inputs["attention_mask"].bool()
    return [(vectors[here], ~odd[here]) for vectors, here, odd in zip(unit, present, special, strict=True)]


def _match(
    said: tuple[torch.Tensor, torch.Tensor], truth: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, float, float]:
    (said_vectors, said_counts), (true_vectors, true_counts) = said, truth
    if not said_counts.any() or not true_counts.any():
        return 0.0, 0.0, 0.0
    similarity = said_vectors @ true_vectors.T  # (pieces said, pieces of the reference)
    precision = similarity.max(1).values[said_counts].mean().item()
    recall = similarity.max(0).values[true_counts].mean().item()
    return precision, recall, 2 * precision * recall / (precision + recall)
