"""Hostile clients against each rule of weights: the final loss beside the run that nobody attacks.

    python bench/hostile.py OUT [--methods flora fedit ferret fedavg] [--rules …] [--attacks …]
        [--hostile 2] [--seeds 1] [key=value …]

Ten clients have the built-in tasks between them, at random; the first of them are hostile:

    turned   send their update with the sign turned, and ten times as long
    noise    send normal noise, ten times as long as their update
    little   all send the mean of the honest updates less 1.5 standard deviations, entry by entry
             (Baruch et al., "A Little Is Enough", 1902.06156); for methods of one rank

Adapters go on from factors in some methods: there B is turned, or noise. A table for each method
has the mean over seeds of the loss after the last round, relative to the method's own clean run
without a rule; the first line is what a rule costs where nobody attacks. Runs that are in OUT
already are not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hedgerow import console
from hedgerow.clock import Clock
from hedgerow.engines import local
from hedgerow.engines.local import LocalFleet
from hedgerow.errors import RunFailed
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult, Unwatched
from hedgerow.methods.base import Client
from hedgerow.methods.robust_weights import RULES
from hedgerow.runs.rows import read_rows
from hedgerow.wire import Update

EXPERIMENT = """\
model:      {path: demo}
data:
  source:   demo
  partition: {kind: iid, clients: 10}
  test:     demo
  prompt:   plain
  max_length: 96
method:     {name: flora}
training:   {steps: 20, batch_size: 8, learning_rate: 1.0e-3}
federation: {rounds: 6}
evaluation: {every: 6, metrics: [loss], batch_size: 64}
"""
METHODS = {
    "flora": "method={name: flora, ranks: [16, 16, 8, 8, 8, 8, 4, 4, 4, 4], alpha: 2r}",
    "fedit": "method={name: fedit, ranks: 8, alpha: 2r}",
    "ferret": "method={name: ferret, compression: 64}",
    "fedavg": "method={name: fedavg}",
}
ATTACKS = ("none", "turned", "noise", "little")
LENGTH = 10.0
"""Length of a hostile update, in units of the honest one."""
LITTLE = 1.5
"""Standard deviations from the mean that nobody notices."""


class Attacked(LocalFleet):
    """A fleet whose first clients are hostile, and know what the others send."""

    attack: str
    hostile: int

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
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS[1:], default=list(ATTACKS[1:]))
    parser.add_argument("--hostile", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    experiment = arguments.out / "experiment.yaml"
    experiment.write_text(EXPERIMENT)
    for method in arguments.methods:
        table = []
        clean = None
        for attack in ("none", *arguments.attacks):
            if attack == "little" and method in ("flora", "ferret"):
                continue  # their updates are of several shapes, or coded
            losses = [
                _loss(experiment, arguments, method, attack, rule)
                for rule in (None, *arguments.rules)
            ]
            clean = losses[0] if clean is None else clean
            table.append((attack, *(_relative(loss, clean) for loss in losses)))
        hostile = f"{arguments.hostile} of 10 hostile"
        header = ["attack", "no rule", *arguments.rules]
        console.table(f"{method}, {hostile}: loss beside the clean run's", header, table)


def _loss(
    experiment: Path, arguments: argparse.Namespace, method: str, attack: str, rule: str | None
) -> float | None:
    """Mean loss over seeds after the last round; None where a run failed."""
    found = []
    for seed in range(arguments.seeds):
        name = f"{method}-{attack}-{arguments.hostile}-{rule}-{seed}"
        changes = [METHODS[method], f"federation.seed={seed}", *arguments.overrides]
        if rule is not None:
            changes.append(f"federation.weights={rule}")
        loaded, out = load(experiment, changes), arguments.out / name
        kind: Any = LocalFleet
        if attack != "none":
            kind = type("Hostile", (Attacked,), {"attack": attack, "hostile": arguments.hostile})
        try:
            local.run(loaded, out, Unwatched(), resume=True, fleet=kind)
        except RunFailed:
            return None
        loss = read_rows(out)[-1]["eval_loss"]
        if loss is None:
            return None
        found.append(loss)
    return fmean(found)


def _relative(loss: float | None, clean: float | None) -> str:
    if loss is None or clean is None:
        return "fails"
    return f"{loss / clean - 1:+.1%}" if loss < 10 * clean else f"×{loss / clean:.0f}"


def _update(result: ClientResult) -> Update:
    assert isinstance(result.update, bytes)
    return Update.from_bytes(result.update)


if __name__ == "__main__":
    main()
