"""Inbox of a round whose updates the server adds up unseen (`federation.secure`)."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from hedgerow.clock import Clock
from hedgerow.errors import InvalidMessage, RunFailed
from hedgerow.experiment import Experiment
from hedgerow.federation.fleet import ClientResult, Fleet, Watcher
from hedgerow.federation.inbox import Inbox
from hedgerow.federation.secure import SumOfRound, UnmaskedSums, about, as_codes, check_masked
from hedgerow.methods.base import Aggregate, Client
from hedgerow.privacy.secure.coordinator import Coordinator
from hedgerow.privacy.secure.letters import Ask, AskKeys, Keys, Shares, Unmasking, Unopened
from hedgerow.runs.directory import RunDirectory
from hedgerow.wire import Entry, Update

if TYPE_CHECKING:
    from torch import Tensor

_A = TypeVar("_A", Keys, Shares, Unmasking)


class SecureInbox(Inbox):
    """The masked updates of one round, which are added as they arrive."""

    def __init__(
        self,
        experiment: Experiment,
        round: int,
        clients: Sequence[Client],
        population: int,
        previous: Entry | None,
        directory: RunDirectory,
        watcher: Watcher,
        sum_of: SumOfRound,
        record: UnmaskedSums,
    ) -> None:
        super().__init__(experiment, round, clients, population, previous, directory, watcher)
        self._sum_of = sum_of
        self._says_loss = False
        self._needed = max(self._needed, sum_of.threshold)
        self._record = record
        self._members: set[str] | None = None
        """Clients that a sum has to be of, once one was to be unmasked; before, it may be of any
        that are enough."""
        self._bind()
        self._left_out: dict[str, str] = {}
        """Clients that have no part in further tries of the round, and why."""
        self._loss = 0.0
        self._found = ""
        """How far a try went."""
        self._letter_bytes = 0

    def aggregate(self, fleet: Fleet, clock: Clock) -> Aggregate:
        """What the method makes of the mean of the updates, of which none is seen.

        Each try is a sum of its own, with new keys. Once a sum was asked to be unmasked, another
        try is of the same clients: whoever helps may have told the server enough, and of two sums
        that differ by a client the difference is its update.

        Raises:
            RunFailed: too few clients took part to the end, in as many tries as there may be.
            InvalidMessage: the method could not make anything of the mean.
        """
        for attempt in range(self._settings.attempts):
            if attempt:
                self._wait(attempt, self.clients)
            mean = self._tried(fleet, clock)
            if mean is not None:
                return self._method.aggregate_sum(mean, 1, list(self.losses), self.server_round)
        raise RunFailed(self._too_few(attempt + 1))

    def _bind(self) -> None:
        """Have the round's sum be of those whose sum was to be unmasked before, if one was."""
        asked = self._record.of(self._round, self._ledger.head)
        if asked is not None:
            self._members, self._needed = set(asked), len(asked)

    @property
    def seen(self) -> dict[str, Any]:
        """As any round's, with the bytes of keys and shares, both ways."""
        return {**super().seen, "secure_bytes": self._letter_bytes}

    def _tried(self, fleet: Fleet, clock: Clock) -> dict[str, Tensor] | None:
        """As `_try`, which begins anew at once, and counts once, where it has left somebody out."""
        while True:
            before = len(self._left_out)
            self.failures.clear()
            self.failures.update(self._left_out)
            if self._members is not None:
                others = {client.name for client in self.clients} - self._members
                self.failures.update(dict.fromkeys(sorted(others), _OTHERS))
            self._losses.clear()
            mean = self._try(fleet, clock)
            if mean is not None or len(self._left_out) == before:
                return mean

    def _try(self, fleet: Fleet, clock: Clock) -> dict[str, Tensor] | None:
        """The mean of those who took part to the end; None where they are too few."""
        sum_of = self._sum_of
        present = self._left(self.clients)
        if not self._are_enough(len(present)):
            return None
        server = Coordinator(
            threshold=sum_of.threshold,
            about=about(self._round, self._ledger.head),
            session=secrets.token_hex(16),
            most_examples=max(client.num_examples for client in self.clients),
        )
        if sum_of.settings.masks:
            asks: list[tuple[Client, Ask]]
            asks = [(client, AskKeys(session=server.session)) for client in present]
            self._collect(fleet, asks, Keys, server.add_keys, clock)
            present = self._left(present)
            if not self._are_enough(len(present)):
                return None
            asks = [(client, server.asks_shares) for client in present]
            self._collect(fleet, asks, Shares, server.add_shares, clock)
            present = self._left(present)
            if not self._are_enough(len(present)):
                return None
        letters = {client.name: server.asks_masked(client.name) for client in present}
        self._letter_bytes += sum(map(size_of, letters.values()))
        for result in fleet.train(self._round, self._ledger.head, present, clock, letters):
            with clock("wire"):
                self._receive(result)
                for update in self._hand_on(result.client.name):
                    server.add(update.client, as_codes(update))
                    self._complain(server, result)
        if not self._are_enough(len(server.arrived)):
            return None
        if at_odds := server.at_odds():
            # Nobody was asked to unmask a sum of theirs, so that another is free to be made.
            for name, why in at_odds.items():
                if name not in self.failures:
                    self._fails(name, why)
                self._left_out[name] = self.failures[name]
            return None
        if sum_of.settings.masks:
            self._record.note(self._round, self._ledger.head, server.arrived)
            self._bind()
            asks = [(c, server.asks_unmasking) for c in present if c.name in server.arrived]
            helped: dict[str, Unmasking] = {}
            self._collect(fleet, asks, Unmasking, helped.__setitem__, clock)
            try:
                server.unmask(helped)
            except InvalidMessage as error:
                self._watcher.say(f"round {self._round}: {error}")
                self._found = str(error)
                return None
            finally:
                for name, why in server.faults.items():
                    self._fails(name, why)
        sizes = [c.num_examples for c in self.clients if c.name in server.arrived]
        each = [sum_of.weights(size, server.most_examples) for size in sizes]
        weights = sum(weight for weight, _ in each), sum(share for _, share in each)
        mean, self._loss = sum_of.decode(
            server.total, weights, self._round, self.server_round.expected
        )
        return mean

    def _collect(
        self,
        fleet: Fleet,
        asks: Sequence[tuple[Client, Ask]],
        kind: type[_A],
        take: Callable[[str, _A], None],
        clock: Clock,
    ) -> None:
        """Have `take` each client's answer of one kind; whoever has none that fits has failed."""
        self._letter_bytes += sum(size_of(ask) for _, ask in asks)
        for each in fleet.ask(self._round, self._ledger.head, asks, clock):
            name = each.client.name
            if not isinstance(each.answer, kind):
                self._fails(name, each.failure or "it gave no answer")
                continue
            self._letter_bytes += size_of(each.answer)
            try:
                take(name, each.answer)
            except InvalidMessage as error:
                self._fails(name, str(error))

    def _complain(self, server: Coordinator, result: ClientResult) -> None:
        """Note what a client that has sent its numbers says of the shares that it was sent."""
        complaint, name = result.answer, result.client.name
        if not isinstance(complaint, Unopened):
            return
        self._letter_bytes += size_of(complaint)
        try:
            server.add_unopened(name, complaint)
        except InvalidMessage as error:
            self._watcher.say(f"{name}: {error}")
            return
        senders = ", ".join(complaint.senders)
        self._watcher.say(f"{name} cannot open the shares of {senders}: it does without, if it can")

    def _fails(self, name: str, why: str) -> None:
        """Note that a client has not answered a letter."""
        self.failures[name] = why
        if name in self._losses:  # its numbers have arrived, and it was seen to finish
            self._watcher.say(f"{name} failed: {why}")
        else:
            self._watcher.client_finished(name, why)

    def _are_enough(self, count: int) -> bool:
        """Whether so many clients suffice to go on."""
        self._found = f"{count} of the {self._needed} clients that it takes stayed to the end"
        return count >= self._needed

    def _left(self, clients: Sequence[Client]) -> list[Client]:
        """Those who have not failed in this try."""
        return [client for client in clients if client.name not in self.failures]

    def _check_content(self, client: Client, update: Update) -> None:
        check_masked(update, self._sum_of, self.server_round.expected)

    def _too_few(self, attempts: int) -> str:
        members = self._members or {client.name for client in self.clients}
        reason = f"only {len(members & {c.name for c in self.clients})} had joined"
        if failed := [c.name for c in self.clients if c.name in self.failures.keys() & members]:
            why, count = Counter(self.failures[name] for name in failed).most_common(1)[0]
            first = next(name for name in failed if self.failures[name] == why)
            others = f" and {count - 1} more" if count > 1 else ""
            reason = f"{first}{others} failed because {why}"
        tries = f" in {attempts} tries" if attempts > 1 else ""
        found = f"round {self._round} has no secure sum: {self._found}{tries}: {reason}"
        if self._members is None:
            return found
        return (
            f"{found}. The sum of the {len(self._members)} clients that {self._record.file} names "
            "was to be unmasked, and the difference from another would tell of single ones: go on "
            "with the run when all of them are there, or begin another run where one will not be"
        )

    def _mean_loss(self, present: Sequence[Client]) -> float:
        return self._loss


_OTHERS = "the sum of others of this round was to be unmasked before"


def size_of(letter: BaseModel) -> int:
    """Number of bytes of a letter, as it travels."""
    return len(letter.model_dump_json())
