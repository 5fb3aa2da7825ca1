"""DiLoCo: many local AdamW steps, whose moments stay, and outer Nesterov momentum.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models",
arXiv 2311.08105, algorithm 1, with its outer learning rate 0.7 and momentum 0.9.

    every round:
      client k:  Δ_k = (w after H steps of AdamW that goes on from its last round) - w
      server:    Δ = Σ Δ_k / N,  m <- 0.9 m + Δ
      everybody: w <- w + 0.7 (Δ + 0.9 m)
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hedgerow.methods.averaged import AveragedWeights
from hedgerow.methods.parts.server_optimizers import (
    ChosenServerOptimizer,
    Nesterov,
)
from hedgerow.methods.weighting import ByShare


class DiLoCo(AveragedWeights):
    """All parameters, averaged, with Nesterov momentum at the server."""

    name: str = "diloco"
    summary: ClassVar[str] = "FedAvg with kept moments and outer Nesterov momentum"
    reference: ClassVar[str] = "DiLoCo, arXiv 2311.08105"

    server: ChosenServerOptimizer = Field(default_factory=Nesterov)
    """Optimiser of the global steps: the paper's Nesterov momentum, or another, or one with other
    options; with null, the global model takes the mean update as it is."""
    weights: ByShare = "uniform"
    """Weights p_k of the clients' updates: `uniform`, 1/N for each of N clients, as in the paper,
    or `size`, each client's share of the round's examples."""

    @property
    def keeps_optimizer(self) -> bool | None:
        """Yes: inner optimisers are never reset."""
        return True
