"""Scoring many volumes: seconds and peak memory of what `train/evaluate.py` does after the models have run.

    python benchmarks/evaluation.py [--volumes 5000 50000] [--dim 128]

On made-up embeddings, labels, phantom reports and answers, two volumes a study and two studies a patient, each step in
a process of its own:
- retrieval: `score_embeddings`: by index and by study, both directions, curves; between volumes, with its floor;
- reports: word overlap (bleu-coco), findings by our labeller, diversity, of one system;
- questions: one a volume, answered by one system; and the volumes swapped for the verdict;
each with its intervals by patient. The memory is the peak above what the imports took. Beside it stands what one
matrix of all volumes by all volumes would take in the 64-bit numbers that scores are computed in.
"""

import argparse
import platform
import resource
import time
from collections.abc import Callable
from multiprocessing import get_context

import numpy as np

from hsenet.metrics import RuleLabeller
from hsenet.phantom import sample_study
from hsenet.scoring.output import scorer_of
from hsenet.scoring.retrieval import score_embeddings
from hsenet.scoring.tallies import ReportTask, question_tallies
from hsenet.scoring.text import diversity_results
from hsenet.scoring.volumes import shuffled_rows


RESAMPLES = 2000
DIFFERENT = 500  # reports; they take turns


def rows_of(number: int) -> list[dict]:
    studies = [sample_study(0, index) for index in range(min(DIFFERENT, number))]
    return [
        {
            "volume_name": f"{i}",
            "study_id": f"{i // 2}",
            "patient_id": f"{i // 4}",
            "labels": list(studies[i // 2 % len(studies)].labels),
            "text": studies[i // 2 % len(studies)].findings_text,
            "question_type": ("presence", "location")[i % 2],
            "answer": ("yes", "no", "left", "right")[i % 4],
            "region": "lung",
        }
        for i in range(number)
    ]


def retrieval(number: int, dim: int) -> None:
    rows, generator = rows_of(number), np.random.default_rng(0)
    images = generator.normal(size=(number, dim)).astype(np.float32)
    texts = images + 2 * generator.normal(size=(number, dim)).astype(np.float32)
    scores = score_embeddings("stage1", rows, images, texts, scorer_of(patients(rows), RESAMPLES, 0))
    assert scores.metrics["stage1"]["num_candidates"] == number


def reports(number: int, dim: int) -> None:
    rows = rows_of(number)[::2]
    task = ReportTask(
        [row["text"] for row in rows], np.array([row["labels"] for row in rows]), RuleLabeller(), ["bleu-coco"]
    )
    texts = task.references[1:] + task.references[:1]
    assert scorer_of(patients(rows), RESAMPLES, 0)("model", task.tallies(texts))
    assert diversity_results({"model": texts})


def questions(number: int, dim: int) -> None:
    rows = rows_of(number)
    swapped = shuffled_rows(rows, 0)
    answers = [row["answer"] for row in rows[1:] + rows[:1]]
    assert scorer_of(patients(rows), RESAMPLES, 0)("model", question_tallies(answers, rows)) and len(swapped) == number


def patients(rows: list[dict]) -> list[str]:
    return [row["patient_id"] for row in rows]


def measured(step: Callable[[int, int], None], number: int, dim: int, results) -> None:
    before, start = peak(), time.perf_counter()
    step(number, dim)
    results.put((time.perf_counter() - start, peak() - before))


def peak() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, nargs="+", default=[5000, 50000])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", nargs="+", default=["retrieval", "reports", "questions"])
    arguments = parser.parse_args()
    context = get_context("spawn")
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}\n")
    print("| step | volumes | seconds | peak, MB | all by all, MB |\n|---|---|---|---|---|")
    for step in [step for step in (retrieval, reports, questions) if step.__name__ in arguments.steps]:
        for number in arguments.volumes:
            results = context.Queue()
            process = context.Process(target=measured, args=(step, number, arguments.dim, results))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{step.__name__} of {number} volumes ended with {process.exitcode}.")
            seconds, megabytes = results.get()
            whole = number * number * 8 / 2**20
            print(f"| {step.__name__} | {number} | {seconds:.0f} | {megabytes:.0f} | {whole:.0f} |", flush=True)


if __name__ == "__main__":
    main()
