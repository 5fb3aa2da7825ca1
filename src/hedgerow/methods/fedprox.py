"""FedProx: FedAvg whose clients are drawn back to where the round began.

Li et al., "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127, algorithm 2.

    every round:
      client k:  minimise F_k(w) + μ/2 ‖w - w_t‖² from the global model w_t;  Δ_k = w - w_t
      server:    Δ = Σ p_k Δ_k
      everybody: w <- w + Δ
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hedgerow.methods.averaged import AveragedWeights

if TYPE_CHECKING:
    from torch import nn

    from hedgerow.methods.base import ClientRound
    from hedgerow.training.first_order import AfterBackward
    from hedgerow.training.job import Job


class FedProx(AveragedWeights):
    """All parameters, averaged, with a proximal term in every client's loss."""

    name: str = "fedprox"
    summary: ClassVar[str] = "FedAvg with a proximal term that holds clients together"
    reference: ClassVar[str] = "FedProx, arXiv 1812.06127"

    mu: float = Field(0.01, ge=0)
    """Weight μ of the proximal term μ/2 ‖w - w_t‖² in the loss; 0 is FedAvg."""

    def after_backward(self, job: Job, client_round: ClientRound) -> AfterBackward | None:
        """Add the term's gradient, μ (w - w_t)."""
        if self.mu == 0:
            return None

        def add(parameters: Mapping[str, nn.Parameter]) -> None:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    start = job.start[name].to(parameter.device)
                    parameter.grad.add_(parameter.detach() - start, alpha=self.mu)

        return add
