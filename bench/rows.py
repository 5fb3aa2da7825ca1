"""What benchmarks of several methods on one experiment share: their arguments, and the runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hedgerow import comparison, console
from hedgerow.errors import RunFailed
from hedgerow.experiment import load


def arguments(description: str) -> argparse.Namespace:
    """`experiment`, `out` and `overrides`, from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args()


def run(given: argparse.Namespace, methods: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Run what is missing of each method, as `hedgerow compare` does; returns their metrics.

    Raises:
        RunFailed: one of them did not get to its end.
    """
    experiment = partial(load, given.experiment)
    cells = comparison.plan(experiment, given.overrides, methods, {}, 1, given.out)
    outcomes = comparison.run(cells, console.ProgressWatcher)
    for outcome in outcomes:
        if outcome.failure is not None:
            raise RunFailed(f"{comparison.title(outcome.cell)}: {outcome.failure}")
    return [outcome.rows for outcome in outcomes]
