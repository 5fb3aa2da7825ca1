"""Loss against the bytes that it took: the methods with the same local work on the same clients.

    python bench/bytes_to_loss.py EXPERIMENT.yaml OUT [--only NAME …] [key.path=value ...]

The experiment names model, data and local training; the rows below are run one after another, each
into OUT/NAME, and go on where they were interrupted. At the end there is a table, and a picture in
OUT/bytes_to_loss.png. Bytes are those of serialised updates and entries, up and down, of all
clients together. Learning rates are per kind of training, the best of a few on this data.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from hedgerow import console
from hedgerow.engines import local
from hedgerow.experiment import load
from hedgerow.runs.rows import read_rows

FULL, LORA, ZEROTH = 2e-3, 5e-3, 3e-4
METHODS: dict[str, tuple[str, float]] = {
    "FedAvg": ("{name: fedavg}", FULL),
    "FedIT": ("{name: fedit, ranks: 16}", LORA),
    "FLoRA": ("{name: flora, ranks: 16}", LORA),
    "FedKSeed": ("{name: fedkseed}", ZEROTH),
    "Ferret 1-32": ("{name: ferret, compression: 32.6}", FULL),
    "Ferret 1-64": ("{name: ferret, compression: 66}", FULL),
    "Ferret 1-128": ("{name: ferret, compression: 137}", FULL),
    "Ferret 1-512": ("{name: ferret, compression: 600}", FULL),
    "Ferret paper 1-32": ("{name: ferret, paper: true, compression: 33}", FULL),
    "Ferret over LoRA": ("{name: ferret, over: lora, ranks: 16, compression: 40}", LORA),
}
"""The compressions are a little above the ratio of the name, to make up for a message's header."""

GOAL = 3.0


def main() -> None:
    """Run what is missing, then print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    curves = {}
    for name in arguments.only:
        method, rate = METHODS[name]
        changes = [f"method={method}", f"training.learning_rate={rate}", *arguments.overrides]
        directory = arguments.out / name.replace(" ", "-").lower()
        with console.ProgressWatcher(name) as watcher:
            local.run(load(arguments.experiment, changes), directory, watcher, resume=True)
        curves[name] = read_rows(directory)
    print_table(curves)
    draw(curves, arguments.out / "bytes_to_loss.png")


def spent(rows: list[dict[str, Any]]) -> list[int]:
    """Cumulative bytes up and down after each round."""
    total, sums = 0, []
    for row in rows:
        total += row["bytes_up"] + row["bytes_down"]
        sums.append(total)
    return sums


def print_table(curves: dict[str, list[dict[str, Any]]]) -> None:
    """One line for each method, beside the first one's."""
    reference = next(iter(curves.values()))

    def to_goal(rows: list[dict[str, Any]]) -> tuple[int, int] | None:
        reached = [i for i, row in enumerate(rows) if row["eval_loss"] <= GOAL]
        return (reached[0], spent(rows)[reached[0]]) if reached else None

    table = []
    for name, rows in curves.items():
        goal, first = to_goal(rows), to_goal(reference)
        up, reference_up = (sum(row["bytes_up"] for row in r) for r in (rows, reference))
        loss = rows[-1]["eval_loss"]
        table.append(
            (
                name,
                f"{loss:.3f}",
                f"{loss / reference[-1]['eval_loss'] - 1:+.1%}",
                f"1/{reference_up / up:.1f}",
                console.size(spent(rows)[-1]),
                f"{goal[0]} rounds, {console.size(goal[1])}" if goal else "not reached",
                f"1/{first[1] / goal[1]:.1f}" if goal and first else "",
            )
        )
    header = [
        "method",
        f"loss after {len(reference) - 1} rounds",
        "beside the first",
        "bytes up",
        "up and down",
        f"to loss {GOAL:g}",
        "bytes to it",
    ]
    console.table("", header, table)


def draw(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Loss against cumulative bytes."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for index, (name, rows) in enumerate(curves.items()):
        line = "-" if index < 10 else "--"
        axes.plot(
            spent(rows)[1:], [row["eval_loss"] for row in rows[1:]], line, marker=".", label=name
        )
    axes.axhline(GOAL, color="gray", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log", xlabel="bytes up and down, all clients", ylabel="loss on the test answers"
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    figure.savefig(file, dpi=150)
    print(f"{file}: loss against bytes")


if __name__ == "__main__":
    main()
