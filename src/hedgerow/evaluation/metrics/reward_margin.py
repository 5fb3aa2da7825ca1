"""How far the model has come to prefer better answers."""

from __future__ import annotations

from hedgerow.evaluation.metrics.base import PreferenceMetric, Score


class RewardMargin(PreferenceMetric):
    """Mean difference of the rewards of better and worse answers (arXiv 2305.18290), with their β.

    Rewards are beside the model that the run began with, of which all are 0.
    """

    name: str = "reward_margin"
    scores = (Score("reward_margin", label="reward margin", unit="nats", direction="higher"),)

    def score(self, chosen: float, rejected: float) -> float:
        """The better answer's reward less the worse one's."""
        return chosen - rejected
