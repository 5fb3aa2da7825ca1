"""Membership: how well a score tells the rows that a model was trained on from others.

The score is how far training has lowered a row's loss. That the base model finds a row easy is no
sign that it was trained on: the base is the reference (Watson et al., arXiv 2111.08440; Carlini et
al., arXiv 2112.03570, who also say why true positives at few false ones count).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

FALSE_POSITIVES = 0.01
"""Largest share of others that may be taken for members where true positives are counted."""
_Z = 1.959964
"""97.5% quantile of the standard normal distribution."""


class Separation(NamedTuple):
    """How well scores tell members from others."""

    auc: float
    """Probability that a member's score is above another's, ties by half: 0.5 tells nothing."""
    low: float
    """Lower end of the 95% interval of `auc`."""
    high: float
    """Upper end of it."""
    true_positives: float
    """Share of members that are told where at most `FALSE_POSITIVES` of the others are taken for
    members."""


def separation(members: Float64, others: Float64) -> Separation:
    """How well scores tell members from others.

    Args:
        members: shape (m,), m > 0.
        others: shape (n,), n > 0.
    """
    ranked = np.sort(others)
    below = np.searchsorted(ranked, members, side="left")
    not_above = np.searchsorted(ranked, members, side="right")
    auc = float((below + not_above).mean() / (2 * len(others)))
    low, high = interval(auc, len(members), len(others))
    threshold = ranked[-1 - int(FALSE_POSITIVES * len(others))]
    return Separation(auc, low, high, float((members > threshold).mean()))


def interval(auc: float, members: int, others: int) -> tuple[float, float]:
    """Interval of an AUC at 95% confidence.

    Newcombe, "Confidence intervals for an effect size measure based on the Mann–Whitney statistic",
    Statistics in Medicine 25 (2006), part 2, method 5: all θ whose own standard error has the AUC
    within 1.96 of it. It does not shrink to nothing where the AUC is 0 or 1.
    """

    def is_within(theta: float) -> bool:
        mean = (members + others) / 2 - 1
        parts = 1 + mean * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        variance = theta * (1 - theta) * parts / (members * others)
        return abs(auc - theta) <= _Z * math.sqrt(variance)

    def edge(inside: float, outside: float) -> float:
        if is_within(outside) and 0 < outside < 1:
            return outside
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_within(middle) else (inside, middle)
        return outside

    return edge(auc, 0.0), edge(auc, 1.0)
