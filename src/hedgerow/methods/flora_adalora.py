"""FLoRA with AdaLoRA clients: each matrix gets the rank that it needs, and stacking stays exact.

Wang et al., FLoRA, arXiv 2409.05976, with clients that train as in Zhang et al.,
"AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.

    every round:
      client k:  attach ΔW = s_k·P·Λ·Q of rank initial·r_k to each matrix (Λ = 0), train it, and
                 set the least important of all matrices' singular values to zero, down to r_k
                 a matrix on average; A_k = Λ·Q and B_k = P of those that are left
      server:    A = [p_1 s_1 A_1; …; p_N s_N A_N],  B = [B_1 … B_N], of a rank for each matrix
      everybody: W <- W + B·A
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hedgerow.errors import InvalidMessage
from hedgerow.lazy import peft, torch
from hedgerow.methods.base import (
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Payload,
    ServerRound,
    Trained,
)
from hedgerow.methods.factors import check_pairs
from hedgerow.methods.parts.svd_layers import SvdLayers
from hedgerow.methods.restarted import RestartedAdapter
from hedgerow.methods.stacking import aggregate_adapters
from hedgerow.training import adalora
from hedgerow.wire import Kind, kinds

if TYPE_CHECKING:
    from torch import nn

    from hedgerow.model import Model
    from hedgerow.training.job import Job
    from hedgerow.wire import Entry, Update


class FLoRAAdaLoRA(RestartedAdapter):
    """Adapters whose ranks differ by client and by matrix, stacked: the aggregate is exact."""

    name: str = "flora_adalora"
    summary: ClassVar[str] = "FLoRA of AdaLoRA: a rank for each matrix by its importance, stacked"
    reference: ClassVar[str] = "FLoRA, arXiv 2409.05976, with AdaLoRA, 2303.10512"
    adapts_experts: ClassVar[bool] = False

    initial: float = Field(1.5, ge=1)
    """Rank of each matrix before the first step, as a multiple of the client's rank r_k."""
    orthogonality: float = Field(0.5, ge=0)
    """Weight in the loss of the distance of P and Q from orthogonal ones; 0 leaves it out."""

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach new P and Q with Λ = 0.

        They are orthogonal from the start. AdaLoRA draws small ones and leaves that to the
        regulariser, but here they begin anew in each round, which may have only a few steps.
        """
        initial = self.initial_rank(self.rank(client_round.client))
        config = peft.AdaLoraConfig(
            init_r=initial,
            # peft divides it by the initial rank, and s_k is that of r_k.
            lora_alpha=self.scale(self.rank(client_round.client)) * initial,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            init_lora_weights=False,
            total_step=1,  # the layers don't ask; `training.adalora` has the schedule
        )
        parameters = model.attach(config, layers=SvdLayers())
        generator = client_round.seeds.torch(
            "adapter", client_round.round, client_round.client.name
        )
        with torch.no_grad():
            for name, parameter in sorted(parameters.items()):
                if name.endswith(".lora_E"):
                    parameter.zero_()
                else:
                    drawn = torch.empty(parameter.shape)
                    parameter.copy_(torch.nn.init.orthogonal_(drawn, generator=generator))
        return parameters

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Train by AdaLoRA's steps."""
        rank = self.rank(client_round.client)
        sizes = {"initial": self.initial_rank(rank), "target": rank}
        loss = adalora.train(job, parameters, **sizes, orthogonality=self.orthogonality)
        return Trained(parameters, loss)

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Make ordinary factors of the components that are left; one of zeros where none is."""
        tensors = {}
        initial = self.initial_rank(self.rank(client_round.client))
        factors = {name: factor.detach().cpu() for name, factor in trained.parameters.items()}
        for key in factors:
            if key.endswith(".lora_E"):
                module = key.removesuffix(".lora_E")
                left = factors[key].flatten() != 0
                left[0] |= not left.any()
                # peft divides by r + 1e-5 where the server divides by r.
                values = factors[key][left] * (initial / (initial + 1e-5))
                tensors[f"{module}.lora_A.weight"] = values * factors[f"{module}.lora_A"][left]
                tensors[f"{module}.lora_B.weight"] = factors[f"{module}.lora_B"][:, left]
        return Payload(tensors, self._about(self.rank(client_round.client)))

    def initial_rank(self, rank: int) -> int:
        """The rank of each matrix before training, of a client of this rank."""
        return math.ceil(self.initial * rank)

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check the client's scale, and for a pair for each module, within the budget."""
        rank = self.rank(client)
        update.check_about(self._about(rank))
        self._check_within_budget(kinds(update.tensors), expected.shapes, [rank])

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for a pair for each module, within the budgets of its participants."""
        count = len(entry.participants)
        largest = self.possible_ranks(count)[-count:]
        self._check_within_budget(kinds(entry.tensors), shapes, largest)

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Stack the factors, as many of each matrix as the clients have."""
        return aggregate_adapters(updates, lambda stacked, parts, exact: exact.float())

    def _check_within_budget(
        self, given: Mapping[str, Kind], shapes: Mapping[str, Sequence[int]], ranks: Sequence[int]
    ) -> None:
        """Up to the initial rank in each matrix, and r_k on average, of clients of these ranks.

        A matrix of which nothing is left has a component of zeros beyond the budget.
        """
        most = sum(map(self.initial_rank, ranks))
        total = sum(check_pairs(given, shapes, dict.fromkeys(shapes, most)).values())
        budget = sum(ranks) * len(shapes) + len(ranks) * (len(shapes) - 1)
        if total > budget:
            raise InvalidMessage(f"ranks must sum to at most {budget}, got {total}")
