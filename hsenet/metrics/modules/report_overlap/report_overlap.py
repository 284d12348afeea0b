"""Word overlap of generated and reference radiology reports (BLEU, ROUGE-L, METEOR), each under a named protocol.

The configuration is the protocol: `bleu-coco` (default), `bleu-13a`, `bleu-coco-lower`, `bleu-coco-ptb`,
`precision-hsenet`, `bleu-m3d`, `rouge-l`, `rouge-l-stem`, `rouge-l-coco`, `meteor-nltk`, `meteor-nltk-stem`.
A missing (None) or empty prediction scores 0 and stays in every denominator.
"""

import datasets
import evaluate

from hsenet.metrics.overlap import overlap_tally


class ReportOverlap(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: one report each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references) -> dict:
        protocol = "bleu-coco" if self.config_name == "default" else self.config_name
        tally = overlap_tally(protocol, predictions, references)
        return {**tally.scores(), "protocol": tally.protocol}
