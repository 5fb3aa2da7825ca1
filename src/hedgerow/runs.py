"""Finished (or interrupted) runs: open one, and put the model of any of its rounds together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, ModelSettings, load
from hedgerow.ledger import Base, Ledger, unpack
from hedgerow.model import Model
from hedgerow.rundir import EXPERIMENT


@contextmanager
def opened(path: Path, overrides: list[str]) -> Iterator[tuple[Experiment, Ledger]]:
    """A run's experiment and ledger, from its directory or its packed ledger.

    Raises:
        UserError: `path` is neither.
    """
    if path.is_file():
        with unpack(path) as folder, opened(Path(folder), overrides) as run:
            yield run
    elif (path / EXPERIMENT).is_file():
        yield load(path / EXPERIMENT, overrides), Ledger.open(path / "ledger")
    else:
        raise UserError(f"{path} is no run: it is neither a run directory nor a packed ledger")


def model_at(experiment: Experiment, ledger: Ledger, round: int) -> Model:
    """The run's model after a round; `round` 0 is the base.

    Raises:
        UserError: model.path does not hold the ledger's base, or an entry is damaged.
    """
    model = Model.load(experiment.model)
    ledger.check_base(Base.of(model), f"model.path {experiment.model.path}")
    ledger.replay(experiment.method, model, round)
    return model


class Lender:
    """Lends one model again and again, each time as it was loaded."""

    def __init__(self) -> None:
        self._settings: ModelSettings | None = None
        self._model: Model | None = None
        self.state: dict[str, Tensor] = {}
        """Its weights and buffers as they were loaded, in host memory."""
        self._base: Base | None = None

    def lend(self, settings: ModelSettings) -> Model:
        """The model, for the caller to change until it is lent again.

        Raises:
            UserError: there is no such model.
        """
        if self._model is None or settings != self._settings:
            self._model, self.state = None, {}  # before the next one is in memory
            self._model, self._settings = Model.load(settings), settings
            self.state, self._base = self._model.state(), None
        else:
            self._model.reset(self.state)
        return self._model

    def check_base(self, ledger: Ledger) -> None:
        """Raise a `UserError` unless the model, which was just lent, is the base of `ledger`."""
        assert self._model is not None
        assert self._settings is not None
        if self._base is None:  # hashing all weights takes a while
            self._base = Base.of(self._model)
        ledger.check_base(self._base, f"model.path {self._settings.path}")


def check_client(experiment: Experiment, ledger: Ledger, client: str | None) -> list[str]:
    """The clients whose models are meant: the one that is named, or all; none of a global model.

    Raises:
        UserError: one is named where there is a global model, or it is not there.
    """
    if experiment.method.has_global_model:
        if client is None:
            return []
        raise UserError(f"--client {client}: {experiment.method.name} has one model for everybody")
    clients = ledger.clients()
    if client is None:
        return clients
    if client not in clients:
        raise UserError(f"--client {client}: only {', '.join(clients)} took part in the run")
    return [client]


def check_round(ledger: Ledger, round: int | None) -> int:
    """The round that is meant: the last where none is named."""
    if round is not None and not 0 <= round <= len(ledger):
        raise UserError(f"--round {round}: the ledger has rounds 0 (the base) to {len(ledger)}")
    return len(ledger) if round is None else round
