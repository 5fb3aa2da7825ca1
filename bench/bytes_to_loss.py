"""Loss against the bytes that it took: the methods with the same local work on the same clients.

    python bench/bytes_to_loss.py EXPERIMENT.yaml OUT [--only NAME …] [--seeds N] [key=value …]

The experiment names model, data (a file for each client) and local training. Each method's learning
rate is the best of a few on rows that are taken from the clients' own for it, with the first seed;
then every method is run with all seeds and scored on the test data. Both are comparisons in OUT,
which go on where they were interrupted. At the end there is a table of means ± half the spread, and
a picture in OUT/bytes_to_loss.png. Bytes are those of serialised updates and entries, up and down,
of all clients together.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

import hedgerow as hr
from hedgerow import console
from hedgerow.experiment import load

FULL, LORA, ZEROTH = (2e-3, 3e-3, 4e-3), (3e-3, 5e-3, 1e-2), (1e-4, 3e-4, 1e-3)
NESTEROV = "server={name: nesterov, learning_rate: 0.8, momentum: 0.5}"
METHODS: dict[str, tuple[str, tuple[float, ...]]] = {
    "FedAvg": ("fedavg training.keep_optimizer=false", FULL),
    "FedAvg, moments kept": ("fedavg training.keep_optimizer=true", FULL),
    "DiLoCo": ("diloco", FULL),
    "SparseLoCo": ("sparseloco", FULL),
    "SparseLoCo 1-32": ("sparseloco up={name: top_k, k: 512, tile: 4096, bits: 2}", FULL),
    "SparseLoCo 1-512": ("sparseloco up={name: top_k, k: 24, tile: 4096, bits: 2}", FULL),
    "STC 1-128": (
        "stc up={name: top_k, k: 1, tile: 32, group: all, bits: 1} "
        "down={name: top_k, k: 1, tile: 32, group: all, bits: 1}",
        FULL,
    ),
    "STC 1-512": (
        "stc up={name: top_k, k: 1, tile: 160, group: all, bits: 1} "
        "down={name: top_k, k: 1, tile: 160, group: all, bits: 1}",
        FULL,
    ),
    "Ferret 1-32": ("ferret compression=33", FULL),
    "Ferret 1-128": ("ferret compression=141", FULL),
    "Ferret 1-128, 1-64 down": ("ferret compression=141 broadcast_compression=66", FULL),
    "Ferret 1-128, 1-8 down": ("ferret compression=141 broadcast_bits=4", FULL),
    "Ferret 1-128, random": ("ferret coordinates=random compression=137", FULL),
    "Ferret 1-128, Nesterov": (f"ferret compression=141 {NESTEROV}", FULL),
    "Ferret 1-512, Nesterov": (f"ferret compression=850 {NESTEROV}", FULL),
    "Ferret 1-512": ("ferret compression=850", FULL),
    "Ferret 1-2048": ("ferret compression=8000", FULL),
    "Ferret over LoRA": ("ferret over=lora ranks=16 compression=40", LORA),
    "Ferret of the paper 1-32": ("ferret paper=true compression=33", FULL),
    "FedKSeed": ("fedkseed", ZEROTH),
}
"""A method with its options, and the learning rates that are tried. The compressions are a little
above the ratio of the name, to make up for a message's header."""

GOAL = 3.0
HELD_OUT = 30
"""One in so many rows of each client is for choosing learning rates."""


def main() -> None:
    """Choose rates, run what is missing, then print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    data = split(arguments.experiment, arguments.out / "data")
    overrides = [f"data.clients={data / 'client_{}.json'}", *arguments.overrides]
    validation = f"data.test={data / 'validation.json'}"
    curves = {}
    for name in arguments.only:
        method, rates = METHODS[name]
        tried = hr.compare(
            arguments.experiment,
            *overrides,
            validation,
            methods=[method],
            sweep={"training.learning_rate": rates},
            out=arguments.out / "rates" / folder(name),
        )
        rate = best_rate(tried)
        found = hr.compare(
            arguments.experiment,
            *overrides,
            methods=[f"{method} training.learning_rate={rate}"],
            seeds=arguments.seeds,
            out=arguments.out / "runs" / folder(name),
        )
        curves[name] = [run.metrics for run in found.runs.values()]
        console.out.print(f"{name}: learning rate {rate:g}")
    print_table(curves)
    draw(curves, arguments.out / "bytes_to_loss.png")


def folder(name: str) -> str:
    """Name of a method's folder."""
    return name.lower().replace(" ", "-").replace(",", "")


