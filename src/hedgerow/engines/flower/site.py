"""What a site does: it checks what the server sends, keeps its copy of the ledger, and trains.

A site's folder is a run directory of its own, so that the result can be exported there:

    FOLDER/RUN/experiment.yaml    the experiment, with the site's own paths
    FOLDER/RUN/ledger/            the entries so far
    FOLDER/RUN/updates/NAME/      the last updates, and the digest of the data that they are from
    FOLDER/RUN/clients/NAME/      the client's memory from round to round; with example-level
                                  privacy, the key of its noise and the rounds it has trained
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hedgerow.clock import Clock
from hedgerow.data import Canaries, ClientData, Tokenized
from hedgerow.engines.flower.app import App, without_test
from hedgerow.engines.flower.messages import Held, OwnScores, Reply, Request, info
from hedgerow.engines.flower.node import SiteSettings, place_of
from hedgerow.errors import ClientFailed, InvalidMessage, NothingToLearn, UserError
from hedgerow.evaluation.scores import TestSet, in_round
from hedgerow.experiment import validate
from hedgerow.experiment.mistakes import check_trainer
from hedgerow.federation.participant import example_level, train_beside, train_client
from hedgerow.federation.secure import UNMASKED, SecureClient, as_known, sum_of_round
from hedgerow.files import replacing
from hedgerow.ledger import INDEX, Base, Ledger, Record
from hedgerow.methods.base import Client, ClientRound, check_entry
from hedgerow.model import Model
from hedgerow.names import MEMORY
from hedgerow.privacy.noise import PRIVACY_KEY
from hedgerow.privacy.secure.letters import Ask, AskMasked
from hedgerow.runs.directory import EXPERIMENT
from hedgerow.runs.memory import RoundMemory
from hedgerow.runs.personal import CLIENTS, RunModels
from hedgerow.runs.preparation import (
    check_fits,
    check_privacy,
    client_tests,
    notes_on_data,
    notes_on_model,
    referring,
    scored_beside,
    with_date,
)
from hedgerow.runs.scoring import score_clients
from hedgerow.seeds import Seeds
from hedgerow.settings import ClientFile, PrivacySettings
from hedgerow.terminal import say
from hedgerow.training.job import SealedExamples, TakesSteps
from hedgerow.wire import LARGEST_SENT, Entry, Update, header_limit

LONGEST_STAGE = 86400.0
"""Seconds that a stage of a secure sum may take where the experiment has no deadline."""


def of_node(app: Path, node: Mapping[str, object]) -> tuple[SiteSettings, Site]:
    """The site of a SuperNode.

    Args:
        app: the Flower app's folder.
        node: the SuperNode's node config.

    Raises:
        UserError: the node config or the app is wrong.
    """
    settings = validate(node, "the node config", SiteSettings)
    loaded = App.load(app)
    model = loaded.experiment.model
    if settings.model is not None:
        model = model.model_copy(update={"path": str(Path(settings.model).absolute())})
    if settings.device is not None:
        model = model.model_copy(update={"device": settings.device})
    own = ClientFile(name=settings.name, file=str(Path(settings.data).absolute()))
    tests = _own_test(loaded.experiment.data.client_test, settings)
    changes = {"clients": [own], "client_test": tests}
    changed = {
        "model": model,
        "data": loaded.experiment.data.model_copy(update=changes),
        "privacy": _own_privacy(loaded.experiment.privacy, settings.epsilon),
    }
    experiment = without_test(loaded.experiment.model_copy(update=changed))
    return settings, Site(replace(loaded, experiment=experiment), place_of(node))


def _own_test(asked: object, settings: SiteSettings) -> float | list[ClientFile] | None:
    """Test rows of a site's own, where the experiment asks for some (`data.client_test`)."""
    if asked is None or (settings.test is None and isinstance(asked, float)):
        return asked
    if settings.test is None:
        _say(settings.name, 'the node config has no test="…": the client is not scored by itself')
        return None
    return [ClientFile(name=settings.name, file=str(Path(settings.test).absolute()))]


