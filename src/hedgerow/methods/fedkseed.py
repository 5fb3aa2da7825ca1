"""FedKSeed: zeroth-order full-parameter tuning along a fixed set of candidate directions.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
Cost under 18 Kilobytes", arXiv 2312.06353, algorithm 1. Every local step takes one of K candidate
seeds, the same K for everybody in all rounds, so what all clients did is at most K numbers. (The
paper's server keeps the K sums of all rounds and clients rebuild from the base; here an entry has a
round's sums, which comes to the same model. FedKSeed-Pro's uneven probabilities are not here.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hedgerow.methods.base import Client, ClientRound, Expected
from hedgerow.methods.parts.along_seeds import check_steps
from hedgerow.methods.zeroth_order import ZerothOrderMethod

if TYPE_CHECKING:
    from hedgerow.wire import Entry


class FedKSeed(ZerothOrderMethod):
    """Zeroth-order steps along K candidate directions."""

    name: str = "fedkseed"
    summary: ClassVar[str] = "all parameters, zeroth-order steps along K shared candidate seeds"
    reference: ClassVar[str] = "FedKSeed, arXiv 2312.06353"

    candidates: int = Field(4096, ge=1)
    """Number of candidate seeds of directions, K: the same for everybody in all rounds."""

    def directions(self, client_round: ClientRound) -> Callable[[int], Sequence[int]]:
        """Draw one of the candidates for each step."""
        draws = client_round.seeds.numpy("directions", client_round.round, client_round.client.name)
        return lambda step: [
            client_round.seeds.derive("candidate", int(draws.integers(self.candidates)))
        ]

    def possible(self, client: Client, round: int, expected: Expected) -> set[int]:
        """Seeds of all candidates."""
        return {expected.seeds.derive("candidate", index) for index in range(self.candidates)}

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that it has at most K seeds of directions."""
        check_steps(entry.tensors, self.candidates)
