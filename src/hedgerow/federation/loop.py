"""The round loop: the same for every engine and every method.

It knows methods and a *fleet* (whoever trains), and nothing of adapters, networks or transport.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from hedgerow import allocator
from hedgerow.clock import Clock
from hedgerow.errors import InvalidMessage, RunFailed
from hedgerow.experiment import Experiment
from hedgerow.federation.fleet import Fleet, Watcher
from hedgerow.federation.inbox import Inbox
from hedgerow.federation.secure import UNMASKED, UnmaskedSums, sum_of_round
from hedgerow.federation.secure_inbox import SecureInbox
from hedgerow.federation.traffic import Traffic, row_of
from hedgerow.methods.base import REVEALED, Client
from hedgerow.privacy.bands import Turns
from hedgerow.privacy.client_level import ClientLevel
from hedgerow.runs.directory import RunDirectory
from hedgerow.runs.rows import ROWS_BY_CLIENT
from hedgerow.seeds import Seeds
from hedgerow.wire import Entry


def run(experiment: Experiment, fleet: Fleet, directory: RunDirectory, watcher: Watcher) -> None:
    """Take a run from its ledger's head to the experiment's last round.

    Raises:
        RunFailed: too few clients of a round sent a usable update, or the method made of them what
            no participant could read.
    """
    method, ledger = experiment.method, directory.ledger
    settings, seeds = experiment.federation, Seeds(experiment.federation.seed)
    traffic = Traffic(method, ledger)
    turns = turns_of(experiment, fleet, directory)
    privacy = client_level(experiment, fleet, directory, turns)
    sum_of = sum_of_round(experiment, lambda: fleet.population)
    sums = UnmaskedSums(directory.path / UNMASKED)

    def asked_in(round: int, everybody: Sequence[Client]) -> list[Client]:
        if turns is not None:
            return [client for client in everybody if turns.has(client.name, round)]
        if privacy is None or privacy.sampling is None:
            return draw(everybody, settings.drawn_of(len(everybody)), seeds, round)
        names = set(privacy.sampling.drawn(round, ledger.parent(round)))
        return [client for client in everybody if client.name in names]

    def finish(row: dict[str, Any]) -> None:
        directory.write_row(row)
        watcher.round_ends(row)

    def scores(round: int) -> dict[str, Any]:
        due = round % experiment.evaluation.every == 0 or round == settings.rounds
        return fleet.evaluate(watcher.evaluated) if due else {}

    def inbox_of(round: int, everybody: Sequence[Client], previous: Entry | None) -> Inbox:
        asked, population = asked_in(round, everybody), len(everybody)
        if sum_of is not None:
            # Of a sum that was to be unmasked, all; who else has joined since changes who is drawn.
            names = {*(client.name for client in asked), *(sums.of(round, ledger.head) or ())}
            asked = [client for client in everybody if client.name in names]
            return SecureInbox(
                experiment, round, asked, population, previous, directory, watcher, sum_of, sums
            )
        return Inbox(experiment, round, asked, population, previous, directory, watcher, privacy)

    # Who is scored on rows of its own gets the model for that, too.
    rows = directory.rows()
    for row in rows[1:]:
        asked = [*row["participants"], *row["failures"], *row.get(ROWS_BY_CLIENT, [])]
        traffic.down(asked, row["round"])
    if len(ledger) and len(rows) <= len(ledger):
        drawn = privacy is not None and privacy.sampling is not None
        watcher.say(_lost(len(rows), len(ledger), drawn_in_secret=drawn))
    # Before the first round; or the run was killed between an entry and its row, or rows are gone.
    for round in range(len(rows), len(ledger) + 1):
        entry = ledger.read(round) if round else None
        scored = scores(round) if round == len(ledger) else {}
        if entry is None:
            finish(row_of(entry, traffic) | scored)
            continue
        asked = [client.name for client in asked_in(round, fleet.gather())]
        present = [] if entry.names_all else [p.client for p in entry.participants]
        absent = [name for name in asked if name not in present]
        failures = dict.fromkeys(absent, _UNKNOWN_PART if entry.names_all else _UNKNOWN_REASON)
        traffic.down([*asked, *scored.get(ROWS_BY_CLIENT, [])], round)
        finish(row_of(entry, traffic, present, failures) | scored)

    previous = ledger.read(len(ledger)) if len(ledger) else None
    for round in range(len(ledger) + 1, settings.rounds + 1):
        inbox = inbox_of(round, fleet.gather(), previous)
        began, clock = time.perf_counter(), Clock()
        watcher.round_begins(round, settings.rounds, len(inbox.clients))

        with clock("aggregate"):
            try:
                aggregate = inbox.aggregate(fleet, clock)
            except InvalidMessage as error:
                raise RunFailed(
                    f"method {method.name} could not aggregate round {round}: {error}"
                ) from None
        with clock("ledger"):
            previous = entry = ledger.append(
                inbox.entry(aggregate), method, inbox.server_round.expected
            )
        revealed = {REVEALED: inbox.revealed(aggregate)}
        del aggregate  # from here on the entry's tensors are read from its file
        with clock("apply"):
            allocator.give_back()
            fleet.advance(entry)
            allocator.give_back()
        with clock("evaluate"):
            scored = scores(round)
            allocator.give_back()
        traffic.down([*(c.name for c in inbox.clients), *scored.get(ROWS_BY_CLIENT, [])], round)

        parts = {f"{part}_seconds": seconds for part, seconds in clock.seconds.items()}
        seconds = {"seconds": time.perf_counter() - began, **parts}
        row = row_of(entry, traffic, list(inbox.losses), inbox.failures)
        finish(row | scored | revealed | inbox.seen | seconds)


_UNKNOWN_REASON = "not known: the run was stopped before it was written"
_UNKNOWN_PART = "not known whether it failed: the run was stopped before that was written"


def turns_of(experiment: Experiment, fleet: Fleet, directory: RunDirectory) -> Turns | None:
    """Turns in which clients take part (`privacy.bands`); None where each may in every round."""
    bands = None if experiment.privacy is None else experiment.privacy.bands
    if bands is None:
        return None
    memory = partial(directory.noise_memory, bands)
    return Turns.of(fleet.names, bands, Seeds(experiment.federation.seed), memory)


def client_level(
    experiment: Experiment, fleet: Fleet, directory: RunDirectory, turns: Turns | None = None
) -> ClientLevel | None:
    """Client-level privacy of a run; None where it has none, or does not need it any more.

    Raises:
        UserError: what is promised cannot be kept.
    """
    settings, federation, ledger = experiment.privacy, experiment.federation, directory.ledger
    if settings is None or settings.level != "client":
        return None
    names = fleet.names
    drawn = federation.drawn_of(len(names))
    # Rows that are missing say who was asked, which the key alone knows.
    missing = len(directory.rows()) <= len(ledger)
    if len(ledger) >= federation.rounds and not (drawn is not None and missing):
        return None
    return ClientLevel.of(
        settings,
        rounds=federation.rounds,
        clients=names,
        folder=directory.path,
        known=[(round, ledger.parent(round)) for round in range(1, len(ledger) + 1)],
        drawn=drawn,
        turns=turns,
    )


def _lost(first: int, last: int, *, drawn_in_secret: bool) -> str:
    """Sentence on rows of metrics.jsonl that are not there, though their entries are."""
    rounds = f"round {first}" if first == last else f"rounds {first} to {last}"
    who = "who took part of those that were drawn, " if drawn_in_secret else ""
    return (
        f"metrics.jsonl has no row of {rounds}, as where a run is killed between an entry and its "
        "row: what the ledger has not is not known there (times, train_loss_by_client, "
        f"sent_by_client, {REVEALED}, {who}why clients failed, and "
        f"scores before round {last})"
    )


def draw(clients: Sequence[Client], count: int | None, seeds: Seeds, round: int) -> list[Client]:
    """The clients that take part in a round: all, or `count` of them at random, in their order.

    Everybody can know them, by the run's seed.
    """
    if count is None:
        return list(clients)
    chosen = seeds.numpy("participants", round).choice(len(clients), count, replace=False)
    return [clients[index] for index in sorted(chosen)]
