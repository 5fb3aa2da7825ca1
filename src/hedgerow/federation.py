"""The round loop: the same for every engine and every method.

It knows methods and a *fleet* (whoever trains), and nothing of adapters, networks or transport.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hedgerow.clock import Clock
from hedgerow.errors import InvalidMessage, RunFailed
from hedgerow.experiment import Experiment
from hedgerow.ledger import Ledger
from hedgerow.methods.base import Aggregate, Client, Expected, Method, ServerTurn
from hedgerow.rundir import RunDirectory
from hedgerow.seeds import Seeds
from hedgerow.wire import Entry, Participant, Update


@dataclass(frozen=True)
class Answer:
    """A client's answer: its update, or why there is none."""

    client: Client
    update: bytes | Path = b""
    """In wire.py's format; or the file that holds it, which is deleted when it is used up."""
    failure: str | None = None
    absent: bool = False
    """The failure is that nothing was heard, so that asking again may help."""

    @property
    def nbytes(self) -> int:
        """The update's size."""
        update = self.update
        return len(update) if isinstance(update, bytes) else update.stat().st_size


class Fleet(Protocol):
    """Those who have the model and the data, as the round loop sees them."""

    def gather(self) -> Sequence[Client]:
        """Everybody who may take part in the next round, in their order."""

    def train(
        self, round: int, parent: str, clients: Sequence[Client], clock: Clock
    ) -> Iterator[Answer]:
        """Have `clients` train from the global model; yields an answer for each, as they come."""

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
        """Something that a person should know."""

    def round_begins(self, round: int, rounds: int, clients: int) -> None:
        """A round begins, with so many clients."""

    def client_answered(self, client: str, failure: str | None) -> None:
        """A client's update has arrived, or it has failed."""

    def tries_again(self, clients: Sequence[str], seconds: float) -> None:
        """A round has too few updates: after so many seconds these clients are asked again."""

    def evaluated(self, done: int, total: int) -> None:
        """So much of an evaluation is done."""

    def round_ends(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl is written."""


def run(experiment: Experiment, fleet: Fleet, directory: RunDirectory, watcher: Watcher) -> None:
    """Take a run from its ledger's head to the experiment's last round.

    Raises:
        RunFailed: too few clients of a round sent a usable update.
    """
    method, ledger = experiment.method, directory.ledger
    settings, seeds = experiment.federation, Seeds(experiment.federation.seed)
    traffic = Traffic(method, ledger)

    def participants(round: int) -> list[Client]:
        return draw(fleet.gather(), settings.clients_per_round, seeds, round)

    def finish(row: dict[str, Any]) -> None:
        directory.write_row(row)
        watcher.round_ends(row)

    def scores(round: int) -> dict[str, Any]:
        due = round % experiment.evaluation.every == 0 or round == settings.rounds
        return fleet.evaluate(watcher.evaluated) if due else {}

    asked = {row["round"]: [*row["participants"], *row["failures"]] for row in directory.rows()}
    for round in range(1, len(ledger) + 1):
        names = asked.get(round) or [client.name for client in participants(round)]
        traffic.down(names, round)
    if len(ledger) not in asked:
        # Before the first round; or the run was killed between an entry and its row.
        last = ledger.read(len(ledger)) if len(ledger) else None
        present = {p.client for p in last.participants} if last else set()
        absent = (
            [c.name for c in participants(len(ledger)) if c.name not in present] if last else []
        )
        failures = dict.fromkeys(absent, "not known: the run was stopped before it was written")
        finish(row_of(last, traffic, failures) | scores(len(ledger)))

    previous = ledger.read(len(ledger)) if len(ledger) else None
    for round in range(len(ledger) + 1, settings.rounds + 1):
        answers = Answers(experiment, round, participants(round), previous, directory, watcher)
        began, clock = time.perf_counter(), Clock()
        watcher.round_begins(round, settings.rounds, len(answers.clients))

        with clock("aggregate"):
            aggregate = method.aggregate(answers.usable(fleet, clock), answers.turn)
        with clock("ledger"):
            previous = entry = ledger.append(answers.entry(aggregate))
        del aggregate  # from here on the entry's tensors are read from its file
        traffic.down([client.name for client in answers.clients], round)
        with clock("apply"):
            fleet.advance(entry)
        with clock("evaluate"):
            scored = scores(round)

        parts = {f"{part}_seconds": seconds for part, seconds in clock.seconds.items()}
        seconds = {"seconds": time.perf_counter() - began, **parts}
        row = row_of(entry, traffic, answers.failures)
        finish(row | scored | {"train_loss_by_client": answers.losses} | seconds)


def draw(clients: Sequence[Client], count: int | None, seeds: Seeds, round: int) -> list[Client]:
    """The clients that take part in a round: all, or `count` of them at random, in their order."""
    if count is None or count >= len(clients):
        return list(clients)
    chosen = seeds.numpy("participants", round).choice(len(clients), count, replace=False)
    return [clients[index] for index in sorted(chosen)]


class Answers:
    """The answers to one round: each is checked as it arrives, and accounted for.

    Updates are handed on in the clients' order, so that the bits of their sum do not depend on who
    was faster; one that is early waits where it arrived, in memory or in its file.
    """

    def __init__(
        self,
        experiment: Experiment,
        round: int,
        clients: Sequence[Client],
        previous: Entry | None,
        directory: RunDirectory,
        watcher: Watcher,
    ) -> None:
        self.clients = clients
        self.failures: dict[str, str] = {}
        self._method, self._settings = experiment.method, experiment.federation
        self._round, self._ledger = round, directory.ledger
        seeds = Seeds(experiment.federation.seed)
        expected = Expected(seeds, self._ledger.trained, experiment.training)
        memory = directory.server_memory(round)
        self.turn = ServerTurn(round, clients, previous, expected, memory)
        self._directory, self._watcher = directory, watcher
        self._arrived: dict[str, tuple[Answer, Update]] = {}
        self._absent: set[str] = set()
        self._losses: dict[str, float] = {}
        self._bytes = 0

    def usable(self, fleet: Fleet, clock: Clock) -> Iterator[Update]:
        """Ask the clients, and those that are away again where too few answer.

        Yields:
            The updates that pass the checks, in the clients' order.

        Raises:
            RunFailed: there were too few of them, after as many tries as the experiment allows.
        """
        waiting = list(self.clients)  # in their order, those whose updates are not handed on
        asked = list(self.clients)
        for attempt in range(self._settings.attempts):
            if attempt:
                seconds = self._settings.backoff * 2 ** (attempt - 1)
                self._watcher.tries_again([client.name for client in asked], seconds)
                time.sleep(seconds)
            for answer in fleet.train(self._round, self._ledger.head, asked, clock):
                with clock("wire"):
                    self._receive(answer)
                del answer  # its memory, while the next client trains
                while waiting and self._is_settled(waiting[0].name):
                    yield from self._hand_on(waiting.pop(0).name)
            asked = [client for client in self.clients if client.name in self._absent]
            if len(self._losses) >= self._settings.min_clients or not asked:
                break
        if len(self._losses) < self._settings.min_clients:
            raise RunFailed(self._too_few(attempt + 1))
        for client in waiting:
            yield from self._hand_on(client.name)

    @property
    def losses(self) -> dict[str, float]:
        """The training loss that each client reports, in the clients' order."""
        names = (client.name for client in self.clients)
        return {name: self._losses[name] for name in names if name in self._losses}

    def entry(self, aggregate: Aggregate) -> Entry:
        """The round's entry; who answered weighs p_k = n_k / Σ n, or what the aggregate says."""
        losses = self.losses
        present = [client for client in self.clients if client.name in losses]
        total = sum(client.num_examples for client in present)
        shares = [client.num_examples / total for client in present]
        weights = shares if aggregate.weights is None else aggregate.weights
        participants = [
            Participant(client.name, client.num_examples, weight)
            for client, weight in zip(present, weights, strict=True)
        ]
        train_loss = sum(p * loss for p, loss in zip(shares, losses.values(), strict=True))
        metrics = {"train_loss": train_loss, "bytes_up": self._bytes, **aggregate.metrics}
        return Entry(
            *(self._method.name, self._round, self._ledger.head, participants, metrics),
            *(aggregate.tensors, self._method.entry_options()),
        )

    def _receive(self, answer: Answer) -> None:
        """Check an answer; keep its update for `_hand_on`, or note why there is none."""
        name = answer.client.name
        self._absent.discard(name)
        self.failures.pop(name, None)
        try:
            update = self._checked(answer)
        except InvalidMessage as error:
            self.failures[name] = str(error)
            if answer.absent:
                self._absent.add(name)
            if isinstance(answer.update, Path):
                answer.update.unlink()
            self._watcher.client_answered(name, str(error))
            return
        self._arrived[name] = answer, update
        self._losses[name] = update.train_loss
        self._bytes += answer.nbytes if self._method.communicates else 0
        self._watcher.client_answered(name, None)

    def _is_settled(self, name: str) -> bool:
        """Whether a client has answered, or will not answer in this round."""
        return name in self._arrived or (name in self.failures and name not in self._absent)

    def _hand_on(self, name: str) -> Iterator[Update]:
        if name in self._arrived:
            answer, update = self._arrived.pop(name)
            yield update
            if isinstance(answer.update, Path):
                answer.update.unlink()

    def _checked(self, answer: Answer) -> Update:
        if answer.failure is not None:
            raise InvalidMessage(answer.failure)
        client, content = answer.client, answer.update
        update = Update.decode(content) if isinstance(content, bytes) else Update.read(content)
        update.check(
            *(self._method.name, self._round, self._ledger.head),
            *(client.name, client.num_examples),
        )
        self._method.check_update(client, update, self.turn.expected)
        if self._settings.keep_updates:
            self._directory.keep_update(self._method.kept(update, self.turn))
        return update

    def _too_few(self, attempts: int) -> str:
        count, needed = len(self._losses), self._settings.min_clients
        reasons = [f"{client} failed because {why}" for client, why in self.failures.items()]
        found = (
            f"{count} of the {needed} usable updates that it needs"
            if count
            else ("no usable update")
        )
        tries = f" in {attempts} tries" if attempts > 1 else ""
        return (
            f"round {self._round} has {found} from its {len(self.clients)} clients{tries}: "
            f"{(reasons or ['nobody answered'])[0]}"
        )


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
        for client in clients:
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
