"""What a round costs beside local training, by part and method, from the run's own metrics.

    python bench/rounds.py [EXPERIMENT.yaml] [key.path=value ...]

Without arguments it takes the built-in demo's experiment. The methods run one after another in one
process, with the same local work; the first round, which warms caches, is left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from hedgerow import console, demo
from hedgerow.engines import local
from hedgerow.experiment import load
from hedgerow.runs.rows import read_rows

PARTS = ("start", "update", "wire", "aggregate", "ledger", "apply")
METHODS = ("flora", "zero_padding", "fedavg", "ferret")
ALL_PARAMETERS = ("fedavg", "ferret")


def main() -> None:
    """Run the methods and print the share of each part."""
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        given = arguments and "=" not in arguments[0]
        path = Path(arguments.pop(0)) if given else demo.prepare(out / "demo")
        rows = []
        for method in METHODS:
            key = "method" if method in ALL_PARAMETERS else "method.name"
            experiment = load(path, ["federation.rounds=4", *arguments, f"{key}={method}"])
            with console.ProgressWatcher(method) as watcher:
                local.run(experiment, out / method, watcher)
            metrics = read_rows(out / method)[2:]
            evaluation = sum(row.get("evaluate_seconds", 0) for row in metrics)
            total = sum(row["seconds"] for row in metrics) - evaluation
            shares = [sum(row[f"{part}_seconds"] for row in metrics) / total for part in PARTS]
            rows.append((method, *(f"{share:.2%}" for share in (*shares, sum(shares)))))
    console.table(
        "share of a round without evaluation", ["method", *PARTS, "beside training"], rows
    )


if __name__ == "__main__":
    main()
