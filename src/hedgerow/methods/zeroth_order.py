"""Zeroth-order methods, whose steps are seeds of directions, and coordinates: what they share.

client k:  c_k,z <- c_k,z - η·g along direction z, for each local step
server:    c_z = Σ p_k c_k,z
everybody: w <- w + Σ_z c_z z
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.lazy import torch
from hedgerow.methods.base import (
    REVEALED,
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Holds,
    Method,
    Payload,
    ServerRound,
    Trained,
)
from hedgerow.methods.parts.along_seeds import (
    check_steps,
    revealed,
    steps_of_tensors,
    steps_to_tensors,
    summed,
)
from hedgerow.training import zeroth_order
from hedgerow.training.zeroth_order import direction, pieces

if TYPE_CHECKING:
    from torch import nn

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.training.job import Job
    from hedgerow.wire import Entry, Update


class ZerothOrderMethod(Method):
    """Local steps from two forward passes each; of `training`, the optimiser's options are unused.

    A good learning rate is smaller than a first-order one by orders of magnitude.
    """

    own_steps: ClassVar[bool] = True
    compresses_broadcast: ClassVar[bool] = True
    tells_steps: ClassVar[bool] = True

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

    def most_directions(self, steps: int) -> int:
        """Number of directions that so many local steps take at most; by default one each."""
        return steps

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Unfreeze all weights; the snapshot is only there to give the model back."""
        return model.unfreeze()

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Train by MeZO's steps."""
        directions = self.directions(client_round)
        loss, steps = zeroth_order.train(job, parameters.values(), directions, self.epsilon)
        return Trained(parameters, loss, summed(zip(*steps, strict=True)))

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Collect each direction's seed, and how far the client went along it."""
        return Payload(steps_to_tensors(trained.steps), {})

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check that the weights resolve small steps, and that nothing is asked of gradients."""
        if training.router_aux_loss_coef:
            raise UserError(
                "training.router_aux_loss_coef: the routers' auxiliary loss is in gradients alone, "
                f"of which {self.name} has none: leave it out"
            )
        if model.network.dtype != torch.float32:
            raise UserError(
                f"method.name: {self.name} takes steps that {model.network.dtype} rounds away: "
                "give model.dtype=float32"
            )

    @abstractmethod
    def possible(self, client: Client, round: int, expected: Expected) -> set[int]:
        """The seeds of all directions that a client's steps of a round may have.

        Args:
            client: of which name and number of examples are known, and its index at the server.
            round: number of the round, from 1.
            expected: the run's.
        """

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check for seeds of directions that the client may take, and as many coordinates."""
        update.check_about({})
        count = len(check_steps(update.tensors))
        possible = self.possible(_bounded(client, count, expected), update.round, expected)
        if not check_steps(update.tensors, len(possible)) <= possible:
            raise InvalidMessage("seeds must be those of directions that the client may take")

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for seeds of directions, whosever they are, and as many coordinates."""
        check_steps(entry.tensors)

    def check_derived(self, entry: Entry, expected: Expected) -> None:
        """Check that the directions are some that its participants may have taken."""
        seeds = check_steps(entry.tensors)
        strangers = set(seeds)
        for index, p in enumerate(entry.participants):
            client = _bounded(Client(index, p.client, p.num_examples), len(seeds), expected)
            strangers -= self.possible(client, entry.round, expected)
            if not strangers:
                return
        raise InvalidMessage(
            f"seeds must be those of directions that its participants may take: {len(strangers)} "
            f"of {len(seeds)} are not"
        )

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Sum coordinates, Σ p_k c_k, direction by direction."""
        total, weighted, directions = 0, [], list[set[int]]()
        for update in updates:
            total += update.num_examples
            steps = steps_of_tensors(update.tensors)
            directions.append(set(steps))
            for seed, coordinate in steps.items():
                weighted.append((seed, coordinate * update.num_examples))
        tensors = steps_to_tensors({seed: c / total for seed, c in summed(weighted).items()})
        return Aggregate(tensors, {REVEALED: revealed(directions)})

    def update_holds(self, client: Client, expected: Expected) -> Holds:
        """Memory of a seed and a coordinate for each direction."""
        steps = expected.training.most_steps(client.num_examples)
        return Holds(_DIRECTION * self.most_directions(steps))

    def aggregate_holds(self, clients: Sequence[Client], expected: Expected) -> Holds:
        """Memory of all clients' seeds and coordinates."""
        return Holds(sum(self.update_holds(client, expected).message for client in clients))

    def apply(self, model: Model, entry: Entry) -> None:
        """Add the steps, w <- w + Σ c_z z, weight by weight."""
        steps = steps_of_tensors(entry.tensors)
        for index, (name, weight) in enumerate(model.network.named_parameters()):
            total = torch.zeros(weight.numel(), device=weight.device)
            for seed, coordinate in steps.items():
                for piece, part in zip(pieces(total), direction(weight, seed, index), strict=True):
                    piece.add_(part, alpha=coordinate)
            model.add(name, total.view(weight.shape))


_DIRECTION = 8 + 4
"""Bytes of a direction in a message: its seed, and the coordinate along it."""


def _bounded(client: Client, steps: int, expected: Expected) -> Client:
    """The client with no more examples than so many steps can be of, whatever it claims to have."""
    training = expected.training
    examples = max(steps, 1) * training.batch_size * training.gradient_accumulation
    return replace(client, num_examples=min(client.num_examples, examples))
