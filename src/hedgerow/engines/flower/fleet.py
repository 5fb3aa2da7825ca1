"""The SuperNodes as the round loop sees them: who is there, what they get, what they answer."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from hedgerow.clock import Clock
from hedgerow.engines.flower.keys import KnownKeys
from hedgerow.engines.flower.messages import (
    Action,
    FileInfo,
    Held,
    NoReply,
    Parcel,
    Reply,
    Request,
    pack,
    read_reply,
)
from hedgerow.errors import InvalidMessage, RunFailed
from hedgerow.evaluation.metrics import main_scores_of
from hedgerow.evaluation.scores import in_round
from hedgerow.experiment import Experiment
from hedgerow.federation.fleet import ClientResult
from hedgerow.ledger import Ledger
from hedgerow.methods.base import Client
from hedgerow.privacy.secure.letters import Ask, AskMasked
from hedgerow.runs.scoring import ClientScores, Scorer, over_clients
from hedgerow.wire import MAX_HEADER_BYTES, Entry

BATCH = 256 << 20
"""Bytes of entries in one message to a site that has missed many."""
RESTARTS = 5
"""Number of times that a site's copy of the ledger may prove other than it was thought to be."""
PATIENCE = 60.0
"""Seconds that a run waits for sites that refuse to take part, before it begins without them; and
for sites that are only to be told the end."""
POLL = 0.2
"""Seconds between two looks for replies."""
FOREVER = 10 * 365 * 86400.0
"""Seconds for which Flower keeps a message where the experiment sets no deadline."""


@dataclass
class Member:
    """A SuperNode that has joined as a client."""

    node: int
    client: Client
    held: int = 0
    """The rounds that its copy of the ledger has, as far as is known."""


@dataclass
class Errand:
    """Errand to a node, in as many messages as it takes."""

    node: int
    member: Member | None = None
    batches: collections.deque[range] = field(default_factory=collections.deque)
    """The rounds whose entries are still to be sent."""
    asks: Action = Action.entries
    """What the last message asks for."""
    letter: Ask | None = None
    """Letter of a secure sum in the last message."""
    restarts: int = 0


