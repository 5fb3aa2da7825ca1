"""Accuracies of multiple choice, as lm-evaluation-harness compares options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hedgerow.evaluation.metrics.base import ChoiceMetric, Score

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class MultipleChoice(ChoiceMetric):
    """How often the right option has the highest log-likelihood, and what guessing would score.

    `accuracy` compares log-likelihoods (the harness's `acc`), `accuracy_norm` the same per
    character (its `acc_norm`).
    """

    name: str = "multiple_choice"
    scores = (
        Score("accuracy", label="accuracy", unit="%", direction="higher"),
        Score("accuracy_norm", label="accuracy (normalised)", unit="%", direction="higher"),
        Score("accuracy_chance", label="chance", unit="%"),
    )

    def score(
        self, candidates: Sequence[str], right: int, log_likelihoods: npt.NDArray[np.float64]
    ) -> dict[str, float]:
        """100 where the right option is the likeliest, or else 0; and 100 by their number."""
        characters = [len(candidate) for candidate in candidates]
        return {
            "accuracy": 100 * int(log_likelihoods.argmax() == right),
            "accuracy_norm": 100 * int((log_likelihoods / characters).argmax() == right),
            "accuracy_chance": 100 * (1 / len(characters)),
        }
