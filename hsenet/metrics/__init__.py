"""
Metrics of retrieval, report generation and question answering, each under a named protocol, with the floor to print
beside it, intervals, and paired tests.

Every metric is a `Tally`: what it counted on each item, and the formula of the sum. `load` gives the same metrics as
modules of the library `evaluate`.
"""

from .bertscore import bert_score_tally
from .bootstrap import compare_runs, confidence_intervals
from .diversity import diversity
from .findings import finding_scores, findings_tally
from .hub import load, push_module
from .labeller import label_report, label_vector
from .labellers import ClassifierLabeller, RuleLabeller
from .options import chosen_option, options_m3d_tally, options_tally
from .overlap import OVERLAP_PROTOCOLS, overlap_tally
from .radiology import radeval_tally
from .report import best_constant_report_floor, report_metrics
from .retrieval import chance_recall, recall_curve, retrieval_metrics, retrieval_tally
from .table import Result, results_table
from .tally import Tally, mean_tally
from .verdict import image_verdict
from .volume_retrieval import ct_clip_volume_scores, volume_retrieval_tally
from .vqa import (
    major_class_hsenet_tally,
    majority_answer_floor,
    majority_answers,
    normalise_answer,
    vqa_metrics,
    vqa_tally,
)


__all__ = [
    "ClassifierLabeller",
    "OVERLAP_PROTOCOLS",
    "Result",
    "RuleLabeller",
    "Tally",
    "bert_score_tally",
    "best_constant_report_floor",
    "chance_recall",
    "chosen_option",
    "compare_runs",
    "confidence_intervals",
    "ct_clip_volume_scores",
    "diversity",
    "finding_scores",
    "findings_tally",
    "image_verdict",
    "label_report",
    "label_vector",
    "load",
    "major_class_hsenet_tally",
    "majority_answer_floor",
    "majority_answers",
    "mean_tally",
    "normalise_answer",
    "options_m3d_tally",
    "options_tally",
    "overlap_tally",
    "push_module",
    "radeval_tally",
    "recall_curve",
    "report_metrics",
    "results_table",
    "retrieval_metrics",
    "retrieval_tally",
    "volume_retrieval_tally",
    "vqa_metrics",
    "vqa_tally",
]
