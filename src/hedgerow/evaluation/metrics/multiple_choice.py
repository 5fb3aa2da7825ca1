"""Accuracies of multiple choice, as lm-evaluation-harness compares options."""

from __future__ import annotations

import math
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
        """100 where the right option is the likeliest, or else 0; and 100 by their number.

        Accuracies are NaN where a likelihood is, of which none is the highest.
        """
        characters = [len(candidate) for candidate in candidates]
        per_character = log_likelihoods / characters
        return {
            "accuracy": _is_best(log_likelihoods, right),
            "accuracy_norm": _is_best(per_character, right),
            "accuracy_chance": 100 * (1 / len(characters)),
        }


def _is_best(values: npt.NDArray[np.float64], index: int) -> float:
    highest = values.argmax()  # the first NaN, where there is one
    return 100.0 * int(highest == index) if values[highest] == values[highest] else math.nan
