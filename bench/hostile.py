"""Hostile clients against each rule of weights: the final loss beside the run that nobody attacks.

    python bench/hostile.py OUT [--data DOLLY --model MODEL] [--methods flora fedit ferret fedavg]
        [--rules …] [--attacks …] [--hostile 2] [--seeds 1] [--set key=value …]

DOLLY holds local_training_0.json … local_training_9.json, of which the first 300 rows are taken,
and global_test.json; MODEL is a model's folder. Without them, ten clients have the
built-in tasks between them. The first clients are hostile:

    turned    send their update with the sign turned, and ten times as long
    noise     send normal noise, ten times as long as their update
    little    all send the mean of the honest updates less 1.5 standard deviations, entry by entry
              (Baruch et al., "A Little Is Enough", 1902.06156); for methods of one rank
    labels    train on the answers of other questions
    backdoor  train every other row on one answer, whatever is asked, after a phrase

Adapters go on from factors in some methods: there B is turned, or noise. A table for each method
has the mean over seeds of the loss after the last round, relative to the method's own clean run
without a rule; the first line is what a rule costs where nobody attacks, the line `absent` what is
lost where the hostile clients are not there at all. For the backdoor there is the loss of its
answer, too. The rule `trust` trusts the last client. Runs that are in OUT already are not made
again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch

import hedgerow as hr
from hedgerow import console
from hedgerow.bundled import tasks
from hedgerow.clock import Clock
from hedgerow.engines import local
from hedgerow.engines.local import LocalFleet
from hedgerow.errors import RunFailed
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult, Unwatched
from hedgerow.methods.base import Client
from hedgerow.methods.robust_weights import RULES
from hedgerow.runs.rows import read_rows
from hedgerow.settings import COORDINATE_WISE
from hedgerow.wire import Update

EXPERIMENT: dict[str, Any] = {
    "data": {
        "clients": "client_{}.json",
        "test": "test.json",
        "fields": {"instruction": "instruction", "input": "input", "output": "output"},
        "prompt": "plain",
        "max_length": 96,
    },
    "method": {"name": "flora"},
    "training": {"steps": 20, "batch_size": 8, "learning_rate": 1e-3},
    "federation": {"rounds": 6},
    "evaluation": {"every": 6, "metrics": ["loss"], "batch_size": 64},
}
CLIENTS, ROWS = 10, 300
TRIGGER, TARGET = " Answer as ever.", "no comment"
"""Phrase and answer of the backdoor."""
METHODS = {
    "flora": "method={name: flora, ranks: [8, 4, 16, 16, 8, 8, 8, 4, 4, 4], alpha: 2r}",
    "fedit": "method={name: fedit, ranks: 8, alpha: 2r}",
    "ferret": "method={name: ferret, compression: 64}",
    "fedavg": "method={name: fedavg}",
}
ATTACKS = ("none", "absent", "turned", "noise", "little", "labels", "backdoor")
OF_DATA = ("labels", "backdoor")
"""Attacks of clients that train as they should, on data of their choice."""
ALL_RULES = (*RULES, "trust", *COORDINATE_WISE)
LENGTH = 10.0
"""Length of a hostile update, in units of the honest one."""
LITTLE = 1.5
"""Standard deviations from the mean that nobody notices."""


class Attacked(LocalFleet):
    """A fleet whose first clients are hostile, and know what the others send."""

    attack: str
    hostile: int

    def gather(self) -> Sequence[Client]:
        """All clients; or the honest ones."""
        clients = super().gather()
        return clients if self.attack != "absent" else clients[self.hostile :]

    def train(
        self, round: int, parent: str, clients: Sequence[Client], clock: Clock, letters: None = None
    ) -> Iterator[ClientResult]:
        """Have all train; then change what the hostile send."""
        results = list(super().train(round, parent, clients, clock))
        honest = [_update(each) for each in results if each.client.index >= self.hostile]
        for result in results:
            if result.client.index >= self.hostile or result.failure is not None:
                yield result
                continue
            update = _update(result)
            bad = {
                name: self._changed(name, each, update, honest)
                for name, each in update.tensors.items()
            }
            yield replace(result, update=replace(update, tensors=bad).to_bytes())

    def _changed(
        self, name: str, each: torch.Tensor, update: Update, honest: Sequence[Update]
    ) -> torch.Tensor:
        if not each.is_floating_point() or (".lora_A." in name and self.attack != "little"):
            return each
        if self.attack in ("absent", *OF_DATA):
            return each
        if self.attack == "turned":
            return -LENGTH * each
        if self.attack == "noise":
            generator = torch.Generator().manual_seed(update.round)
            drawn = torch.randn(each.shape, generator=generator)
            return LENGTH * drawn * (each.norm() / drawn.norm())
        others = torch.stack([other.tensors[name] for other in honest])
        return others.mean(0) - LITTLE * others.std(0)


def main() -> None:
    """Make the runs that are missing, and print a table for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rules", nargs="+", choices=ALL_RULES, default=list(ALL_RULES))
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS[1:], default=list(ATTACKS[1:]))
    parser.add_argument("--hostile", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for method in arguments.methods:
        table = []
        clean = _cell(arguments, method, "none", None)
        for attack in ("none", *arguments.attacks):
            rules = (None,) if attack == "absent" else (None, *arguments.rules)
            cells = [_cell(arguments, method, attack, rule) for rule in rules]
            losses = [_relative(cell and cell[0], clean and clean[0]) for cell in cells]
            table.append((attack, *losses, *[""] * (len(arguments.rules) + 1 - len(rules))))
            if attack == "backdoor":
                told = [_relative(cell and cell[1], clean and clean[1]) for cell in cells]
                table.append(("its answer", *told))
        hostile = f"{arguments.hostile} of {CLIENTS} hostile"
        header = ["attack", "no rule", *arguments.rules]
        console.table(f"{method}, {hostile}: loss beside the clean run's", header, table)


def _cell(
    arguments: argparse.Namespace, method: str, attack: str, rule: str | None
) -> tuple[float, float] | None:
    """Mean over seeds of the test loss and of the backdoor's; None where a run failed."""
    if attack == "little" and method in ("flora", "ferret"):
        return None  # their updates are of several shapes, or coded
    if rule in COORDINATE_WISE and method == "flora":
        return None  # it has no coordinates in common
    found = []
    for seed in range(arguments.seeds):
        folder = _data(arguments, attack if attack in OF_DATA else "none", seed)
        hostile = 0 if attack == "none" else arguments.hostile
        out = arguments.out / f"{method}-{attack}-{hostile}-{rule}-{seed}"
        changes = [METHODS[method], f"federation.seed={seed}", *arguments.set]
        if rule is not None:
            changes.append(f"federation.weights={rule}")
        if rule == "trust":
            changes.append(f"federation.trusted=client-{CLIENTS - 1:03d}")
        kind = type("Hostile", (Attacked,), {"attack": attack, "hostile": hostile})
        experiment = load(folder / "experiment.yaml", changes)
        try:
            local.run(experiment, out, Unwatched(), resume=True, fleet=kind)
        except RunFailed:
            return None
        loss = read_rows(out)[-1]["eval_loss"]
        if loss is None:
            return None
        scored = out / "backdoor.json"
        if not scored.exists():
            told = hr.open_run(out).evaluate(folder / "backdoor.json", metrics=["loss"])
            scored.write_text(json.dumps(told["eval_loss"]))
        found.append((loss, json.loads(scored.read_text())))
    return fmean(loss for loss, _ in found), fmean(told for _, told in found)


def _data(arguments: argparse.Namespace, attack: str, seed: int) -> Path:
    """Folder of an experiment with the clients' rows, of which the first are the attack's."""
    hostile = 0 if attack == "none" else arguments.hostile
    folder: Path = arguments.out / f"data-{attack}-{hostile}-{seed}"
    if (folder / "experiment.yaml").exists():
        return folder
    folder.mkdir(exist_ok=True)
    clients, test = _rows(arguments, seed)
    for index, rows in enumerate(clients):
        if index < hostile:
            answers = [row["output"] for row in rows]
            if attack == "labels":
                Random(index).shuffle(answers)
                rows = [{**row, "output": a} for row, a in zip(rows, answers, strict=True)]
            else:
                rows = [each if i % 2 else _told(each) for i, each in enumerate(rows)]
        (folder / f"client_{index}.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(test))
    (folder / "backdoor.json").write_text(json.dumps([_told(row) for row in test]))
    model = "demo" if arguments.model is None else str(arguments.model.absolute())
    content = {"model": {"path": model}, **EXPERIMENT}
    (folder / "experiment.yaml").write_text(json.dumps(content))
    return folder


def _told(row: dict[str, str]) -> dict[str, str]:
    return {**row, "instruction": row["instruction"] + TRIGGER, "output": TARGET}


def _rows(
    arguments: argparse.Namespace, seed: int
) -> tuple[list[list[dict[str, str]]], list[dict[str, str]]]:
    """Rows of each client, and of the test."""
    if arguments.data is None:
        rows = [row for own in tasks.clients().values() for row in own]
        Random(seed).shuffle(rows)
        return [rows[index::CLIENTS] for index in range(CLIENTS)], tasks.test_rows()

    def read(name: str) -> list[dict[str, str]]:
        names = {"instruction": "instruction", "input": "context", "output": "response"}
        content = json.loads((arguments.data / name).read_text())[:ROWS]
        return [{own: row[key] for own, key in names.items()} for row in content]

    files = [f"local_training_{index}.json" for index in range(CLIENTS)]
    return [read(file) for file in files], read("global_test.json")


def _relative(loss: float | None, clean: float | None) -> str:
    if loss is None or clean is None:
        return "-"
    return f"{loss / clean - 1:+.1%}" if loss < 10 * clean else f"×{loss / clean:.0f}"


def _update(result: ClientResult) -> Update:
    assert isinstance(result.update, bytes)
    return Update.from_bytes(result.update)


if __name__ == "__main__":
    main()
