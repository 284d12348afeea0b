"""Scores trained models on the held-out split, each beside the floors that it has to beat.

    python train/evaluate.py --dataset DIR --stage1 outputs/stage1 --stage2 outputs/stage2 --model outputs/stage3 \
        --output_dir outputs/evaluation

Any of the three models may be left out. Writes `metrics.json`, `predictions.jsonl` and `table.md`. The floors: chance,
the best constant report (all findings claimed, and the best training report), the majority answer (of all questions,
and of each question's type and finding), and the model's own output on shuffled volumes: text that doesn't come from
the image stays as good there. One volume a study, the first reconstruction.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from hsenet.collators import ContrastiveCollator
from hsenet.data import REPORT_PROMPTS, VolumeRows, load_rows, one_per_study, report_text
from hsenet.evaluation import embed, generate_answers
from hsenet.metrics.labeller import label_vector
from hsenet.metrics.report import best_constant_report_floor, report_metrics
from hsenet.metrics.retrieval import retrieval_metrics
from hsenet.metrics.vqa import majority_answer_floor, vqa_metrics
from hsenet.phantom import CT_RATE_LABELS
from hsenet.training import parse_arguments
from hsenet.volume_cache import VolumeCache, cache_volumes
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration
from processing_hsenet import HSENetProcessor


@dataclass
class EvaluationArguments:
    dataset: str = field(default="", metadata={"help": "Dataset folder or Hub id with `reports` and `vqa` rows."})
    split: str = field(default="test")
    train_split: str = field(default="train", metadata={"help": "Where the floors take their answers from."})
    stage1: str | None = field(default=None, metadata={"help": "Contrastive model to score by retrieval."})
    stage2: str | None = field(default=None, metadata={"help": "Contrastive model to score by retrieval."})
    model: str | None = field(default=None, metadata={"help": "Generating model to score by reports and answers."})
    output_dir: str = field(default="outputs/evaluation")
    cache_dir: str = field(default="outputs/cache")
    report_fields: list[str] = field(default_factory=lambda: ["findings", "impression"])
    tasks: list[str] = field(
        default_factory=lambda: ["reports", "vqa"], metadata={"help": "Without vqa: a dataset without questions."}
    )
    question_types: list[str] = field(default_factory=list, metadata={"help": "Only these questions; empty: all."})
    max_rows: int | None = field(default=None, metadata={"help": "Only the first studies and questions."})
    batch_size: int = field(default=32)
    max_new_tokens: int = field(default=512)
    temperature: float = field(
        default=0.0, metadata={"help": "Of reports; 0: greedy, as in the paper. Answers to questions are greedy."}
    )
    num_workers: int = field(default=0)
    seed: int = field(default=0, metadata={"help": "Of the shuffled volumes, and of reports that are sampled."})


def score_retrieval(folder: str, rows: list[dict], arguments: EvaluationArguments, run: Accelerator) -> dict:
    model = HSENetCLIPModel.from_pretrained(folder).to(run.device).eval()
    processor = HSENetProcessor.from_pretrained(folder)
    cache = cache_volumes(
        rows, processor.image_processor, model.slice_encoder, arguments.cache_dir, run, arguments.num_workers
    )
    collator = ContrastiveCollator(processor.tokenizer, model.config.text_config.max_position_embeddings)
    images, texts = embed(model, VolumeRows(rows, cache), collator, arguments.batch_size)
    return retrieval_metrics(images, texts, ks=(1, 5, 10))


def shuffled_volumes(rows: list[dict], seed: int) -> list[dict]:
    """Every study asked about with another study's volume."""
    names = list(dict.fromkeys(row["volume_name"] for row in rows))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [names[i] for i in order]
    other = dict(zip(names, names[1:] + names[:1], strict=True))  # a cycle: nobody keeps their own
    return [{**row, "volume_name": other[row["volume_name"]]} for row in rows]


def answers_to(
    rows: list[dict],
    model: Any,
    processor: HSENetProcessor,
    cache: VolumeCache,
    arguments: EvaluationArguments,
    temperature: float = 0.0,
) -> list[str]:
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["question"]))  # less padding
    dataset = VolumeRows([rows[index] for index in order], cache)
    torch.manual_seed(arguments.seed)
    generated = generate_answers(
        model, processor, dataset, arguments.batch_size, arguments.max_new_tokens, temperature
    )
    answers = dict(zip(order, (answer for _, answer in generated), strict=True))
    return [answers[index] for index in range(len(rows))]


def score_text(
    reports: list[dict], questions: list[dict], arguments: EvaluationArguments, run: Accelerator
) -> tuple[dict, list[dict]]:
    model = HSENetForConditionalGeneration.from_pretrained(arguments.model).to(run.device).eval()
    processor = HSENetProcessor.from_pretrained(arguments.model)
    cache = cache_volumes(
        reports + questions,
        processor.image_processor,
        model.slice_encoder,
        arguments.cache_dir,
        run,
        arguments.num_workers,
    )
    fields = tuple(arguments.report_fields)
    reports = [
        {**row, "question": REPORT_PROMPTS[0], "answer": report_text(row, fields), "question_type": "report"}
        for row in reports
    ]
    rows = reports + questions
    settings = (model, processor, cache, arguments)
    seen, blind = (
        answers_to(some[: len(reports)], *settings, arguments.temperature)
        + answers_to(some[len(reports) :], *settings)
        for some in (rows, shuffled_volumes(rows, arguments.seed))
    )
    metrics = {
        name: {
            "report": score_reports(answers[: len(reports)], reports),
            "vqa": score_questions(answers[len(reports) :], questions) if questions else None,
        }
        for name, answers in (("model", seen), ("shuffled_volumes", blind))
    }
    names = ("volume_name", "study_id", "question_type", "question", "answer")
    predictions = [
        {**{name: row[name] for name in names}, "prediction": prediction, "prediction_shuffled": shuffled}
        for row, prediction, shuffled in zip(rows, seen, blind, strict=True)
    ]
    return metrics, predictions


