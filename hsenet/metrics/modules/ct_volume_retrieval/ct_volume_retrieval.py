"""Retrieval between scans: how much the findings of the nearest scans overlap with a scan's own (mean Jaccard index).

The default leaves out the query's own study (`study_ids`, one for each row). The configuration `ct-clip` is the score
that CT-CLIP and HSENet publish as MAP@k, with its faults: for comparison with their tables only.
"""

import datasets
import evaluate
import numpy as np

from hsenet.metrics.volume_retrieval import KS, ct_clip_volume_scores, volume_retrieval_tally


class CtVolumeRetrieval(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        vector, labels = datasets.Sequence(datasets.Value("float64")), datasets.Sequence(datasets.Value("int8"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: embeddings of scans; references: their labels, 0 or 1. study_ids, ks.",
            features=datasets.Features({"predictions": vector, "references": labels}),
        )

    def _compute(self, predictions, references, study_ids=None, ks=KS) -> dict:
        embeds, labels = np.array(predictions), np.array(references)
        if self.config_name == "ct-clip":
            return ct_clip_volume_scores(embeds, labels, ks=ks)
        if study_ids is None:
            raise ValueError("study_ids are needed: a scan must not find its own study.")
        tally = volume_retrieval_tally(embeds, labels, study_ids, ks=ks)
        return {**tally.scores(), "protocol": tally.protocol}
