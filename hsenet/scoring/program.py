"""The evaluation that `train/evaluate.py` and `hsenet evaluate` run: settings to scores, tables and figures."""

import os
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from hsenet.collators import ContrastiveCollator
from hsenet.digests import digest, model_digest
from hsenet.folder_or_hub import check_model_source
from hsenet.metrics.labellers import ClassifierLabeller, RuleLabeller
from hsenet.metrics.table import as_records
from hsenet.metrics.tally import Tally
from hsenet.report_prompts import REPORT_PROMPTS
from hsenet.scoring import text
from hsenet.scoring.figures import save_finding_bars, save_recall_curves
from hsenet.scoring.floors import nearest_reports, question_floors
from hsenet.scoring.output import model_index, scorer_of, tables, versions, write_json
from hsenet.scoring.retrieval import RetrievalScores, compare_queries, save_queries, score_embeddings
from hsenet.scoring.rows import EvaluationRows, load_evaluation_rows, patient_of
from hsenet.scoring.tallies import ReportTask, question_tallies
from hsenet.scoring.volumes import BlankVolumes, shuffled_rows
from hsenet.scoring.work import Generation, answers_to, embeddings_of
from hsenet.volume_cache import cache_volumes
from modeling_hsenet import HSENetCLIPModel, HSENetForConditionalGeneration
from processing_hsenet import HSENetProcessor


QUERIES = "queries.safetensors"  # what each query of retrieval adds to the scores
MIN_TESTED = 1000  # resamples of a test


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
    report_prompt: str = field(
        default=REPORT_PROMPTS[0], metadata={"help": "What asks for a report: the first of stage 3's report_prompts."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Only the first studies and questions."})
    ids: str | None = field(default=None, metadata={"help": "File of volume names, one a line: score only these."})
    all_reconstructions: bool = field(
        default=False, metadata={"help": "Retrieval over all reconstructions, by index and by study."}
    )
    neighbour_rows: int = field(
        default=500, metadata={"help": "Training studies to take the nearest report from; 0: without this floor."}
    )
    overlap: list[str] = field(
        default_factory=lambda: ["bleu-13a", "bleu-coco", "precision-hsenet", "rouge-l", "meteor-nltk-stem"],
        metadata={"help": "Protocols of word overlap, see hsenet/metrics/overlap.py."},
    )
    labeller: str | None = field(
        default=None, metadata={"help": "Sequence-classification model that reads findings; default: our rules."}
    )
    bert_score_model: str | None = field(default=None, metadata={"help": "Encoder for BERTScore, e.g. roberta-large."})
    bert_score_layer: int = field(default=17)
    radeval: list[str] = field(default_factory=list, metadata={"help": "ratescore, radgraph, green: needs RadEval."})
    baseline: str | None = field(
        default=None, metadata={"help": "output_dir of another run: paired tests of this one against it."}
    )
    batch_size: int = field(default=32)
    max_new_tokens: int = field(default=512)
    temperature: float = field(
        default=0.0, metadata={"help": "Of reports; 0: greedy, as in the paper. Answers to questions are greedy."}
    )
    num_workers: int = field(default=0)
    num_resamples: int = field(default=2000, metadata={"help": "Of the bootstrap by patient; 0: no intervals."})
    seed: int = field(default=0, metadata={"help": "Of swapped volumes, sampled reports, floors and intervals."})


def start() -> Accelerator:
    # Rank 0 scores, and a slow rank caches scans, while the others wait.
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=1))
    run = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[waiting])
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if run.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, but each would score alone: check the launcher.")
    return run


