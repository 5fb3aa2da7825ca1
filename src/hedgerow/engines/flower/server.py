"""The ServerApp: the round loop on the SuperLink's machine.

It needs neither the base model nor a GPU; where the run config names the model and test data, it
scores the global model too.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from pydantic import BaseModel, ConfigDict

from hedgerow import federation, tracking
from hedgerow.console import ProgressWatcher
from hedgerow.engines.flower import app_folder
from hedgerow.engines.flower.app import App, check_method, without_test
from hedgerow.engines.flower.fleet import FlowerFleet
from hedgerow.engines.flower.keys import KEYS, KnownKeys
from hedgerow.errors import RunFailed, UserError
from hedgerow.evaluation.scores import TestSet
from hedgerow.experiment import Experiment, check_server_libraries, validate
from hedgerow.federation.fleet import Watcher
from hedgerow.files import emptied, replacing
from hedgerow.ledger import Base
from hedgerow.model import Model
from hedgerow.runs.directory import TEST_DATA, Digests, RunDirectory
from hedgerow.runs.preparation import load_test, notes_on_scoring, scored_beside, with_date_of
from hedgerow.runs.scoring import Scorer

RUN = "flower.json"
"""The file of a run directory that says what the run is called at its sites."""


class ServerSettings(BaseModel):
    """The run config: paths on the SuperLink's machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str
    model: str = ""
    test: str = ""


def _main(grid: Grid, context: Context) -> None:
    """Flower's entry point: run the app's experiment, or go on with it."""
    try:
        settings = validate(dict(context.run_config), "the run config", ServerSettings)
        loaded = App.load(app_folder())
        experiment = with_date_of(
            _at_home(loaded.experiment, settings), Path(settings.out), is_set=not loaded.dated
        )
        model = test = None
        method = experiment.method
        if settings.test and method.personal and not method.has_global_model:
            raise UserError(
                f"the run config has test data, but {method.name} has no global model to score on "
                "them: leave out test; data.client_test has each client's model scored at its site"
            )
        if settings.model:
            model = Model.load(experiment.model)
            if difference := Base.of(model).difference(loaded.base):
                raise UserError(f"model: {settings.model} is not the app's base: {difference}")
        notes: list[str] = []
        if model is not None and settings.test:
            test = load_test(experiment.data, experiment.evaluation, model)
            notes = notes_on_scoring(model, test, experiment.evaluation)
        at_home = replace(loaded, experiment=experiment)
        with ProgressWatcher(metrics=experiment.evaluation.metrics) as watcher:
            for note in notes:
                watcher.say(note)
            serve(grid, at_home, Path(settings.out), watcher, model, test)
    except (UserError, RunFailed) as error:
        # Flower logs the text of what ends a ServerApp; where it was raised is nobody's concern.
        raise error.with_traceback(None) from None


app = ServerApp()
app.main()(_main)


def serve(
    grid: Grid,
    loaded: App,
    out: Path,
    watcher: Watcher,
    model: Model | None,
    test: TestSet | None,
    data: Digests | None = None,
    awaited: Sequence[str] | None = None,
) -> None:
    """Run an experiment on a grid, or go on with the run that is in `out`.

    Args:
        loaded: with the server's own paths in its experiment.
        model: the base, to score the global model; None scores nothing.
        awaited: clients that the run begins with; None for all of the experiment's.
        data: digests of the clients' and the test data, where the server may know them.

    Raises:
        UserError: something in the experiment or in `out` is wrong.
        RunFailed: too few clients joined or answered; what is written is valid.
    """
    experiment = loaded.experiment
    check_method(experiment)
    check_server_libraries(experiment)
    tracking.check(experiment.tracking)
    resume = RunDirectory.check_resumable(out, experiment)
    opener = RunDirectory.resume if resume else RunDirectory.create
    if data is None:
        data = dict.fromkeys(loaded.clients)
        if test is not None:
            data[TEST_DATA] = test.digest()
    with opener(out, experiment, loaded.base, data, loaded.trained) as directory:
        for change in directory.changes:
            watcher.say(change)
        scorer = None
        if model is not None:
            if test is not None:
                test = scored_beside(test, experiment, model)
            expected = experiment.expected(directory.ledger.trained)
            directory.ledger.replay(experiment.method, model, expected=expected)
            scorer = Scorer(experiment, model, directory.ledger, test)
        arrived = out / "arrived"
        with emptied(arrived):
            fleet = FlowerFleet(
                grid,
                experiment=experiment,
                names=loaded.clients,
                awaited=loaded.clients if awaited is None else awaited,
                ledger=directory.ledger,
                run=_run_name(directory),
                folder=arrived,
                keys=KnownKeys(out / KEYS),
                scorer=scorer,
                say=watcher.say,
            )
            with tracking.tracked(experiment, directory, watcher) as tracked:
                federation.run(experiment, fleet, directory, tracked)
            fleet.finish()


def _at_home(experiment: Experiment, settings: ServerSettings) -> Experiment:
    """The experiment with the server's paths, so that the run directory can be used there."""
    model, data = experiment.model, experiment.data
    if settings.model:
        model = model.model_copy(update={"path": str(Path(settings.model).absolute())})
    if settings.test and not settings.model:
        raise UserError('the run config has test data but no model to score: give model="…"')
    data = data.model_copy(update={"test": str(Path(settings.test).absolute())})
    at_home = experiment.model_copy(update={"model": model, "data": data})
    return at_home if settings.test else without_test(at_home)


def _run_name(directory: RunDirectory) -> str:
    """What the run is called at its sites: random, and the same when it is resumed."""
    path = directory.path / RUN
    if not path.exists():
        with replacing(path) as file:
            file.write(json.dumps({"run": secrets.token_hex(16)}).encode())
    try:
        return str(json.loads(path.read_bytes())["run"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: restore it from a copy") from None
