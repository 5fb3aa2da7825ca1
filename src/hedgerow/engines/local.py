"""The local engine: all clients on one base model, one after another or side by side.

Everything but the network is real: updates are serialised and read back, entries are applied from
their files. A client costs its trainables while it trains, and a few bytes an example otherwise.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from hedgerow import federation, tracking
from hedgerow.clock import Clock
from hedgerow.data import Held, KeptTokens
from hedgerow.errors import ClientFailed, UserError
from hedgerow.experiment import Experiment
from hedgerow.federation.fleet import ClientResult, Watcher
from hedgerow.federation.participant import example_level, train_client
from hedgerow.federation.secure import SecureClient, as_known, sum_of_round
from hedgerow.files import emptied
from hedgerow.methods.base import Client, ClientRound
from hedgerow.model import Model
from hedgerow.privacy.example_level import ExampleLevel
from hedgerow.privacy.noise import PRIVACY_KEY
from hedgerow.privacy.secure.letters import Ask, AskMasked
from hedgerow.runs.directory import TEST_DATA, TOKENS, RunDirectory, same_data
from hedgerow.runs.preparation import Prepared, prepare, with_date_of
from hedgerow.runs.scoring import Progress, Scorer
from hedgerow.runs.shelf import Shelf
from hedgerow.seeds import Seeds
from hedgerow.wire import Entry, Update
from hedgerow.workers import ALONE, Outcome, WorkerDied, Workers


class LocalFleet:
    """All clients of a run, in this process."""

    def __init__(
        self,
        experiment: Experiment,
        prepared: Prepared,
        directory: RunDirectory,
        say: Callable[[str], None] = lambda sentence: None,
        workers: Workers = ALONE,
    ) -> None:
        """Have nobody train yet.

        Args:
            say: told what a client says in its own log alone.
            workers: who train side by side.
        """
        self._say, self._workers = say, workers
        self._arriving = directory.path / "arriving"
        shutil.rmtree(self._arriving, ignore_errors=True)  # of a process that was killed
        self._experiment, self._prepared, self._directory = experiment, prepared, directory
        self._model = prepared.model
        self._seeds = Seeds(experiment.federation.seed)
        self._privacy: dict[str, ExampleLevel | None] = {}
        self._secure: dict[str, SecureClient] = {}
        self._scorer = Scorer(
            experiment,
            prepared.model,
            directory.ledger,
            prepared.test,
            prepared.tests,
            workers,
            prepared.shelf,
        )

    def gather(self) -> Sequence[Client]:
        """Clients of the run, in their order."""
        return self._prepared.clients

    @property
    def names(self) -> Sequence[str]:
        """Names of all clients of the experiment, in their order, also of those left out."""
        return self._prepared.names

    @property
    def population(self) -> int:
        """Number of clients of the run."""
        return len(self._prepared.clients)

    def ask(
        self, round: int, parent: str, letters: Sequence[tuple[Client, Ask]], clock: Clock
    ) -> Iterator[ClientResult]:
        """Have clients answer letters of a secure sum, one after another."""
        for client, letter in letters:
            try:
                answer = self._secure_of(client).answer(letter, round, parent)
                yield ClientResult(client, answer=answer)
            except ClientFailed as error:
                yield self._failed(client, round, error)

    def train(
        self,
        round: int,
        parent: str,
        clients: Sequence[Client],
        clock: Clock,
        letters: Mapping[str, AskMasked] | None = None,
    ) -> Iterator[ClientResult]:
        """Train clients, one after another or side by side; each borrows the model."""

        def learn(client: Client) -> Update | Path:
            update = self._trained(self._begun(client, round), parent, clock)
            if self._workers.is_alone:
                return update
            path = self._arriving / f"{client.name}.safetensors"
            with path.open("wb") as file:
                update.write(file)
            return path

        alone = self._workers.is_alone
        if not alone:
            self._experiment.method.load_kernels()
            for client in clients:
                # In here, so that all have one key where it is made in this round. What is kept of
                # it is not, since it goes on elsewhere.
                self._privacy_of(client)
            self._privacy.clear()
        with (
            nullcontext() if alone else emptied(self._arriving),
            closing(self._workers.each(learn, clients)) as outcomes,
        ):
            for client in clients:
                letter = None if letters is None else letters[client.name]
                # In a function, so that nothing holds its update while the next client trains.
                yield self._result(outcomes, client, round, parent, clock, letter)

    def _result(
        self,
        outcomes: Iterator[Outcome[Update | Path]],
        client: Client,
        round: int,
        parent: str,
        clock: Clock,
        letter: AskMasked | None,
    ) -> ClientResult:
        """What comes of the next client's training."""
        with nullcontext() if self._workers.is_alone else clock("train"):
            outcome = next(outcomes)
        try:
            return self._sent(client, outcome.get(), round, parent, clock, letter)
        except WorkerDied as error:
            return self._failed(client, round, ClientFailed(str(error), kind=str(error)))
        except ClientFailed as error:
            return self._failed(client, round, error)

    def _begun(self, client: Client, round: int) -> ClientRound:
        directory = self._directory
        return ClientRound(
            client,
            round,
            self._seeds,
            self._experiment.training,
            directory.memory(client.name, round),
            directory.ledger.read,
        )

    def _failed(self, client: Client, round: int, error: ClientFailed) -> ClientResult:
        """Result of a client without an update, which says no more of it than it may."""
        said = self._experiment.says.sentence(error)
        if said != str(error):
            self._say(f"{client.name}: round {round}: {error}")
        return ClientResult(client, failure=said)

    def _trained(self, client_round: ClientRound, parent: str, clock: Clock) -> Update:
        """A client's update; in a process of its own where there are several."""
        name = client_round.client.name
        examples, privacy = self._prepared.shards[name], self._privacy_of(client_round.client)
        return train_client(
            self._experiment, self._model, examples, client_round, parent, clock, privacy
        )

    def _sent(
        self,
        client: Client,
        update: Update | Path,
        round: int,
        parent: str,
        clock: Clock,
        letter: AskMasked | None,
    ) -> ClientResult:
        """What a client sends: its update, which may be in a file; or codes, where those are asked.

        Raises:
            ClientFailed: it cannot make codes.
        """
        complaint = None
        if letter is not None:
            with clock("update"):
                plain = Update.read(update) if isinstance(update, Path) else update
                ledger = self._directory.ledger
                known = as_known(client, ledger, self._experiment.expected(ledger.trained))
                secure = self._secure_of(client)
                update = secure.masked(plain, letter, known)
                complaint = secure.unopened
        if isinstance(update, Path):
            return ClientResult(client, update)
        with clock("wire"):
            return ClientResult(client, update.to_bytes(), answer=complaint)

    def _secure_of(self, client: Client) -> SecureClient:
        """A client's part in secure sums."""
        if client.name not in self._secure:
            sum_of = sum_of_round(self._experiment, lambda: self.population)
            assert sum_of is not None, "letters are sent for secure sums alone"
            self._secure[client.name] = SecureClient(client.name, sum_of)
        return self._secure[client.name]

    def _privacy_of(self, client: Client) -> ExampleLevel | None:
        """Example-level privacy of a client, whose record is read once."""
        if client.name not in self._privacy:
            directory = self._directory
            key_file, folder = directory.path / PRIVACY_KEY, directory.client_folder(client.name)
            self._privacy[client.name] = example_level(
                self._experiment,
                client.name,
                len(self._prepared.shards[client.name]),
                directory.ledger,
                key_file,
                folder,
            )
        return self._privacy[client.name]

    def advance(self, entry: Entry) -> None:
        """Advance the one model that all clients share."""
        self._scorer.advance(entry)

    def evaluate(self, progress: Progress) -> dict[str, Any]:
        """Scores of the global model; of each client's and their mean where there is no global."""
        return self._scorer.evaluate(self.gather, progress)


