"""FLoRA's loss against its scaling factor, and beside it what `adaptive` chooses.

    python bench/scaling.py EXPERIMENT.yaml OUT [key.path=value ...]

The experiment names model, data and local training. Each factor p is what every client counts
(`method.scaling`), so that N·p is the length of the global step; the rows are run one after
another, each into OUT, and go on where they were interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hedgerow import console
from hedgerow.engines import local
from hedgerow.experiment import load
from hedgerow.rundir import read_rows

STEPS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""N·p."""


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    clients = len(local.prepare(load(arguments.experiment, arguments.overrides)).clients)
    scalings = {f"{step:g}/N": str(step / clients) for step in STEPS} | {"adaptive": "adaptive"}
    losses, weights = {}, {}
    for name, scaling in scalings.items():
        changes = [*arguments.overrides, "method.name=flora", f"method.scaling={scaling}"]
        directory = arguments.out / name.replace("/", "-")
        experiment = load(arguments.experiment, changes)
        with console.ProgressWatcher(name) as watcher:
            local.run(experiment, directory, watcher, resume=True)
        rows = read_rows(directory)
        losses[name] = rows[-1]["eval_loss"]
        weights[name] = [f"{row['step_size']:.2f}" for row in rows[1:] if "step_size" in row]
    best = min(loss for name, loss in losses.items() if name != "adaptive")
    table = [(name, f"{loss:.4f}", f"{loss / best - 1:+.2%}") for name, loss in losses.items()]
    console.table("", ["scaling factor", "loss", "beside the best fixed one"], table)
    print("global step sizes that adaptive took:", ", ".join(weights["adaptive"]))


if __name__ == "__main__":
    main()
