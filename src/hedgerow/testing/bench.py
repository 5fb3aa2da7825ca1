"""A tiny model and three clients' data on disk, and short runs on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from hedgerow.bundled import tasks
from hedgerow.clock import Clock
from hedgerow.engines import local
from hedgerow.engines.local import LocalFleet
from hedgerow.experiment import Experiment, load
from hedgerow.federation.fleet import ClientResult, Unwatched
from hedgerow.methods.base import Client, Method
from hedgerow.model import Model
from hedgerow.privacy.secure.letters import AskMasked
from hedgerow.runs.preparation import Prepared, prepare
from hedgerow.testing.case import SIZES, TRAINING
from hedgerow.testing.models import tiny_llama

ROUNDS = 3


class LastFirst(LocalFleet):
    """Clients of a run who train, and answer, in the other order."""

    def train(
        self,
        round: int,
        parent: str,
        clients: Sequence[Client],
        clock: Clock,
        letters: Mapping[str, AskMasked] | None = None,
    ) -> Iterator[ClientResult]:
        """Train the last one first."""
        return super().train(round, parent, clients[::-1], clock, letters)


@dataclass(frozen=True)
class Bench:
    """An experiment of a method, and what it takes to run it."""

    folder: Path
    method: Method
    model: Model
    """The base; whoever changes it gives it back by `reset`."""
    prepared: Prepared

    @staticmethod
    def of(method: Method, folder: Path) -> Bench:
        """Write model, data and the experiment into a folder.

        Raises:
            AssertionError: the method's options are others when the file is read.
            UserError: they do not fit the model or the clients.
        """
        _write(method, folder)
        read = load(folder / "experiment.yaml").method
        before, after = method.model_dump(mode="json"), read.model_dump(mode="json")
        assert (type(read), after) == (type(method), before), (
            f"options do not survive an experiment file: {type(method).__name__} with {before} is "
            f"{type(read).__name__} with {after} when it is read"
        )
        experiment = load(folder / "experiment.yaml")
        model = Model.load(experiment.model)
        return Bench(folder, method, model, prepare(experiment, model))

    @property
    def experiment(self) -> Experiment:
        """The experiment, read anew, as another process would: its method keeps nothing."""
        return load(self.folder / "experiment.yaml")

    def run(
        self,
        name: str,
        rounds: int,
        *,
        resume: bool = False,
        fleet: type[LocalFleet] = LocalFleet,
    ) -> Path:
        """Run the experiment to a round; the model is then the run's.

        Returns:
            The run's directory, which has this name.
        """
        loaded = self.experiment
        federation = loaded.federation.model_copy(update={"rounds": rounds})
        loaded = loaded.model_copy(update={"federation": federation})
        out = self.folder / name
        local.run(loaded, out, Unwatched(), resume=resume, model=self.model, fleet=fleet)
        return out


def _write(method: Method, folder: Path) -> None:
    """A tiny model, the clients' rows, and the experiment file."""
    rows = zip(SIZES, tasks.clients().values(), strict=False)
    names = [f"client-{index:03d}" for index in range(len(SIZES))]
    for name, (size, own) in zip(names, rows, strict=True):
        (folder / f"{name}.json").write_text(json.dumps(own[:size]))
    (folder / "test.json").write_text(json.dumps(tasks.test_rows(per_kind=1)[:4]))
    content = {
        "model": {"path": str(tiny_llama(folder / "model")), "device": "cpu"},
        "data": {
            "clients": {name: f"{name}.json" for name in names},
            "test": "test.json",
            "prompt": "plain",
            "max_length": 96,
        },
        "method": method.model_dump(mode="json"),
        "training": TRAINING.model_dump(mode="json"),
        "federation": {"min_clients": 1 if method.pools_data else len(SIZES)},
        "evaluation": {"every": ROUNDS},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
