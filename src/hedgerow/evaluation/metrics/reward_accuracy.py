"""Share of pairs in which the model prefers the better answer."""

from __future__ import annotations

from hedgerow.evaluation.metrics.base import PreferenceMetric, Score


class RewardAccuracy(PreferenceMetric):
    """How often the better answer of a pair has the higher reward (arXiv 2305.18290).

    Rewards are beside the model that the run began with, of which all are 0: it has 50%, since
    equal ones count half.
    """

    name: str = "reward_accuracy"
    scores = (Score("reward_accuracy", label="reward accuracy", unit="%", direction="higher"),)

    def score(self, chosen: float, rejected: float) -> float:
        """100 where the better answer's is higher, 50 where they are equal, or else 0."""
        return 50.0 * (chosen > rejected) + 50.0 * (chosen >= rejected)
