"""Scoring of models: that of a running method, a run's after a round, or one in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hedgerow.data import Records
from hedgerow.errors import UserError
from hedgerow.evaluation.measuring import derived
from hedgerow.evaluation.metrics import metrics_of
from hedgerow.evaluation.scores import TestSet, evaluate
from hedgerow.experiment import Experiment, apply_overrides, validate
from hedgerow.methods.base import Client, Method
from hedgerow.model import Model, max_positions
from hedgerow.runs.opening import Loader, check_client, check_round, model_at, opened
from hedgerow.runs.preparation import check_causal, load_test, notes_on_scoring
from hedgerow.settings import DEFAULT_TEST, Evaluation, EvaluationSettings, TextSettings
from hedgerow.wire import Entry

Progress = Callable[[int, int], None]
"""Callback that is told how many forward passes or answers are done, of how many."""


class Scorer:
    """The global model of a run, which entries advance, and its scores."""

    def __init__(self, experiment: Experiment, model: Model, test: TestSet | None) -> None:
        self._experiment, self._model, self._test = experiment, model, test

    def advance(self, entry: Entry) -> None:
        """Advance the model by one entry."""
        self._experiment.method.apply(self._model, entry)

    def evaluate(
        self, gather: Callable[[], Sequence[Client]], progress: Progress
    ) -> dict[str, Any]:
        """Scores of the model; of each client's and their mean where there is no global one.

        They are empty without test data.

        Args:
            gather: gives the run's clients, where they have models of their own.
        """
        if self._test is None:
            return {}
        method = self._experiment.method
        return score_method(
            method,
            self._model,
            clients=[] if method.has_global_model else [client.name for client in gather()],
            test=self._test,
            settings=self._experiment.evaluation,
            progress=progress,
        )


def score_method(
    method: Method,
    model: Model,
    clients: Sequence[str],
    test: TestSet,
    settings: EvaluationSettings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores of a method's global model; or, where it has none, of each client's, and their mean.

    Args:
        clients: whose models count where there is no global one.
    """
    models = method.models(model, clients)
    scores = {name: evaluate(model, test, settings, progress) for name in models}
    return by_model(scores, settings.metrics)


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
    method: Method | None
    clients: Sequence[str]
    """Clients whose models are meant, where a run has no global one."""

    def models(self) -> Iterator[str | None]:
        """Put what is to be scored into `model`, as `Method.models` does."""
        if self.method is None:
            yield None
        else:
            yield from self.method.models(self.model, self.clients)


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
) -> Iterator[Subject]:
    """Load a run's model after a round, or a model folder.

    Args:
        path: a run directory, a packed ledger, or a model (or adapter) folder.
        overrides: `key.path=value`, on top of the run's experiment.
        round: the round of a run, None for the last.
        client: whose model, of a run without a global one; None for all.
        load: gives a run's base model.

    Raises:
        UserError: naming what does not fit.
    """
    if is_model(path):
        if round is not None or client is not None:
            raise UserError(f"{path} is a model, not a run: leave out --round and --client")
        content: dict[str, Any] = {"model": {"path": str(path.absolute())}, "data": {}}
        asked = validate(apply_overrides(content, overrides, [Path.cwd()]), str(path), Evaluation)
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
            method=None,
            clients=(),
        )
        return
    with opened(path, overrides) as (experiment, ledger):
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
            method=experiment.method,
            clients=clients,
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
    say: Callable[[str], None] = lambda sentence: None,
) -> tuple[dict[str, Any], list[str]]:
    """Scores of a run's model after a round, or of a model folder; the arguments are `loaded`'s.

    Args:
        held: the test rows, where `data.test` is `(memory)`.
        say: told what a run says of its model, prompts and test data when it begins.

    Returns:
        The scores, and the names of the metrics that gave them.

    Raises:
        UserError: naming what does not fit.
    """
    with loaded(path, overrides, round, client, load) as it:
        test = load_test(it.data, it.evaluation, it.model, held)
        for note in notes_on_scoring(it.model, test, it.evaluation):
            say(note)
        scored = {name: evaluate(it.model, test, it.evaluation, progress) for name in it.models()}
        metrics = it.evaluation.metrics
        return by_model(scored, metrics) | counts(test), metrics


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
