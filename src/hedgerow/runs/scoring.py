"""Scoring of models: that of a running method, a run's after a round, or one in a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

from hedgerow.data import ClientData, Records
from hedgerow.errors import UserError
from hedgerow.evaluation.measuring import derived
from hedgerow.evaluation.metrics import check_metrics, main_scores_of, metrics_of
from hedgerow.evaluation.scores import TestSet, evaluate, in_round
from hedgerow.experiment import Experiment, apply_overrides, validate
from hedgerow.ledger import Ledger
from hedgerow.methods.base import Client
from hedgerow.model import Model, max_positions
from hedgerow.runs.opening import Loader, check_client, check_round, model_at, opened
from hedgerow.runs.personal import RunModels
from hedgerow.runs.preparation import (
    check_causal,
    client_tests,
    load_test,
    notes_on_scoring,
    scored_beside,
)
from hedgerow.runs.rows import ROWS_BY_CLIENT
from hedgerow.runs.shelf import Shelf
from hedgerow.seeds import Seeds
from hedgerow.settings import DEFAULT_TEST, Evaluation, EvaluationSettings, TextSettings
from hedgerow.wire import Entry
from hedgerow.workers import ALONE, Workers

Progress = Callable[[int, int], None]
"""Callback that is told how many forward passes or answers are done, of how many."""


MERGED_ERROR = "merged_error"
"""Key, in a round's row, of what `model.merged_rank` has cut off so far, at most: the Frobenius
norm of it relative to that of all that is kept beside the weights."""


class Scorer:
    """The global model of a run, which entries advance, and its scores."""

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        ledger: Ledger,
        test: TestSet | None,
        tests: Mapping[str, TestSet] | None = None,
        workers: Workers = ALONE,
        shelf: Shelf | None = None,
    ) -> None:
        """Score the model at the ledger's head.

        Args:
            experiment: says how.
            model: at the head, too.
            ledger: the run's.
            test: test data for all; None for none.
            tests: test rows of clients, by name, for the models that they have.
            workers: who take batches side by side.
            shelf: has what the base of other runs has scored.
        """
        self._workers, self._shelf = workers, shelf or Shelf()
        self._experiment, self._model, self._ledger = experiment, model, ledger
        self._test, self._tests = test, tests or {}

    def advance(self, entry: Entry) -> None:
        """Advance the model by one entry."""
        self._experiment.method.apply(self._model, entry)

    def evaluate(
        self, gather: Callable[[], Sequence[Client]], progress: Progress
    ) -> dict[str, Any]:
        """Scores of the model; of each client's and their mean where there is no global one.

        Those of clients' own test rows are beside them (`over_clients`), and with
        `model.merged_rank` what was cut off. Without either, and test data, they are empty.

        Args:
            gather: gives the run's clients, where they have models of their own.
        """
        method, rounds = self._experiment.method, self._experiment.federation.rounds
        settings = in_round(self._experiment.evaluation, len(self._ledger), rounds)
        models = RunModels(method, self._ledger, len(self._ledger))
        found: dict[str, Any] = {}
        if self._model.merged_rank is not None:
            found[MERGED_ERROR] = self._model.merged_error
        if self._test is not None:
            clients = [] if method.has_global_model else [client.name for client in gather()]
            if len(self._ledger):
                scored = {
                    name: evaluate(self._model, self._test, settings, progress, self._workers)
                    for name in models.models(self._model, clients)
                }
            else:  # everybody has the base
                names: list[str | None] = [*clients] or [None]
                scored = {name: self._of_base(self._test, settings, progress) for name in names}
            found |= by_model(scored, settings.metrics)
        tests = self._tests if settings.metrics else {}
        own = score_clients(models, self._model, tests, settings, progress, self._workers)
        count = self._experiment.says.count
        said = {name: each._replace(rows=count(each.rows)) for name, each in own.items()}
        return found | over_clients(said, settings.metrics)

    def _of_base(
        self, test: TestSet, settings: EvaluationSettings, progress: Progress
    ) -> dict[str, Any]:
        """Scores of the base, which all runs on it share that have the same test data."""
        asked = [self._ledger.base.fingerprint, str(self._model.device), settings.measured]
        return self._shelf.scores_of_base(
            test,
            json.dumps(asked),
            lambda: evaluate(self._model, test, settings, progress, self._workers),
        )


def score_clients(
    models: RunModels,
    model: Model,
    tests: Mapping[str, TestSet],
    settings: EvaluationSettings,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> dict[str, ClientScores]:
    """Scores of clients' models on their own test rows, by name.

    Args:
        models: those of the run.
        model: the global one, at their round.
        tests: the rows.
        settings: say what is scored.
    """
    keys = [score.key for score in main_scores_of(settings.metrics).values()]
    whole = settings.model_copy(update={"by": None})
    found = {}
    for name, test in tests.items():
        for _ in models.of_client(model, name):
            scores = evaluate(model, test, whole, progress, workers)
            found[name] = ClientScores(len(test), {key: float(scores[key]) for key in keys})
    return found


class ClientScores(NamedTuple):
    """Scores of the model that a client has, on test rows of its own."""

    rows: int
    """Number of these."""
    values: Mapping[str, float]
    """Main score of each metric, by its key."""


def over_clients(found: Mapping[str, ClientScores], metrics: Sequence[str]) -> dict[str, Any]:
    """Scores of clients' own test rows as a row of metrics has them; empty where there are none.

    Returns:
        `eval_loss_by_client` (of each client), `eval_loss_over_clients` (their mean, in which each
        client counts once, however many rows it has), and the same of other metrics' main scores;
        and `test_rows_by_client`, the number of its rows. Of means what is not `plausible` is left
        out.
    """
    if not found:
        return {}
    scores: dict[str, Any] = {}
    for key in main_scores_of(metrics):
        values = {name: own.values[key] for name, own in found.items()}
        scores[f"{key}_by_client"] = values
        counted = plausible(values).values()
        scores[f"{key}_over_clients"] = sum(counted) / len(counted)
    return scores | {ROWS_BY_CLIENT: {name: own.rows for name, own in found.items()}}


def plausible(said: Mapping[str, float]) -> dict[str, float]:
    """Numbers that clients say of themselves, by name, without those that one of them made up.

    Those are in magnitude more than a hundred times the median of all, or of 1 where that is
    smaller. So one client cannot decide a mean. A NaN stays: it is a model that has diverged.
    """
    sizes = [abs(number) for number in said.values() if not math.isnan(number)]
    most = 100 * max(1.0, median_low(sizes)) if sizes else math.inf
    return {name: number for name, number in said.items() if not abs(number) > most}


def by_model(scores: dict[str | None, dict[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """The global model's scores (under None), or those of each client with their mean.

    Args:
        metrics: names of the metrics that gave the scores.
    """
    if None in scores:
        return scores[None]
    average = mean(list(scores.values()))
    for metric in metrics_of(metrics):
        average |= derived(metric, average)
    return average | {"by_client": scores}


@dataclass(frozen=True, eq=False)
class Subject:
    """A run's model after a round, or a model from a folder, and the settings to score it with."""

    model: Model
    data: TextSettings
    evaluation: EvaluationSettings
    name: str
    """The folder's or the run's name, and the round."""
    entry: str | None
    """The hash of the run's last entry that is in the model, or of its base; None of a folder."""
    seed: int
    """Seed of the run, for what is drawn at random."""
    experiment: Experiment | None
    """The run's; None of a folder."""
    own: RunModels | None
    """The run's models after the round."""
    clients: Sequence[str]
    """Clients whose models are meant: all of them where a run has no global one, or one of them."""
    base: Callable[[], Model] | None
    """Loads the base that the run began with; None of a folder."""

    def models(self) -> Iterator[str | None]:
        """Put what is to be scored into `model`, as `Method.models` does."""
        if self.own is None:
            yield None
        else:
            yield from self.own.models(self.model, self.clients)


