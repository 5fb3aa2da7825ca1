"""Metrics that keep what they are shown, so that tests can look at it row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from hedgerow.evaluation.metrics.base import AnswerMetric, ChoiceMetric, LikelihoodMetric, Score

METRICS = [f"{__name__}:{name}" for name in ("Nats", "Answers", "Options")]
"""Names of the metrics, as `evaluation.metrics` takes them."""
seen: dict[str, list[Any]] = {"nats": [], "answers": [], "options": []}
"""What an evaluation has shown the metrics since this was emptied, in the rows' order."""


def forget() -> None:
    """Empty `seen`, before an evaluation."""
    for kept in seen.values():
        kept.clear()


class Nats(LikelihoodMetric):
    """Cross-entropy of each right answer, summed over its tokens."""

    scores: ClassVar[tuple[Score, ...]] = (Score("nats", label="nats"),)

    def score(self, nats: float, tokens: int) -> float:
        seen["nats"].append(nats)
        return nats


class Answers(AnswerMetric):
    """Greedy answer to each prompt."""

    scores: ClassVar[tuple[Score, ...]] = (Score("characters", label="characters"),)

    def score(self, reference: str, answer: str) -> float:
        seen["answers"].append(answer)
        return len(answer)


class Options(ChoiceMetric):
    """Log-likelihood of each option of each question."""

    scores: ClassVar[tuple[Score, ...]] = (Score("options", label="options"),)

    def score(self, candidates: Sequence[str], right: int, log_likelihoods: Any) -> float:
        seen["options"].append([float(each) for each in log_likelihoods])
        return float(len(candidates))
