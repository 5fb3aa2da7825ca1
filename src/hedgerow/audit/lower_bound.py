"""Lower bound of ε from one run, by guesses on who of its canaries was trained on.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", arXiv 2305.08846. Fair
coins decide on each of m canaries. Whoever sees what an (ε, δ)-private training has released, and
makes r guesses on the coins, has v or more of them right with a probability of at most
(theorem 5.2, with W ~ Binomial(r, e^ε / (e^ε + 1)))

    P[W ≥ v] + 2·m·δ · max_{i ≥ 1} P[v > W ≥ v - i] / i

so that an ε for which this is small is refuted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SHARES = (1.0, 0.5, 0.25, 0.125)
"""Shares of the canaries that are guessed on; each is tried, with its part of the error."""
_PRECISION = 1e-6
_LARGEST = 100.0
"""Largest ε that is looked for."""


class Guesses(NamedTuple):
    """Guesses on canaries, and what they show."""

    guesses: int
    """Number of guesses, r."""
    correct: int
    """Number of those that are right, v."""
    epsilon: float
    """ε below which nothing true is promised, at δ and a confidence; 0 shows nothing."""


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest probability of so many right guesses, whatever is (ε, δ)-private.

    Args:
        canaries: number of canaries, m.
        guesses: number of guesses, r, at most m.
        correct: number of right ones, v, at most r.
        epsilon: ε, from 0.
        delta: δ, from 0 to 1.
    """
    # Logarithms of probabilities of Binomial(r, q), since q comes close to 1.
    log_q, log_p = -np.logaddexp(0, -epsilon), -np.logaddexp(0, epsilon)
    logs = np.log(np.arange(1, guesses + 1))
    factorial = np.concatenate([[0.0], np.cumsum(logs)])
    right = np.arange(guesses + 1)
    pmf = np.exp(factorial[-1] - factorial - factorial[::-1] + right * log_q + right[::-1] * log_p)
    tail = pmf[correct:].sum()
    # Beyond i = v the numerator stays as it is.
    below = np.cumsum(pmf[:correct][::-1]) / np.arange(1, correct + 1)
    return float(min(1.0, tail + 2 * canaries * delta * below.max(initial=0.0)))


def lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95
) -> float:
    """Largest ε that so many right guesses refute, to 1e-6; 0 where they refute none.

    Args:
        canaries: as for `p_value`, and so are `guesses`, `correct` and `delta`.
        confidence: probability, at least, with which the ε of the run is not below it.
    """

    def is_refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    low, high = 0.0, 1.0
    while is_refuted(high) and high < _LARGEST:
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low


def guess(
    scores: npt.NDArray[np.float64],
    is_in: npt.NDArray[np.bool_],
    delta: float,
    confidence: float = 0.95,
) -> Guesses:
    """Guess on canaries by their scores, and take the numbers of guesses that show most.

    As many of the highest scores are guessed to have been trained on as of the lowest to have been
    left out. Each of `SHARES` is tried at its part of the error, so that the largest of their
    bounds holds with the confidence, too.

    Args:
        scores: shape (m,), m > 1: the higher, the likelier it was trained on.
        is_in: shape (m,): whether it was.
        delta: δ that the bound is at.
        confidence: as for `lower_bound`.
    """
    order = np.argsort(scores, kind="stable")
    found = []
    each = 1 - (1 - confidence) / len(SHARES)
    for share in SHARES:
        side = max(1, int(share * len(scores)) // 2)
        correct = int(is_in[order[-side:]].sum() + (~is_in[order[:side]]).sum())
        bound = lower_bound(len(scores), 2 * side, correct, delta, each)
        found.append(Guesses(2 * side, correct, bound))
    return max(found, key=lambda guesses: guesses.epsilon)
