"""Inbox of one round: what arrives is checked and accounted for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hedgerow.clock import Clock
from hedgerow.errors import InvalidMessage, RunFailed
from hedgerow.experiment import Experiment
from hedgerow.federation import robust
from hedgerow.federation.fleet import ClientResult, Fleet, Watcher
from hedgerow.federation.traffic import contents
from hedgerow.methods.base import REVEALED, Aggregate, Client, ServerRound, revealed_by_sum
from hedgerow.privacy.client_level import ClientLevel
from hedgerow.runs.directory import RunDirectory
from hedgerow.runs.rows import SENT_BY_CLIENT
from hedgerow.runs.scoring import plausible
from hedgerow.settings import COORDINATE_WISE
from hedgerow.wire import SAMPLING_RATE, Entry, Participant, Update, header_limit


class Inbox:
    """The results of one round: each is checked as it arrives, and accounted for.

    Updates are handed on in the clients' order, so that the bits of their sum do not depend on who
    was faster; one that is early waits where it arrived, in memory or in its file.
    """

    def __init__(
        self,
        experiment: Experiment,
        round: int,
        clients: Sequence[Client],
        population: int,
        previous: Entry | None,
        directory: RunDirectory,
        watcher: Watcher,
        privacy: ClientLevel | None = None,
    ) -> None:
        self.clients = clients
        self.failures: dict[str, str] = {}
        self._method, self._settings = experiment.method, experiment.federation
        self._round, self._ledger = round, directory.ledger
        expected = experiment.expected(self._ledger.trained)
        memory = directory.server_memory(round)
        self._privacy = privacy
        clip = None if previous is None else previous.metrics.get("clip")
        self._private = None
        if privacy is not None:
            self._private = privacy.mean(round, self._ledger.head, len(clients), clip)
        self.server_round = ServerRound(
            round, clients, previous, expected, memory, population, self._private
        )
        self._directory, self._watcher = directory, watcher
        self._arrived: dict[str, tuple[ClientResult, Update]] = {}
        self._absent: set[str] = set()
        self._notes: dict[str, str] = {}
        self._losses: dict[str, float | None] = {}
        self._level = None if experiment.privacy is None else experiment.privacy.level
        self._says = experiment.says
        self._says_loss = self._says.losses is True
        self._needed = self._settings.min_clients
        self._is_sampled = privacy is not None and privacy.sampling is not None
        if self._is_sampled:
            # Whoever was drawn: that they are few is neither a failure nor to be told.
            self._needed = min(self._needed, len(clients))
        # Of those who are away in a round, too: what they have spent is not less.
        self._epsilon = 0.0 if previous is None else previous.metrics.get("epsilon", 0.0)
        self._bytes = 0
        self._sent: dict[str, dict[str, Any]] = {}

    def usable(self, fleet: Fleet, clock: Clock) -> Iterator[Update]:
        """Ask the clients; those that are away again where too few answer, or one that it takes.

        Yields:
            The updates that pass the checks, in the clients' order.

        Raises:
            RunFailed: there were too few of them, or none of the client that others are weighed by,
                after as many tries as the experiment allows.
        """
        robust.check_trusted(self._settings, self._round, (c.name for c in self.clients))
        waiting = list(self.clients)  # in their order, those whose updates are not handed on
        asked = list(self.clients)
        for attempt in range(self._settings.attempts):
            if attempt:
                self._wait(attempt, asked)
            for result in fleet.train(self._round, self._ledger.head, asked, clock):
                with clock("wire"):
                    self._receive(result)
                del result  # its memory, while the next client trains
                while waiting and self._is_settled(waiting[0].name):
                    yield from self._hand_on(waiting.pop(0).name)
            asked = [client for client in self.clients if client.name in self._absent]
            enough = len(self._losses) >= self._needed
            if not asked or (enough and self._settings.trusted not in self._absent):
                break
        if len(self._losses) < self._needed:
            raise RunFailed(self._too_few(attempt + 1))
        robust.check_trusted(self._settings, self._round, self._losses)
        for client in waiting:
            yield from self._hand_on(client.name)

    def _wait(self, attempt: int, asked: Sequence[Client]) -> None:
        """Wait before these clients are asked once more, twice as long as the time before."""
        seconds = self._settings.backoff * 2 ** (attempt - 1)
        self._watcher.tries_again([client.name for client in asked], seconds)
        time.sleep(seconds)

    def aggregate(self, fleet: Fleet, clock: Clock) -> Aggregate:
        """What the method makes of the usable updates, weighed by the experiment's rule if any.

        Raises:
            RunFailed: as in `usable`.
            InvalidMessage: the method could not make anything of them.
        """
        if self._private is not None and self._is_sampled and not self.clients:
            changed = self._method.changed(self._round, self.server_round.expected)
            sums, total = self._private.of_nobody(changed), self._private.denominator
            return self._method.aggregate_sum(sums, total, [], self.server_round)
        updates = self.usable(fleet, clock)
        if not self._method.is_weighed:
            return self._method.aggregate(updates, self.server_round)
        with robust.on_disk(updates, self._directory.path / "weighed") as kept:
            names = [update.client for update in kept]
            rule = self._settings.weights
            if rule in COORDINATE_WISE:
                mean = robust.middle(self._method, kept, self.server_round, rule)
                equal = dict.fromkeys(names, 1 / len(names))
                weighed = replace(self.server_round, given_weights=equal)
                return self._method.aggregate_sum(mean, 1, names, weighed)
            found = robust.weigh(self._method, kept, self.server_round, self._settings)
            self._notes = {names[place]: note for place, note in sorted(found.notes.items())}
            given = dict(zip(names, found.weights, strict=True))
            weighed = replace(self.server_round, given_weights=given)
            return self._method.aggregate(kept, weighed)

    @property
    def losses(self) -> dict[str, float | None]:
        """Training loss of each client that has answered, in their order; None where none is."""
        names = (client.name for client in self.clients)
        return {name: self._losses[name] for name in names if name in self._losses}

    @property
    def seen(self) -> dict[str, Any]:
        """What the server has seen of the round, and the entry does not say."""
        names = (client.name for client in self.clients)
        sent = {name: self._sent[name] for name in names if name in self._sent}
        seen: dict[str, Any] = {SENT_BY_CLIENT: sent} if sent else {}
        if self._private is not None:
            return {**seen, "bytes_up": self._bytes, "clipped": self._private.clipped_share}
        if self._notes:
            seen["weighed_otherwise"] = self._notes
        return {"train_loss_by_client": self.losses, **seen} if self._says_loss else seen

    def revealed(self, aggregate: Aggregate) -> int | None:
        """Number of clients of whose update everybody gets a piece apart from the others'.

        None: nothing is sent, or the method does not say. Noise on the sum leaves no update as it
        was.
        """
        if not self._method.communicates:
            return None
        if self._private is not None:
            return 0
        if REVEALED not in aggregate.metrics and self._method.linear:
            weights = [1.0] * len(self._losses) if aggregate.weights is None else aggregate.weights
            return revealed_by_sum(weights)
        told = aggregate.metrics.get(REVEALED)
        return None if told is None else int(told)

    def entry(self, aggregate: Aggregate) -> Entry:
        """The round's entry; who answered weighs p_k = n_k / Σ n, or what the aggregate says.

        With client-level privacy it says nothing that depends on clients' data but through noise.
        Where clients are drawn in secret, that is also true of who they are: it names all.

        Raises:
            RunFailed: it says that of more or fewer than there are, or cannot be written; or its
                release would exceed the budget of privacy.
        """
        losses = self.losses
        present = [client for client in self.clients if client.name in losses]
        total = sum(client.num_examples for client in present)
        shares = [client.num_examples / total for client in present]
        weights = shares if aggregate.weights is None else aggregate.weights
        if len(weights) != len(present):
            raise RunFailed(
                f"method {self._method.name} gave {len(weights)} weights for the "
                f"{len(present)} updates of round {self._round}: give one for each"
            )
        sizes = [1 if self._privacy else client.num_examples for client in present]
        participants = [
            Participant(client.name, size, float(weight))
            for client, size, weight in zip(present, sizes, weights, strict=True)
        ]
        sampling = None if self._privacy is None else self._privacy.sampling
        if sampling is not None:
            share = 1 / len(sampling.names)
            participants = [Participant(name, 1, share) for name in sampling.names]
        entry = Entry(
            method=self._method.name,
            round=self._round,
            parent=self._ledger.head,
            participants=participants,
            metrics={},
            tensors=aggregate.tensors,
            options=self._method.entry_options(),
        )
        if self._privacy is not None:
            counted = replace(entry, parent=self._privacy.begins_from(entry.parent))
            try:
                digest = counted.digest()
            except InvalidMessage as error:
                raise RunFailed(
                    f"method {entry.method} made an entry that cannot be written: {error}"
                ) from None
            names = [participant.client for participant in participants]
            spent = self._privacy.account_for(entry.round, entry.parent, digest, names)
            clip = None if self._private is None else self._private.next_clip
            metrics = {"epsilon": spent} | ({"clip": clip} if clip else {})
            rate = {} if sampling is None else {SAMPLING_RATE: sampling.rate}
            return replace(entry, metrics=metrics | rate)
        learnt = {}
        if self._level is not None:
            learnt = {"epsilon": self._epsilon}
        elif self._says.losses:
            learnt = {"train_loss": self._mean_loss(present)}
        own = {key: value for key, value in aggregate.metrics.items() if key != REVEALED}
        return replace(entry, metrics={**learnt, "bytes_up": self._bytes, **own})

    def _mean_loss(self, present: Sequence[Client]) -> float:
        """Mean of the training losses, without those that cannot be, of which people are told."""
        losses = {name: loss for name, loss in self.losses.items() if loss is not None}
        counted = plausible(losses)
        for name in losses.keys() - counted.keys():
            self._watcher.say(
                f"{name} says that its training loss is {losses[name]:.4g}, which others' are far "
                f"from: it is left out of the mean of round {self._round}"
            )
        total = sum(client.num_examples for client in present if client.name in counted)
        sizes = {client.name: client.num_examples for client in present}
        return sum(sizes[name] / total * loss for name, loss in counted.items())

    def _receive(self, result: ClientResult) -> None:
        """Check a result; keep its update for `_hand_on`, or note why there is none."""
        name = result.client.name
        self._absent.discard(name)
        self.failures.pop(name, None)
        try:
            update = self._checked(result)
        except InvalidMessage as error:
            self.failures[name] = str(error)
            if result.absent:
                self._absent.add(name)
            if isinstance(result.update, Path):
                result.update.unlink()
            self._watcher.client_finished(name, str(error))
            return
        self._arrived[name] = result, update
        self._losses[name] = update.train_loss
        self._epsilon = max(self._epsilon, update.epsilon or 0.0)
        if self._method.communicates:
            self._bytes += result.nbytes
            self._sent[name] = contents(update, result.nbytes)
        self._watcher.client_finished(name, None)

    def _is_settled(self, name: str) -> bool:
        """Whether a client has answered, or will not answer in this round."""
        return name in self._arrived or (name in self.failures and name not in self._absent)

    def _hand_on(self, name: str) -> Iterator[Update]:
        if name in self._arrived:
            result, update = self._arrived.pop(name)
            yield update
            if isinstance(result.update, Path):
                result.update.unlink()

    def _checked(self, result: ClientResult) -> Update:
        if result.failure is not None:
            raise InvalidMessage(result.failure)
        # As the round knows it: a site that came back meanwhile may claim other numbers.
        (client,) = (each for each in self.clients if each.name == result.client.name)
        content, expected = result.update, self.server_round.expected

        def fits(update: Update) -> None:
            update.check(
                method=self._method.name,
                round=self._round,
                parent=self._ledger.head,
                client=client.name,
                num_examples=client.num_examples,
                says_loss=self._says_loss,
                says_epsilon=self._level == "example",
            )
            self._check_content(client, update)

        limit = header_limit(expected.shapes)
        if isinstance(content, bytes):
            update = Update.from_bytes(content, limit, fits)
        else:
            update = Update.read(content, limit, fits)
        if self._settings.keep_updates:
            self._directory.keep_update(self._method.shown(update, self.server_round))
        return update

    def _check_content(self, client: Client, update: Update) -> None:
        """Raise `InvalidMessage` unless an update's tensors are those that were asked for."""
        self._method.check_update(client, update, self.server_round.expected)

    def _too_few(self, attempts: int) -> str:
        count, needed = len(self._losses), self._needed
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
