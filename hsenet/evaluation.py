"""Running a model over a dataset for evaluation: embeddings and generated text."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hsenet.collators import ContrastiveCollator
from hsenet.losses import GlobalSimilarity, SiblingsMode, image_text_contrastive_loss, pairs_among
from hsenet.metrics.retrieval import similarity_metrics
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration
from processing_hsenet import HSENetProcessor


@torch.no_grad()
def embed(
    model: HSENetCLIPModel, dataset: Dataset, collator: Callable, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """L2-normalised embeddings of volumes and texts, both `(num_rows, projection_dim)`, in the dataset's order."""
    images, texts = [], []
    for batch in DataLoader(dataset, batch_size, collate_fn=collator):
        inputs = {name: batch[name] for name in batch if name not in ContrastiveCollator.NOT_INPUTS}
        batch = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        outputs = model(**batch)
        images.append(outputs.image_embeds.float().cpu())
        texts.append(outputs.text_embeds.float().cpu())
    return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def guided_similarity(model: HSENetCLIPModel, dataset: Dataset, collator: Callable, batch_size: int) -> torch.Tensor:
    """
    Cosines `(num_volumes, num_texts)` of a model that is guided by text: volume i guided by text j with text j.

    So no volume is guided by its own report alone, which would tell the answer. It takes a pass of the encoder for
    every pair: this model has no embedding that could be stored in an index.
    """
    volumes, texts = [], []
    for batch in DataLoader(dataset, 1, collate_fn=collator):
        volumes.append(batch["pixel_values"])
        tokens = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        text = model.get_text_features(**tokens)
        embedding = nn.functional.normalize(text.pooler_output, dim=-1)  # (1, projection_dim)
        texts.append((text.last_hidden_state, tokens["attention_mask"], embedding))
    rows = []
    for pixel_values in torch.cat(volumes).split(batch_size):
        pixel_values = pixel_values.to(model.device)
        columns = []
        for states, mask, embedding in texts:
            guidance = {"text_states": states.expand(len(pixel_values), -1, -1)}
            guidance["attention_mask"] = mask.expand(len(pixel_values), -1)
            images = model.get_image_features(pixel_values, **guidance).pooler_output
            columns.append(nn.functional.normalize(images, dim=-1) @ embedding[0])
        rows.append(torch.stack(columns, dim=1).float().cpu())  # (batch, num_texts)
    return torch.cat(rows)


def evaluate_retrieval(
    model: HSENetCLIPModel, dataset: Dataset, collator: Callable, batch_size: int, siblings: SiblingsMode = "none"
) -> dict[str, float]:
    """
    Recalls while training, and the loss of the whole split as one batch; for one process alone.

    Args:
        dataset: examples; a [`VolumeRows`] where `siblings` are not `"none"`.
        siblings (`"masked"`, `"multi_positive"` or `"none"`):
            What rows with the same study or report are in that loss: see [`image_text_contrastive_loss`]. Only with
            the setting of the training is it comparable with the training's loss.
    """
    if model.guided_by_text:
        similarity = guided_similarity(model, dataset, collator, batch_size)
    else:
        images, texts = embed(model, dataset, collator, batch_size)
        similarity = images @ texts.t()
    pairs = None
    if siblings != "none":
        ids = torch.tensor([row["sibling_ids"] for row in dataset.rows])
        pairs = pairs_among(ids, ids)
    both = GlobalSimilarity(similarity, similarity.t())
    loss = image_text_contrastive_loss(both, model.logit_scale.exp().float().cpu(), pairs, siblings)
    metrics = similarity_metrics(similarity, ks=(5,))
    names = ("image_to_text_R@5", "text_to_image_R@5", "chance_R@5")
    return {"loss": loss.item(), **{name: metrics[name] for name in names}}


@torch.no_grad()
def evaluate_language_loss(
    model: HSENetForConditionalGeneration, dataset: Dataset, collator: Callable, batch_size: int
) -> dict[str, float]:
    """Mean next-token loss over all answer tokens of the split."""
    total, count = 0.0, 0
    for batch in DataLoader(dataset, batch_size, collate_fn=collator):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        num_targets = (batch["labels"][:, 1:] != -100).sum().item()
        total += model(**batch, skip_logits=True).loss.item() * num_targets
        count += num_targets
    return {"loss": total / count}


@torch.no_grad()
def generate_answers(
    model: HSENetForConditionalGeneration,
    processor: HSENetProcessor,
    dataset: Dataset,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Iterator[tuple[dict[str, Any], str]]:
    """
    Answers to the `question` of each row (with cached tensors), in order, as `(row, answer)`.

    Args:
        temperature (`float`): 0 takes the likeliest token at every step, anything above draws from torch's generator.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    for examples in DataLoader(dataset, batch_size, collate_fn=list):
        names = [name for name in ("pixel_values", "slice_features") if name in examples[0]]
        volumes = {name: torch.stack([example[name] for example in examples]) for name in names}
        prompts = [processor.prompt(example["question"]) for example in examples]
        inputs = {**processor.tokenize_prompts(prompts), **volumes}
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
        answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from zip(examples, (answer.strip() for answer in answers), strict=True)
