"""FedZO: zeroth-order local steps along fresh random directions.

Fang et al., "Communication-Efficient Stochastic Zeroth-Order Optimization for Federated Learning",
arXiv 2201.09531, algorithm 1, with MeZO's estimator (two-sided, normal directions). There a client
sends all parameters; here it sends each direction's seed and coordinate, which is the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from hedgerow.methods.base import Turn
from hedgerow.methods.zeroth_order import ZerothOrderMethod


class FedZO(ZerothOrderMethod):
    """Zeroth-order steps along fresh directions."""

    name: Literal["fedzo"] = "fedzo"
    summary: ClassVar[str] = "all parameters, zeroth-order (MeZO) steps along fresh directions"
    reference: ClassVar[str] = "FedZO, arXiv 2201.09531, with MeZO's steps, arXiv 2305.17333"

    directions_per_step: int = Field(1, ge=1)
    """b₂: directions whose estimates a step averages."""

    def directions(self, turn: Turn) -> Callable[[int], Sequence[int]]:
        """New ones for every client, round and step."""

        def seeds(step: int) -> list[int]:
            purpose = ("direction", turn.round, turn.client.name, step)
            return [turn.seeds.derive(*purpose, i) for i in range(self.directions_per_step)]

        return seeds
