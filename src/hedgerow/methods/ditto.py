"""Ditto: a global model, and a model of each client's own that is drawn to it.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", arXiv 2012.04221,
algorithm 1. Both models are one adapter (LoRA) on the base, so that what a client keeps is small.

    every round:
      client k:  w_k: train from the global adapter w_t, and send it
                 v_k: minimise F_k(v) + λ/2 ‖v - w_t‖² from its own adapter, and keep it
      server:    w = Σ p_k w_k, A and B apart
      everybody: the global adapter is w; the base stays as it is

Client k's model is W + s·B·A of v_k, which begins as the global adapter of its first round. It
takes as many local steps as w_k, with an optimiser that begins anew, so that clients train for
twice as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hedgerow.lazy import torch
from hedgerow.methods.base import ClientRound, Trained
from hedgerow.methods.continued import ContinuedAdapter
from hedgerow.methods.own_factors import OwnFactors
from hedgerow.training import first_order

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.training.job import Job


class Ditto(OwnFactors, ContinuedAdapter):
    """Adapters of one rank, averaged, and one of each client's own."""

    name: str = "ditto"
    own_steps: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "averaged LoRA, and an adapter of each client's own that is drawn to it"
    )
    reference: ClassVar[str] = "Ditto, arXiv 2012.04221"
    same_rank: ClassVar[bool] = True

    trainings: ClassVar[int] = 2

    proximal: float = Field(0.1, ge=0)
    """Weight λ of the proximal term λ/2 ‖v - w_t‖² in the loss of clients' own models, without a
    unit; 0 leaves them alone."""

    @property
    def learns_by_steps(self) -> bool:
        """Yes: both models are trained by steps."""
        return True

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Train w_k, then v_k; the parameters are w_k again in the end."""
        w_t = _copies(parameters)
        trained = super().train(job, client_round, parameters)
        w_k = _copies(parameters)
        _set(parameters, self.kept(client_round.memory.load()) or w_t)

        def pull(parameters: Mapping[str, nn.Parameter]) -> None:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - w_t[name], alpha=self.proximal)

        private = None if job.private is None else job.private.again()
        first_order.train(replace(job, private=private), parameters, after_backward=pull)
        self.keep(client_round, parameters)
        _set(parameters, w_k)
        return trained


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