def _own_privacy(asked: PrivacySettings | None, epsilon: float | None) -> PrivacySettings | None:
    """Privacy that keeps to a site's own largest ε, too.

    Raises:
        UserError: the experiment does not promise any, or what everybody can undo.
    """
    if epsilon is None:
        return asked
    if asked is None or asked.level != "example" or asked.seed is not None:
        raise UserError(
            f"the node config has epsilon={epsilon:g}, but the experiment does not hide single "
            "rows: it would need privacy.level example, without privacy.seed"
        )
    budget = epsilon if asked.epsilon is None else min(epsilon, asked.epsilon)
    return asked.model_copy(update={"epsilon": budget})


@dataclass(frozen=True)
class Script:
    """What a script of its own brings in the place of a site's files, and of hedgerow's steps."""

    trainer: TakesSteps
    num_examples: int
    base: Callable[[], Model]
    """Lends the base model as it was in the beginning, for whoever changes it."""
    before: Callable[[Path, str, datetime.date | None], None] | None = None
    """Called before each round's steps with the app's folder, the run's name, and the day that its
    chat template writes."""


def of_script(app: Path, name: str, folder: Path, script: Script) -> Site:
    """The site of a script.

    Args:
        app: the Flower app's folder.
        name: the client's.
        folder: as in the module's text.

    Raises:
        UserError: the app asks for what a script's trainer does not do, or has another base.
    """
    loaded = App.load(app)
    experiment, trainer = loaded.experiment, script.trainer.name
    training = experiment.training
    if training.keep_optimizer:
        _say(name, f"{trainer} begins each round with an optimiser of its own")
        training = training.model_copy(update={"keep_optimizer": False})
    check_trainer(trainer, experiment.method, training, experiment.privacy)
    if experiment.audit is not None and experiment.audit.client == name:
        raise UserError(
            f"audit.client: canaries would be among the rows of {name}, which {trainer}"
            " has: name another client"
        )
    changes = {
        "training": training,
        "model": experiment.model.model_copy(update={"path": MEMORY}),
        "data": experiment.data.model_copy(
            update={"clients": [ClientFile(name=name, file=MEMORY)], "client_test": None}
        ),
    }
    if difference := Base.of(script.base()).difference(loaded.base):
        raise UserError(f"{trainer} is not for the federation's base: {difference}")
    if experiment.data.client_test is not None:
        _say(name, f"{trainer} has no test rows: the client is not scored by itself")
    changed = without_test(experiment.model_copy(update=changes))
    before = None if script.before is None else partial(script.before, app)
    return Site(replace(loaded, experiment=changed), folder, script=script, before=before)


class Refused(Exception):
    """The site does not take part; `public` says why without naming anything of its own."""

    def __init__(self, public: str, own: str | None = None) -> None:
        super().__init__(own or public)
        self.public = public


