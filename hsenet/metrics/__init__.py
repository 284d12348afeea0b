"""Metrics of retrieval, report generation and question answering, each with the floor to print beside it."""

from .labeller import label_report, label_vector
from .report import best_constant_report_floor, corpus_bleu, finding_scores, report_metrics
from .retrieval import chance_recall, retrieval_metrics
from .vqa import majority_answer_floor, majority_answers, normalise_answer, vqa_metrics


__all__ = [
    "best_constant_report_floor",
    "chance_recall",
    "corpus_bleu",
    "finding_scores",
    "label_report",
    "label_vector",
    "majority_answer_floor",
    "majority_answers",
    "normalise_answer",
    "report_metrics",
    "retrieval_metrics",
    "vqa_metrics",
]
