"""Who trains and who watches, as the round loop sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hedgerow.clock import Clock
from hedgerow.methods.base import Client
from hedgerow.privacy.secure.letters import Answer, Ask, AskMasked
from hedgerow.runs.scoring import ClientScores
from hedgerow.wire import Entry


@dataclass(frozen=True)
class ClientResult:
    """Result of a client's round: its update, or why there is none."""

    client: Client
    update: bytes | Path = b""
    """Update in the format of `hedgerow.wire`; or its file, which is there while results of the
    round are asked for, and is deleted when it is used up."""
    failure: str | None = None
    absent: bool = False
    """The failure is that nothing was heard, so that asking again may help."""
    scores: ClientScores | None = None
    """What its model scores on its own test rows, where that was asked instead of an update."""
    answer: Answer | None = None
    """Answer to a letter of a secure sum, where there was one; beside an update, a complaint."""

    @property
    def nbytes(self) -> int:
        """Size of the update, in bytes."""
        update = self.update
        return len(update) if isinstance(update, bytes) else update.stat().st_size


class Fleet(Protocol):
    """Those who have the model and the data, as the round loop sees them."""

    @property
    def names(self) -> Sequence[str]:
        """Names of all clients that the experiment has, in their order.

        Whether they have joined or not, and whether they have something to learn from.
        """

    @property
    def population(self) -> int:
        """Number of clients of the experiment, whether they have joined or not."""

    def gather(self) -> Sequence[Client]:
        """Clients that may take part in the next round, in their order."""

    def train(
        self,
        round: int,
        parent: str,
        clients: Sequence[Client],
        clock: Clock,
        letters: Mapping[str, AskMasked] | None = None,
    ) -> Iterator[ClientResult]:
        """Have `clients` train from the global model; yields the result of each, as they come.

        Args:
            round: from 1.
            parent: hash of the entry before.
            clients: who trains.
            clock: told where time goes.
            letters: for each, where it sends codes for a secure sum; else None.
        """

    def ask(
        self, round: int, parent: str, letters: Sequence[tuple[Client, Ask]], clock: Clock
    ) -> Iterator[ClientResult]:
        """Send clients letters of a secure sum; yields the answer of each, as they come."""

    def advance(self, entry: Entry) -> None:
        """Advance every participant's global model by one entry."""

    def evaluate(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Scores of the global model on the test data (`eval_loss` …); empty without test data.

        Args:
            progress: told how much is done, of how much.
        """


class Watcher(Protocol):
    """Whoever wants to see a run while it works."""

    def say(self, sentence: str) -> None:
        """Tell people something that they should know."""

    def round_begins(self, round: int, rounds: int, clients: int) -> None:
        """Note that a round begins, with so many clients."""

    def client_finished(self, client: str, failure: str | None) -> None:
        """Note that a client's update has arrived, or that the client has failed."""

    def tries_again(self, clients: Sequence[str], seconds: float) -> None:
        """Note that these clients are asked again after so many seconds: updates are missing."""

    def evaluated(self, done: int, total: int) -> None:
        """Note how much of an evaluation is done."""

    def round_ends(self, row: dict[str, Any]) -> None:
        """Note that a row of metrics.jsonl is written."""


class Unwatched:
    """Watcher of a run that nobody watches."""

    def say(self, sentence: str) -> None:
        """Do nothing."""

    def round_begins(self, round: int, rounds: int, clients: int) -> None:
        """Do nothing."""

    def client_finished(self, client: str, failure: str | None) -> None:
        """Do nothing."""

    def tries_again(self, clients: Sequence[str], seconds: float) -> None:
        """Do nothing."""

    def evaluated(self, done: int, total: int) -> None:
        """Do nothing."""

    def round_ends(self, row: dict[str, Any]) -> None:
        """Do nothing."""
