"""Evaluation: loss, ROUGE-L, exact match and multiple choice on a test set."""

from hedgerow.evaluation.scores import TestSet, evaluate

__all__ = ["TestSet", "evaluate"]