class FlowerFleet:
    """The clients of a run behind a Flower grid.

    Args:
        grid: Flower's.
        names: the experiment's clients, in their order.
        awaited: those that the run begins with.
        run: names the run to the sites.
        folder: where updates wait on disk until they are aggregated.
        keys: which site each client is.
        scorer: the server's own copy of the model, or None where it has none.
        say: told of what people should see.
    """

    def __init__(
        self,
        grid: Grid,
        experiment: Experiment,
        names: Sequence[str],
        awaited: Sequence[str],
        ledger: Ledger,
        run: str,
        folder: Path,
        keys: KnownKeys,
        scorer: Scorer | None,
        say: Callable[[str], None],
    ) -> None:
        self._grid, self._method, self._ledger = grid, experiment.method, ledger
        self._settings, self._names = experiment.federation, list(names)
        self._evaluation = experiment.evaluation
        self._is_told = experiment.says.examples != "withheld"
        self._has_tests = experiment.data.client_test is not None
        self._date = experiment.data.template.date
        self._run, self._folder, self._keys = run, folder, keys
        self._scorer, self._say = scorer, say
        # Of float32 numbers, or codes; an adapter of full rank has up to twice its matrix.
        numbers = sum(math.prod(shape) for shape in ledger.trained.values())
        secure = experiment.federation.secure
        width = 4 if secure is None else max(4, secure.bits // 8)
        self._largest = 2 * width * numbers + 2 * MAX_HEADER_BYTES
        self._members: dict[str, Member] = {}
        self._known: dict[int, str] = {}
        self._joining: dict[str, Errand] = {}
        self._awaited = list(awaited)
        self._refusals: dict[str, str] = {}
        """Why a client's site has refused to take part, by the client's name."""
        self._began = False

    # --- who is there ---------------------------------------------------------------------------

    def gather(self) -> Sequence[Client]:
        """Everybody who has joined; the first time, all are waited for, up to the deadline."""
        self._ask_strangers_again()
        if not self._began:
            self._wait_for_all(self._settings.deadline)
        self._invite()
        members = [self._members[name] for name in self._names if name in self._members]
        return [member.client for member in members]

    def _wait_for_all(self, patience: float | None) -> None:
        """Wait until every client has joined, or for so many seconds."""
        self._began = True
        began = said = time.monotonic()
        waits_since: float | None = None  # for nobody but those whose sites refuse
        while missing := [name for name in self._awaited if name not in self._members]:
            self._invite()
            now = time.monotonic()
            if set(missing) <= self._refusals.keys():
                waits_since = now if waits_since is None else waits_since
                enough = len(self._members) >= self._settings.min_clients
                if enough and now - waits_since > PATIENCE:
                    for name in missing:
                        self._say(f"begins without {name}, whose site {self._refusals[name]}")
                    return
            else:
                waits_since = None
            if now - said > 30:
                said = now
                self._say(f"waiting for {', '.join(missing)}")
                self._ask_strangers_again()
            if patience is not None and now - began > patience:
                if len(self._members) < self._settings.min_clients:
                    raise RunFailed(
                        f"only {len(self._members)} of the {self._settings.min_clients} clients "
                        f"that a round needs joined by the deadline: {', '.join(missing)} did not"
                    )
                return
            time.sleep(POLL)

    def _ask_strangers_again(self) -> None:
        """Invite again who was not let in: what was wrong may have been mended."""
        members = {member.node for member in self._members.values()}
        asked = {errand.node for errand in self._joining.values()}
        self._known = {n: since for n, since in self._known.items() if n in members | asked}

    def _invite(self) -> None:
        """Ask nodes that are new who they are, and see what those that were asked have said."""
        nodes = {node.node_id: node for node in self._grid.get_nodes()}
        for gone in self._known.keys() - nodes.keys():
            del self._known[gone]  # if it comes back, it may have another base or data
        for node in nodes.values():
            if self._known.get(node.node_id) != node.last_activated_at:
                self._known[node.node_id] = node.last_activated_at
                errand = Errand(node.node_id)
                self._joining[self._send(errand, Action.invite, range(0))] = errand
        for message_id, errand in list(self._joining.items()):
            reply = self._reply(message_id, errand)
            if reply is not None:
                del self._joining[message_id]
                self._welcome(errand.node, reply, nodes)

    def _welcome(
        self, node: int, arrived: Parcel[Reply] | InvalidMessage, nodes: dict[int, Any]
    ) -> None:
        """Make a node a member, or say why not."""
        try:
            if isinstance(arrived, InvalidMessage):
                raise arrived
            if node not in nodes:
                raise InvalidMessage("it is no longer connected")
            reply = arrived.words
            name, about = reply.name, nodes[node]
            self._keys.check(name, about, nodes.values())
            if name not in self._names:
                raise InvalidMessage(f"the experiment has no client {name}")
            if reply.refused is not None:
                self._refusals[name] = f"does not take part: {reply.refused}"
                raise InvalidMessage(f"it does not take part: {reply.refused}")
            other = self._members.get(name)
            if other is not None and other.node != node and self._keeps(other, nodes, about):
                raise InvalidMessage(f"another SuperNode is {name} already")
            if reply.num_examples is None:
                raise InvalidMessage("it does not say how many examples it has")
        except InvalidMessage as error:
            self._say(f"SuperNode {node} was not let in: {error}")
            return
        self._refusals.pop(name, None)
        client = Client(self._names.index(name), name, reply.num_examples)
        self._members[name] = Member(node, client, self._rounds_held(reply.held))
        key = self._keys.remember(name, about)
        by_key = "" if key is None else f", by the key {key}"
        with_examples = f", with {client.num_examples:,} examples" if self._is_told else ""
        self._say(f"{name} joined{with_examples}{by_key}")

    def _keeps(self, member: Member, nodes: dict[int, Any], rival: Any) -> bool:
        """Whether a member is connected, by no lesser right than a SuperNode of the same name."""
        return member.node in nodes and not (rival.name and not nodes[member.node].name)

    # --- rounds ---------------------------------------------------------------------------------

    @property
    def names(self) -> Sequence[str]:
        """Names of all clients of the experiment, in their order."""
        return self._names

    @property
    def population(self) -> int:
        """Number of clients of the experiment, whether they have joined or not."""
        return len(self._names)

    def train(
        self,
        round: int,
        parent: str,
        clients: Sequence[Client],
        clock: Clock,
        letters: Mapping[str, AskMasked] | None = None,
    ) -> Iterator[ClientResult]:
        """Have clients train on what they miss and have; yields their results as they come."""
        own = {} if letters is None else letters
        asked = [(client, own.get(client.name)) for client in clients]
        yield from self._have_done(Action.train, round, asked, clock)

    def ask(
        self, round: int, parent: str, letters: Sequence[tuple[Client, Ask]], clock: Clock
    ) -> Iterator[ClientResult]:
        """Have clients answer letters of a secure sum; yields their results as they come."""
        yield from self._have_done(Action.secure, round, letters, clock)

    def _have_done(
        self,
        action: Action,
        round: int,
        asked: Sequence[tuple[Client, Ask | None]],
        clock: Clock,
    ) -> Iterator[ClientResult]:
        """Have clients do something in a round, each with its letter if there is one."""
        with clock("send"):
            self._invite()  # who has come back under another id, before a second try
            online = {node.node_id for node in self._grid.get_nodes()}
        errands = []
        for client, letter in asked:
            member = self._members[client.name]
            if member.node in online:
                errands.append(self._errand(member, round, asks=action, letter=letter))
            else:
                why = "its SuperNode is not connected"
                yield ClientResult(member.client, failure=why, absent=True)
        yield from self._run_errands(errands, clock)

    def advance(self, entry: Entry) -> None:
        """Advance the server's model, if it has one; sites get the entry with the next request."""
        if self._scorer is not None:
            self._scorer.advance(entry)

    def evaluate(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Scores of what the method has made, where the server has a model and test data.

        And those of each client's model on its own test rows, which its site scores.
        """
        scorer = self._scorer
        found = {} if scorer is None else scorer.evaluate(self.gather, progress)
        due = in_round(self._evaluation, len(self._ledger), self._settings.rounds)
        if not (self._has_tests and due.metrics):
            return found
        return found | over_clients(self._own_scores(), due.metrics)

    def _own_scores(self) -> dict[str, ClientScores]:
        """Scores of all clients that are connected and have test rows of their own, by name."""
        clients = self.gather()
        online = {node.node_id for node in self._grid.get_nodes()}
        members = [self._members[client.name] for client in clients]
        errands = [
            self._errand(member, len(self._ledger) + 1, asks=Action.score)
            for member in members
            if member.node in online
        ]
        found: dict[str, ClientScores] = {}
        for result in self._run_errands(errands, Clock()):
            name = result.client.name
            if result.failure is not None:
                self._say(f"{name} has no score on its own test rows: {result.failure}")
            elif result.scores is not None:
                found[name] = result.scores
        return {client.name: found[client.name] for client in clients if client.name in found}

    def finish(self) -> None:
        """Send everybody the entries that they still miss."""
        if not self._began:  # the run was complete, but for this
            with contextlib.suppress(RunFailed):
                self._wait_for_all(self._settings.deadline or PATIENCE)
        online = {node.node_id for node in self._grid.get_nodes()}
        errands = [
            self._errand(member, len(self._ledger) + 1, asks=Action.entries)
            for member in self._members.values()
            if member.node in online and member.held < len(self._ledger)
        ]
        for result in self._run_errands(errands, Clock()):
            if result.failure is not None:
                self._say(f"{result.client.name} may lack the last entries: {result.failure}")

    # --- messages -------------------------------------------------------------------------------

    def _errand(
        self, member: Member, round: int, *, asks: Action, letter: Ask | None = None
    ) -> Errand:
        """Bring a member's ledger to the round before, in batches; then have it do something."""
        errand = Errand(member.node, member, asks=asks, letter=letter)
        first, size = member.held + 1, 0
        if not self._method.entries_accumulate:
            errand.batches.append(range(first, round))  # of which only the last is sent
            return errand
        for missing in range(member.held + 1, round):
            if size and size + self._ledger.records[missing - 1].bytes > BATCH:
                errand.batches.append(range(first, missing))
                first, size = missing, 0
            size += self._ledger.records[missing - 1].bytes
        errand.batches.append(range(first, round))
        return errand

    def _run_errands(self, errands: Sequence[Errand], clock: Clock) -> Iterator[ClientResult]:
        """Send every errand's messages one after another, all errands at once, by the deadline."""
        deadline = time.monotonic() + (self._settings.deadline or FOREVER)
        with clock("send"):
            pending = {self._next(errand): errand for errand in errands}
        late = False
        while pending and not late:
            late = time.monotonic() > deadline
            for message_id, errand in list(pending.items()):
                with clock("receive"):
                    reply = self._reply(message_id, errand)
                if reply is None:
                    continue
                del pending[message_id]
                result = self._result(errand, reply)
                del reply  # with the memory of what it holds
                if result is None:
                    pending[self._next(errand)] = errand
                else:
                    yield result
                del result
            with clock("train"):
                time.sleep(POLL if pending else 0)
        for errand in pending.values():
            assert errand.member is not None
            why = f"it did not answer within {self._settings.deadline:g} s"
            yield ClientResult(errand.member.client, failure=why, absent=True)

    def _next(self, errand: Errand) -> str:
        """Send an errand's next message; returns its id."""
        rounds = errand.batches.popleft()
        return self._send(errand, Action.entries if errand.batches else errand.asks, rounds)

    def _reply(self, message_id: str, errand: Errand) -> Parcel[Reply] | InvalidMessage | None:
        """The reply to an errand's last message, or why there is none to read; None: not yet."""
        most = self._largest if errand.asks is Action.train and not errand.batches else 0
        try:
            return read_reply(self._grid, message_id, most)
        except InvalidMessage as error:
            return type(error)(str(error))  # its traceback would hold all that was read

    def _send(self, errand: Errand, action: Action, rounds: range) -> str:
        records = [
            FileInfo(bytes=record.bytes, sha256=record.sha256)
            for record in self._ledger.records[rounds.start - 1 : rounds.stop - 1]
        ]
        needed = records if self._method.entries_accumulate else records[-1:]
        request = Request(
            run=self._run,
            first=max(1, rounds.start),
            records=records,
            files=needed,
            date=self._date,
            train=action is Action.train,
            score=True if action is Action.score else None,
            secure=errand.letter if action is errand.asks else None,
        )
        files = [
            self._ledger.folder / self._ledger.records[round - 1].file
            for round in rounds[len(records) - len(needed) :]
        ]
        message = Message(
            pack(request, files),
            errand.node,
            action.value,
            # Longer than the fleet waits: a reply may lie here while others are being added up.
            ttl=2 * self._settings.deadline if self._settings.deadline else FOREVER,
            group_id=str(len(self._ledger) + 1),
        )
        # One at a time: Flower would hold the pieces of all of them at once.
        (message_id,) = self._grid.push_messages([message])
        return str(message_id)

    def _result(
        self, errand: Errand, arrived: Parcel[Reply] | InvalidMessage
    ) -> ClientResult | None:
        """The result that a member's reply holds, or None where it needs another message first."""
        member = errand.member
        assert member is not None
        client = member.client
        try:
            if isinstance(arrived, InvalidMessage):
                raise arrived
            reply = arrived.words
            if reply.refused is not None:
                return ClientResult(client, failure=f"it does not take part: {reply.refused}")
            if reply.name != client.name:
                raise InvalidMessage(f"it says that it is {reply.name}")
            member.held = self._rounds_held(reply.held)
            if reply.failure is not None:
                return ClientResult(client, failure=reply.failure)
            if errand.batches:
                return None
            if errand.asks is Action.train and reply.files:
                return ClientResult(client, self._saved(arrived, client), answer=reply.secure)
            if errand.asks is not Action.train and member.held == len(self._ledger):
                return ClientResult(client, scores=self._scores(reply), answer=reply.secure)
            if errand.restarts == RESTARTS:
                raise InvalidMessage(
                    f"its copy of the ledger still differs after {RESTARTS} attempts"
                )
            # It is not what it was thought to be.
            again = self._errand(member, len(self._ledger) + 1, asks=errand.asks)
            errand.batches, errand.restarts = again.batches, errand.restarts + 1
            return None
        except InvalidMessage as error:
            return ClientResult(client, failure=str(error), absent=isinstance(error, NoReply))

    def _saved(self, parcel: Parcel[Reply], client: Client) -> Path:
        """The update's file."""
        if len(parcel.words.files) != 1:
            raise InvalidMessage(f"expected one file, the update, got {len(parcel.words.files)}")
        path = self._folder / f"{client.name}.safetensors"
        parcel.save(0, path)
        return path

    def _scores(self, reply: Reply) -> ClientScores | None:
        """What a client's model scores on its own test rows."""
        if reply.scores is None:
            return None
        # Its experiment may end in an earlier round, in which it scores all that there is.
        known, values = main_scores_of(self._evaluation.metrics), reply.scores.values
        if strangers := values.keys() - known:
            raise InvalidMessage(f"it has a score {min(strangers)} that nobody asked for")
        return ClientScores(reply.scores.rows, {key: values.get(key, math.nan) for key in known})

    def _rounds_held(self, held: Held | None) -> int:
        """The rounds of the ledger that a site has; 0 where its copy is another."""
        if held is None or not 0 < held.round <= len(self._ledger):
            return 0
        return held.round if self._ledger.records[held.round - 1].sha256 == held.head else 0