def asked_for(
    data: str | None, metrics: Sequence[str] | None, by: str | None, overrides: Sequence[str] = ()
) -> list[str]:
    """Overrides that say what is evaluated, on which rows.

    Args:
        data: the test data, instead of the experiment's, of which nothing counts then.
        metrics: names of metrics; None for the experiment's.
        by: column of the test data; None for the experiment's.
        overrides: others, which count before all these.
    """
    changes = list(overrides)
    if data is not None:
        changes = [*DEFAULT_TEST, *changes, f"data.test={json.dumps(data)}"]
    if metrics is not None:
        changes.append(f"evaluation.metrics={json.dumps(list(metrics))}")
    if by is not None:
        changes.append(f"evaluation.by={json.dumps(by)}")
    return changes


def is_model(path: Path) -> bool:
    """Whether a folder holds a model, or an adapter of one, rather than a run."""
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


@contextmanager
def loaded(
    path: Path,
    overrides: list[str],
    round: int | None,
    client: str | None,
    load: Loader = Model.load,
    check: Callable[[Sequence[str]], None] = lambda metrics: None,
) -> Iterator[Subject]:
    """Load a run's model after a round, or a model folder.

    Args:
        path: a run directory, a packed ledger, or a model (or adapter) folder.
        overrides: `key.path=value`, on top of the run's experiment.
        round: the round of a run, None for the last.
        client: whose model, of a run without a global one; None for all.
        load: gives a run's base model.
        check: raises a `UserError` where metrics of these names cannot be computed, before any
            model is loaded.

    Raises:
        UserError: naming what does not fit.
    """
    if is_model(path):
        if round is not None or client is not None:
            raise UserError(f"{path} is a model, not a run: leave out --round and --client")
        content: dict[str, Any] = {"model": {"path": str(path.absolute())}, "data": {}}
        asked = validate(apply_overrides(content, overrides, [Path.cwd()]), str(path), Evaluation)
        check(asked.evaluation.metrics)
        model = Model.load(asked.model)
        check_causal(model)
        data = asked.data
        if "max_length" not in data.model_fields_set:  # the default is for models with room for it
            most = min(data.max_length, max_positions(model.network))
            data = data.model_copy(update={"max_length": most})
        yield Subject(
            model=model,
            data=data,
            evaluation=asked.evaluation,
            name=model.name,
            entry=None,
            seed=0,
            experiment=None,
            own=None,
            clients=(),
            base=None,
        )
        return
    with opened(path, overrides) as (experiment, ledger):
        check(experiment.evaluation.metrics)
        clients = check_client(experiment, ledger, client)
        round = check_round(ledger, round)
        model = model_at(experiment, ledger, round, load)
        yield Subject(
            model=model,
            data=experiment.data,
            evaluation=experiment.evaluation,
            name=f"{path.absolute().name}-round-{round}",
            entry=ledger.parent(round + 1),
            seed=experiment.federation.seed,
            experiment=experiment,
            own=RunModels(experiment.method, ledger, round),
            clients=clients,
            base=lambda: model_at(experiment, ledger, 0, load),
        )


