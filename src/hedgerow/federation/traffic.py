"""The rows of metrics.jsonl, and the bytes that go down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hedgerow.ledger import Ledger
from hedgerow.methods.base import Method
from hedgerow.wire import Entry


class Traffic:
    """Bytes that go down: each participant of a round gets the entries that it misses, and the new.

    Where every client takes part in every round, that is the entry's size times the clients.
    """

    def __init__(self, method: Method, ledger: Ledger) -> None:
        self._method, self._ledger = method, ledger
        self._holds: dict[str, int] = {}
        self.bytes_down = 0

    def down(self, clients: Sequence[str], round: int) -> None:
        """Account for a round; `bytes_down` is then that round's."""
        self.bytes_down = 0
        if not self._method.communicates:
            return
        sizes = [record.bytes for record in self._ledger.records[:round]]
        for client in dict.fromkeys(clients):
            missed = sizes[self._holds.get(client, 0) : round - 1]
            if not self._method.entries_accumulate:
                missed = missed[-1:]
            self.bytes_down += sum(missed) + sizes[-1]
            self._holds[client] = round


def row_of(entry: Entry | None, traffic: Traffic, failures: dict[str, str]) -> dict[str, Any]:
    """A row of metrics.jsonl, for an entry or for the base; clock and scores come on top."""
    names = [p.client for p in entry.participants] if entry else []
    return {
        "round": entry.round if entry else 0,
        "eval_loss": None,
        "train_loss": None,
        "bytes_up": 0,
        "bytes_down": traffic.bytes_down,
        "seconds": None,
        "train_seconds": None,
        "aggregation_error": None,
        "clients": len(names),
        "failed": len(failures),
        "participants": names,
        "failures": failures,
        **(entry.metrics if entry else {}),
    }
