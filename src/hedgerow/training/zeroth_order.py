"""Local training without gradients: two forward passes and one random direction a step (MeZO).

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333, algorithm
1. A direction is a seed: it is added to the weights, and taken off again, piece by piece as it is
generated, so a step needs no memory beside the weights and one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hedgerow.lazy import torch
from hedgerow.sketch import reconstruct
from hedgerow.training.job import LOWER_RATE, Job, check_finite
from hedgerow.training.objectives.base import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

PIECE = 1 << 22
"""Entries of a direction that are there at a time."""


class Steps(NamedTuple):
    """Where local training went: Σ_i coordinates[i]·z(seeds[i])."""

    seeds: list[int]
    coordinates: list[float]


def train(
    job: Job,
    parameters: Iterable[nn.Parameter],
    directions: Callable[[int], Sequence[int]],
    epsilon: float,
) -> tuple[float, Steps]:
    """Train `parameters` of the job's network in place.

    Each step estimates the gradient g along each of its directions z from the losses at w + εz and
    w - εz, and goes w <- w - η·g·z, with the mean over directions.

    Args:
        directions: the seeds of a step's directions, from the step's number (0, 1, …).
        epsilon: ε.

    Returns:
        The mean loss over all steps, per answer token or pair, and where they went.

    Raises:
        Diverged: the loss is not finite.
    """
    weights = [parameter.detach() for parameter in parameters]
    steps = Steps([], [])
    total_loss, total_tokens = 0.0, 0
    with torch.no_grad():
        for step, (collated, tokens) in enumerate(job.steps()):

            def loss_here(collated: list[Batch] = collated) -> float:
                return sum(float(job.objective.total(job.network, batch)) for batch in collated)

            seeds = directions(step)
            moves: list[float] = []
            for seed in seeds:
                move(weights, seed, epsilon)
                above = loss_here()
                move(weights, seed, -2 * epsilon)
                below = loss_here()
                move(weights, seed, epsilon)
                check_finite(above + below, step + 1, LOWER_RATE)
                slope = (above - below) / (2 * epsilon * max(tokens, 1))
                rate = job.learning_rate * job.pace(step)
                moves.append(-rate * slope / len(seeds))
                total_loss += (above + below) / (2 * len(seeds))
            for seed, distance in zip(seeds, moves, strict=True):
                move(weights, seed, distance)
            steps.seeds.extend(seeds)
            steps.coordinates.extend(moves)
            total_tokens += tokens
    return total_loss / max(total_tokens, 1), steps


def move(weights: Iterable[Tensor], seed: int, distance: float) -> None:
    """w <- w + distance·z(seed), in place."""
    for index, weight in enumerate(weights):
        for piece, part in zip(pieces(weight), direction(weight, seed, index), strict=True):
            piece.add_(part.mul_(distance))


def direction(weight: Tensor, seed: int, index: int) -> Iterator[Tensor]:
    """The part of z(seed) that belongs to the `index`-th weight: normal entries, in flat pieces.

    Args:
        weight: gives size and device.
    """
    for number, piece in enumerate(pieces(weight)):
        one = torch.full((1,), float(piece.numel()) ** 0.5, device=weight.device)
        # A weight has fewer than 2²⁰ pieces, so no two pieces of a direction share a seed.
        yield reconstruct(one, (seed + (index << 20) + number) % 2**64, piece.numel(), "gaussian")


def pieces(weight: Tensor) -> Sequence[Tensor]:
    """Views of a weight's entries, as many as a direction has there at a time."""
    return torch.split(weight.view(-1), PIECE)
