"""ROUGE-L of greedy answers."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from hedgerow.evaluation.metrics.base import AnswerMetric, Score

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


class RougeL(AnswerMetric):
    """F-measure of the longest common subsequence of stemmed words (Lin, 2004)."""

    name: str = "rouge_l"
    scores = (Score("rouge_l", label="ROUGE-L", unit="%", direction="higher"),)

    def score(self, reference: str, answer: str) -> float:
        """From 0 to 100."""
        measured: float = _scorer().score(reference, answer)["rougeL"].fmeasure
        return 100 * measured


@cache
def _scorer() -> RougeScorer:
    # Not at the top: it brings nltk, which takes 100 MB where scikit-learn is installed.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
