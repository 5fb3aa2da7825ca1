"""Rounds of clients side by side beside the same one after another, and what memory they take.

    python bench/workers.py [EXPERIMENT.yaml] [key.path=value …] [--workers N] [--times N]

Without arguments it takes the built-in demo's experiment. In turns, each in processes of its own:
one worker with one thread, one with N, and N workers with one each. The table has the seconds of
rounds beside the first's (median; the first round, which warms caches, is left out), whether the
ledger has its bytes, and what one worker holds that is its own, at most, beside the bytes of the
base's weights, in a run of its own, since looking takes time. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from hedgerow import console, demo
from hedgerow.experiment import load
from hedgerow.model import Model
from hedgerow.quantized import nbytes
from hedgerow.runs.rows import read_rows


def main() -> None:
    """Run all in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", nargs="*", help="a file, and overrides")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    count = arguments.workers
    given = list(arguments.experiment)
    kinds = {
        "1 worker, 1 thread": (1, 1),
        f"1 worker, {count} threads": (1, count),
        f"{count} workers, 1 thread": (count, 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        has_file = given and "=" not in given[0]
        path = Path(given.pop(0)) if has_file else demo.prepare(out / "demo")
        overrides = ["federation.rounds=4", *given]
        size = nbytes(Model.load(load(path, overrides).model).network)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        own = dict.fromkeys(kinds, 0)
        for turn in range(arguments.times + 1):
            for kind, (workers, threads) in kinds.items():
                run = out / f"{kind} {turn}"
                command = [sys.executable, "-m", "hedgerow", "run", str(path), *overrides]
                command += ["--workers", str(workers), "--out", str(run)]
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as whole:
                    while turn == arguments.times and whole.poll() is None:
                        own[kind] = max(own[kind], *map(_private, _children(whole.pid)), 0)
                        time.sleep(0.05)
                if whole.returncode:
                    raise SystemExit(f"{' '.join(command)} has failed")
                if turn < arguments.times:
                    seconds[kind].append(sum(row["seconds"] for row in read_rows(run)[2:]))
        bytes_of = {
            kind: [file.read_bytes() for file in sorted((out / f"{kind} 0/ledger").iterdir())]
            for kind in kinds
        }
    first, *_ = kinds
    rows = [
        (
            kind,
            f"{median(seconds[kind]) / median(seconds[first]):.2f}",
            "yes" if bytes_of[kind] == bytes_of[first] else "no",
            f"{own[kind] / size:.2f}" if own[kind] else "",
        )
        for kind in kinds
    ]
    columns = ["", "seconds", "same bytes", "a worker's own memory"]
    console.table(f"{os.cpu_count()} processors, {console.size(size)} of weights", columns, rows)


def _children(parent: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))
    except OSError:  # it has ended
        return []


def _private(process: int) -> int:
    """Bytes of memory that a process has written, and shares with no other."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


if __name__ == "__main__":
    main()
