"""The round loop: the same for every engine and every method.

It knows methods and a *fleet* (whoever trains), and nothing of adapters, networks or transport.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hedgerow.clock import Clock
from hedgerow.errors import RunFailed
from hedgerow.experiment import Experiment
from hedgerow.ledger import Ledger
from hedgerow.methods.base import Aggregate, Client, Expected, Method
from hedgerow.rundir import RunDirectory
from hedgerow.seeds import Seeds
from hedgerow.wire import Entry, InvalidMessage, Participant, Update


@dataclass(frozen=True)
class Answer:
    """A client's answer: its update as bytes, or why there is none."""

    client: str
    data: bytes = b""
    failure: str | None = None


class Fleet(Protocol):
    """Those who have the model and the data, as the round loop sees them."""

    clients: Sequence[Client]

    def train(
        self, round: int, parent: str, clients: Sequence[Client], clock: Clock
    ) -> Iterator[Answer]:
        """Have `clients` train from the global model; yields their answers as they come."""

    def advance(self, entry: Entry) -> None:
        """Advance every participant's global model by one entry."""

    def evaluate(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Scores of the global model on the test data (`eval_loss` …); empty without test data.

        Args:
            progress: told how much is done, of how much.
        """


class Watcher(Protocol):
    """Whoever wants to see a run while it works."""

    def round_begins(self, round: int, rounds: int, clients: int) -> None:
        """A round begins, with so many clients."""

    def client_answered(self, client: str, failure: str | None) -> None:
        """A client's update has arrived, or it has failed."""

    def evaluated(self, done: int, total: int) -> None:
        """So much of an evaluation is done."""

    def round_ends(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl is written."""


def run(experiment: Experiment, fleet: Fleet, directory: RunDirectory, watcher: Watcher) -> None:
    """Take a run from its ledger's head to the experiment's last round.

    Raises:
        RunFailed: no client of a round sent a usable update.
    """
    method, ledger = experiment.method, directory.ledger
    rounds, seeds = experiment.federation.rounds, Seeds(experiment.federation.seed)
    traffic = Traffic(method, ledger)

    def participants(round: int) -> list[Client]:
        return draw(fleet.clients, experiment.federation.clients_per_round, seeds, round)

    def finish(row: dict[str, Any]) -> None:
        directory.write_row(row)
        watcher.round_ends(row)

    def scores(round: int) -> dict[str, Any]:
        due = round % experiment.evaluation.every == 0 or round == rounds
        return fleet.evaluate(watcher.evaluated) if due else {}

    for round in range(1, len(ledger) + 1):
        traffic.down(participants(round), round)
    if not directory.has_row(len(ledger)):
        # Before the first round; or the run was killed between an entry and its row.
        last = ledger.read(len(ledger)) if len(ledger) else None
        present = {p.client for p in last.participants} if last else set()
        absent = [c.name for c in participants(len(ledger)) if last and c.name not in present]
        failures = dict.fromkeys(absent, "not known: the run was stopped before it was written")
        finish(row_of(last, traffic, failures) | scores(len(ledger)))

    for round in range(len(ledger) + 1, rounds + 1):
        began, clock = time.perf_counter(), Clock()
        expected = Expected(seeds, ledger.trained, experiment.training)
        answers = Answers(method, round, expected, participants(round), directory, watcher)
        watcher.round_begins(round, rounds, len(answers.clients))

        with clock("aggregate"):
            arriving = fleet.train(round, ledger.head, answers.clients, clock)
            aggregate = method.aggregate(answers.usable(arriving, clock))
        with clock("ledger"):
            entry = ledger.append(answers.entry(aggregate))
        del aggregate  # from here on the entry's tensors are read from its file
        traffic.down(answers.clients, round)
        with clock("apply"):
            fleet.advance(entry)
        with clock("evaluate"):
            scored = scores(round)

        parts = {f"{part}_seconds": seconds for part, seconds in clock.seconds.items()}
        seconds = {"seconds": time.perf_counter() - began, **parts}
        finish(row_of(entry, traffic, answers.failures) | scored | seconds)


def draw(clients: Sequence[Client], count: int | None, seeds: Seeds, round: int) -> list[Client]:
    """The clients that take part in a round: all, or `count` of them at random, in their order."""
    if count is None or count >= len(clients):
        return list(clients)
    chosen = seeds.numpy("participants", round).choice(len(clients), count, replace=False)
    return [clients[index] for index in sorted(chosen)]


class Answers:
    """The answers to one round: each is checked as it arrives, and accounted for."""

    def __init__(
        self,
        method: Method,
        round: int,
        expected: Expected,
        clients: Sequence[Client],
        directory: RunDirectory,
        watcher: Watcher,
    ) -> None:
        self.clients = clients
        self.failures: dict[str, str] = {}
        self._method, self._round, self._parent = method, round, directory.ledger.head
        self._expected = expected
        self._directory, self._watcher = directory, watcher
        self._losses: dict[str, float] = {}
        self._bytes = 0

    def usable(self, arriving: Iterator[Answer], clock: Clock) -> Iterator[Update]:
        """The updates that pass the checks, as they arrive.

        Raises:
            RunFailed: there was none.
        """
        for answer in arriving:
            try:
                with clock("wire"):
                    update = self._checked(answer)
            except InvalidMessage as error:
                self.failures[answer.client] = str(error)
                self._watcher.client_answered(answer.client, str(error))
                continue
            self._losses[update.client] = update.train_loss
            self._bytes += len(answer.data) if self._method.communicates else 0
            self._watcher.client_answered(answer.client, None)
            yield update
        if not self._losses:
            reasons = [f"{client} failed because {why}" for client, why in self.failures.items()]
            raise RunFailed(
                f"round {self._round} has no usable update from its {len(self.clients)} clients: "
                f"{(reasons or ['nobody answered'])[0]}"
            )

    def entry(self, aggregate: Aggregate) -> Entry:
        """The round's entry, with weights p_k = n_k / Σ n of those who answered."""
        present = [client for client in self.clients if client.name in self._losses]
        total = sum(client.num_examples for client in present)
        participants = [
            Participant(c.name, c.num_examples, c.num_examples / total) for c in present
        ]
        train_loss = sum(p.weight * self._losses[p.client] for p in participants)
        metrics = {"train_loss": train_loss, "bytes_up": self._bytes, **aggregate.metrics}
        return Entry(
            *(self._method.name, self._round, self._parent, participants, metrics),
            *(aggregate.tensors, self._method.entry_options()),
        )

    def _checked(self, answer: Answer) -> Update:
        if answer.failure is not None:
            raise InvalidMessage(answer.failure)
        update = Update.decode(answer.data)
        client = next((c for c in self.clients if c.name == answer.client), None)
        if client is None or client.name in self._losses:
            raise InvalidMessage("it was not asked, or has answered already")
        said = (update.method, update.round, update.parent, update.client, update.num_examples)
        if said != (self._method.name, self._round, self._parent, client.name, client.num_examples):
            raise InvalidMessage(f"its update says {said}, which is not what it was asked for")
        self._method.check_update(client, update, self._expected)
        self._directory.keep_update(self._round, client.name, answer.data)
        return update


class Traffic:
    """Bytes that go down: each participant of a round gets the entries that it misses, and the new.

    Where every client takes part in every round, that is the entry's size times the clients.
    """

    def __init__(self, method: Method, ledger: Ledger) -> None:
        self._method, self._ledger = method, ledger
        self._holds: dict[str, int] = {}
        self.bytes_down = 0

    def down(self, clients: Sequence[Client], round: int) -> None:
        """Account for a round; `bytes_down` is then that round's."""
        self.bytes_down = 0
        if not self._method.communicates:
            return
        sizes = [record.bytes for record in self._ledger.records[:round]]
        for client in clients:
            missed = sizes[self._holds.get(client.name, 0) : round - 1]
            if not self._method.entries_accumulate:
                missed = missed[-1:]
            self.bytes_down += sum(missed) + sizes[-1]
            self._holds[client.name] = round


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
