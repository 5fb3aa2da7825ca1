"""What a method or a run is handed where nothing comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hedgerow.federation.fleet import Watcher

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.wire import Entry


def no_past(round: int) -> Entry:
    """The earlier entries of a round in which nobody reads them."""
    raise AssertionError("nobody reads an earlier entry")


class Forgetful:
    """The memory of a client, or a server, that keeps nothing."""

    def load(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Forget them."""


class Nobody(Watcher):
    """Watches nothing."""

    def say(self, sentence: str) -> None:
        """Keep silent."""
        return

    def round_begins(self, round: int, rounds: int, clients: int) -> None:
        """Look away."""
        return

    def client_finished(self, client: str, failure: str | None) -> None:
        """Look away."""
        return

    def tries_again(self, clients: Sequence[str], seconds: float) -> None:
        """Look away."""
        return

    def evaluated(self, done: int, total: int) -> None:
        """Look away."""
        return

    def round_ends(self, row: dict[str, Any]) -> None:
        """Look away."""
        return
