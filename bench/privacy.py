"""Loss under differential privacy, method by method, beside the loss without.

    python bench/privacy.py OUT --choose [--levels example client] [--methods fedavg ferret …]
        [--epsilons 1 3 8] [--data demo|dolly] [--dolly DOLLY] [--model MODEL]
    python bench/privacy.py OUT [the same] [--seeds 3]

    client   the built-in tasks over 500 clients, two rows each; 4 rounds, of 250 clients (on
             average, where private) that take one step of plain SGD on all that they have; δ = 1e-3
    example  ten clients, 4 rounds of 4 steps of AdamW, each on 16 rows (on average, where they are
             private). With `--data demo` they have the built-in tasks between them (δ = 1e-3), with
             `--data dolly` they are those of DOLLY, a folder with local_training_0.json … and
             global_test.json, and MODEL is a model's folder (δ = 1e-4)

`--choose` finds learning rates and clips with the first seed, on rows that are taken from the
clients' own, and keeps them in OUT/chosen.json, which the runs proper read. What a step's length
follows is walked up and down by factors of two to the least loss: the clip at the level of clients,
whose updates it binds, and else the learning rate. At the largest ε the other of the two is then
walked by factors of four. A smaller ε begins at the larger one's. Without privacy, gradients are at
most 1 long, and there is no clip. Ferret has FedAvg's clip, noise and local learning rate, and a
learning rate of the server that is walked instead.

Each run is a line of OUT/results.jsonl, and none is made twice: the script can be stopped and
started at will. Everything runs on one thread. At the end there is a table for each level: loss on
the test data, mean and standard deviation over seeds, and beside the method's own without privacy.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from hedgerow import console
from hedgerow.bundled import tasks
from hedgerow.engines import local
from hedgerow.errors import RunFailed
from hedgerow.experiment import Experiment, validate
from hedgerow.federation.fleet import Unwatched
from hedgerow.files import replacing
from hedgerow.runs.rows import read_rows


@dataclass(frozen=True)
class Candidate:
    """A method, and where the walks begin."""

    options: dict[str, Any]
    rate: float = 1.0
    """Learning rate of plain SGD; of the server, where it follows FedAvg."""
    clip: float = 1.0
    """Of an update by plain SGD."""
    adam_rate: float = 2e-3
    follows: bool = False
    """Whether it has FedAvg's clip and local learning rate."""


RANK = {"ranks": 4}
METHODS = {
    "fedavg": Candidate({"name": "fedavg"}),
    "diloco": Candidate({"name": "diloco"}, clip=0.5),
    "ferret": Candidate(
        {
            **{"name": "ferret", "coordinates": "random", "compression": 4, "shrink": False},
            **{"bits": 32, "broadcast_bits": 32},
        },
        follows=True,
    ),
    "fedit": Candidate({"name": "fedit", **RANK}, 4.0, 4.0, 1e-2),
    "ffa_lora": Candidate({"name": "ffa_lora", **RANK}, 4.0, 4.0, 1e-2),
    "fed_sb": Candidate({"name": "fed_sb", "ranks": 8}, 4.0, 4.0, 3e-2),
    "flora": Candidate({"name": "flora", **RANK}, 4.0, 4.0, 1e-2),
}
"""FedAvg comes first, since others follow it."""
EXAMPLES_CLIP = 0.5
"""Clip of an example's gradient where the walk begins."""
NOT_LINEAR = {"flora"}
"""Methods that client-level privacy is not for."""
HELD_OUT = {"demo": 10, "dolly": 30}
"""One in so many rows of each client is for choosing."""
WIDEST = 5
"""Largest number of steps of a walk from where it began."""


class Cell(NamedTuple):
    """One run."""

    setting: str
    method: str
    epsilon: float | None
    clip: float | None
    rate: float
    """Local learning rate."""
    server_rate: float | None
    seed: int
    held_out: bool
    """Whether it is scored on rows that were taken from the clients' own."""

    @property
    def folder(self) -> str:
        """Its run directory's name."""
        return "-".join(str(each) for each in self).replace(" ", "-")


class Choice(NamedTuple):
    """What was chosen for a method at an ε."""

    clip: float | None
    rate: float
    server_rate: float | None = None


