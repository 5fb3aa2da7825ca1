"""Weights p_k of clients in an aggregate: FLoRA's scaling factors (section 3, eq. 5).

FLoRA's paper finds that the best factor differs by data set (section 4, "impact of scaling
factor"), and leaves the choice to the user. `adaptive` chooses by the clients' losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Annotated, Literal

from pydantic import Field

from hedgerow.errors import InvalidMessage
from hedgerow.wire import LARGEST_WEIGHT, Participant

ByShare = Literal["size", "uniform"]
"""Weights that depend on who is there alone: `size`, p_k = n_k / Σ n, or `uniform`, 1 / N."""
Weight = Annotated[float, Field(gt=0, le=LARGEST_WEIGHT)]
Weighting = (
    Literal["size", "uniform", "adaptive"] | Weight | Annotated[list[Weight], Field(min_length=1)]
)
"""`size`: p_k = n_k / Σ n. `uniform`: 1 / N. A number: that for each client, as in the paper's
study. A list: one number for each client. `adaptive`: see `adaptive_step`."""

LENGTHS = (0.5, 1.0, 1.5)
"""Lengths at which clients measure the loss for `adaptive`, in units of the last round's step."""

SHORTEST, LONGEST = 1 / 8, 8.0
"""Range of the global step size of `adaptive`, in units of the mean update."""

_FASTEST = 1.5
"""Largest factor by which it changes from one round to the next."""


def fixed_weights(
    weighting: Weighting,
    clients: Sequence[str],
    num_examples: Sequence[int],
    places: Mapping[str, int],
) -> list[float]:
    """Weights of one round's participants, where they do not depend on the updates.

    Args:
        clients: their names.
        num_examples: n_k of each.
        places: which of the experiment's clients they are, for a list of weights.

    Returns:
        p_k of each client.
    """
    pairs = zip(clients, num_examples, strict=True)
    relative = [relative_weight(weighting, client, count, places) for client, count in pairs]
    factor = normalisation(weighting, num_examples)
    return [weight * factor for weight in relative]


def relative_weight(
    weighting: Weighting, client: str, num_examples: int, places: Mapping[str, int]
) -> float:
    """Weight of one client relative to the others, before it is known who they are."""
    if isinstance(weighting, list):
        return weighting[places[client]]
    if isinstance(weighting, float):
        return weighting
    return 1.0 if weighting == "uniform" else float(num_examples)


def normalisation(weighting: Weighting, num_examples: Sequence[int]) -> float:
    """Factor that makes p_k of `relative_weight`."""
    if isinstance(weighting, list | float):
        return 1.0
    return 1 / (len(num_examples) if weighting == "uniform" else sum(num_examples))


def adaptive_step(
    last: float, losses: Sequence[Sequence[float]], num_examples: Sequence[int]
) -> float:
    """Global step size η of a round, by a line search along the last one's step.

    Clients have the model after that step, and report their loss before they train, where the step
    had been shorter and longer. The parabola through the means has its minimum at the length that
    would have been best, and which this round takes: one round late, but for no more messages.
    A client's losses count as differences from its own middle one, which are bounded by the
    clients' median, so that nobody decides alone.

    Args:
        last: η of the last round.
        losses: of each client, at `LENGTHS`.
        num_examples: n_k of each.

    Returns:
        η, so that p_k = η n_k / Σ n.
    """
    shorter, longer = (
        _mean_of_bounded([each[end] - each[1] for each in losses], num_examples) for end in (0, 2)
    )
    bend = shorter + longer
    if bend > 0:
        factor = 1 + (shorter - longer) / (4 * bend)
    else:
        factor = {1: _FASTEST, 0: 1.0, -1: 1 / _FASTEST}[(shorter > longer) - (shorter < longer)]
    factor = min(max(factor, 1 / _FASTEST), _FASTEST)
    return min(max(last * factor, SHORTEST), LONGEST)


def _mean_of_bounded(values: Sequence[float], num_examples: Sequence[int]) -> float:
    """The weighted mean of values, none of which counts as more than thrice the median size."""
    most = 3 * median(map(abs, values))
    pairs = zip(values, num_examples, strict=True)
    return sum(min(max(value, -most), most) * n for value, n in pairs) / sum(num_examples)


def check(weighting: Weighting, participants: Sequence[Participant]) -> None:
    """Raise `InvalidMessage` unless an entry's weights are those of `weighting`."""
    if isinstance(weighting, list):
        if strangers := [p for p in participants if p.weight not in weighting]:
            raise InvalidMessage(
                f"weight of {strangers[0].client} must be one of method.scaling, "
                f"got {strangers[0].weight}"
            )
    else:
        clients = [p.client for p in participants]
        weights = fixed_weights(weighting, clients, [p.num_examples for p in participants], {})
        if weighting == "adaptive":
            total = sum(p.weight for p in participants)
            if not SHORTEST * (1 - 1e-9) <= total <= LONGEST * (1 + 1e-9):
                raise InvalidMessage(f"weights must sum to {SHORTEST} to {LONGEST}, got {total}")
            weights = [total * weight for weight in weights]
        for p, weight in zip(participants, weights, strict=True):
            if not math.isclose(p.weight, weight, rel_tol=1e-9):
                raise InvalidMessage(f"weight of {p.client} must be {weight}, got {p.weight}")