def split(experiment: Path, out: Path) -> Path:
    """Divide each client's rows: those that train, and those that rates are chosen on."""
    files = load(experiment).data.clients
    if not isinstance(files, str):
        raise SystemExit("data.clients: give a pattern, as client_{}.json")
    out.mkdir(parents=True, exist_ok=True)
    held_out: list[Any] = []
    for index in range(len(list(Path(files).parent.glob(Path(files).name.replace("{}", "*"))))):
        rows = json.loads(Path(files.replace("{}", str(index))).read_text())
        count = max(1, len(rows) // HELD_OUT)
        chosen = set(np.random.default_rng(index).choice(len(rows), count, replace=False).tolist())
        held_out += [row for place, row in enumerate(rows) if place in chosen]
        kept = [row for place, row in enumerate(rows) if place not in chosen]
        (out / f"client_{index}.json").write_text(json.dumps(kept))
    (out / "validation.json").write_text(json.dumps(held_out))
    return out


def best_rate(tried: hr.Comparison) -> float:
    """The learning rate with the least loss after the last round."""
    losses = {
        run.experiment.training.learning_rate: run.metrics["eval_loss"].iloc[-1]
        for run in tried.runs.values()
    }
    return min(losses, key=lambda rate: losses[rate])


def spent(rows: Any) -> Any:
    """Cumulative bytes up and down after each round."""
    return (rows["bytes_up"] + rows["bytes_down"]).cumsum()


def print_table(curves: dict[str, list[Any]]) -> None:
    """One line for each method, beside the first one's."""
    reference = next(iter(curves.values()))

    def to_goal(runs: list[Any]) -> float | None:
        """Mean bytes to the goal, where all seeds reach it."""
        reached = [spent(rows)[rows["eval_loss"] <= GOAL].min() for rows in runs]
        return None if np.isnan(reached).any() else float(mean(reached))

    first = to_goal(reference)
    base_loss, base_up = (
        mean(rows["eval_loss"].iloc[-1] for rows in reference),
        mean(rows["bytes_up"].sum() for rows in reference),
    )
    table = []
    for name, runs in curves.items():
        losses = [rows["eval_loss"].iloc[-1] for rows in runs]
        goal, up = to_goal(runs), mean(rows["bytes_up"].sum() for rows in runs)
        table.append(
            (
                name,
                f"{mean(losses):.3f} ± {(max(losses) - min(losses)) / 2:.3f}",
                f"{mean(losses) / base_loss - 1:+.1%}",
                f"1/{base_up / up:.1f}",
                console.size(int(mean(spent(rows).iloc[-1] for rows in runs))),
                console.size(int(goal)) if goal else "not reached",
                f"1/{first / goal:.1f}" if goal and first else "",
            )
        )
    rounds = len(reference[0]) - 1
    header = [
        *("method", f"loss after {rounds} rounds", "beside the first", "bytes up", "up and down"),
        *(f"to loss {GOAL:g}", "bytes to it"),
    ]
    console.table("", header, table)


def draw(curves: dict[str, list[Any]], file: Path) -> None:
    """Mean loss against cumulative bytes, and the spread of the seeds."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    by_bytes: dict[str, Any] = defaultdict(list)
    for index, (name, runs) in enumerate(curves.items()):
        losses = np.array([rows["eval_loss"].dropna().to_numpy()[1:] for rows in runs])
        scored = runs[0]["eval_loss"].notna()
        by_bytes[name] = spent(runs[0])[scored].to_numpy()[1:]
        line = "-" if index < 10 else "--"
        axes.plot(by_bytes[name], losses.mean(0), line, marker=".", label=name)
        axes.fill_between(by_bytes[name], losses.min(0), losses.max(0), alpha=0.2)
    axes.axhline(GOAL, color="gray", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log", xlabel="bytes up and down, all clients", ylabel="loss on the test answers"
    )
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