class Bench:
    """What is done, and what is chosen, on disk."""

    def __init__(self, out: Path, dolly: Path | None, model: Path | None) -> None:
        self.out, self.dolly, self._path = out, dolly, model
        out.mkdir(parents=True, exist_ok=True)
        self._results, self._choices = out / "results.jsonl", out / "chosen.json"
        lines = self._results.read_text().splitlines() if self._results.exists() else []
        self._done = {Cell(*cell): float(loss) for cell, loss in map(json.loads, lines)}
        self.chosen: dict[str, dict[str, Any]] = {}
        if self._choices.exists():
            self.chosen = json.loads(self._choices.read_text())

    def choice(self, setting: str, method: str, epsilon: float | None) -> Choice:
        """What was chosen.

        Raises:
            SystemExit: nothing was.
        """
        try:
            return Choice(*self.chosen[setting][method][str(epsilon)])
        except KeyError:
            raise SystemExit(
                f"{self._choices}: has no choice for {method} at epsilon {epsilon} ({setting}): "
                "run with --choose first"
            ) from None

    def choose(self, setting: str, method: str, epsilon: float | None, choice: Choice) -> None:
        """Keep a choice."""
        self.chosen.setdefault(setting, {}).setdefault(method, {})[str(epsilon)] = choice
        with replacing(self._choices) as file:
            file.write(json.dumps(self.chosen, indent=1).encode() + b"\n")

    def loss(self, cell: Cell) -> float:
        """Loss after the last round, of a run that is made where it is missing."""
        if cell not in self._done:
            loss = self._done[cell] = self._run(cell)
            with self._results.open("a") as file:
                file.write(json.dumps([cell, loss]) + "\n")
            print(f"{cell.folder}: {loss:.4f}", flush=True)
        return self._done[cell]

    def _run(self, cell: Cell) -> float:
        out = self.out / cell.folder
        experiment = validate(self.experiment(cell), "privacy.py", Experiment)
        try:
            local.run(experiment, out, Unwatched(), resume=True)
        except RunFailed:
            return math.inf
        loss = read_rows(out)[-1]["eval_loss"]
        shutil.rmtree(out)
        return math.inf if loss is None else float(loss)

    def experiment(self, cell: Cell) -> dict[str, Any]:
        """The experiment of a cell."""
        level, data = cell.setting.split()
        method: dict[str, Any] = METHODS[cell.method].options
        training: dict[str, Any] = {"learning_rate": cell.rate}
        if cell.server_rate is not None:
            method = {**method, "server_learning_rate": cell.server_rate}
        federation: dict[str, Any] = {"seed": cell.seed}
        if level == "client":
            training |= {"optimizer": "sgd", "steps": 1, "batch_size": 2}
            federation |= {"rounds": 4, "clients_per_round": 250}
        else:
            training |= {"steps": 4, "batch_size": 16}
            federation |= {"rounds": 4}
        content: dict[str, Any] = {
            "model": {"path": "demo" if data == "demo" else str(self._path), "device": "cpu"},
            "data": self._data(level, data, cell.held_out),
            "method": method,
            "training": training,
            "federation": federation,
            "evaluation": {"every": 1000, "batch_size": 64},
        }
        if cell.epsilon is not None:
            training["max_grad_norm"] = None  # the clip bounds
            content["privacy"] = {
                **{"level": level, "clip": cell.clip, "epsilon": cell.epsilon, "seed": cell.seed},
                "delta": 1e-3 if data == "demo" else 1e-4,
                "accountant": "pld" if level == "client" else "rdp",
            }
        return content

    def _data(self, level: str, data: str, held_out: bool) -> dict[str, Any]:
        common: dict[str, Any] = {"prompt": "plain", "max_length": 96 if data == "demo" else 128}
        if data == "dolly":
            assert self.dolly is not None
            fields = {"instruction": "instruction", "input": None, "output": "response"}
            test = str(self.dolly / "global_test.json")
            files = self.dolly / "local_training_{}.json"
            if held_out:
                test, files = self._held_out(data, _dolly_rows(self.dolly))
            return {**common, "fields": fields, "clients": str(files), "test": test}
        source, test = "demo", "demo"
        if held_out:
            test, files = self._held_out(data, [list(chain(*tasks.clients().values()))])
            source = str(files).format(0)
        partition = {"kind": "iid", "clients": 500 if level == "client" else 10}
        return {**common, "source": source, "partition": partition, "test": test}

    def _held_out(self, data: str, rows: Sequence[Sequence[Any]]) -> tuple[str, Path]:
        """A file of rows for choosing, and a pattern of files with the others, of each client."""
        test, pattern = self.out / f"{data}-choosing.json", self.out / f"{data}-{{}}.json"
        if not test.exists():
            share = HELD_OUT[data]
            for index, own in enumerate(rows):
                kept = [row for place, row in enumerate(own) if place % share]
                Path(str(pattern).format(index)).write_text(json.dumps(kept))
            taken = [row for own in rows for row in own[::share]]
            with replacing(test) as file:  # last, so that it stands for all
                file.write(json.dumps(taken).encode())
        return str(test), pattern


