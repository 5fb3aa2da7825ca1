"""The local engine: all clients in this process, one after another, on one base model.

Everything but the network is real: updates are serialised and read back, entries are applied from
their files. A client costs its trainables while it trains, and a few bytes an example otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hedgerow import federation, tracking
from hedgerow.clock import Clock
from hedgerow.data import Held, Tokenized
from hedgerow.errors import ClientFailed, UserError
from hedgerow.experiment import Experiment
from hedgerow.federation.fleet import ClientResult, Watcher
from hedgerow.federation.participant import example_level, train_client
from hedgerow.federation.secure import SecureClient, as_known, sum_of_round
from hedgerow.methods.base import Client, ClientRound
from hedgerow.model import Model
from hedgerow.privacy.example_level import ExampleLevel
from hedgerow.privacy.noise import PRIVACY_KEY
from hedgerow.privacy.secure.letters import Ask, AskMasked
from hedgerow.runs.directory import TEST_DATA, RunDirectory, same_data
from hedgerow.runs.preparation import Prepared, prepare, with_date_of
from hedgerow.runs.scoring import Progress, Scorer
from hedgerow.seeds import Seeds
from hedgerow.wire import Entry


class LocalFleet:
    """All clients of a run, in this process."""

    def __init__(
        self,
        experiment: Experiment,
        prepared: Prepared,
        directory: RunDirectory,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Have nobody train yet.

        Args:
            say: told what a client says in its own log alone.
        """
        self._say = say
        self._experiment, self._prepared, self._directory = experiment, prepared, directory
        self._model = prepared.model
        self._seeds = Seeds(experiment.federation.seed)
        self._privacy: dict[str, ExampleLevel | None] = {}
        self._secure: dict[str, SecureClient] = {}
        self._scorer = Scorer(
            experiment, prepared.model, directory.ledger, prepared.test, prepared.tests
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
        """Train one client after another; each borrows the model and gives it back."""
        for client in clients:
            memory = self._directory.memory(client.name, round)
            past = self._directory.ledger.read
            client_round = ClientRound(
                client, round, self._seeds, self._experiment.training, memory, past
            )
            examples = self._prepared.shards[client.name]
            try:
                letter = None if letters is None else letters[client.name]
                yield self._trained(client_round, examples, parent, clock, letter)
            except ClientFailed as error:
                yield self._failed(client, round, error)

    def _failed(self, client: Client, round: int, error: ClientFailed) -> ClientResult:
        """Result of a client without an update, which says no more of it than it may."""
        said = self._experiment.says.sentence(error)
        if said != str(error):
            self._say(f"{client.name}: round {round}: {error}")
        return ClientResult(client, failure=said)

    def _trained(
        self,
        client_round: ClientRound,
        examples: Tokenized,
        parent: str,
        clock: Clock,
        letter: AskMasked | None,
    ) -> ClientResult:
        privacy = self._privacy_of(client_round.client)
        update = train_client(
            self._experiment, self._model, examples, client_round, parent, clock, privacy
        )
        client, ledger, complaint = client_round.client, self._directory.ledger, None
        if letter is not None:
            with clock("update"):
                known = as_known(client, ledger, self._experiment.expected(ledger.trained))
                secure = self._secure_of(client)
                update = secure.masked(update, letter, known)
                complaint = secure.unopened
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
) -> None:
    """Run an experiment in this process; the run directory is written as it goes.

    Args:
        resume: go on with the run that is in `out`, if one was begun.
        model: the unchanged base model where it is loaded already; the run changes it.
        held: the rows that the experiment calls `(memory)`.
        say: told, before training, what there is, what is left out of it, and what is other than
            before the run was resumed; None tells `watcher`.
        scored_on: digests that the test data must have, as `test_digests` has them, if any.
        fleet: who has the clients train.

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
    prepared = prepare(experiment, model, held)
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
    with opener(out, experiment, prepared.base, data, prepared.trained) as directory:
        for change in directory.changes:
            say(change)
        prepared = prepared.referenced()
        expected = experiment.expected(directory.ledger.trained)
        directory.ledger.replay(experiment.method, prepared.model, expected=expected)
        with tracking.tracked(experiment, directory, watcher) as tracked:
            everybody = fleet(experiment, prepared, directory, say)
            federation.run(experiment, everybody, directory, tracked)