def reference_labels(rows: list[dict]) -> np.ndarray:
    """(num_reports, 18): the dataset's labels, or for all what the labeller finds in the references."""
    if all(row.get("labels") for row in rows):
        return np.array([row["labels"] for row in rows])
    return np.array([label_vector(row["answer"]) for row in rows])


def score_reports(predictions: list[str], rows: list[dict]) -> dict:
    labels = reference_labels(rows)
    occurring = [index for index in range(len(CT_RATE_LABELS)) if labels[:, index].any()]
    return {
        **report_metrics(
            predictions,
            [row["answer"] for row in rows],
            reference_labels=labels[:, occurring],
            labels=[CT_RATE_LABELS[index] for index in occurring],
        ),
        "unique_reports": len(set(predictions)) / len(predictions),
    }


def score_questions(predictions: list[str], rows: list[dict]) -> dict:
    return vqa_metrics(predictions, [row["answer"] for row in rows], [row["question_type"] for row in rows])


def floors(reports: list[dict], questions: list[dict], arguments: EvaluationArguments) -> dict:
    """What is reached without looking at any volume."""
    train_reports = load_rows(arguments.dataset, "reports", arguments.train_split)
    fields = tuple(arguments.report_fields)
    references = [report_text(row, fields) for row in reports]
    constant = best_constant_report_floor(
        reference_labels([{**row, "answer": text} for row, text in zip(reports, references, strict=True)]),
        training_reports=[report_text(row, fields) for row in one_per_study(train_reports)],
    )
    bleu = report_metrics([constant["constant_report"]] * len(references), references)["bleu_4"]
    if not questions:
        return {"constant_report": {**constant, "bleu_4": bleu}}
    train_questions = load_rows(arguments.dataset, "vqa", arguments.train_split, None, arguments.question_types)
    majority = {
        name: majority_answer_floor(
            [row["answer"] for row in train_questions],
            [tuple(row[column] for column in columns) for row in train_questions],
            [row["answer"] for row in questions],
            [tuple(row[column] for column in columns) for row in questions],
        )
        for name, columns in (("type", ("question_type",)), ("type_and_finding", ("question_type", "label")))
    }
    return {"constant_report": {**constant, "bleu_4": bleu}, "majority_answer": majority}


def table(metrics: dict) -> str:
    lines = ["| task | metric | model | shuffled volumes | floor without image |", "|---|---|---|---|---|"]
    for stage in ("stage1", "stage2"):
        if stage in metrics:
            for name in ("image_to_text_R@5", "text_to_image_R@5"):
                scores = metrics[stage]
                lines.append(f"| {stage} retrieval | {name} | {scores[name]:.3f} | | {scores['chance_R@5']:.3f} |")
    if "model" in metrics:
        constant = metrics["floors"]["constant_report"]
        best_constant = max(constant["constant_labels_f1_macro"], constant["constant_report_f1_macro"])
        seen, blind = metrics["model"], metrics["shuffled_volumes"]
        rows = [("report", "findings_f1_macro", best_constant), ("report", "bleu_4", constant["bleu_4"])]
        if seen["vqa"]:
            majority = metrics["floors"]["majority_answer"]
            rows.append(("vqa", "accuracy", majority["type"]["group_majority_accuracy"]))
        for task, name, floor in rows:
            lines.append(f"| {task} | {name} | {seen[task][name]:.3f} | {blind[task][name]:.3f} | {floor:.3f} |")
    return "\n".join(lines)


def main(arguments: EvaluationArguments) -> None:
    run = Accelerator(cpu=not torch.accelerator.is_available())
    reports = one_per_study(load_rows(arguments.dataset, "reports", arguments.split))[: arguments.max_rows]
    questions = []
    if arguments.model and "vqa" in arguments.tasks:
        questions = load_rows(arguments.dataset, "vqa", arguments.split, arguments.max_rows, arguments.question_types)
    metrics: dict[str, Any] = {"split": arguments.split, "num_studies": len(reports), "num_questions": len(questions)}
    for stage in ("stage1", "stage2"):
        if folder := getattr(arguments, stage):
            rows = [{**row, "text": report_text(row, tuple(arguments.report_fields))} for row in reports]
            metrics[stage] = score_retrieval(folder, rows, arguments, run)
    predictions = []
    if arguments.model:
        metrics["floors"] = floors(reports, questions, arguments)
        scores, predictions = score_text(reports, questions, arguments, run)
        metrics.update(scores)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2))
    (output / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    (output / "table.md").write_text(table(metrics) + "\n")
    print(f"\n{len(reports)} held-out studies, {len(questions)} questions\n\n{table(metrics)}\n")


if __name__ == "__main__":
    main(*parse_arguments(EvaluationArguments))
