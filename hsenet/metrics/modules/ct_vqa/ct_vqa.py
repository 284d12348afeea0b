"""Answers to questions about scans: exact, set and major-class accuracy, or multiple choice.

Configurations: the default compares texts (`groups` splits the accuracy, e.g. by type or anatomy); `option` reads a
letter of `options`; `option-m3d` and `major-class-hsenet` are the lenient tests of M3D and HSENet, for comparison with
their tables only (the latter counts an empty answer as right).
"""

import datasets
import evaluate

from hsenet.metrics.options import options_m3d_tally, options_tally
from hsenet.metrics.vqa import major_class_hsenet_tally, vqa_tally


class CtVqa(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: one answer each. groups or options: see the description.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, **options) -> dict:
        protocols = {
            "default": vqa_tally,
            "option": options_tally,
            "option-m3d": options_m3d_tally,
            "major-class-hsenet": major_class_hsenet_tally,
        }
        tally = protocols[self.config_name](predictions, references, **options)
        return {**tally.scores(), "protocol": tally.protocol}
