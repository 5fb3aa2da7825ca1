"""Exact match of greedy answers."""

from __future__ import annotations

import unicodedata

from hedgerow.evaluation.metrics.base import AnswerMetric, Score


class ExactMatch(AnswerMetric):
    """How often an answer is the right one but for white space.

    A letter with its accent is the same however it is coded (Unicode's normal form NFC).
    """

    name: str = "exact_match"
    scores = (Score("exact_match", label="exact match", unit="%", direction="higher"),)

    def score(self, reference: str, answer: str) -> float:
        """100 where the texts are the same but for white space, or else 0."""
        right, said = (unicodedata.normalize("NFC", text).split() for text in (reference, answer))
        return 100 * (right == said)
