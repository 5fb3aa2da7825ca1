"""Adapters of which clients train one factor, on the other that is the same for all of them.

Then averages are exact: Σ p_k s_k B_k A = (Σ p_k s_k B_k) A, and likewise for A. The trained factor
alone travels up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hedgerow import lowrank
from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.lazy import torch
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Aggregate, Client, ClientRound, Expected, ServerRound
from hedgerow.methods.continued import ContinuedAdapter
from hedgerow.methods.factors import Factor, factor_kinds, of_factor
from hedgerow.methods.lora import update_scale
from hedgerow.methods.parts.stacking import finite
from hedgerow.methods.parts.values import Shapes
from hedgerow.wire import Kind, check_kinds, kinds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.wire import Update


class OnePart(ContinuedAdapter):
    """One global adapter, of which clients train a part, and send it alone."""

    @property
    def is_exact(self) -> bool:
        """Whether the parts' average is what is applied: the rest is the same for all."""
        return self.is_mean

    def check_factors(self, client: Client, update: Update, expected: Expected) -> None:
        """Check the client's rank and scale, and for the trained part of each module."""
        rank = self.rank(client)
        update.check_about(self._about(rank))
        check_kinds(kinds(update.tensors), self.sent(expected.shapes, rank, update.round))


class OneFactor(OnePart):
    """One global adapter; in each round clients train one of its factors."""

    def trained_factor(self, round: int) -> Factor:
        """Factor that clients train in a round."""
        return "lora_B"

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the global adapter, of which one factor is frozen."""
        factor = self.trained_factor(client_round.round)
        parameters = super().start(model, client_round)
        for name, parameter in parameters.items():
            parameter.requires_grad_(f".{factor}." in name)
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        return self.with_snapshot(model, trained)

    def sent(self, shapes: Shapes, rank: int, round: int) -> dict[str, Kind]:
        """Kinds of the trained factor of each module."""
        return only(self.trained_factor(round), shapes, rank)

    def fold(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Average the trained factor beside the shared one."""
        shared = self.before(server_round)
        pairs = dict(adapter_pairs({**shared, **average_factor(updates)}))
        # Where ranks differ, clients of the largest may be away.
        exact = {m: Factors(A[: B.shape[1]], B).double() for m, (A, B) in pairs.items()}
        applied = {module: self.refactor(pair).float() for module, pair in exact.items()}
        error = lowrank.relative_error((applied[module], exact[module]) for module in exact)
        return Aggregate(adapter_tensors(applied), finite({"aggregation_error": error}))

    def refactor(self, pair: Factors) -> Factors:
        """Make the next global adapter, of the exact sum's product and rank."""
        return pair


def only(factor: Factor, shapes: Mapping[str, Sequence[int]], rank: int) -> dict[str, Kind]:
    """Kinds of this factor of an adapter, in each module."""
    return of_factor(factor, factor_kinds(shapes, rank))


def average_factor(updates: Iterable[Update]) -> dict[str, Tensor]:
    """Average the trained factor, Σ p_k A_k, Σ p_k s_k B_k or Σ p_k s_k R_k, in float64.

    Columns of B that a client of a lower rank has not are zeros of its.
    """
    total = 0
    sums: dict[str, Tensor] = {}
    for update in updates:
        total += update.num_examples
        for name, factor in update.tensors.items():
            scale = 1.0 if ".lora_A." in name else update_scale(update)
            addend = factor.double() * (update.num_examples * scale)
            sums[name] = _add(sums[name], addend) if name in sums else addend
    return {name: factor / total for name, factor in sums.items()}


def _add(first: Tensor, second: Tensor) -> Tensor:
    columns = max(first.shape[1], second.shape[1])
    padded = [
        torch.nn.functional.pad(each, (0, columns - each.shape[1])) for each in (first, second)
    ]
    return padded[0] + padded[1]
