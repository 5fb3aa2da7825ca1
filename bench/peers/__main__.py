"""Peers beside hedgerow: the same work through other libraries, each in an environment of its own.

    python bench/peers [--peers a,b,…] [--rounds N] [--times N] [--model FOLDER --data FOLDER]
                       [--environments DIR] [--out DIR]

Everybody averages LoRA factors (rank 8, alpha 16, on q_proj and v_proj), weighted by rows: ten
AdamW steps of four rows of up to 128 tokens a client and round, one thread, one client at a time
where the library can. What hedgerow draws, the rows of each step and the adapter that everybody
begins with, is written once and given to all, so that losses and adapters come out alike. Without
arguments it takes the built-in demo's clients; `--data` names a folder of local_training_0.json, …,
with Dolly's fields. What was measured is in DIR/measured.jsonl, and a run that was stopped goes on
from there.

A round's costs are those of a run of N rounds without those of a run of one, by N - 1; what a run
of one costs beyond a round is its start. So rounds of a library whose start takes longer than all
of them are known roughly: give more rounds (and another `--out`), and times. Bytes are those that a
library counts, of which some count headers. Memory is the largest sum of PSS. All are
ratios to hedgerow's in the same turn, of which the table has medians. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from statistics import median
from typing import Any

from environments import OURS, PEERS, NotInstalled, python_of, version_of
from measure import Failed, measure
from task import Task, apart, finished, prepare

from hedgerow import console
from hedgerow.errors import UserError

HERE = Path(__file__).resolve().parent
Key = tuple[str, int, int]
"""A peer, its number of rounds, and the turn."""


def main() -> None:
    """Measure what is not measured yet, in turns, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="names, with commas between")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    options = parser.parse_args()
    # So that whoever ends this ends what it is measuring, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def run(options: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        UserError: an argument makes no sense, or `--out` holds the measurements of other work.
    """
    names = [name for name in options.peers.split(",") if name not in ("", OURS)]
    if unknown := [name for name in names if name not in PEERS]:
        raise UserError(f"--peers: there is no {unknown[0]}: choose from {', '.join(PEERS)}")
    if options.rounds < 2 or options.times < 1:
        raise UserError("--rounds must be at least 2, and --times at least 1")
    if (options.model is None) != (options.data is None):
        raise UserError("--model and --data go together: give both, or none for the demo")
    task = prepare(options.out, options.model, options.data, options.rounds)
    commands: dict[str, list[str]] = {}
    versions, skipped = {}, {}
    for name in [OURS, *names]:
        try:
            python = python_of(name, options.environments.absolute())
        except NotInstalled as error:
            if name == OURS:
                raise UserError(str(error)) from None
            skipped[name] = str(error)
            continue
        commands[name] = [str(python), *([] if name == OURS else [str(HERE / PEERS[name].script)])]
        versions[name] = version_of(name, options.environments.absolute())
    records = measured(task, commands, skipped, options)
    show(task, records, versions, skipped, options)


def measured(
    task: Task, commands: dict[str, list[str]], skipped: dict[str, str], options: Any
) -> dict[Key, dict[str, Any]]:
    """Every measurement, of which those that are not in the file yet are made."""
    path = options.out / "measured.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    records = {(each["peer"], each["rounds"], each["turn"]): each for each in found}
    todo = [
        (name, rounds, turn)
        for turn in range(options.times)
        for name in commands
        for rounds in (1, options.rounds)
    ]
    for name, rounds, turn in todo:
        key = (name, rounds, turn)
        if key in records or name in skipped:
            continue
        out = (options.out / "scratch" / f"{name}-{rounds}-{turn}").absolute()
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        errors = out.with_suffix(".err")
        ours = name == OURS
        command = [*commands[name], *(task.ours if ours else task.args)(out, rounds)]
        try:
            taken = measure(command, environment(ours), errors)
            said = task.said(out) if ours else finished(taken.output)
        except Failed as error:
            if ours:
                raise UserError(f"hedgerow has failed: {error}") from None
            skipped[name] = f"{PEERS[name].title} has failed, as {errors} says: {last_line(error)}"
            continue
        record = {
            "peer": name,
            "rounds": rounds,
            "turn": turn,
            "cpu": taken.cpu,
            "wall": taken.wall,
            "peak": taken.peak,
            **said,
            "apart": None if ours or rounds == 1 else apart(task, out, options.rounds),
        }
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        records[key] = record
        print(f"turn {turn + 1}, {name}, {rounds} rounds: loss {said['loss']:.4f}", file=sys.stderr)
        if not ours:
            shutil.rmtree(out, ignore_errors=True)
    return records


def last_line(error: Failed) -> str:
    """How the output of a command that has failed ends."""
    return (str(error).splitlines() or ["it has said nothing"])[-1]


def environment(ours: bool) -> dict[str, str]:
    """Variables of a run: one thread, and nobody asks a network for anything."""
    own = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }
    # Processes that a peer begins find its modules, too.
    path = {} if ours else {"PYTHONPATH": str(HERE)}
    return os.environ | own | path


def show(
    task: Task,
    records: dict[Key, dict[str, Any]],
    versions: dict[str, str],
    skipped: dict[str, str],
    options: Any,
) -> None:
    """Print the table, and whom it lacks."""
    costs: dict[str, list[dict[str, float]]] = {}
    for name in versions:
        if name in skipped:
            continue
        costs[name] = [
            costs_of(records[name, 1, turn], records[name, options.rounds, turn])
            for turn in range(options.times)
        ]
    rows = []
    for name, turns in costs.items():
        pairs = list(zip(turns, costs[OURS], strict=True))
        ratios = [
            f"{median(own[key] / ours[key] for own, ours in pairs):.2f}"
            for key in ("cpu", "wall", "start", "peak")
        ]
        last = records[name, options.rounds, options.times - 1]
        ours = records[OURS, options.rounds, options.times - 1]
        rows.append(
            (
                f"{PEERS[name].title if name in PEERS else OURS} {versions[name]}",
                *ratios,
                f"{last['bytes_up'] / ours['bytes_up']:.2f}",
                f"{last['loss']:.4f}",
                "" if last["apart"] is None else f"{last['apart']:.0e}",
            )
        )
    names = ["", "CPU", "wall", "start, CPU", "peak", "bytes up", "loss", "adapter apart"]
    console.table(f"{task.title}, {options.rounds} rounds, beside hedgerow", names, rows)
    for sentence in skipped.values():
        console.out.print(sentence, soft_wrap=True)


def costs_of(one: dict[str, Any], all_rounds: dict[str, Any]) -> dict[str, float]:
    """Seconds of a round and of the start, and the peak."""
    more = all_rounds["rounds"] - 1
    cpu, wall = ((all_rounds[key] - one[key]) / more for key in ("cpu", "wall"))
    return {"cpu": cpu, "wall": wall, "start": one["cpu"] - cpu, "peak": all_rounds["peak"]}


if __name__ == "__main__":
    main()
