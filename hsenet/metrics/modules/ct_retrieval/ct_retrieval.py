"""Retrieval between scans and reports: R@k, mean rank and MRR in both directions, beside chance.

Without `study_ids` only the same row is a hit (protocol `retrieval-identity`, as in published CT-RATE tables); with
them every row of the same study is (`retrieval-study`). Ties count as their expectation.
"""

import datasets
import evaluate
import numpy as np

from hsenet.metrics.retrieval import retrieval_metrics


class CtRetrieval(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: embeddings of scans; references: of reports. study_ids, ks: optional.",
            features=datasets.Features({"predictions": vector, "references": vector}),
        )

    def _compute(self, predictions, references, study_ids=None, ks=(1, 5, 10)) -> dict:
        return retrieval_metrics(np.array(predictions), np.array(references), study_ids=study_ids, ks=ks)
