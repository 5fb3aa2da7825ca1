"""Exact match of greedy answers."""

from __future__ import annotations

from hedgerow.evaluation.metrics.base import AnswerMetric, Score


class ExactMatch(AnswerMetric):
    """How often an answer is the right one but for white space."""

    name: str = "exact_match"
    scores = (Score("exact_match", label="exact match", unit="%", direction="higher"),)

    def score(self, reference: str, answer: str) -> float:
        """100 where the texts are the same but for white space, or else 0."""
        return 100 * (reference.split() == answer.split())
