"""What a round costs beside local training, by part and method, from the run's own metrics.

    python bench/rounds.py [EXPERIMENT.yaml] [key.path=value …] [--only METHOD …]
        [--before CHECKOUT] [--times N]

Without arguments it takes the built-in demo's experiment. Methods do the same local work, each in
a process of its own; the first round, which warms caches, is left out. With `--before`, each also
runs from another checkout of hedgerow, in turn with this one, with what was version 0.1's default,
and a second table has the ratios of the seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from hedgerow import console, demo
from hedgerow.runs.rows import read_rows

PARTS = ("start", "update", "wire", "aggregate", "ledger", "apply")
METHODS = {
    "flora": ["method.name=flora"],
    "zero_padding": ["method.name=zero_padding"],
    "fedavg": ["method=fedavg"],
    "ferret": ["method=ferret"],
}
AS_BEFORE = {
    "fedavg": ["training.keep_optimizer=false"],
    "ferret": ["training.keep_optimizer=false", "method={name: ferret, coordinates: random}"],
}
"""What makes methods do here what they did by default in version 0.1."""

HERE = Path(__file__).parents[1]


def main() -> None:
    """Run the methods, and print the share of each part, and what it was before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", nargs="*", help="a file, and overrides")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--before", type=Path)
    parser.add_argument("--times", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.before is not None and not (arguments.before / "src/hedgerow").is_dir():
        parser.error(f"--before {arguments.before} is no checkout of hedgerow")
    if arguments.times < 1:
        parser.error("--times must be at least 1")
    given = list(arguments.experiment)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        has_file = given and "=" not in given[0]
        path = Path(given.pop(0)) if has_file else demo.prepare(out / "demo")
        overrides = ["federation.rounds=4", *given]

        def seconds(what: str, method: str, time: int, *options: str) -> dict[str, float]:
            checkout = arguments.before if what == "before" else HERE
            run = out / f"{what}-{method}-{time}"
            return run_from(checkout, path, [*overrides, *METHODS[method], *options], run)

        shares, ratios = [], []
        for method in arguments.only:
            now, like, before = [], [], []
            for time in range(arguments.times):
                now.append(seconds("now", method, time))
                if arguments.before is not None:
                    before.append(seconds("before", method, time))
                    options = AS_BEFORE.get(method, [])
                    like.append(seconds("like", method, time, *options) if options else now[-1])
            own = middle(now)
            shares.append(
                (method, *(f"{own[part] / own['round']:.2%}" for part in (*PARTS, "all")))
            )
            if before:
                old, new = middle(before), middle(like)
                parts = (f"{new[part] / old[part]:.2f}" for part in (*PARTS, "all", "round"))
                ratios.append((method, *parts, f"{own['all'] / old['all']:.2f}"))
    header = ["method", *PARTS, "beside training"]
    console.table("share of a round without evaluation", header, shares)
    if ratios:
        header += ["whole round", "beside training, today's default"]
        console.table("seconds beside the other checkout's, on the same work", header, ratios)


def run_from(checkout: Path, path: Path, overrides: list[str], out: Path) -> dict[str, float]:
    """Seconds of each part in the rounds after the first, by part, `all` parts and the `round`."""
    subprocess.run(
        [sys.executable, "-m", "hedgerow", "run", path, *overrides, "--out", out],
        env=os.environ | {"PYTHONPATH": str(checkout / "src")},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    metrics = read_rows(out)[2:]
    found = {p: sum(row[f"{p}_seconds"] for row in metrics) for p in PARTS}
    evaluation = sum(row.get("evaluate_seconds", 0) for row in metrics)
    whole = sum(row["seconds"] for row in metrics) - evaluation
    return {**found, "all": sum(found.values()), "round": whole}


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median over runs, by part."""
    return {part: median(run[part] for run in runs) for part in runs[0]}


if __name__ == "__main__":
    main()