def score_retrieval(
    stage: str, folder: str, rows: EvaluationRows, arguments: EvaluationArguments, run: Accelerator
) -> tuple[RetrievalScores, dict[str, list[str]], str]:
    """The scores, the floor that takes the report of the nearest training scan, and the model's digest."""
    model = HSENetCLIPModel.from_pretrained(folder).to(run.device).eval()
    sha = model_digest(model)
    processor = HSENetProcessor.from_pretrained(folder)
    collator = ContrastiveCollator(processor.tokenizer, model.config.text_config.max_position_embeddings)
    training = rows.training[: arguments.neighbour_rows] if arguments.model else []
    embeds = {}
    for name, some in (("volumes", rows.volumes), ("training", training)):
        if some:
            parts = Path(arguments.output_dir) / "parts" / f"{stage}_{name}"
            cache = cached(some, model, processor, arguments, run)
            embeds[name] = embeddings_of(some, model, sha, collator, cache, arguments.batch_size, parts, run)
    images, texts = (side.numpy() for side in embeds["volumes"])
    score = scorer_of([patient_of(row) for row in rows.volumes], arguments.num_resamples, arguments.seed)
    scores = score_embeddings(stage, rows.volumes, images, texts, score) if run.is_main_process else RetrievalScores()
    neighbours = {}
    if training:
        place = {row["volume_name"]: index for index, row in enumerate(rows.volumes)}
        studies = images[[place[row["volume_name"]] for row in rows.studies]]
        reports = [row["text"] for row in training]
        neighbours[f"nearest training report ({stage})"] = nearest_reports(
            studies, embeds["training"][0].numpy(), reports
        )
    return scores, neighbours, sha


def cached(rows: list[dict], model: Any, processor: HSENetProcessor, arguments: EvaluationArguments, run: Accelerator):
    settings = (processor.image_processor, model.slice_encoder, arguments.cache_dir, run, arguments.num_workers)
    return cache_volumes(rows, *settings)


def write_texts(
    rows: dict[str, list[dict]], arguments: EvaluationArguments, run: Accelerator
) -> tuple[dict[str, text.Texts], str, str]:
    """Task -> system -> texts, with the own, another patient's and no scan; why no other's, if so; the digest."""
    model = HSENetForConditionalGeneration.from_pretrained(arguments.model).to(run.device).eval()
    sha = model_digest(model)
    processor = HSENetProcessor.from_pretrained(arguments.model)
    everything = [row for of_task in rows.values() for row in of_task]
    volumes = cached(everything, model, processor, arguments, run)
    conditions = {text.OWN: (everything, volumes)}
    reason = ""
    try:
        conditions[text.OTHER] = (shuffled_rows(everything, arguments.seed), volumes)
    except ValueError as error:  # too few patients, which the verdict will say
        reason = str(error)
    blank = BlankVolumes(processor.image_processor, model)
    conditions[text.BLANK] = (everything, blank)
    written: dict[str, text.Texts] = {task: {} for task in rows}
    for condition, (asked, shown) in conditions.items():
        start = 0
        for task, of_task in rows.items():
            generation = Generation(
                arguments.max_new_tokens,
                arguments.temperature if task == "report" else 0.0,
                arguments.batch_size,
                arguments.seed,
            )
            some = asked[start : start + len(of_task)]
            parts = Path(arguments.output_dir) / "parts" / f"{task}_{text.DETAILS[condition]}"
            # About a blank scan there is one likeliest answer to a question, whoever it is asked about.
            once = {row["question"]: row for row in some} if shown is blank and not generation.temperature else {}
            texts = answers_to(list(once.values()) or some, model, sha, processor, shown, generation, parts, run)
            by_question = dict(zip(once, texts, strict=False))
            written[task][condition] = [by_question[row["question"]] for row in some] if once else texts
            start += len(of_task)
    return written, reason, sha


def report_task(rows: list[dict], arguments: EvaluationArguments, device: torch.device) -> ReportTask:
    given = all(row.get("labels") for row in rows)
    bert_score = (arguments.bert_score_model, arguments.bert_score_layer) if arguments.bert_score_model else None
    return ReportTask(
        references=[row["answer"] for row in rows],
        labels=np.array([row["labels"] for row in rows]) if given else None,
        labeller=ClassifierLabeller(arguments.labeller, device=device) if arguments.labeller else RuleLabeller(),
        overlap=arguments.overlap,
        bert_score=bert_score,
        radeval=arguments.radeval,
        device=device,
    )