def score_path(
    path: Path,
    overrides: list[str],
    round: int | None,
    client: str | None,
    progress: Progress | None = None,
    *,
    load: Loader = Model.load,
    held: Records | None = None,
    own_tests: bool = True,
    say: Callable[[str], None] = lambda sentence: None,
    workers: Workers = ALONE,
) -> tuple[dict[str, Any], list[str]]:
    """Scores of a run's model after a round, or of a model folder; the arguments are `loaded`'s.

    Args:
        held: the test rows, where `data.test` is `(memory)`.
        own_tests: score clients on test rows of their own too, where the run has those.
        say: told what a run says of its model, prompts and test data when it begins.
        workers: who take batches side by side.

    Returns:
        The scores, and the names of the metrics that gave them.

    Raises:
        UserError: naming what does not fit.
    """
    with workers.one_thread(), loaded(path, overrides, round, client, load, check_metrics) as it:
        workers = workers.on(it.model.device.type)
        found: dict[str, Any] = {}
        has_own = it.experiment is not None and it.experiment.data.client_test is not None
        metrics = it.evaluation.metrics
        if it.data.test is not None or not (has_own and own_tests):
            test = load_test(it.data, it.evaluation, it.model, held)
            test = _beside_base(it, {"": test})[""]
            for note in notes_on_scoring(it.model, test, it.evaluation):
                say(note)
            scored = {
                name: evaluate(it.model, test, it.evaluation, progress, workers)
                for name in it.models()
            }
            found = by_model(scored, metrics) | counts(test)
        if has_own and own_tests:
            try:
                found |= _of_own_tests(it, client, progress, say, workers)
            except UserError as error:
                if not found:
                    raise
                say(f"clients are not scored on test rows of their own: {error}")
        return found, metrics


def _beside_base(it: Subject, tests: dict[str, TestSet]) -> dict[str, TestSet]:
    """Test rows with what rewards of pairs are beside: the base, loaded for as long as that takes.

    Raises:
        UserError: there are pairs, and the model is of no run.
    """
    if all(test.examples.other is None for test in tests.values()):
        return tests
    if it.base is None or it.experiment is None:
        raise UserError(
            f"`evaluation.metrics`: rewards are beside the base of a run, and {it.name} is a model "
            "by itself: evaluate a run, or leave out the metrics of rewards"
        )
    base = it.base()
    return {name: scored_beside(test, it.experiment, base) for name, test in tests.items()}


def _of_own_tests(
    it: Subject,
    client: str | None,
    progress: Progress | None,
    say: Callable[[str], None],
    workers: Workers,
) -> dict[str, Any]:
    """Scores of all clients, or of one, on their own test rows, as `over_clients` has them."""
    assert it.experiment is not None
    assert it.own is not None
    data = ClientData(
        it.experiment.data,
        it.model.tokenizer,
        Seeds(it.seed),
        vocabulary_size=it.model.vocabulary_size,
        learns=it.experiment.objective.learns,
    )
    names = data.names if client is None else [client]
    tests, without = client_tests(it.experiment, it.model, data, names)
    for note in without:
        say(note)
    tests = _beside_base(it, tests)
    own = score_clients(it.own, it.model, tests, it.evaluation, progress, workers)
    return over_clients(own, it.evaluation.metrics)


def counts(test: TestSet) -> dict[str, int]:
    """Numbers of test rows that were scored, cut or left out."""
    return {
        "rows": len(test),
        "truncated": test.truncated,
        "dropped": test.dropped,
        "skipped": test.skipped,
    }


def mean(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each score, also inside dictionaries of scores."""
    return {
        key: mean([s[key] for s in scores])
        if isinstance(value, dict)
        else sum(s[key] for s in scores) / len(scores)
        for key, value in scores[0].items()
    }
