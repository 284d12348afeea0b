"""Scoring a model over a dataset: work shared out among processes, floors, intervals, tables and figures.

`train/evaluate.py` puts these together.
"""
