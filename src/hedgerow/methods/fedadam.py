"""FedAdam: FedAvg whose server steps by Adam along the mean change.

Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2 (FedOpt). Its other
server optimisers are `server: yogi` and `server: adagrad`, of any method.

    every round:
      client k:  Δ_k = (w after local training) - w
      server:    Δ = Σ p_k Δ_k,  m <- β₁ m + (1 - β₁) Δ,  v <- β₂ v + (1 - β₂) Δ²
      everybody: w <- w + η m / (√v + τ)
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hedgerow.methods.averaged import AveragedWeights
from hedgerow.methods.parts.server_optimizers import Adam, ChosenServerOptimizer


class FedAdam(AveragedWeights):
    """All parameters, averaged, with Adam at the server."""

    name: str = "fedadam"
    summary: ClassVar[str] = "FedAvg with Adam at the server (FedOpt)"
    reference: ClassVar[str] = "FedAdam, arXiv 2003.00295"

    server: ChosenServerOptimizer = Field(default_factory=Adam)
    """Optimiser of the global steps: the paper's Adam, or as {name: adam, learning_rate: 0.001};
    with null, the global model takes the mean update as it is."""
