"""FLoRA with AdaLoRA clients: each matrix gets the rank that it needs, and stacking stays exact.

Wang et al., FLoRA, arXiv 2409.05976, with clients that train as in Zhang et al.,
"AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.

    every round:
      client k:  attach ΔW = s_k·P·Λ·Q of rank initial·r_k to each matrix (Λ = 0), train it, and
                 set the least important of all matrices' singular values to zero, down to r_k
                 a matrix on average; A_k = Λ·Q and B_k = P of those that are left
      server:    A = [p_1 s_1 A_1; …; p_N s_N A_N],  B = [B_1 … B_N], of a rank for each matrix;
                 or, by default, √S·Vᵀ and U·√S of their product U·S·Vᵀ
      everybody: W <- W + B·A
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hedgerow.methods.base import Client, ClientRound, Expected, Payload, Trained
from hedgerow.methods.parts.svd_factors import NewSvd, as_pairs
from hedgerow.methods.residual import ResidualAdapter
from hedgerow.methods.stacked import ExactlyStacked
from hedgerow.training import adalora
from hedgerow.wire import kinds

if TYPE_CHECKING:
    from torch import nn

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.training.job import Job
    from hedgerow.wire import Entry, Update


class FLoRAAdaLoRA(ExactlyStacked, ResidualAdapter):
    """Adapters whose ranks differ by client and by matrix, stacked: the aggregate is exact."""

    name: str = "flora_adalora"
    own_steps: ClassVar[bool] = True
    summary: ClassVar[str] = "FLoRA of AdaLoRA: a rank for each matrix by its importance, stacked"
    reference: ClassVar[str] = "FLoRA, arXiv 2409.05976, with AdaLoRA, 2303.10512"
    adapts_experts: ClassVar[bool] = False
    renews: ClassVar[bool] = True

    initial: float = Field(1.5, ge=1)
    """Rank of each matrix before the first step, as a multiple of the client's rank r_k."""
    orthogonality: float = Field(0.5, ge=0)
    """Weight in the loss of the distance of P and Q from orthogonal ones; 0 leaves it out."""

    def starts(self, training: TrainingSettings) -> NewSvd:
        """P and Q anew, and Λ = 0."""
        return NewSvd(self, self.initial)

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Train by AdaLoRA's steps."""
        rank, starts = self.rank(client_round.client), self.starts(client_round.training)
        sizes = {"initial": starts.rank(rank), "target": rank}
        loss = adalora.train(job, parameters, **sizes, orthogonality=self.orthogonality)
        return Trained(parameters, loss)

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Make ordinary factors of the components that are left."""
        rank, starts = self.rank(client_round.client), self.starts(client_round.training)
        return Payload(as_pairs(trained.parameters, starts.rank(rank)), self._about(rank))

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check the client's scale, and for a pair for each module, within the budget."""
        rank = self.rank(client)
        update.check_about(self._about(rank))
        NewSvd(self, self.initial).check(kinds(update.tensors), expected.shapes, [rank])

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for a pair for each module, within the budgets of its participants."""
        count = len(entry.participants)
        largest = self.possible_ranks(count)[-count:]
        NewSvd(self, self.initial).check(kinds(entry.tensors), shapes, largest)