def run(
    experiment: Experiment,
    out: Path,
    watcher: Watcher,
    *,
    resume: bool = False,
    model: Model | None = None,
    held: Held | None = None,
    say: Callable[[str], None] | None = None,
    scored_on: Mapping[str, str] | None = None,
    fleet: type[LocalFleet] = LocalFleet,
    workers: Workers = ALONE,
    shelf: Shelf | None = None,
) -> None:
    """Run an experiment on this machine; the run directory is written as it goes.

    Args:
        resume: go on with the run that is in `out`, if one was begun.
        model: the unchanged base model where it is loaded already; the run changes it.
        held: the rows that the experiment calls `(memory)`.
        say: told, before training, what there is, what is left out of it, and what is other than
            before the run was resumed; None tells `watcher`.
        scored_on: digests that the test data must have, as `test_digests` has them, if any.
        fleet: who has the clients train.
        workers: who train clients, and score the model, side by side.
        shelf: has what runs before have made of the same model and data.

    Raises:
        UserError: something in the experiment or in `out` is wrong; nothing has been written.
        RunFailed: the run cannot go on; what it wrote so far is valid.
    """
    tracking.check(experiment.tracking)
    if resume:
        resume = RunDirectory.check_resumable(out, experiment)
        experiment = with_date_of(experiment, out)
    else:
        RunDirectory.check_free(out)
    # What was never in a file is not written into one.
    in_memory = held is not None and held.has_examples
    kept = None if in_memory else KeptTokens(out / TOKENS)
    prepared = prepare(experiment, model, held, shelf, kept)
    workers = workers.on(prepared.model.device.type)
    experiment = prepared.experiment
    say = say or watcher.say
    for note in prepared.notes:
        say(note)
    opener = RunDirectory.resume if resume else RunDirectory.create
    data = prepared.digests()
    for what, digest in (scored_on or {}).items():
        if not same_data(digest, data.get(what)):
            key = "data.test" if what == TEST_DATA else "data.client_test"
            raise UserError(
                f"{key}: the runs of this comparison were scored on other test data: give the "
                "same, or another --out"
            )
    with (
        workers.one_thread(),
        opener(out, experiment, prepared.base, data, prepared.trained) as directory,
    ):
        for change in directory.changes:
            say(change)
        rounds = experiment.federation.rounds
        if kept is not None and len(directory.ledger) < rounds:
            try:
                kept.save(prepared.examples)
            except (OSError, UserError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                say(f"a resume will have to tokenise again: {reason}")
        prepared = prepared.referenced()
        expected = experiment.expected(directory.ledger.trained)
        directory.ledger.replay(experiment.method, prepared.model, expected=expected)
        with tracking.tracked(experiment, directory, watcher) as tracked:
            everybody = fleet(experiment, prepared, directory, say, workers)
            federation.run(experiment, everybody, directory, tracked)
            if kept is not None:
                kept.forget()
