# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The scores of one trained arm on the test split: retrieval for stage 2, presence questions for stage 3."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from hsenet.collators import ContrastiveCollator, ReportCollator
from hsenet.data import VolumeRows, load_rows, one_per_study, report_text
from hsenet.evaluation import embed, guided_similarity
from hsenet.metrics.retrieval import similarity_metrics
from hsenet.scoring.volumes import shuffled_rows
from hsenet.volume_cache import cache_volumes
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration
from processing_hsenet import HSENetProcessor


MAX_LENGTH, BATCH_SIZE = 512, 32


def retrieval_scores(folder: Path, settings: dict[str, Any], gallery_size: int) -> dict[str, float]:
    """
    Recall at 5, MRR and mean rank, the mean of both directions and of all galleries.

    The test split is cut into galleries of `gallery_size` studies: a model guided by text has to read every pair. For
    such a model `own_report_R@5` is the recall if each volume were guided by its own report, which nobody has who
    searches; the difference is the answer that leaks.

    Args:
        folder: of the trained stage 2.
        settings: with `dataset`, `cache_dir` and `max_test_rows`.
    """
    model = HSENetCLIPModel.from_pretrained(folder).eval()
    processor = HSENetProcessor.from_pretrained(folder)
    rows = one_per_study(load_rows(settings["dataset"], "reports", "test", settings.get("max_test_rows")))
    for row in rows:
        row["text"] = report_text(row)
    cache = cache_volumes(
        rows, processor.image_processor, model.slice_encoder, settings["cache_dir"], Accelerator(cpu=True)
    )
    collator = ContrastiveCollator(
        processor.tokenizer, min(MAX_LENGTH, model.config.text_config.max_position_embeddings)
    )
    scores = []
    for start in range(0, len(rows) - gallery_size + 1, gallery_size):
        dataset = VolumeRows(rows[start : start + gallery_size], cache)
        images, texts = embed(model, dataset, collator, BATCH_SIZE)
        own = similarity = images @ texts.t()
        if model.guided_by_text:
            similarity = guided_similarity(model, dataset, collator, BATCH_SIZE)
        scores.append(_both_directions(similarity))
        if model.guided_by_text:
            scores[-1]["own_report_R@5"] = _both_directions(own)["R@5"]
    if not scores:
        raise ValueError(f"The test split has {len(rows)} studies, fewer than one gallery of {gallery_size}.")
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _both_directions(similarity: torch.Tensor) -> dict[str, float]:
    metrics = similarity_metrics(similarity, ks=(1, 5))
    directions = ("image_to_text", "text_to_image")
    names = ("R@1", "R@5", "mrr", "mean_rank")
    return {name: float(np.mean([metrics[f"{direction}_{name}"] for direction in directions])) for name in names}


def presence_scores(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """
    How well the model tells yes from no in the presence questions of the test split, without writing a word.

    A question's score is the log-likelihood of "yes" less that of "no". `presence_auroc` is the mean over findings of
    the AUROC among the questions of that finding, so that knowing which findings are common is worth nothing.
    `other_scan_auroc` is the same with another patient's scan: what the wording of the questions tells.
    `answer_loss` is the mean negative log-likelihood of the true answer.

    Args:
        folder: of the trained stage 3.
        settings: with `dataset`, `cache_dir` and `max_test_rows` (of questions).
    """
    model = HSENetForConditionalGeneration.from_pretrained(folder).eval()
    processor = HSENetProcessor.from_pretrained(folder)
    questions = load_rows(settings["dataset"], "vqa", "test", settings.get("max_test_rows"), ["presence"])
    cache = cache_volumes(
        questions, processor.image_processor, model.slice_encoder, settings["cache_dir"], Accelerator(cpu=True)
    )
    truth = np.array([question["answer"] == "yes" for question in questions])
    own = answer_likelihoods(model, processor, cache, questions, ("yes", "no"))
    other = answer_likelihoods(model, processor, cache, shuffled_rows(questions, seed=0), ("yes", "no"))
    return {
        "presence_auroc": _mean_auroc(questions, truth, own[:, 0] - own[:, 1]),
        "other_scan_auroc": _mean_auroc(questions, truth, other[:, 0] - other[:, 1]),
        "answer_loss": float(-np.where(truth, own[:, 0], own[:, 1]).mean()),
    }


def _mean_auroc(questions: list[dict[str, Any]], truth: np.ndarray, scores: np.ndarray) -> float:
    """The mean over findings that have both answers."""
    labels = np.array([question["label"] for question in questions])
    of_findings = [labels == label for label in sorted(set(labels))]
    aurocs = [roc_auc_score(truth[rows], scores[rows]) for rows in of_findings if len(set(truth[rows])) == 2]
    return float(np.mean(aurocs))


@torch.no_grad()
def answer_likelihoods(
    model: HSENetForConditionalGeneration,
    processor: HSENetProcessor,
    cache: Any,
    questions: list[dict[str, Any]],
    answers: Sequence[str],
) -> np.ndarray:
    """Log-likelihood of each answer to each question, end token included, `(num_questions, num_answers)`.

    All questions and answers of a volume share its tokens in one row, as in training.
    """
    collator = ReportCollator(processor, MAX_LENGTH)
    numbers: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        numbers.setdefault(question["volume_name"], []).append(number)
    rows = [
        {
            "volume_name": name,
            "turns": [(questions[number]["question"], answer) for number in asked for answer in answers],
        }
        for name, asked in numbers.items()
    ]
    likelihoods = np.zeros((len(questions), len(answers)))
    for examples in DataLoader(VolumeRows(rows, cache), BATCH_SIZE, collate_fn=list):
        batch = collator(examples)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        chosen = logits.log_softmax(dim=-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        for example, values, targets in zip(examples, chosen, labels, strict=True):
            turns = torch.tensor(collator.tokenize(example).turns[1:])
            counted = values[: len(turns)] * (targets[: len(turns)] != -100)
            of_turns = [counted[turns == turn].sum().item() for turn in range(1, 1 + len(example["turns"]))]
            likelihoods[numbers[example["volume_name"]]] = np.reshape(of_turns, (-1, len(answers)))
    return likelihoods
