"""A Flower app for an experiment: what `hedgerow flower init` writes, and both components read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from hedgerow.data import load_template
from hedgerow.data.sources import client_files, client_test_files
from hedgerow.engines.flower import BASE
from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, load
from hedgerow.ledger import Base
from hedgerow.model import Model
from hedgerow.runs.preparation import (
    check_audit,
    check_fits,
    check_groups,
    check_trusted,
    notes_on_model,
    with_date,
)
from hedgerow.settings import ClientFile

EXPERIMENT = "experiment.yaml"
PROMPT = "prompt.md"
"""A prompt template of the experiment's own; Flower packs no other text files."""

_PYPROJECT = """\
[project]
name = "{name}"
version = "1.0.0"
description = "A federated fine-tuning experiment of hedgerow; what it is, is in {experiment}."
license = "Apache-2.0"
dependencies = []  # hedgerow is installed wherever this runs

[tool.flwr.app]
publisher = "hedgerow"

[tool.flwr.app.components]
serverapp = "hedgerow.engines.flower.server:app"
clientapp = "hedgerow.engines.flower.client:app"

# Paths on the SuperLink's machine: flwr run --run-config 'out="/srv/run"'
[tool.flwr.app.config]
out = "hedgerow-run"  # the run's directory; if there is a run, it goes on
model = ""            # the base model, to evaluate on the server; empty: it needs no model
test = ""             # the test data for that
"""


class _BaseFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    base: Base
    trained: dict[str, list[int]]
    dated: bool = False


@dataclass(frozen=True)
class App:
    """An experiment as all its participants know it, without anybody's paths."""

    experiment: Experiment
    base: Base
    """The checkpoint that every site must have."""
    trained: Mapping[str, Sequence[int]]
    """The shapes of what clients train (`Method.trained_shapes`)."""
    clients: list[str]
    """The clients' names, in their order."""
    dated: bool = False
    """Whether the day that the experiment's chat template writes is that on which the app was made:
    nobody set it, so that a run that goes on keeps its own."""

    @staticmethod
    def load(folder: Path) -> App:
        """The app in a folder.

        Raises:
            UserError: it is none, or is damaged.
        """
        experiment = load(folder / EXPERIMENT)
        prompt = Path(experiment.data.prompt)
        if prompt.is_absolute() and prompt != (folder / PROMPT).absolute():
            raise UserError(f"data.prompt: {prompt} is no part of the app, which has {PROMPT}")
        try:
            file = _BaseFile.model_validate_json((folder / BASE).read_bytes())
        except (OSError, ValueError):
            raise UserError(
                f"{folder / BASE} is missing or damaged: make the app anew (hedgerow flower init)"
            ) from None
        return _app(experiment, file)


def _app(experiment: Experiment, file: _BaseFile) -> App:
    return App(
        experiment=experiment,
        base=file.base,
        trained=file.trained,
        clients=client_names(experiment),
        dated=file.dated,
    )


def init(
    experiment: Experiment,
    folder: Path,
    name: str,
    say: Callable[[str], None] = lambda sentence: None,
) -> App:
    """Write a Flower app for an experiment.

    Args:
        folder: made by this function.
        name: what Flower calls the app.
        say: told what of the model the method leaves untrained, and what is unexpected about
            prompts.

    Raises:
        UserError: something in the experiment does not fit, or `folder` is taken.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: name a folder that is not there yet")
    check_method(experiment)
    clients = client_names(experiment)
    if experiment.federation.min_clients > len(clients):
        raise UserError(
            f"federation.min_clients: {experiment.federation.min_clients} is above the "
            f"{len(clients)} clients there are"
        )
    check_groups(experiment, clients, clients)
    check_audit(experiment, clients)
    check_trusted(experiment, clients)
    model = Model.load(experiment.model)
    base = Base.of(model)
    check_fits(experiment, model, len(clients))
    words = load_template(experiment.data, model.tokenizer)
    dated = experiment.data.template.date is None and words.date is not None
    experiment = with_date(experiment, words.date)
    shapes = experiment.method.trained_shapes(model)
    trained = {name: list(shape) for name, shape in shapes.items()}
    file = _BaseFile(base=base, trained=trained, dated=dated)
    for note in notes_on_model(model, words, experiment.method):
        say(note)
    folder.mkdir(parents=True, exist_ok=True)
    shared, template = _without_paths(experiment, clients)
    if template is not None:
        shutil.copyfile(template, folder / PROMPT)
    (folder / EXPERIMENT).write_text(shared.dump(), encoding="utf-8")
    (folder / BASE).write_text(file.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "experiment"
    (folder / "pyproject.toml").write_text(_PYPROJECT.format(name=slug, experiment=EXPERIMENT))
    return _app(shared, file)


def check_method(experiment: Experiment) -> None:
    """Raise a `UserError` for a method that has nothing to send."""
    if not experiment.method.communicates:
        raise UserError(
            f"method.name: {experiment.method.name} is a baseline that sends nothing: run it with "
            "--engine local"
        )


def client_names(experiment: Experiment) -> list[str]:
    """The clients, in their order; their files need not be here.

    Raises:
        UserError: the experiment does not say who they are.
    """
    clients = experiment.data.clients
    if clients is None:
        raise UserError(
            "data.source: every site has its own file: name the clients in data.clients instead, "
            "as {north: north.json, south: south.json} (the files need not be here)"
        )
    if isinstance(clients, str):
        return list(client_files(clients))
    if isinstance(clients, dict):
        return list(clients)
    return [Path(c).stem if isinstance(c, str) else c.name for c in clients]


def without_test(experiment: Experiment) -> Experiment:
    """The experiment for a participant that scores nothing."""
    data = experiment.data.model_copy(update={"test": None})
    evaluation = experiment.evaluation.model_copy(update={"by": None})
    return experiment.model_copy(update={"data": data, "evaluation": evaluation})


def _without_paths(experiment: Experiment, clients: list[str]) -> tuple[Experiment, Path | None]:
    """The experiment without anybody's paths, and its template's file if it has one.

    What it is about, and what trackers call it, is nobody's business but the owner's either.
    """
    settings, data = experiment.model, experiment.data
    if Path(settings.path).is_absolute():
        settings = settings.model_copy(update={"path": f"./{Path(settings.path).name}"})
    is_name = data.test is None or not Path(data.test).is_absolute()
    template = Path(data.prompt) if Path(data.prompt).is_absolute() else None
    tests = data.client_test
    if tests is not None and not isinstance(tests, float):
        names = client_test_files(tests, clients)
        tests = [ClientFile(name=name, file=f"{name}-test.json") for name in names]
    changes = {
        "clients": [ClientFile(name=name, file=f"{name}.json") for name in clients],
        "client_test": tests,
        "test": data.test if is_name else f"./{Path(str(data.test)).name}",
        "prompt": data.prompt if template is None else f"./{PROMPT}",
    }
    update = {
        "about": None,
        "model": settings,
        "data": data.model_copy(update=changes),
        "tracking": experiment.tracking.model_copy(update={"name": None}),
    }
    return experiment.model_copy(update=update), template
