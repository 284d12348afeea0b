"""Public CT corpora, as published, to datasets that `datasets.load_dataset` and the training programs read.

The programs are in `datasets_scripts/`; here is what they share. A corpus becomes a [`Plan`] (rows and what is left
out, from its tables alone), and [`run`] turns the plan into Parquet, a leakage report and a card.
"""

from .build import Plan, add_build_arguments, add_split_arguments, run
from .card import CardFacts
from .source import Corpus, CorpusError


__all__ = ["CardFacts", "Corpus", "CorpusError", "Plan", "add_build_arguments", "add_split_arguments", "run"]
