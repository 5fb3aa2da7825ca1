"""FedSA-LoRA: A is averaged and broadcast, B stays with its client.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv 2410.01463.

    once:        A is drawn from the run's seed, B_k = 0
    every round:
      client k:  go on from the global A and its own B_k, train both, keep B_k, and send A_k
      server:    A = Σ p_k A_k
      everybody: the global A is the entry's; client k's model is W + s·B_k·A

There is no global model: a client that has not trained yet has the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from hedgerow.lazy import torch
from hedgerow.methods.base import Aggregate, ClientRound, Payload, ServerRound, Trained
from hedgerow.methods.factors import Factor, factor_kinds, of_factor
from hedgerow.methods.one_factor import OneFactor, only
from hedgerow.methods.own_factors import OwnFactors
from hedgerow.methods.parts.one_adapter import attach_global
from hedgerow.wire import check_kinds, kinds

if TYPE_CHECKING:
    from torch import nn

    from hedgerow.model import Model
    from hedgerow.wire import Entry, Update


class FedSALoRA(OwnFactors, OneFactor):
    """Adapters of one rank with a global A, and a B of each client's own."""

    name: str = "fedsa_lora"
    summary: ClassVar[str] = "LoRA whose A is averaged, while each client keeps its own B"
    reference: ClassVar[str] = "FedSA-LoRA, arXiv 2410.01463"
    same_rank: ClassVar[bool] = True
    has_global_model: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    def trained_factor(self, round: int) -> Factor:
        """Factor that is sent."""
        return "lora_A"

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the global A with the client's own B; both train."""
        rank = self.rank(client_round.client)
        parameters = attach_global(model, self, rank, client_round.seeds)
        with torch.no_grad():
            for name, B in self.kept(client_round.memory.load()).items():
                parameters[name].copy_(B)
        self.with_snapshot(model, of_factor("lora_A", parameters))
        return parameters

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Keep B, send A."""
        self.keep(client_round, of_factor("lora_B", trained.parameters))
        sent = of_factor("lora_A", trained.parameters)
        return super().update(model, client_round, replace(trained, parameters=sent))

    def fold(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Average A."""
        whole = super().fold(updates, server_round)
        return whole._replace(tensors=of_factor("lora_A", whole.tensors))

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for A of each module."""
        check_kinds(kinds(entry.tensors), only("lora_A", shapes, self.largest_rank))

    def apply(self, model: Model, entry: Entry) -> None:
        """Make the entry's A the global one, beside a B of zeros."""
        every = factor_kinds(self.trained_shapes(model), self.largest_rank)
        model.factors = {n: torch.zeros(k.shape) for n, k in every.items()} | dict(entry.tensors)
