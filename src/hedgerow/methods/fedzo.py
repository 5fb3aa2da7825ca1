"""FedZO: zeroth-order local steps along fresh random directions.

Fang et al., "Communication-Efficient Stochastic Zeroth-Order Optimization for Federated Learning",
arXiv 2201.09531, algorithm 1, with MeZO's estimator (two-sided, normal directions). There a client
sends all parameters; here it sends each direction's seed and coordinate, which is the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import Field

from hedgerow.methods.base import Client, ClientRound, Expected
from hedgerow.methods.zeroth_order import ZerothOrderMethod
from hedgerow.seeds import Seeds


class FedZO(ZerothOrderMethod):
    """Zeroth-order steps along fresh directions."""

    name: str = "fedzo"
    summary: ClassVar[str] = "all parameters, zeroth-order (MeZO) steps along fresh directions"
    reference: ClassVar[str] = "FedZO, arXiv 2201.09531, with MeZO's steps, arXiv 2305.17333"

    directions_per_step: int = Field(1, ge=1)
    """Number of directions whose estimates a step averages, b₂; each costs two forward passes."""

    def directions(self, client_round: ClientRound) -> Callable[[int], Sequence[int]]:
        """Derive new directions for every client, round and step."""

        return lambda step: self._of_step(
            client_round.seeds, client_round.round, client_round.client, step
        )

    def most_directions(self, steps: int) -> int:
        """As many for each step as the option says."""
        return steps * self.directions_per_step

    def possible(self, client: Client, round: int, expected: Expected) -> set[int]:
        """Seeds of the client's own directions, for as many steps as it has."""
        steps = range(expected.training.most_steps(client.num_examples))
        each = [self._of_step(expected.seeds, round, client, step) for step in steps]
        return {seed for seeds in each for seed in seeds}

    def _of_step(self, seeds: Seeds, round: int, client: Client, step: int) -> list[int]:
        purpose = ("direction", round, client.name, step)
        return [seeds.derive(*purpose, index) for index in range(self.directions_per_step)]
