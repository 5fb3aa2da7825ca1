"""Fed-SB: an r×r matrix between two fixed bases is all that is trained and sent.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning", arXiv 2502.15436, on LoRA-SB, arXiv 2411.19557. An update is
r² numbers a matrix, whatever the matrix's size, and averages are exact, since A and B are the same
for all.

    once:        B and A are the leading r left and right singular vectors of W, R = 0
    every round:
      client k:  go on from R, and train it alone: W + s·B·R·A
      server:    R = Σ p_k s_k R_k
      everybody: the global adapter is (A, B·R); the base stays as it is

The bases are LoRA-XS's (arXiv 2405.17604), which everybody has without a word; LoRA-SB's own are
the singular vectors of the first step's full gradient, which somebody would have to compute and
send.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow.methods.base import (
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Holds,
    ServerRound,
)
from hedgerow.methods.continued import HeldAdapter
from hedgerow.methods.one_factor import OnePart, average_factor
from hedgerow.methods.parts import core
from hedgerow.methods.parts.stacking import finite
from hedgerow.methods.parts.values import Shapes
from hedgerow.wire import Kind, check_kinds, kinds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.wire import Entry, Update


class FedSB(HeldAdapter, OnePart):
    """Adapters of one rank, of which the core between two fixed bases is trained."""

    name: str = "fed_sb"
    summary: ClassVar[str] = "an r×r core between W's singular vectors, averaged: exact, and tiny"
    reference: ClassVar[str] = "Fed-SB, arXiv 2502.15436, with LoRA-XS's bases (2405.17604)"
    same_rank: ClassVar[bool] = True
    adapts_experts: ClassVar[bool] = False

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check that every matrix has so many singular vectors."""
        super().check(model, num_clients, training)
        core.check_ranks(self.trained_shapes(model), self.largest_rank)

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the global core between the bases, which are frozen."""
        rank = self.rank(client_round.client)
        return self.with_snapshot(model, core.attach(model, self, rank, self.trained_shapes(model)))

    def sent(self, shapes: Shapes, rank: int, round: int) -> dict[str, Kind]:
        """Kinds of the cores."""
        return core.core_kinds(shapes, rank)

    def before(self, server_round: ServerRound) -> dict[str, Tensor]:
        """The cores that clients went on from: the last entry's, or zeros."""
        last, shapes = server_round.previous, server_round.expected.shapes
        return core.zeros(shapes, self.largest_rank) if last is None else dict(last.tensors)

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that there is a core for each module."""
        check_kinds(kinds(entry.tensors), core.core_kinds(shapes, self.largest_rank))

    def aggregate_holds(self, clients: Sequence[Client], expected: Expected) -> Holds:
        """Memory of the mean core, and of a module's cores of all clients."""
        message = self.update_holds(clients[0], expected).message
        return Holds(message, work=message)

    def fold(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """R = Σ p_k s_k R_k."""
        exact = average_factor(updates)
        cores = {name: each.float() for name, each in exact.items()}
        return Aggregate(cores, finite({"aggregation_error": core.product_error(cores, exact)}))

    def apply(self, model: Model, entry: Entry) -> None:
        """Make (A, B·R) the global adapter, with R beside it."""
        model.factors = core.with_cores(model, entry.tensors, self.trained_shapes(model))
