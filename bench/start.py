"""Processor time of a start: from the command to the first training step, anew and resumed.

    python bench/start.py EXPERIMENT.yaml [KEY=VALUE …] [--repeat 3]

Each start is a process of its own with one thread (`--start`, which takes a command of hedgerow),
interrupted as its first client would train, when the base has been scored. A resume of it finds the
tokens that it has left. What importing the libraries takes is measured, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hedgerow import console

_BEGIN = "processor time: "
_LIBRARIES = f"""
import time, torch, transformers, peft
print({_BEGIN!r}, time.process_time())
"""


def main() -> None:
    """Start again and again, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"anew": [], "resumed": [], "libraries": []}
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as folder:
            run = ["run", str(options.experiment), *options.changes, "--out", f"{folder}/run"]
            found["anew"].append(seconds([__file__, "--start", *run]))
            found["resumed"].append(seconds([__file__, "--start", *run, "--resume"]))
            found["libraries"].append(seconds(["-c", _LIBRARIES]))
    anew = statistics.median(found["anew"])
    console.table(
        f"medians of {options.repeat} starts",
        ["start", "processor seconds", "beside a start anew"],
        [
            (name, f"{statistics.median(each):.1f}", f"{statistics.median(each) / anew:.2f}")
            for name, each in found.items()
        ],
    )


def start(command: list[str]) -> None:
    """Run a command of hedgerow until its first client would train."""
    from hedgerow.cli import main
    from hedgerow.engines.local import LocalFleet

    def stop(*arguments: object, **options: object) -> None:
        print(_BEGIN, time.process_time())
        raise KeyboardInterrupt

    LocalFleet.train = stop  # type: ignore[method-assign, assignment]
    sys.argv = ["hedgerow", *command]
    main()


def seconds(arguments: list[str]) -> float:
    """Processor time that a process says it has taken."""
    command = [sys.executable, *arguments]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    for line in done.stdout.splitlines():
        if line.startswith(_BEGIN):
            return float(line.removeprefix(_BEGIN))
    sys.exit(f"{' '.join(command)} did not come to its first step:\n{done.stderr}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        start(sys.argv[2:])
    else:
        main()
