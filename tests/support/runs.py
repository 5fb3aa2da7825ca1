"""Runs: started in a process of their own, and what they have left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hedgerow import federation
from hedgerow.engines import local
from hedgerow.engines.local import LocalFleet
from hedgerow.experiment import Experiment
from hedgerow.federation.fleet import Unwatched
from hedgerow.runs.directory import RunDirectory


def run_hedgerow(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "hedgerow", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


def run_with(fleet: type[LocalFleet], experiment: Experiment, out: Path) -> list[dict[str, Any]]:
    """Run an experiment with a fleet of a class; returns the rows of its metrics."""
    prepared = local.prepare(experiment)
    trained = experiment.method.trained_shapes(prepared.model)
    with RunDirectory.create(out, experiment, prepared.base, {}, trained) as directory:
        federation.run(experiment, fleet(experiment, prepared, directory), directory, Unwatched())
    return rows_of(out)


def entries(run: Path) -> dict[str, bytes]:
    """The bytes of a run's entries, by name."""
    return {path.name: path.read_bytes() for path in (run / "ledger").glob("*.safetensors")}


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def ledger_bytes(run: Path) -> dict[str, bytes]:
    """The files of a run's ledger."""
    return {path.name: path.read_bytes() for path in sorted((run / "ledger").iterdir())}


def tensorboard_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of each scalar in a run's event files, as TensorBoard shows them."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def hear_interrupts() -> None:
    """Have a new process stop at SIGINT (`preexec_fn`).

    Who runs the tests in the background of a shell has them, and what they start, ignore it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
