"""Weights p_k of stacked updates: by size, where no part of its own says otherwise (FedAvg's)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hedgerow.methods import weighting

if TYPE_CHECKING:
    from hedgerow.lowrank import Factors
    from hedgerow.methods.base import ClientRound, ServerRound
    from hedgerow.methods.parts.stacking import Arrived
    from hedgerow.methods.parts.statements import Statement
    from hedgerow.training.job import Job
    from hedgerow.wire import Participant, Update

LastStep = Callable[["ClientRound"], Iterable[tuple[str, "Factors"]]]
"""Reads what the last round changed, ΔW = B·A of each module."""


class Weigh:
    """Weights by size: p_k = n_k / Σ n."""

    def check_clients(self, num_clients: int) -> None:
        """Raise a `UserError` unless there are weights for so many clients."""

    @property
    def reads_examples(self) -> bool:
        """Whether clients state what they have found out of their examples (`said`)."""
        return False

    # --- at a client ----------------------------------------------------------------------------

    def statements(self, round: int) -> list[Statement]:
        """What updates of a round have to state for their weights."""
        return []

    def said(self, job: Job, client_round: ClientRound, last_step: LastStep) -> dict[str, str]:
        """What a client states, before it trains: text for each of `statements`."""
        return {}

    # --- at the server --------------------------------------------------------------------------

    def relative(self, update: Update, server_round: ServerRound) -> float:
        """Weight of an update relative to the others, before it is known who they are."""
        return float(update.num_examples)

    def factor(self, arrived: Arrived, server_round: ServerRound) -> float:
        """Factor that makes p_k of `relative`, once all updates have arrived."""
        return 1 / sum(arrived.num_examples)

    def weights(self, arrived: Arrived, server_round: ServerRound) -> list[float]:
        """Weights p_k of the clients whose updates have arrived, in their order."""
        total = sum(arrived.num_examples)
        return [count / total for count in arrived.num_examples]

    def metrics(self, arrived: Arrived, server_round: ServerRound) -> dict[str, float]:
        """What a round's metrics say of the weights."""
        return {}

    def check(self, participants: Sequence[Participant]) -> None:
        """Raise `InvalidMessage` unless an entry's weights may be these."""
        weighting.check("size", participants)


class GivenWeights(Weigh):
    """Weights that a rule of the experiment's has given."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights

    def relative(self, update: Update, server_round: ServerRound) -> float:
        """The weight itself."""
        return self._weights[update.client]

    def factor(self, arrived: Arrived, server_round: ServerRound) -> float:
        """1."""
        return 1.0

    def weights(self, arrived: Arrived, server_round: ServerRound) -> list[float]:
        """The weights of the clients whose updates have arrived."""
        return [self._weights[client] for client in arrived.clients]
