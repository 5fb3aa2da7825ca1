"""Finished (or interrupted) runs: open one, and put the model of any of its rounds together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from hedgerow.errors import UserError
from hedgerow.experiment import Experiment
from hedgerow.experiment import load as load_experiment
from hedgerow.experiment.file import read
from hedgerow.ledger import Base, Ledger, unpack
from hedgerow.model import Model
from hedgerow.runs.directory import EXPERIMENT
from hedgerow.runs.personal import CLIENTS
from hedgerow.settings import ModelSettings


@contextmanager
def opened(path: Path, overrides: list[str]) -> Iterator[tuple[Experiment, Ledger]]:
    """A run's experiment and ledger, from its directory or its packed ledger.

    Raises:
        UserError: `path` is neither.
    """
    with _folder(path) as folder:
        if path.is_file():
            _check_plug_ins(path, folder / EXPERIMENT, overrides)
        yield load_experiment(folder / EXPERIMENT, overrides), Ledger.open(folder / "ledger")


Loader = Callable[[ModelSettings], Model]
"""Gives a run's base model, new and unchanged; `Model.load` where it is not in memory."""


@contextmanager
def opened_ledger(path: Path) -> Iterator[Ledger]:
    """A run's ledger alone, from its directory or its packed ledger.

    Raises:
        UserError: `path` is neither.
    """
    with _folder(path) as folder:
        yield Ledger.open(folder / "ledger")


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A run's directory; of a packed ledger one that is there meanwhile."""
    with unpack(path) if path.is_file() else nullcontext(path) as folder:
        if not (folder / EXPERIMENT).is_file():
            raise UserError(f"{path} is no run: it is neither a run directory nor a packed ledger")
        yield folder


def _check_plug_ins(packed: Path, experiment: Path, overrides: list[str]) -> None:
    """Raise a `UserError` where a packed ledger, a stranger's maybe, would have a module imported.

    Who opens it may name the same plug-in, and so say that it is trusted.
    """
    content = read(experiment)
    method, training = content.get("method"), content.get("training")
    training = training if isinstance(training, dict) else {}
    optimizer, objective = training.get("optimizer"), training.get("objective")
    evaluation = content.get("evaluation")
    metrics = evaluation.get("metrics") if isinstance(evaluation, dict) else None
    named = {
        "method.name": method.get("name") if isinstance(method, dict) else method,
        "training.optimizer": optimizer.get("name") if isinstance(optimizer, dict) else optimizer,
        "training.objective": objective.get("name") if isinstance(objective, dict) else objective,
        "evaluation.metrics": metrics,
    }
    overridden = {override.partition("=")[0] for override in overrides}
    for key, value in named.items():
        if ":" in str(value) and not overridden & {key, key.partition(".")[0]}:
            raise UserError(
                f"{packed} names the plug-in {value}, which would be imported: if you trust "
                f"whoever made the file, add {key}={json.dumps(value)}"
            )


def model_at(
    experiment: Experiment, ledger: Ledger, round: int, load: Loader = Model.load
) -> Model:
    """The run's model after a round; `round` 0 is the base.

    Raises:
        UserError: model.path does not hold the ledger's base, or an entry is damaged.
    """
    path = Path(experiment.model.path)
    if path.is_absolute() and not path.exists():
        raise UserError(
            f"model.path: {ledger.base.name}, the run's base, is not there ({path}): add "
            "model.path=FOLDER, the folder of a copy of it"
        )
    model = load(experiment.model)
    ledger.check_base(Base.of(model), f"model.path {experiment.model.path}")
    expected = experiment.expected(ledger.trained)
    ledger.replay(experiment.method, model, round, expected=expected)
    return model


def check_client(experiment: Experiment, ledger: Ledger, client: str | None) -> list[str]:
    """The clients whose models are meant: the one that is named, or all; none of a global model.

    Raises:
        UserError: one is named where there is one model for everybody, or it is not there.
    """
    method = experiment.method
    if method.has_global_model:
        if client is None:
            return []
        if not method.personal:
            raise UserError(f"client {client}: {method.name} has one model for everybody")
    clients = ledger.clients()
    if client is None:
        return clients
    at_site = method.personal and (ledger.folder.parent / CLIENTS / client).is_dir()
    if client not in clients and not at_site:  # a site may lack the entries that name its client
        raise UserError(f"client {client}: only {', '.join(clients)} took part in the run")
    return [client]


def check_round(ledger: Ledger, round: int | None) -> int:
    """The round that is meant: the last where none is named."""
    if round is not None and not 0 <= round <= len(ledger):
        raise UserError(f"round {round}: the ledger has rounds 0 (the base) to {len(ledger)}")
    return len(ledger) if round is None else round
