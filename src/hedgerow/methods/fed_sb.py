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
send. They are made in float64, on the CPU and with fixed signs: machines differ in the last bits,
unless two singular values of a weight are so close that their vectors are hardly defined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow import lowrank
from hedgerow.adapters import adapter_tensors
from hedgerow.errors import UserError
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Aggregate, Client, ClientRound, Expected, ServerRound
from hedgerow.methods.continued import ContinuedAdapter, HeldAdapter
from hedgerow.methods.factors import factor_kinds
from hedgerow.methods.one_factor import average_factor
from hedgerow.methods.parts.core import CoreLayers
from hedgerow.methods.parts.values import Shapes
from hedgerow.methods.stacking import finite
from hedgerow.wire import Kind, check_kinds, kinds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.wire import Entry, Update


class FedSB(HeldAdapter, ContinuedAdapter):
    """Adapters of one rank, of which the core between two fixed bases is trained."""

    name: str = "fed_sb"
    summary: ClassVar[str] = "an r×r core between W's singular vectors, averaged: exact, and tiny"
    reference: ClassVar[str] = "Fed-SB, arXiv 2502.15436, with LoRA-XS's bases (2405.17604)"
    same_rank: ClassVar[bool] = True
    adapts_experts: ClassVar[bool] = False

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check that every matrix has so many singular vectors."""
        super().check(model, num_clients, training)
        module, shape = min(self.trained_shapes(model).items(), key=lambda item: min(item[1]))
        if self.largest_rank > min(shape):
            raise UserError(
                f"method.ranks: {module} has {min(shape)} singular vectors, not "
                f"{self.largest_rank}: give a lower rank, or other targets"
            )

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the global core between the bases, which are frozen."""
        rank = self.rank(client_round.client)
        bases = adapter_tensors(self._bases(model))
        parameters = model.attach(self.config(rank), layers=CoreLayers())
        held = model.factors or {}
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name in bases:
                    parameter.requires_grad_(False).copy_(bases[name])
                elif name in held:
                    parameter.copy_(held[name] / self.scale(rank))
                else:
                    parameter.zero_()
        trained = {name: p for name, p in parameters.items() if name not in bases}
        return self.with_snapshot(model, trained)

    def sent(self, shapes: Shapes, rank: int, round: int) -> dict[str, Kind]:
        """Kinds of the cores."""
        return {_core_name(module): Kind(torch.float32, (rank, rank)) for module in shapes}

    def before(self, server_round: ServerRound) -> dict[str, Tensor]:
        """The cores that clients went on from: the last entry's, or zeros."""
        if server_round.previous is not None:
            return dict(server_round.previous.tensors)
        kinds = self.sent(server_round.expected.shapes, self.largest_rank, server_round.round)
        return {name: torch.zeros(kind.shape) for name, kind in kinds.items()}

    def check_factors(self, client: Client, update: Update, expected: Expected) -> None:
        """Check the client's rank and scale, and that there is a core for each module."""
        rank = self.rank(client)
        update.check_about(self._about(rank))
        check_kinds(kinds(update.tensors), self.sent(expected.shapes, rank, update.round))

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that there is a core for each module."""
        check_kinds(kinds(entry.tensors), self.sent(shapes, self.largest_rank, entry.round))

    def fold(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """R = Σ p_k s_k R_k."""
        exact = average_factor(updates)
        cores = {name: core.float() for name, core in exact.items()}
        # The bases, which the server does not have, keep lengths.
        basis = torch.eye(self.largest_rank)
        error = lowrank.relative_error(
            (Factors(cores[name], basis), Factors(exact[name], basis)) for name in exact
        )
        return Aggregate(cores, finite({"aggregation_error": error}))

    def apply(self, model: Model, entry: Entry) -> None:
        """Make (A, B·R) the global adapter, with R beside it."""
        cores = dict(entry.tensors)
        pairs = {}
        for module, (A, B) in self._bases(model).items():
            pairs[module] = Factors(A, B @ cores[_core_name(module)])
        model.factors = adapter_tensors(pairs) | cores

    def _bases(self, model: Model) -> dict[str, Factors]:
        modules = self.trained_shapes(model)
        return {module: model.singular_vectors(module, self.largest_rank) for module in modules}


def _core_name(module: str) -> str:
    """PEFT's key name of a module's A, with R for A."""
    return next(iter(factor_kinds({module: (1, 1)}, 1))).replace(".lora_A.", ".lora_R.")
