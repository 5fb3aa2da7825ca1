"""Zeroth-order methods, whose steps are seeds of directions, and coordinates: what they share.

client k:  c_k,z <- c_k,z - η·g along direction z, for each local step
server:    c_z = Σ p_k c_k,z
everybody: w <- w + Σ_z c_z z
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.lazy import torch
from hedgerow.methods.base import (
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Method,
    Payload,
    ServerRound,
    Trained,
)
from hedgerow.training import zeroth_order
from hedgerow.training.zeroth_order import direction, pieces
from hedgerow.wire import Kind, check_kinds, kinds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.training.job import Job
    from hedgerow.wire import Entry, Update


class ZerothOrderMethod(Method):
    """Local steps from two forward passes each; of `training`, the optimiser's options are unused.

    A good learning rate is smaller than a first-order one by orders of magnitude.
    """

    epsilon: float = Field(1e-3, gt=0)
    """Distance from the weights at which the two losses of a step are measured, ε, in multiples of
    a direction of normal numbers."""

    @property
    def keeps_optimizer(self) -> bool | None:
        """Nothing: there is no optimiser."""
        return None

    @abstractmethod
    def directions(self, client_round: ClientRound) -> Callable[[int], Sequence[int]]:
        """Function from a local step's number to the seeds of its directions."""

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Unfreeze all weights; the snapshot is only there to give the model back."""
        return model.unfreeze()

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Train by MeZO's steps."""
        directions = self.directions(client_round)
        loss, steps = zeroth_order.train(job, parameters.values(), directions, self.epsilon)
        return Trained(parameters, loss, _summed(zip(*steps, strict=True)))

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Collect each direction's seed, and how far the client went along it."""
        return Payload(_tensors(trained.steps), {})

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check that the weights resolve small steps."""
        if model.network.dtype != torch.float32:
            raise UserError(
                f"method.name: {self.name} takes steps that {model.network.dtype} rounds away: "
                "give model.dtype=float32"
            )

    @abstractmethod
    def possible(self, client: Client, round: int, expected: Expected) -> set[int]:
        """The seeds of all directions that a client's steps of a round may have."""

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check for seeds of directions that the client may take, and as many coordinates."""
        update.check_about({})
        possible = self.possible(client, update.round, expected)
        if not check_local_steps(update.tensors, len(possible)) <= possible:
            raise InvalidMessage("seeds must be those of directions that the client may take")

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for seeds of directions, whosever they are, and as many coordinates."""
        check_local_steps(entry.tensors)

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Sum coordinates, Σ p_k c_k, direction by direction."""
        total, weighted = 0, []
        for update in updates:
            total += update.num_examples
            for seed, coordinate in _steps(update.tensors).items():
                weighted.append((seed, coordinate * update.num_examples))
        summed = _summed(weighted)
        return Aggregate(_tensors({seed: c / total for seed, c in summed.items()}), {})

    def apply(self, model: Model, entry: Entry) -> None:
        """Add the steps, w <- w + Σ c_z z, weight by weight."""
        steps = _steps(entry.tensors)
        for index, (name, weight) in enumerate(model.network.named_parameters()):
            total = torch.zeros(weight.numel(), device=weight.device)
            for seed, coordinate in steps.items():
                for piece, part in zip(pieces(total), direction(weight, seed, index), strict=True):
                    piece.add_(part, alpha=coordinate)
            model.add(name, total.view(weight.shape))


def _summed(steps: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Coordinates by direction; a direction that was taken twice has their sum."""
    sums: dict[int, float] = {}
    for seed, coordinate in steps:
        sums[seed] = sums.get(seed, 0.0) + coordinate
    return sums


def _tensors(steps: Mapping[int, float]) -> dict[str, Tensor]:
    return {
        "seeds": torch.tensor(list(steps), dtype=torch.int64),
        "coordinates": torch.tensor(list(steps.values()), dtype=torch.float32),
    }


def _steps(tensors: Mapping[str, Tensor]) -> dict[int, float]:
    """The inverse of `_tensors`."""
    return dict(zip(tensors["seeds"].tolist(), tensors["coordinates"].tolist(), strict=True))


def check_local_steps(tensors: Mapping[str, Tensor], most: float = math.inf) -> set[int]:
    """The seeds of at most so many steps.

    Raises:
        InvalidMessage: the tensors are not what `_tensors` makes of such steps.
    """
    given = kinds(tensors)
    count = given["seeds"].shape[0] if "seeds" in given and given["seeds"].shape else 1
    each = {"seeds": Kind(torch.int64, (count,)), "coordinates": Kind(torch.float32, (count,))}
    check_kinds(given, each)
    if not 1 <= count <= most:
        raise InvalidMessage(
            f"expected at most {most} steps, got {count}" if count else "seeds must not be empty"
        )
    seeds = set(tensors["seeds"].tolist())
    if len(seeds) < count or min(seeds) < 0:
        raise InvalidMessage("seeds must be distinct and non-negative")
    return seeds
