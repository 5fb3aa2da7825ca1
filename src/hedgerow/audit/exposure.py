"""Exposure: how far a model prefers a canary to others like it, which it has never seen.

Carlini et al., "The Secret Sharer", arXiv 1802.08232, definition 5, with the canaries that were
left out as the space of alternatives:

    exposure = log2(number of alternatives and itself) - log2(rank of its loss among them)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def exposure(planted: Float64, left_out: Float64) -> Float64:
    """Exposure of each canary that was trained on, in bits, from 0 to `highest`.

    Without any memory of it, all ranks are as likely, and the mean is about 1.44.

    Args:
        planted: shape (m,): losses of canaries that were trained on.
        left_out: shape (n,): losses of those that were not.
    """
    rank = 1 + np.searchsorted(np.sort(left_out), planted, side="right")
    return np.asarray(np.log2(len(left_out) + 1) - np.log2(rank))


def highest(left_out: int) -> float:
    """Exposure of a canary that the model prefers to all of so many others, in bits."""
    return math.log2(left_out + 1)
