"""FedAvg of all parameters: every client trains the whole model, the server averages the changes.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv 1602.05629, algorithm 1. What Ferret is compared with, and FLoRA's share of communication.

    every round:
      client k:  Δ_k = (w after local training) - w
      server:    Δ = Σ p_k Δ_k
      everybody: w <- w + Δ
"""

from __future__ import annotations

from typing import ClassVar

from hedgerow.methods.averaged import AveragedWeights


class FedAvg(AveragedWeights):
    """All parameters, averaged."""

    name: str = "fedavg"
    summary: ClassVar[str] = "all parameters trained, dense changes averaged"
    reference: ClassVar[str] = "FedAvg, arXiv 1602.05629"

    @property
    def keeps_optimizer(self) -> bool | None:
        """Yes: it was better wherever it was tried, with all clients in every round."""
        return True
