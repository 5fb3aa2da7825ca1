"""SCAFFOLD: control variates correct what clients' own data pull their steps to.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
arXiv 1910.06378, algorithm 1.

    every round:
      client k:  Δ_k = (w after local steps along g - c_k + c) - w
                 c_k <- c_k + Δc_k = the mean of the steps' gradients g
      server:    Δ = Σ Δ_k / |S|,  Δc = |S|/N Σ Δc_k / |S|, of the clients S of N
      everybody: w <- w + Δ,  c <- c + Δc

With plain SGD and `max_grad_norm: null` the mean gradient is the paper's option II, c_k - c +
(w - w_k)/(Kη). A client keeps c_k on its disk, c - c_k and the sum of gradients on the device while
it trains, everybody c, all in float32; updates are twice FedAvg's. N are those who have joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from hedgerow.methods.base import ClientRound, ServerRound, Trained
from hedgerow.methods.composed import Composed, Parts
from hedgerow.methods.parts.control_variates import Correction, WithControlVariates, times_share
from hedgerow.methods.parts.mean import Mean
from hedgerow.methods.parts.through import Basis
from hedgerow.methods.parts.values import Values
from hedgerow.methods.weighting import ByShare

if TYPE_CHECKING:
    from torch import nn

    from hedgerow.training.job import Job


class Scaffold(Composed):
    """All parameters, averaged, with gradients corrected by control variates."""

    name: str = "scaffold"
    own_steps: ClassVar[bool] = True
    summary: ClassVar[str] = "FedAvg with control variates against the clients' drift"
    reference: ClassVar[str] = "SCAFFOLD, arXiv 1910.06378"

    weights: ByShare = Field("uniform")
    """Weights p_k of the clients' updates: `uniform`, 1/N for each of N clients, as in the paper,
    or `size`, each client's share of the round's examples."""

    @model_validator(mode="after")
    def _plain_steps(self) -> Scaffold:
        if self.server is not None:
            raise ValueError("`server`: scaffold steps by the mean change itself: leave it out")
        return self

    @property
    def parts(self) -> Parts:
        """All weights, and their control variates."""
        return Parts(trains=WithControlVariates())

    @property
    def clients_remember(self) -> bool:
        """Yes: their control variates."""
        return True

    @property
    def clients_may_forget(self) -> bool:
        """No: the common control variate is the mean of all clients'."""
        return False

    @property
    def learns_by_steps(self) -> bool:
        """Yes: control variates are means of the steps' gradients."""
        return True

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Train along corrected gradients, and learn the new control variate."""
        correction = Correction(job.shared_state, client_round.memory.load())
        trained = self.train_along(job, client_round, parameters, correction)
        learnt = correction.learnt(parameters)
        client_round.remember(learnt)
        return replace(trained, parameters={**parameters, **correction.changes(learnt)})

    def means(
        self, mean: Mean, count: int, server_round: ServerRound
    ) -> Iterator[tuple[Basis, Values]]:
        """The means; that of Δc_k times the share of the clients that took part."""
        share = count / (server_round.population or len(server_round.clients))
        for basis, values in super().means(mean, count, server_round):
            yield basis, times_share(values, share)
