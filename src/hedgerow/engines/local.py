"""The local engine: all clients in this process, one after another, on one base model.

Everything but the network is real: updates are serialised and read back, entries are applied from
their files. A client costs its trainables while it trains, and a few bytes an example otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hedgerow import federation
from hedgerow.clock import Clock
from hedgerow.data import (
    Encoded,
    Row,
    Spool,
    check_columns,
    client_files,
    load_template,
    partition,
    read,
)
from hedgerow.errors import Diverged, UserError
from hedgerow.evaluation import TestSet
from hedgerow.evaluation.likelihood import max_positions
from hedgerow.evaluation.targets import Progress, load_test, score_method
from hedgerow.experiment import Experiment
from hedgerow.federation import Answer, Watcher
from hedgerow.ledger import Base
from hedgerow.methods.base import Client, Turn
from hedgerow.model import Model
from hedgerow.rundir import RunDirectory
from hedgerow.seeds import Seeds
from hedgerow.training.job import Job, learning_rate
from hedgerow.wire import Entry, Update


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked before anything is written."""

    model: Model
    base: Base
    clients: list[Client]
    shards: dict[str, Encoded]
    test: TestSet | None


def prepare(experiment: Experiment, model: Model | None = None) -> Prepared:
    """Load the model and tokenise everybody's data.

    Args:
        model: the base model where it is loaded already.

    Raises:
        UserError: naming what in the experiment does not fit.
    """
    model = model or Model.load(experiment.model)
    positions = max_positions(model.network)
    if experiment.data.max_length > positions:
        raise UserError(
            f"data.max_length: {experiment.data.max_length} is above the {positions} positions of "
            f"{model.name}: give at most {positions}"
        )
    shards = encode_clients(experiment, model.tokenizer)
    experiment.method.check(model, len(shards))
    if experiment.method.pools_data:
        shards = {"pooled": Encoded.concatenate(list(shards.values()))}
    clients = [
        Client(index, name, len(shard)) for index, (name, shard) in enumerate(shards.items())
    ]
    wanted = experiment.federation.clients_per_round
    if wanted is not None and wanted > len(clients) and not experiment.method.pools_data:
        raise UserError(
            f"federation.clients_per_round: {wanted} is above the {len(clients)} clients there are"
        )
    test = None
    if experiment.data.test is not None:
        test = load_test(experiment.data, experiment.evaluation, model)
    return Prepared(model, Base.of(model), clients, shards, test)


def encode_clients(experiment: Experiment, tokenizer: Any) -> dict[str, Encoded]:
    """Every client's tokenised examples, by name; files are read one at a time."""
    settings = experiment.data
    template = load_template(settings.prompt, tokenizer, settings.fields)
    spool = Spool()

    def encode(name: str, rows: list[Row]) -> Encoded:
        return spool.encode(name, rows, template, tokenizer, settings.max_length, settings.loss_on)

    def checked(source: str) -> list[Row]:
        rows = read(source, settings.split)
        check_columns(rows, settings.fields, source)
        return rows

    if settings.clients is not None:
        files = client_files(settings.clients)
        return {name: encode(name, checked(str(file))) for name, file in files.items()}
    assert settings.source is not None
    assert settings.partition is not None
    rows = checked(settings.source)
    parts = partition(rows, settings.partition, Seeds(experiment.federation.seed).derive("clients"))
    return {name: encode(name, [rows[i] for i in part]) for name, part in parts.items()}


class LocalFleet:
    """All clients of a run, in this process."""

    def __init__(self, experiment: Experiment, prepared: Prepared, directory: RunDirectory) -> None:
        self.clients: Sequence[Client] = prepared.clients
        self._experiment, self._prepared, self._directory = experiment, prepared, directory
        self._model = prepared.model
        self._seeds = Seeds(experiment.federation.seed)

    def train(
        self, round: int, parent: str, clients: Sequence[Client], clock: Clock
    ) -> Iterator[Answer]:
        """Train one client after another; each borrows the model and gives it back."""
        for client in clients:
            try:
                yield Answer(client.name, self._train_one(client, round, parent, clock))
            except Diverged as error:
                yield Answer(client.name, failure=str(error))
            except torch.OutOfMemoryError:
                why = "the device ran out of memory: a smaller training.batch_size may help"
                yield Answer(client.name, failure=why)
            finally:
                with clock("start"):
                    self._model.release()

    def _train_one(self, client: Client, round: int, parent: str, clock: Clock) -> bytes:
        method, training = self._experiment.method, self._experiment.training
        turn = Turn(client, round, self._seeds, self._directory.memory(client.name, round))
        job = Job(
            self._model.network,
            self._prepared.shards[client.name],
            training,
            learning_rate(training, round, self._experiment.federation.rounds),
            self._model.tokenizer.pad_token_id,
            order=self._seeds.numpy("batches", round, client.name),
            dropout_seed=self._seeds.derive("dropout", round, client.name),
        )
        with clock("start"):
            parameters = method.start(self._model, turn)
        with clock("train"):
            trained = method.train(job, turn, parameters)
        with clock("update"):
            tensors, about = method.update(self._model, turn, trained)
        with clock("wire"):
            return Update(
                *(method.name, round, client.name, parent, client.num_examples, trained.loss),
                *(tensors, about),
            ).encode()

    def advance(self, entry: Entry) -> None:
        """Advance the one model that all clients share."""
        self._experiment.method.apply(self._model, entry)

    def evaluate(self, progress: Progress) -> dict[str, Any]:
        """Scores of the global model; of each client's and their mean where there is no global."""
        if self._prepared.test is None:
            return {}
        return score_method(
            self._experiment.method,
            self._model,
            [client.name for client in self.clients],
            self._prepared.test,
            self._experiment.evaluation,
            progress,
        )


def run(
    experiment: Experiment,
    out: Path,
    watcher: Watcher,
    *,
    resume: bool = False,
    model: Model | None = None,
    on_prepared: Callable[[Prepared], None] = lambda prepared: None,
) -> None:
    """Run an experiment in this process; the run directory is written as it goes.

    Args:
        resume: go on with the run that is in `out`, if one was begun.
        model: the unchanged base model where it is loaded already; the run changes it.
        on_prepared: called when model and data are ready, before training.

    Raises:
        UserError: something in the experiment or in `out` is wrong; nothing has been written.
        RunFailed: the run cannot go on; what it wrote so far is valid.
    """
    if resume:
        resume = RunDirectory.check_resumable(out, experiment)
    else:
        RunDirectory.check_free(out)
    prepared = prepare(experiment, model)
    on_prepared(prepared)
    opener = RunDirectory.resume if resume else RunDirectory.create
    data = {name: shard.digest() for name, shard in prepared.shards.items()}
    trained = experiment.method.trained_shapes(prepared.model)
    with opener(out, experiment, prepared.base, data, trained) as directory:
        directory.ledger.replay(experiment.method, prepared.model)
        federation.run(experiment, LocalFleet(experiment, prepared, directory), directory, watcher)