def score_text(
    rows: EvaluationRows,
    asked: dict[str, list[dict]],
    written: dict[str, text.Texts],
    neighbours: text.Texts,
    arguments: EvaluationArguments,
    device: torch.device,
) -> tuple[dict[str, list], dict[str, Any]]:
    """The results of each task, and what else `metrics.json` holds of them."""
    resamples, seed = arguments.num_resamples, arguments.seed
    patients = {task: [patient_of(row) for row in of_task] for task, of_task in asked.items()}
    task = report_task(asked["report"], arguments, device)
    texts, label_floors, best = text.report_floors(task, asked["report"], rows.training, seed)
    texts = {**written["report"], **texts, **neighbours}
    tallies = {"report": {**{system: task.tallies(some) for system, some in texts.items()}, **label_floors}}
    facts: dict[str, Any] = {"floors": {"constant_report": best}, **text.details_of(task, rows.questions, written)}
    if rows.questions:
        answers = {**written["vqa"], **question_floors(rows.training_questions, rows.questions, seed)}
        tallies["vqa"] = {system: question_tallies(some, rows.questions) for system, some in answers.items()}
        facts["floors"]["majority_answer"] = text.majority_floors(rows.questions, rows.training_questions)
    results = {
        name: text.score_systems(systems, scorer_of(patients[name], resamples, seed))
        for name, systems in tallies.items()
    }
    results["report"] += text.diversity_results({**texts, "true reports": list(task.references)})
    tested = max(resamples, MIN_TESTED)
    if text.OTHER in written["report"]:
        facts["verdict"] = text.verdict_of(tallies, written, patients, tested, seed)
    if arguments.baseline:
        theirs = {name: text.read_predictions(arguments.baseline, of_task) for name, of_task in asked.items()}
        baseline = {"report": task.tallies(theirs["report"])}
        if rows.questions:
            baseline["vqa"] = question_tallies(theirs["vqa"], rows.questions)
        own = {name: systems[text.OWN] for name, systems in tallies.items()}
        facts["baseline"] = text.compare_with(own, baseline, patients, tested, seed)
    return results, facts


def write_outputs(output: Path, metrics: dict, results: dict[str, list], curves: dict[str, dict]) -> None:
    write_json(output / "metrics.json", metrics)
    printed = [metrics["verdict"]["text"]] if "verdict" in metrics else []
    printed += [tables(task, of_task) for task, of_task in results.items()]
    if "baseline" in metrics:
        printed.append(text.comparison_table(metrics["baseline"], metrics["settings"]["baseline"]))
    (output / "table.md").write_text("\n\n".join(printed) + "\n")
    if curves:
        save_recall_curves(curves, output / "recall_curves.png")
    bars = {
        system: [result for result in results.get("report", []) if result.system == system]
        for system in (text.OWN, "all findings claimed")
    }
    if any(result.score.startswith("f1[") for result in bars[text.OWN]):
        save_finding_bars(bars, output / "findings.png")
    print(f"\n{metrics['num_studies']} held-out studies, {metrics['num_questions']} questions\n")
    print("\n\n".join(printed) + "\n")


def compare_retrieval(
    queries: dict[str, Tally], rows: EvaluationRows, metrics: dict[str, Any], arguments: EvaluationArguments
) -> None:
    """Keeps what a later run compares itself with, and compares this one with its baseline."""
    ids, patients = metrics["ids_digest"], [patient_of(row) for row in rows.volumes]
    if arguments.baseline:
        theirs = Path(arguments.baseline) / QUERIES
        tested = max(arguments.num_resamples, MIN_TESTED)
        records = compare_queries(queries, theirs, ids, patients, tested, arguments.seed)
        metrics["baseline"] = [*records, *metrics.get("baseline", [])]
    save_queries(Path(arguments.output_dir) / QUERIES, queries, ids)


