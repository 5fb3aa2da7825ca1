"""Robust weights: rules that weigh clients by how their updates agree.

All of them need nothing but the table of inner products of the updates, G_ij = ⟨x_i, x_j⟩, so that
they serve updates of any form, adapters of different ranks too, and the aggregate stays the
method's own weighted sum Σ w_k x_k:

    norm_bound         w_k = p_k·min(1, M/‖x_k‖), M the median length (Sun et al., 1911.07963)
    krum               1 for the one update that is nearest to its N - f - 2 nearest others
                       (Blanchard et al., 1703.02757)
    multi_krum         the same weight for the N - f nearest in that sense
    geometric_median   w_k ∝ p_k / ‖x_k - Σ w_i x_i‖, iterated (Weiszfeld; RFA, 1912.13445)
    trust              w_k = c_k·min(1, ‖x_0‖/‖x_k‖) / Σ c_i, c_k = max(0, cos(x_k, x_0)), where x_0
                       is a trusted client's (FLTrust, 2012.13995, makes short updates longer, too)

f = (N - 3)/2, rounded down, is the largest number of hostile clients that Krum can bear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

ITERATIONS = 100
"""Largest number of Weiszfeld's steps; they end where weights change by less than 1e-9."""
SMALLEST = 1e-6
"""Smallest distance that is divided by, in units of the median length: smooths the median."""


class Weighed(NamedTuple):
    """Weights of updates, and sentences on those that were left out or shortened."""

    weights: list[float]
    notes: dict[int, str]
    """By the update's place."""


def bounded_shares(shares: Sequence[float], largest: float | None) -> list[float]:
    """Shares of clients, of which none is above `largest`, nor above 1/N where that is more.

    What is taken from one goes to the others, in proportion to theirs.

    Args:
        shares: what they claim, above 0; they need not sum to 1.
        largest: largest share; None leaves them as they are.

    Returns:
        Shares that sum to 1.
    """
    found = np.array(shares, dtype=np.float64) / sum(shares)
    if largest is None:
        return [float(each) for each in found]
    most = max(largest, 1 / len(found))
    bound = np.zeros(len(found), dtype=bool)
    while (found > most * (1 + 1e-12)).any():
        bound |= found > most * (1 + 1e-12)
        found[bound] = most
        free = ~bound
        if free.any():
            found[free] *= (1 - most * bound.sum()) / found[free].sum()
    return [float(each) for each in found]


def norm_bound(products: np.ndarray, shares: np.ndarray) -> Weighed:
    """Shorten updates to the median length."""
    lengths = _lengths(products)
    median = float(np.median(lengths))
    if not median:
        return Weighed(list(shares), {})
    factors = np.minimum(1.0, median / np.maximum(lengths, np.finfo(float).tiny))
    notes = {
        place: f"its update was {lengths[place] / median:.3g} times as long as the median: "
        "shortened to it"
        for place in np.flatnonzero(factors < 1 / 1.5)
    }
    return Weighed(list(shares * factors), {int(place): note for place, note in notes.items()})


def krum(products: np.ndarray, shares: np.ndarray) -> Weighed:
    """Take the one update that is nearest to most others."""
    return _nearest(products, np.ones(len(shares)), 1)


def multi_krum(products: np.ndarray, shares: np.ndarray) -> Weighed:
    """Take the N - f updates that are nearest to most others, by their shares."""
    return _nearest(products, shares, len(shares) - _hostile(len(shares)))


def geometric_median(products: np.ndarray, shares: np.ndarray) -> Weighed:
    """Weigh updates by the inverse of their distance from the geometric median."""
    lengths = np.diag(products)
    smallest = SMALLEST * float(np.median(_lengths(products))) or 1.0
    weights = shares.copy()
    for _ in range(ITERATIONS):
        squares = lengths - 2 * products @ weights + weights @ products @ weights
        distances = np.maximum(np.sqrt(np.maximum(squares, 0)), smallest)
        new = shares / distances
        new /= new.sum()
        change, weights = np.abs(new - weights).max(), new
        if change < 1e-9:
            break
    notes = {
        int(place): f"its update is far from the others: it weighs {weights[place]:.2g} instead "
        f"of {shares[place]:.2g}"
        for place in np.flatnonzero(weights < shares / 2)
    }
    return Weighed(list(weights), notes)


def trust(products: np.ndarray, trusted: int) -> Weighed:
    """Weigh updates by how far they point where a trusted one does, none longer than it.

    Args:
        products: inner products, of shape (N, N).
        trusted: place of the trusted update.
    """
    lengths = np.maximum(_lengths(products), np.finfo(float).tiny)
    cosines = products[trusted] / lengths / lengths[trusted]  # of zeros 0, their product is none
    scores = np.clip(cosines, 0, 1)
    scores[trusted] = 1.0
    weights = scores * np.minimum(1.0, lengths[trusted] / lengths) / scores.sum()
    away = "left out: it points away from the trusted client's update (cosine {:.2g})"
    notes = {int(place): away.format(cosines[place]) for place in np.flatnonzero(scores == 0)}
    return Weighed([float(each) for each in weights], notes)


RULES: Mapping[str, Callable[[np.ndarray, np.ndarray], Weighed]] = {
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "norm_bound": norm_bound,
}
"""Each rule takes inner products of shape (N, N) and shares of shape (N,), which sum to 1."""


def _nearest(products: np.ndarray, shares: np.ndarray, count: int) -> Weighed:
    """The `count` updates whose nearest others are nearest, weighed by their shares."""
    number = len(shares)
    lengths = np.diag(products)
    squares = np.maximum(lengths[:, None] + lengths - 2 * products, 0)
    np.fill_diagonal(squares, np.inf)
    near = max(1, number - _hostile(number) - 2)
    scores = np.sort(squares, axis=1)[:, :near].sum(axis=1) if number > 1 else np.zeros(1)
    chosen = np.argsort(scores, kind="stable")[:count]
    weights = np.zeros(number)
    weights[chosen] = shares[chosen] / shares[chosen].sum()
    typical = float(np.median(scores))
    notes = {
        place: f"left out: its distance from its nearest {near} others is "
        f"{np.sqrt(scores[place] / typical) if typical else 1:.3g} times the median client's"
        for place in range(number)
        if not weights[place]
    }
    return Weighed(list(weights), notes)


def _lengths(products: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.diag(products), 0))


def _hostile(number: int) -> int:
    """Number of hostile clients that Krum bears among so many."""
    return max(0, (number - 3) // 2)
