"""FedProx as a method of one's own: FedAvg whose clients stay near the global model.

Li et al., "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127, algorithm 2.

    every round:
      client k:  from w_k = w, some steps down F_k(w_k) + μ/2 ‖w_k - w‖²
      server:    Δ = Σ p_k (w_k - w)
      everybody: w <- w + Δ

hedgerow has it, too (`fedprox`); here it shows what a method is made of. With this file in the
working directory, or anywhere in PYTHONPATH:

    hedgerow run experiment.yaml method.name=own_method:FedProx method.mu=0.1 --out runs/fedprox
    python -c "from own_method import *; from hedgerow.testing import *; check_method(FedProx())"
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from hedgerow.methods import FedAvg
from hedgerow.methods.base import ClientRound, Trained
from hedgerow.training import first_order
from hedgerow.training.job import Job


class FedProx(FedAvg):
    """All parameters, averaged; clients are held back from drifting apart."""

    summary: ClassVar[str] = "FedAvg with a proximal term in the clients' objective"
    reference: ClassVar[str] = "FedProx, arXiv 1812.06127"
    own_steps: ClassVar[bool] = True

    mu: float = Field(0.01, ge=0)
    """Strength μ of the proximal term; 0 is FedAvg, and the paper tries 0.001 to 1."""

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Steps down F_k(w_k) + μ/2 ‖w_k - w‖², whose second part has the gradient μ (w_k - w)."""
        start = {name: w.detach().clone() for name, w in parameters.items()}

        @torch.no_grad()
        def add_proximal_gradient(parameters: Mapping[str, nn.Parameter]) -> None:
            for name, w in parameters.items():
                if w.grad is not None:
                    w.grad.add_(w - start[name], alpha=self.mu)

        loss = first_order.train(job, parameters, after_backward=add_proximal_gradient)
        return Trained(parameters, loss)