def model_indexes(metrics: dict, results: dict[str, list], arguments: EvaluationArguments) -> dict[str, list]:
    """For each model that was scored, its card's `model-index`."""
    indexes = {}
    local = Path(arguments.dataset)
    dataset = local.resolve().name if local.is_dir() else arguments.dataset  # a card shows nobody's folders
    for name in metrics["models"]:
        own = {
            task: [result for result in of_task if result.system == name]
            for task, of_task in results.items()
            if task.split()[0] == name or (name == "model" and task in ("report", "vqa"))
        }
        title = Path(metrics["models"][name]["folder"]).name
        indexes[name] = model_index(title, own, dataset, arguments.split)
    return indexes


def evaluate(arguments: EvaluationArguments) -> Path | None:
    """
    Scores the models and writes what `train/evaluate.py` lists; each process of a launch calls it.

    Returns:
        `Path`: metrics.json, in the main process.
    """
    for name in ("stage1", "stage2", "model"):
        if source := getattr(arguments, name):
            check_model_source(source, what=name)
    run = start()
    rows = load_evaluation_rows(
        arguments.dataset,
        arguments.split,
        arguments.train_split,
        fields=tuple(arguments.report_fields),
        with_questions=bool(arguments.model) and "vqa" in arguments.tasks,
        question_types=arguments.question_types,
        all_reconstructions=arguments.all_reconstructions,
        ids=arguments.ids,
        max_rows=arguments.max_rows,
        prompt=arguments.report_prompt,
    )
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    ids = [row["volume_name"] for row in rows.volumes]
    metrics: dict[str, Any] = {
        "dataset": arguments.dataset,
        "split": arguments.split,
        "num_studies": len(rows.studies),
        "num_questions": len(rows.questions),
        "num_patients": len({patient_of(row) for row in rows.studies}),
        "ids_digest": digest(ids),
        "settings": asdict(arguments),
        "versions": versions(),
        "models": {},
    }
    results: dict[str, list] = {}
    curves: dict[str, dict] = {}
    queries: dict[str, Tally] = {}
    neighbours: text.Texts = {}

    # Retrieval
    for stage in ("stage1", "stage2"):
        if folder := getattr(arguments, stage):
            scores, nearest, sha = score_retrieval(stage, folder, rows, arguments, run)
            metrics["models"][stage] = {"folder": folder, "sha256": sha}
            metrics.update(scores.metrics)
            results.update(scores.results)
            curves.update(scores.curves)
            queries.update(scores.tallies)
            neighbours.update(nearest)

    # Reports and answers
    asked = {task: some for task, some in (("report", rows.studies), ("vqa", rows.questions)) if some}
    if arguments.model:
        written, reason, sha = write_texts(asked, arguments, run)
        metrics["models"]["model"] = {"folder": arguments.model, "sha256": sha}
        if run.is_main_process:
            text.write_predictions(output / "predictions.jsonl", asked, written)
            of_text, facts = score_text(rows, asked, written, neighbours, arguments, run.device)
            metrics.update({"verdict": text.not_tested(reason), **facts} if reason else facts)
            results.update(of_text)

    if run.is_main_process:
        if queries:
            compare_retrieval(queries, rows, metrics, arguments)
        metrics["results"] = {task: as_records(of_task) for task, of_task in results.items()}
        metrics["model_index"] = model_indexes(metrics, results, arguments)
        (output / "ids.txt").write_text("\n".join(ids) + "\n")
        write_json(output / "model_index.json", metrics["model_index"])
        write_outputs(output, metrics, results, curves)
    run.wait_for_everyone()
    run.end_training()
    return output / "metrics.json" if run.is_main_process else None
