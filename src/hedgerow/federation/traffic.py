"""The rows of metrics.jsonl, what an update holds, and the bytes that go down."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hedgerow.ledger import Ledger
from hedgerow.methods.base import REVEALED, Method
from hedgerow.wire import Entry, Update, kinds


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


def contents(update: Update, nbytes: int) -> dict[str, Any]:
    """What an update holds, as a row of metrics.jsonl has it (`sent_by_client`).

    Args:
        update: as it arrived.
        nbytes: size of its file.

    Returns:
        `bytes`; `tensors` and `numbers`, which count its tensors and all their elements; `kinds`,
        number of tensors by number type and name, in which layers are not told apart; and `said`,
        names of what else it says.
    """
    found = kinds(update.tensors)
    named = Counter(
        f"{str(kind.dtype).removeprefix('torch.')} {_name(name)}" for name, kind in found.items()
    )
    said = {"train_loss": update.train_loss, "epsilon": update.epsilon}
    names = ["num_examples", *(key for key, number in said.items() if number is not None)]
    return {
        "bytes": nbytes,
        "tensors": len(found),
        "numbers": sum(math.prod(kind.shape) for kind in found.values()),
        "kinds": dict(sorted(named.items())),
        "said": [*names, *sorted(update.about)],
    }


def _name(name: str) -> str:
    """Name of a tensor without the layer that it is of, as `q_proj.lora_A.weight`."""
    last = re.split(r"\.\d+(?=\.)", name)[-1].lstrip(".")
    return re.sub(r"(?<![A-Za-z])\d+", "*", last)


def row_of(
    entry: Entry | None,
    traffic: Traffic,
    participants: Sequence[str] = (),
    failures: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """A row of metrics.jsonl, for an entry or for the base; clock and scores come on top.

    Args:
        entry: None for the base.
        traffic: has accounted for the round.
        participants: names of the clients whose updates are in the entry, which may not say so.
        failures: by name, why others that were asked have none there, or why participants did not
            help to unmask the sum.
    """
    return {
        "round": entry.round if entry else 0,
        "eval_loss": None,
        "train_loss": None,
        "bytes_up": 0,
        "bytes_down": traffic.bytes_down,
        "seconds": None,
        "train_seconds": None,
        "aggregation_error": None,
        REVEALED: None,
        "clients": len(participants),
        "failed": len(failures),
        "participants": list(participants),
        "failures": dict(failures),
        **(entry.metrics if entry else {}),
    }
