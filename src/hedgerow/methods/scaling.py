"""What each client counts in an aggregate: the scaling factors p_k of FLoRA (section 3, eq. 5).

FLoRA's paper finds that the best factor differs by data set (section 4, "impact of scaling
factor"), and leaves the choice to the user. `adaptive` chooses from the updates' geometry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hedgerow.errors import InvalidMessage
from hedgerow.wire import LARGEST_WEIGHT, Participant

Factor = Annotated[float, Field(gt=0, le=LARGEST_WEIGHT)]
Scaling = (
    Literal["size", "uniform", "adaptive"] | Factor | Annotated[list[Factor], Field(min_length=1)]
)
"""`size`: p_k = n_k / Σ n. `uniform`: 1 / N. A number: that for each client, as in the paper's
study. A list: one number for each client. `adaptive`: see `adaptive`."""

LONGEST = 1.5
"""The largest global step size of `adaptive`, in units of the mean update."""


def fixed(
    scaling: Scaling, clients: Sequence[str], num_examples: Sequence[int], places: Mapping[str, int]
) -> list[float]:
    """The scaling factors of one round's participants, where they do not depend on the updates.

    Args:
        clients: their names.
        num_examples: n_k of each.
        places: which of the experiment's clients they are, for a list of factors.
    """
    pairs = zip(clients, num_examples, strict=True)
    relative = [counts_as(scaling, client, count, places) for client, count in pairs]
    factor = normalisation(scaling, num_examples)
    return [weight * factor for weight in relative]


def counts_as(scaling: Scaling, client: str, num_examples: int, places: Mapping[str, int]) -> float:
    """What one client counts beside the others, before it is known who they are."""
    if isinstance(scaling, list):
        return scaling[places[client]]
    if isinstance(scaling, float):
        return scaling
    return 1.0 if scaling == "uniform" else float(num_examples)


def normalisation(scaling: Scaling, num_examples: Sequence[int]) -> float:
    """What makes p_k of `counts_as`."""
    if isinstance(scaling, list | float):
        return 1.0
    return 1 / (len(num_examples) if scaling == "uniform" else sum(num_examples))


def adaptive(gram: Tensor, shares: Sequence[float]) -> list[float]:
    """Weights and a global step size from how long the updates are and how much they agree.

    An update that is longer than most is scaled down to the median length of those that are not
    zero, so that one client (a higher rank, a harder task) does not lead the others. The step along
    their mean is as long as FedExP's (Jhunjhunwala et al., arXiv 2301.09604, eq. 6),
    η = Σ p_k ‖Δ_k‖² / (2 ‖Σ p_k Δ_k‖²): updates that point apart overshoot less when they are
    averaged than one that all agree on. It is at least 1 and at most `LONGEST`.

    Args:
        gram: shape (N, N), float64: ⟨Δ_i, Δ_j⟩ of all matrices together.
        shares: n_k / Σ n of each client.

    Returns:
        η p_k for each client.
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    moved = lengths[lengths > 0]
    median = moved.quantile(0.5) if len(moved) else lengths.new_zeros(())
    clipped = (median / lengths).clamp(max=1).nan_to_num(1.0)
    weights = torch.tensor(shares, dtype=torch.float64) * clipped
    mean = float(weights @ gram @ weights)
    spread = float((torch.tensor(shares, dtype=torch.float64) * (lengths * clipped) ** 2).sum())
    eta = min(max(spread / (2 * mean), 1.0), LONGEST) if mean > 0 else 1.0
    return [float(weight) for weight in eta * weights]


def check(scaling: Scaling, participants: Sequence[Participant]) -> None:
    """Raise `InvalidMessage` unless an entry's weights may be those of such factors."""
    if scaling == "adaptive":
        total = sum(p.weight for p in participants)
        if not total <= LONGEST * (1 + 1e-9):
            raise InvalidMessage(f"its weights sum to {total}, above {LONGEST}")
    elif isinstance(scaling, list):
        if strangers := [p for p in participants if p.weight not in scaling]:
            raise InvalidMessage(f"the weight of {strangers[0].client} is {strangers[0].weight}")
    else:
        clients = [p.client for p in participants]
        weights = fixed(scaling, clients, [p.num_examples for p in participants], {})
        for p, weight in zip(participants, weights, strict=True):
            if not math.isclose(p.weight, weight, rel_tol=1e-9):
                raise InvalidMessage(f"the weight of {p.client} is {p.weight}, not {weight}")
