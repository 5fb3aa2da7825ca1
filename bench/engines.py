"""What a round costs on each engine, beside the training that it does: one process, and Flower.

    python bench/engines.py [EXPERIMENT.yaml] [key.path=value ...]

Without arguments it takes the built-in demo's experiment. The engines run one after another, on the
same work, with little and with much local training. Each round is compared with the seconds that
the local engine spends in training; Flower's simulation trains on all cores at once, one client on
each, so its rounds can be shorter than that. The first round, which loads models, is left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# As in the simulation, where each client has a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hedgerow import console, demo
from hedgerow.engines import local
from hedgerow.engines.flower import simulation
from hedgerow.experiment import load
from hedgerow.runs.rows import read_rows

STEPS = (1, 10)
ENGINES = {"local": local.run, "flower": simulation.run}


def main() -> None:
    """Run both engines and print what their rounds cost."""
    arguments = sys.argv[1:]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        given = arguments and "=" not in arguments[0]
        path = Path(arguments.pop(0)) if given else demo.prepare(out / "demo")
        for steps in STEPS:
            changes = ["federation.rounds=6", "data.test=null", "evaluation.by=null"]
            experiment = load(path, [*changes, f"training.steps={steps}", *arguments])
            seconds, metrics = {}, {}
            for name, run in ENGINES.items():
                with console.ProgressWatcher(f"{name}, {steps} steps, round") as watcher:
                    run(experiment, out / f"{name}-{steps}", watcher)
                metrics[name] = read_rows(out / f"{name}-{steps}")[2:]
                seconds[name] = sum(row["seconds"] for row in metrics[name])
            training = sum(row["train_seconds"] for row in metrics["local"])
            ratios = [seconds[name] / training for name in ENGINES]
            beside = [
                f"{(seconds[name] - training) / len(metrics[name]):+.2f} s" for name in ENGINES
            ]
            rows.append((str(steps), *(f"{ratio:.2f}" for ratio in ratios), *beside))
    console.table(
        f"rounds in units of the local engine's training, {os.cpu_count()} cores",
        ["steps", "local", "flower", "local adds", "flower adds"],
        rows,
    )


if __name__ == "__main__":
    main()