def _dolly_rows(folder: Path) -> list[Any]:
    files = sorted(folder.glob("local_training_*.json"))
    return [json.loads(file.read_text()) for file in files]


def main() -> None:
    """Choose, or make the runs that are missing and print a table for each level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--choose", action="store_true")
    levels = ("client", "example")
    parser.add_argument("--levels", nargs="+", choices=levels, default=list(levels))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 8.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", choices=HELD_OUT, default="demo")
    parser.add_argument("--dolly", type=Path)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    folders = [each and each.absolute() for each in (arguments.dolly, arguments.model)]
    if arguments.data == "dolly" and None in folders:
        parser.error("--data dolly needs --dolly and --model, the folders of the data and a model")
    torch.set_num_threads(1)
    bench = Bench(arguments.out.absolute(), *folders)
    for level in arguments.levels:
        setting = f"{level} {arguments.data if level == 'example' else 'demo'}"
        left_out = NOT_LINEAR if level == "client" else set()
        methods = [each for each in arguments.methods if each not in left_out]
        if arguments.choose:
            for method in methods:
                choose(bench, setting, method, sorted(arguments.epsilons, reverse=True))
        else:
            print_table(bench, setting, methods, [None, *arguments.epsilons], arguments.seeds)


def choose(bench: Bench, setting: str, method: str, epsilons: Sequence[float]) -> None:
    """Choose clip and learning rates of a method, without privacy and from a large ε to a small."""
    candidate, keys = METHODS[method], ("clip", "rate")
    found = Choice(candidate.clip, candidate.rate)
    if setting.startswith("example"):
        found, keys = Choice(EXAMPLES_CLIP, candidate.adam_rate), ("rate", "clip")
    if candidate.follows:
        found = found._replace(server_rate=candidate.rate)
    for epsilon in (None, *epsilons):

        def loss(choice: Choice, epsilon: float | None = epsilon) -> float:
            clip = None if epsilon is None else choice.clip
            cell = (setting, method, epsilon, clip, choice.rate, choice.server_rate)
            return bench.loss(Cell(*cell, seed=0, held_out=True))

        if candidate.follows:
            followed = bench.choice(setting, "fedavg", epsilon)
            found = followed._replace(server_rate=found.server_rate)
            found = walked(found, "server_rate", 2, loss)
        elif epsilon is None:
            found = walked(found, "rate", 2, loss)
        else:
            found = walked(found, keys[0], 2, loss)
            if epsilon == epsilons[0]:
                found = walked(found, keys[1], 4, loss)
        bench.choose(setting, method, epsilon, found)


def walked(start: Choice, key: str, factor: float, loss: Callable[[Choice], float]) -> Choice:
    """The choice with the least loss, a step of `factor` up and down of which is no better."""
    place = 0

    def at(place: int) -> Choice:
        return start._replace(**{key: getattr(start, key) * factor**place})

    while abs(place) < WIDEST:
        best = min((place, place - 1, place + 1), key=lambda each: loss(at(each)))
        if best == place:
            break
        place = best
    return at(place)


def print_table(
    bench: Bench, setting: str, methods: Sequence[str], epsilons: Sequence[float | None], seeds: int
) -> None:
    """One line for each method: loss without privacy, and at each ε."""

    def losses(method: str) -> Iterator[list[float]]:
        for epsilon in epsilons:
            clip, *rates = bench.choice(setting, method, epsilon)
            clip = None if epsilon is None else clip
            cells = [Cell(setting, method, epsilon, clip, *rates, s, False) for s in range(seeds)]
            yield [bench.loss(cell) for cell in cells]

    def line(method: str) -> list[str]:
        own = list(losses(method))
        without = fmean(own[0])
        return [method, *(_spread(each, without) for each in own)]

    header = ["method", "without", *(f"ε = {epsilon:g}" for epsilon in epsilons if epsilon)]
    console.table(f"{setting}: loss, {seeds} seeds", header, [line(each) for each in methods])


def _spread(losses: Sequence[float], without: float) -> str:
    mean, spread = fmean(losses), stdev(losses) if len(losses) > 1 else 0.0
    return f"{mean:.3f} ± {spread:.3f} ({mean / without - 1:+.1%})"


if __name__ == "__main__":
    main()
