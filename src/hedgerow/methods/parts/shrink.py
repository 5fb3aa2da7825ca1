"""How long an update is sent whose expected squared error is ω times its squared length."""

from __future__ import annotations

import math
from collections.abc import Callable

Shrink = Callable[[float], float]
"""From ω to the factor of the update's length, above 0 and at most 1."""


def bounded(omega: float) -> float:
    """min(1, 1.5/√(1 + ω)): where the error is large, a whole step would be mostly noise."""
    return min(1.0, 1.5 / math.sqrt(1 + omega))


def contraction(omega: float) -> float:
    """1/(1 + ω): then what error feedback keeps is bounded (Stich et al., arXiv 1809.07599)."""
    return 1 / (1 + omega)


def contracting(omega: float) -> float:
    """1/(1 + ω) where ω is 1 or more, else 1: what error feedback keeps is bounded either way."""
    return contraction(omega) if omega >= 1 else 1.0


def whole(omega: float) -> float:
    """1: nothing is shortened."""
    return 1.0