class Site:
    """A process that trains for one client (in a simulation, for several), on one base model."""

    def __init__(
        self,
        app: App,
        folder: Path,
        memory: Path | None = None,
        script: Script | None = None,
        before: Callable[[str, datetime.date | None], None] | None = None,
    ) -> None:
        """Load nothing before the first request.

        Args:
            app: with this site's model and data in its experiment.
            folder: as in the module's text.
            memory: the folder of the clients' memories, where it is not in `folder`.
            script: has the model and the data, and trains.
            before: called before each round's steps with the run's name and its day.
        """
        self._app, self._folder, self._memory = app, folder, memory
        self._script, self._before = script, before
        self._experiment = app.experiment
        self._seeds = Seeds(self._experiment.federation.seed)
        self._run = ""
        self._model: Model | None = None
        self._shapes: Mapping[str, Sequence[int]] = {}
        self._applied: list[str] = []
        self._data: ClientData | None = None
        self._examples: dict[str, Tokenized | SealedExamples] = {}
        self._tests: dict[str, TestSet | None] = {}
        self._secure: dict[str, SecureClient] = {}
        self._told: set[tuple[str, str]] = set()
        """What has been said already, and of whom."""

    def handle(
        self, name: str, request: Request, files: Sequence[Path]
    ) -> tuple[Reply, Path | None]:
        """Do what a request asks of a client.

        Args:
            files: the request's, at the end of `request.records`; they are moved or deleted.

        Returns:
            The reply, and the update's file where there is one.
        """
        try:
            return self._handled(name, request, files)
        except Refused as refusal:
            _say(name, f"refused: {refusal}")
            return Reply(name=name, refused=refusal.public), None
        except NothingToLearn as error:
            _say(name, f"refused: {error}")
            return Reply(name=name, refused="it has no examples to learn from"), None
        except UserError as error:
            return wrong_settings(name, error), None
        finally:
            for file in files:
                file.unlink(missing_ok=True)

    @property
    def is_done(self) -> bool:
        """Whether this site has the entries of all rounds."""
        ledger = self.place / "ledger"
        rounds = self._experiment.federation.rounds
        return (ledger / INDEX).exists() and len(Ledger.open(ledger)) >= rounds

    @property
    def place(self) -> Path:
        """The folder of the run that was asked for last, a run directory."""
        return self._folder / self._run

    @property
    def awaits(self) -> float:
        """Seconds that others may take before a sum that a client has a part in goes on.

        Its keys are in memory alone, so that the process has to live as long.
        """
        if not any(secure.has_part for secure in self._secure.values()):
            return 0.0
        return self._experiment.federation.deadline or LONGEST_STAGE

    def _handled(
        self, name: str, request: Request, files: Sequence[Path]
    ) -> tuple[Reply, Path | None]:
        self._begin(request.run, request.date)
        self._load()
        examples = self._examples_of(name)
        ledger = self._ledger()
        complete = True
        try:
            if request.records or request.train or request.score or request.secure:
                complete = self._catch_up(ledger, request, files)
        except InvalidMessage as error:
            raise Refused(f"the server sent an entry that it does not accept: {error}") from None
        held = Held(round=len(ledger), head=ledger.head)
        reply = Reply(name=name, num_examples=self._client(name).num_examples, held=held)
        if request.score and complete:
            return reply.model_copy(update={"scores": self._own_scores(name, ledger)}), None
        secure, letter = self._secure_of(name), request.secure
        if not complete or (not request.train and letter is None):
            return reply, None
        if (secure is None) != (letter is None):
            raise Refused("the server asks otherwise than federation.secure says")
        try:
            if secure is None or letter is None:
                update = self._train(name, ledger, examples)
            elif request.train:
                update = self._masked(
                    name, ledger, self._train(name, ledger, examples), secure, letter
                )
                reply = reply.model_copy(update={"secure": secure.unopened})
            else:
                answer = secure.answer(letter, len(ledger) + 1, ledger.head)
                return reply.model_copy(update={"secure": answer}), None
        except ClientFailed as error:
            _say(name, f"round {len(ledger) + 1}: {error}")
            said = self._experiment.says.sentence(error)
            return reply.model_copy(update={"failure": said}), None
        return reply.model_copy(update={"files": [info(update)]}), update

    def follow(self, name: str, run: str, date: datetime.date | None) -> None:
        """Train the next round beside another process, which makes the update; writes nothing.

        Args:
            name: the client's.
            run: the run's name; what this site's folder has of it is up to date.
            date: as `Request.date`.

        Raises:
            ClientFailed: training diverged, there as here.
        """
        assert self._script is not None
        self._turn_to(run, date)
        self._load()
        ledger = self._ledger()
        examples = self._sealed()
        self._examples[name] = examples
        client_round = self._round_of(name, ledger)
        model = self._advanced(ledger)
        train_beside(self._experiment, model, examples, client_round, self._script.trainer)

    def _begin(self, run: str, date: datetime.date | None) -> None:
        """Forget another run, or the same with another day.

        Args:
            run: the run's name.
            date: day that its chat template writes; None for the app's.
        """
        if not self._turn_to(run, date):
            return
        self.place.mkdir(parents=True, exist_ok=True)
        with replacing(self.place / EXPERIMENT) as file:
            file.write(self._experiment.dump().encode())

    def _turn_to(self, run: str, date: datetime.date | None) -> bool:
        """Forget another run, or the same with another day; returns whether there was one."""
        experiment = with_date(self._app.experiment, date)
        if (run, experiment) == (self._run, self._experiment):
            return False
        self._run, self._experiment = run, experiment
        self._model, self._data, self._examples, self._tests = None, None, {}, {}
        self._secure = {}
        return True

    def _load(self) -> None:
        """Have the base model, unless it is here."""
        if self._model is None:
            # A script's has been compared with the run's already.
            model = self._loaded() if self._script is None else self._script.base()
            check_fits(self._experiment, model, len(self._app.clients))
            self._shapes = self._experiment.method.trained_shapes(model)
            self._model, self._applied = model, []

    def _loaded(self) -> Model:
        """The base model of the site's folder, which is compared with the run's."""
        settings = self._experiment.model
        if Path(settings.path).is_absolute() and not Path(settings.path).is_dir():
            raise UserError(
                f'the node config needs model="…", this site\'s copy of {self._app.base.name}: '
                f"{settings.path} is no folder"
            )
        model = Model.load(settings)
        if difference := Base.of(model).difference(self._app.base):
            raise Refused(
                f"it has another base model: {difference}", f"{settings.path}: {difference}"
            )
        return model

    def _examples_of(self, name: str) -> Tokenized | SealedExamples:
        """A client's examples; those that it began the run with."""
        if name not in self._app.clients:
            raise Refused(f"the experiment has no client {name}, only {_listed(self._app.clients)}")
        if name not in self._examples:
            self._examples[name] = self._read(name) if self._script is None else self._counted(name)
        return self._examples[name]

    def _read(self, name: str) -> Tokenized:
        """The examples of a client's file."""
        assert self._model is not None
        data = self._data = self._data or self._read_settings(self._model)
        try:
            examples = data.tokenize(name)
        finally:
            # Taken, or they would be counted on top of these next time.
            self._tell(name, data.remarks.take())
        self._tell(name, notes_on_data({name: examples}))
        check_privacy(self._experiment, name, len(examples))
        self._check_unchanged(name, examples.digest())
        return self._referring(examples)

    def _counted(self, name: str) -> SealedExamples:
        """The examples of a script, compared with those that the run began with by their number."""
        assert self._script is not None
        self._check_unchanged(name, f"{self._script.num_examples} rows of a script's own")
        return self._sealed()

    def _sealed(self) -> SealedExamples:
        """The examples of a script, of which no more is known than their number."""
        assert self._script is not None
        trainer, method = self._script.trainer.name, self._experiment.method.name
        return SealedExamples(
            range(self._script.num_examples),
            f"{trainer} has the rows, which {method} would read: take another method",
        )

    def _check_unchanged(self, name: str, digest: str) -> None:
        """Raise `Refused` unless a client's data have the digest that the run began with."""
        path = self.place / "updates" / name / "data.sha256"
        if path.exists() and path.read_text() != digest:
            raise Refused("its data have changed since the run began")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(digest.encode())

    def _referring(self, examples: Tokenized) -> Tokenized:
        """Examples with what the objective compares with."""
        if self._experiment.objective.refers_to != "base":
            return examples
        return referring(self._experiment, self._base(), examples)

    def _base(self) -> Model:
        """The base model, loaded anew where entries have been applied to it."""
        if self._applied:
            self._model = None
            self._load()
        assert self._model is not None
        return self._model

    def _client(self, name: str) -> Client:
        """A client, whose examples have been read, as the server knows it."""
        count = self._experiment.says.count(len(self._examples[name]))
        return Client(self._app.clients.index(name), name, count)

    def _read_settings(self, model: Model) -> ClientData:
        """The clients' data, which are read later; says what a run does of its model."""
        data = ClientData(
            self._experiment.data,
            model.tokenizer,
            self._seeds,
            vocabulary_size=model.vocabulary_size,
            canaries=Canaries.of(self._experiment.audit, self._seeds),
            learns=self._experiment.objective.learns,
        )
        template, method = data.encoder.template, self._experiment.method
        self._tell(self._app.base.name, notes_on_model(model, template, method))
        return data

    def _tell(self, whose: str, sentences: Iterable[str]) -> None:
        """Say what this process has not said of a client, or of the base model, before."""
        for sentence in sentences:
            if (whose, sentence) not in self._told:
                self._told.add((whose, sentence))
                _say(whose, sentence)

    def _ledger(self) -> Ledger:
        """This site's copy."""
        folder = self.place / "ledger"
        if (folder / INDEX).exists():
            return Ledger.open(folder)
        return Ledger.create(folder, self._app.base, self._shapes)

    def _catch_up(self, ledger: Ledger, request: Request, files: Sequence[Path]) -> bool:
        """Make the copy the server's, up to `request.records`; returns whether that was possible.

        Raises:
            InvalidMessage: an entry is not what the method makes for this model.
        """
        assert self._model is not None
        records = [
            Record(round=round, bytes=entry.bytes, sha256=entry.sha256)
            for round, entry in enumerate(request.records, start=request.first)
        ]
        if request.first > len(ledger) + 1 or len(files) > len(records):
            return False
        same = _common(ledger.records[request.first - 1 :], records)
        if not self._experiment.method.entries_accumulate:
            same = min(same, len(records) - len(files))  # what comes may be missing here
        here = [None] * (len(records) - len(files)) + list(files)
        new = list(zip(records, here, strict=True))[same:]
        parent = ledger.parent(request.first + same)
        for record, file in new:  # nothing is forgotten before all that comes has been checked
            if file is None and self._experiment.method.entries_accumulate:
                return False
            if file is not None:
                self._check(record, file, parent)
            parent = record.sha256
        ledger.truncate(request.first - 1 + same)  # beyond it is another history than the server's
        for record, file in new:
            ledger.adopt(record, file)
        return True

    def _check(self, record: Record, file: Path, parent: str) -> None:
        """Raise `InvalidMessage` unless a file is the entry that comes after `parent`."""
        if info(file).model_dump() != {"bytes": record.bytes, "sha256": record.sha256}:
            raise InvalidMessage(f"size and SHA-256 of round {record.round} must be as announced")
        try:
            entry = Entry.read(file, header_limit(self._shapes, len(self._app.clients)))
        except UserError:
            raise InvalidMessage(f"the entry of round {record.round} cannot be read") from None
        expected = self._experiment.expected(self._shapes)
        check_entry(
            entry, self._experiment.method, self._shapes, record.round, parent, expected=expected
        )
        if strangers := {p.client for p in entry.participants} - set(self._app.clients):
            raise InvalidMessage(f"participant {min(strangers)} is not a client of the experiment")

    def _train(self, name: str, ledger: Ledger, examples: Tokenized | SealedExamples) -> Path:
        """The client's update of the next round, in a file."""
        round, parent = len(ledger) + 1, ledger.head
        folder = self.place / "updates" / name
        path = folder / f"{round:04d}-{parent[:16]}.safetensors"
        if path.exists():
            # Asked once more, as after a reply that was lost: it would come to the same bytes.
            return path
        _say(name, f"round {round}: training")
        update = self._update_of(name, ledger, examples)
        before = sorted(folder.glob("*.safetensors"), key=lambda old: old.stat().st_mtime_ns)
        with replacing(path) as file:
            update.write(file)
        for old in before[:-1]:  # the last may still be on its way
            old.unlink()
        numbers = {"train loss": update.train_loss, "epsilon": update.epsilon}
        said = [f"{what} {value:.4g}" for what, value in numbers.items() if value is not None]
        _say(name, f"round {round}: {', '.join(said) or 'trained'}")
        return path

    def _update_of(self, name: str, ledger: Ledger, examples: Tokenized | SealedExamples) -> Update:
        """The client's update of the round after the ledger's last."""
        client_round = self._round_of(name, ledger)
        model = self._advanced(ledger)
        if self._before is not None:
            self._before(self._run, self._experiment.data.template.date)
        own = self._memories / name
        privacy = example_level(
            self._experiment, name, len(examples), ledger, own / PRIVACY_KEY, own
        )
        return train_client(
            self._experiment,
            model,
            examples,
            client_round,
            ledger.head,
            Clock(),
            privacy,
            None if self._script is None else self._script.trainer,
        )

    def _round_of(self, name: str, ledger: Ledger) -> ClientRound:
        """The client's part in the round after the ledger's last."""
        round = len(ledger) + 1
        counts = partial(ledger.took_part, name)
        memory = RoundMemory(self._memories / name, round, counts, ledger.parent)
        self._check_memory(name, ledger, memory)
        return ClientRound(
            self._client(name), round, self._seeds, self._experiment.training, memory, ledger.read
        )

    def _secure_of(self, name: str) -> SecureClient | None:
        """A client's part in secure sums; None where the experiment has none."""
        sum_of = sum_of_round(self._experiment, lambda: len(self._app.clients))
        if sum_of is None:
            return None
        if name not in self._secure:
            self._secure[name] = SecureClient(name, sum_of, self._memories / name / UNMASKED)
        return self._secure[name]

    def _masked(
        self, name: str, ledger: Ledger, update: Path, secure: SecureClient, letter: Ask
    ) -> Path:
        """The masked codes of an update, in a file beside it."""
        if not isinstance(letter, AskMasked):
            raise Refused("the server asks otherwise than federation.secure says")
        known = as_known(self._client(name), ledger, self._experiment.expected(self._shapes))
        masked = secure.masked(Update.read(update), letter, known)
        path = update.with_name(f"masked-{update.name}")
        with replacing(path) as file:
            masked.write(file)
        return path

    def _check_memory(self, name: str, ledger: Ledger, memory: RoundMemory) -> None:
        """Say so where a client has nothing left of its last round, as after a rollback.

        Raises:
            ClientFailed: it cannot begin anew.
        """
        method, last = self._experiment.method, ledger.last_round(name)
        if not (method.clients_remember or self._experiment.training.keep_optimizer):
            return
        if memory.lacks(last):
            what = f"what it kept of round {last} is not there any more"
            if not method.clients_may_forget:
                raise ClientFailed(
                    f"{what}, without which {method.name} would go wrong",
                    kind="what it kept of its last round is not there any more",
                )
            _say(name, f"round {len(ledger) + 1}: {what}, so that it begins anew without it")

    def _own_scores(self, name: str, ledger: Ledger) -> OwnScores | None:
        """Scores of the client's model on its own test rows; None where it has none."""
        test = self._test_of(name) if self._script is None else None
        if test is None:
            return None
        model, rounds = self._advanced(ledger), self._experiment.federation.rounds
        settings = in_round(self._experiment.evaluation, len(ledger), rounds)
        models = RunModels(self._experiment.method, ledger, len(ledger), self._memories)
        found = score_clients(models, model, {name: test}, settings)[name]
        finite = {key: value for key, value in found.values.items() if abs(value) <= LARGEST_SENT}
        shown = ", ".join(f"{key} {value:.4g}" for key, value in finite.items())
        _say(name, f"round {len(ledger)}: {found.rows} test rows: {shown or 'no finite score'}")
        return OwnScores(rows=self._experiment.says.count(found.rows), values=finite)

    def _test_of(self, name: str) -> TestSet | None:
        if name not in self._tests:
            assert self._model is not None
            assert self._data is not None  # the client's examples have been read
            tests, without = client_tests(self._experiment, self._model, self._data, [name])
            self._tell(name, without)
            test = tests.get(name)
            if test is not None and test.examples.other is not None:
                test = scored_beside(test, self._experiment, self._base())
            self._tests[name] = test
        return self._tests[name]

    def _advanced(self, ledger: Ledger) -> Model:
        """The model at the ledger's head."""
        hashes = [record.sha256 for record in ledger.records]
        if self._applied != hashes[: len(self._applied)]:
            self._model = None
            self._load()
        assert self._model is not None
        model, self._model = self._model, None  # half advanced, it would be nobody's
        experiment, applied = self._experiment, len(self._applied)
        expected = experiment.expected(ledger.trained)
        ledger.replay(experiment.method, model, after=applied, expected=expected)
        self._model, self._applied = model, hashes
        return model

    @property
    def _memories(self) -> Path:
        """The folder of the clients' memories."""
        return self._memory or self.place / CLIENTS


def wrong_settings(name: str, error: UserError) -> Reply:
    """Say what is wrong with a site here; the sentence may name paths, so the server gets less."""
    _say(name, str(error))
    return Reply(name=name, refused="its own settings or data are wrong: its log says more")


def _common(first: Sequence[Record], second: Sequence[Record]) -> int:
    """How many records both begin with."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" …" if len(names) > 10 else "")


def _say(name: str, sentence: str) -> None:
    say(f"hedgerow: {name}: {sentence}")
