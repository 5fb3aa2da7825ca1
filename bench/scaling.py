"""FLoRA's loss against its scaling factor, and beside it what `adaptive` chooses.

    python bench/scaling.py EXPERIMENT.yaml OUT [key.path=value ...]

The experiment names model, data and local training. Each factor p is what every client counts
(`method.scaling`), so that N·p is the length of the global step; the rows are run one after
another, each into OUT, and go on where they were interrupted.
"""

from __future__ import annotations

import rows

from hedgerow import console
from hedgerow.engines import local
from hedgerow.experiment import load

STEPS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""N·p."""


def main() -> None:
    """Run what is missing, then print the table."""
    given = rows.arguments(__doc__.splitlines()[0])
    clients = len(local.prepare(load(given.experiment, given.overrides)).clients)
    scalings = {f"{step:g}/N": str(step / clients) for step in STEPS} | {"adaptive": "adaptive"}
    runs = rows.run(given, [f"flora scaling={scaling}" for scaling in scalings.values()])
    metrics = dict(zip(scalings, runs, strict=True))
    losses = {name: each[-1]["eval_loss"] for name, each in metrics.items()}
    best = min(loss for name, loss in losses.items() if name != "adaptive")
    table = [(name, f"{loss:.4f}", f"{loss / best - 1:+.2%}") for name, loss in losses.items()]
    console.table("", ["scaling factor", "loss", "beside the best fixed one"], table)
    sizes = [f"{row['step_size']:.2f}" for row in metrics["adaptive"][1:]]
    print("global step sizes that adaptive took:", ", ".join(sizes))


if __name__ == "__main__":
    main()
