"""FedAvg of all parameters: every client trains the whole model, the server averages the changes.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv 1602.05629, algorithm 1. What Ferret is compared with, and FLoRA's share of communication.

    every round:
      client k:  Δ_k = (w after local training) - w
      server:    Δ = Σ p_k Δ_k
      everybody: w <- w + Δ
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from hedgerow.methods.base import (
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Method,
    Payload,
    ServerRound,
    Trained,
    weight_shapes,
)
from hedgerow.wire import check_kinds, in_float32, kinds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.wire import Entry, Update


class FedAvg(Method):
    """All parameters, averaged."""

    name: str = "fedavg"
    summary: ClassVar[str] = "all parameters trained, dense changes averaged"
    reference: ClassVar[str] = "FedAvg, arXiv 1602.05629"

    def trained_shapes(self, model: Model) -> Mapping[str, Sequence[int]]:
        """Shapes of all weights."""
        return weight_shapes(model)

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Unfreeze all weights."""
        return model.unfreeze()

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Δ_k, in float32."""
        return Payload(dict(model.trained_delta()), {})

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check that it has the change of each weight."""
        update.check_about({})
        check_kinds(kinds(update.tensors), in_float32(expected.shapes))

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that it has the change of each weight."""
        check_kinds(kinds(entry.tensors), in_float32(shapes))

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Σ n_k Δ_k / Σ n_k, folded in as they arrive."""
        total = 0
        sums: dict[str, Tensor] = {}
        for update in updates:
            total += update.num_examples
            for name, delta in update.tensors.items():
                if name in sums:
                    sums[name].add_(delta, alpha=update.num_examples)
                else:
                    sums[name] = delta * update.num_examples
        return Aggregate({name: tensor.div_(total) for name, tensor in sums.items()}, {})

    def apply(self, model: Model, entry: Entry) -> None:
        """Add Δ to the weights, w <- w + Δ."""
        for name, delta in entry.tensors.items():
            model.add(name, delta)
