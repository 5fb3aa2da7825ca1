"""Scaling factors: weights p_k of stacked updates, fixed or by a line search (FLoRA, section 3).

client:  before it trains, with `adaptive`: its loss where the last step had been l times as long
server:  p_k = η n_k / Σ n, 1 / N, or as given;  η is 1, but with `adaptive`
                 η_t = η_{t-1} · argmin_l of the parabola through the clients' mean losses
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hedgerow.errors import UserError
from hedgerow.methods import weighting
from hedgerow.methods.parts.statements import Statement
from hedgerow.methods.parts.weigh import LastStep, Weigh
from hedgerow.methods.weighting import LENGTHS, Weighting
from hedgerow.training import line_search
from hedgerow.wire import LARGEST_SENT

if TYPE_CHECKING:
    from hedgerow.methods.base import ClientRound, ServerRound
    from hedgerow.methods.parts.stacking import Arrived
    from hedgerow.training.job import Job
    from hedgerow.wire import Participant, Update

LOSSES_ALONG = Statement(
    name="losses_along",
    form=re.compile(" ".join([r"[0-9]{1,11}(\.[0-9]{1,12})?(e[+-][0-9]{2})?"] * len(LENGTHS))),
    digits=9,
    most=LARGEST_SENT,
)
"""The global model's loss along the last round's step, at `weighting.LENGTHS`."""


class Scaling(Weigh):
    """Weights of clients' updates by the option `scaling`."""

    def __init__(self, weighting: Weighting) -> None:
        self._weighting = weighting

    def check_clients(self, num_clients: int) -> None:
        """Raise a `UserError` unless there is a factor for each of so many clients."""
        if isinstance(self._weighting, list) and len(self._weighting) != num_clients:
            raise UserError(
                f"method.scaling has {len(self._weighting)} factors for {num_clients} clients: "
                "give one for each, or one number for all"
            )

    @property
    def reads_examples(self) -> bool:
        """Whether clients state losses, with `adaptive`."""
        return self._weighting == "adaptive"

    def statements(self, round: int) -> list[Statement]:
        """Losses along the last step, with `adaptive`; in the first round there is none."""
        return [LOSSES_ALONG] if self.reads_examples and round > 1 else []

    def said(self, job: Job, client_round: ClientRound, last_step: LastStep) -> dict[str, str]:
        """Losses along the last round's step, on as many examples as a training step has."""
        if not self.statements(client_round.round):
            return {}
        name = client_round.client.name
        order = client_round.seeds.numpy("line search", client_round.round, name)
        found = line_search.losses_along(job, last_step(client_round), LENGTHS, order)
        return LOSSES_ALONG.said(found)

    def relative(self, update: Update, server_round: ServerRound) -> float:
        """Weight of an update relative to the others."""
        return weighting.relative_weight(
            self._weighting, update.client, update.num_examples, _places(server_round)
        )

    def factor(self, arrived: Arrived, server_round: ServerRound) -> float:
        """Factor that makes p_k of `relative`."""
        size = self._step_size(arrived, server_round)
        return size * weighting.normalisation(self._weighting, arrived.num_examples)

    def weights(self, arrived: Arrived, server_round: ServerRound) -> list[float]:
        """Weights p_k of the clients whose updates have arrived."""
        size = self._step_size(arrived, server_round)
        fixed = weighting.fixed_weights(
            self._weighting, arrived.clients, arrived.num_examples, _places(server_round)
        )
        return [size * p for p in fixed]

    def metrics(self, arrived: Arrived, server_round: ServerRound) -> dict[str, float]:
        """With `adaptive`, the global step size η."""
        if self._weighting != "adaptive":
            return {}
        return {"step_size": self._step_size(arrived, server_round)}

    def check(self, participants: Sequence[Participant]) -> None:
        """Raise `InvalidMessage` unless an entry's weights may be these."""
        weighting.check(self._weighting, participants)

    def _step_size(self, arrived: Arrived, server_round: ServerRound) -> float:
        """The factor of all weights: the global step size η."""
        if self._weighting != "adaptive" or server_round.previous is None:
            return 1.0
        last = sum(participant.weight for participant in server_round.previous.participants)
        losses = [LOSSES_ALONG.read(about) for about in arrived.said]
        return weighting.adaptive_step(last, losses, arrived.num_examples)


def _places(server_round: ServerRound) -> dict[str, int]:
    """Which of the experiment's clients are there, for a list of weights."""
    return {client.name: client.index for client in server_round.clients}
