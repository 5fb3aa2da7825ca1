"""The local engine: all clients in this process, one after another, on one base model.

Everything but the network is real: updates are serialised and read back, entries are applied from
their files. A client costs its trainables while it trains, and a few bytes an example otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hedgerow import federation, tracking
from hedgerow.clock import Clock
from hedgerow.data import ClientData, Held, Tokenized
from hedgerow.errors import ClientFailed, UserError
from hedgerow.evaluation.scores import TestSet
from hedgerow.experiment import Experiment
from hedgerow.federation.fleet import ClientResult, Watcher
from hedgerow.federation.participant import check_max_length, train_client
from hedgerow.ledger import Base
from hedgerow.methods.base import Client, ClientRound
from hedgerow.model import Model
from hedgerow.runs.directory import TEST_DATA, RunDirectory
from hedgerow.runs.scoring import Progress, Scorer, load_test
from hedgerow.seeds import Seeds
from hedgerow.wire import Entry

MOST_NAMED = 10
"""Clients that are named where several are left out for one reason."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked before anything is written."""

    model: Model
    base: Base
    clients: list[Client]
    shards: dict[str, Tokenized]
    test: TestSet | None
    names: Sequence[str] = ()
    """Everybody whom the experiment names, in order; of `clients` some may be left out."""
    remarks: Sequence[str] = ()
    """Sentences on rows and clients that are left out."""

    @property
    def note(self) -> str:
        """What there is, and what is left out of it, for people."""
        examples = sum(len(shard) for shard in self.shards.values())
        note = f"{self.base.name}, {len(self.clients)} clients, {examples:,} examples"
        truncated = sum(shard.truncated for shard in self.shards.values())
        dropped = sum(shard.dropped for shard in self.shards.values())
        if truncated:
            note += f", {truncated:,} cut at max_length"
        if dropped:
            note += f", {dropped:,} dropped (no answer left within max_length)"
            for name, shard in self.shards.items():
                if shard.dropped > len(shard):
                    total = len(shard) + shard.dropped
                    note += f"\n{name} keeps {len(shard):,} of {total:,} examples"
        return "\n".join([note, *self.remarks])


def prepare(
    experiment: Experiment, model: Model | None = None, held: Held | None = None
) -> Prepared:
    """Load the model and tokenise everybody's data.

    Args:
        experiment: names them.
        model: the base model where it is loaded already.
        held: the rows that the experiment calls `(memory)`.

    Raises:
        UserError: naming what in the experiment does not fit.
    """
    model = model or Model.load(experiment.model)
    check_max_length(model, experiment.data.max_length)
    held = held or Held()
    data = ClientData(experiment.data, model.tokenizer, Seeds(experiment.federation.seed), held)
    shards, unusable = data.tokenize_all()
    remarks = [*data.remarks.sentences(), *left_out(unusable)]
    experiment.method.check(model, len(data.names), experiment.training)
    if experiment.method.pools_data:
        shards = {"pooled": Tokenized.concatenate(list(shards.values()))}
    places = {name: index for index, name in enumerate(data.names)}  # also of those left out
    clients = [Client(places.get(name, 0), name, len(shard)) for name, shard in shards.items()]
    wanted = experiment.federation.clients_per_round
    if wanted is not None and wanted > len(data.names) and not experiment.method.pools_data:
        raise UserError(
            f"federation.clients_per_round: {wanted} is above the {len(data.names)} clients there "
            "are"
        )
    test = None
    if experiment.data.test is not None:
        test = load_test(experiment.data, experiment.evaluation, model, held.test)
        remarks += [f"test data: {sentence}" for sentence in test.remarks]
    return Prepared(model, Base.of(model), clients, shards, test, data.names, remarks)


def left_out(unusable: Mapping[str, str]) -> list[str]:
    """Sentences on clients that are left out, by name, one for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, why in unusable.items():
        by_reason.setdefault(why, []).append(name)
    return [
        f"{len(names)} {'client' if len(names) == 1 else 'clients'} left out "
        f"({', '.join(names[:MOST_NAMED])}{' …' if len(names) > MOST_NAMED else ''}): {why}"
        for why, names in by_reason.items()
    ]


class LocalFleet:
    """All clients of a run, in this process."""

    def __init__(self, experiment: Experiment, prepared: Prepared, directory: RunDirectory) -> None:
        self._experiment, self._prepared, self._directory = experiment, prepared, directory
        self._model = prepared.model
        self._seeds = Seeds(experiment.federation.seed)
        names = [client.name for client in prepared.clients]
        self._scorer = Scorer(experiment, prepared.model, names, prepared.test)

    def gather(self) -> Sequence[Client]:
        """Clients of the run, in their order."""
        return self._prepared.clients

    def train(
        self, round: int, parent: str, clients: Sequence[Client], clock: Clock
    ) -> Iterator[ClientResult]:
        """Train one client after another; each borrows the model and gives it back."""
        for client in clients:
            memory = self._directory.memory(client.name, round)
            past = self._directory.ledger.read
            client_round = ClientRound(
                client, round, self._seeds, self._experiment.training, memory, past
            )
            examples = self._prepared.shards[client.name]
            try:
                yield self._trained(client_round, examples, parent, clock)
            except ClientFailed as error:
                yield ClientResult(client, failure=str(error))

    def _trained(
        self, client_round: ClientRound, examples: Tokenized, parent: str, clock: Clock
    ) -> ClientResult:
        update = train_client(self._experiment, self._model, examples, client_round, parent, clock)
        with clock("wire"):
            return ClientResult(client_round.client, update.to_bytes())

    def advance(self, entry: Entry) -> None:
        """Advance the one model that all clients share."""
        self._scorer.advance(entry)

    def evaluate(self, progress: Progress) -> dict[str, Any]:
        """Scores of the global model; of each client's and their mean where there is no global."""
        return self._scorer.evaluate(progress)


def run(
    experiment: Experiment,
    out: Path,
    watcher: Watcher,
    *,
    resume: bool = False,
    model: Model | None = None,
    held: Held | None = None,
    on_prepared: Callable[[Prepared], None] = lambda prepared: None,
    fleet: type[LocalFleet] = LocalFleet,
) -> None:
    """Run an experiment in this process; the run directory is written as it goes.

    Args:
        resume: go on with the run that is in `out`, if one was begun.
        model: the unchanged base model where it is loaded already; the run changes it.
        held: the rows that the experiment calls `(memory)`.
        on_prepared: called when model and data are ready, before training.
        fleet: who has the clients train.

    Raises:
        UserError: something in the experiment or in `out` is wrong; nothing has been written.
        RunFailed: the run cannot go on; what it wrote so far is valid.
    """
    tracking.check(experiment.tracking)
    if resume:
        resume = RunDirectory.check_resumable(out, experiment)
    else:
        RunDirectory.check_free(out)
    prepared = prepare(experiment, model, held)
    on_prepared(prepared)
    opener = RunDirectory.resume if resume else RunDirectory.create
    data = {name: shard.digest() for name, shard in prepared.shards.items()}
    if prepared.test is not None:
        data[TEST_DATA] = prepared.test.examples.digest()
    trained = experiment.method.trained_shapes(prepared.model)
    with opener(out, experiment, prepared.base, data, trained) as directory:
        directory.ledger.replay(experiment.method, prepared.model)
        with tracking.tracked(experiment, directory, watcher) as tracked:
            federation.run(experiment, fleet(experiment, prepared, directory), directory, tracked)
