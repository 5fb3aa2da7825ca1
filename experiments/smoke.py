"""Try every experiment of papers and benchmarks in its smoke variant, each as a reader types it.

    python experiments/smoke.py [FILE.yaml …]

Prints each file with its seconds. What a command printed, and its runs, are in `runs/smoke`, which
starts afresh; the files whose commands failed are named at the end, and the exit code is then 1.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent / "runs" / "smoke"


def main() -> None:
    """Run them one after another."""
    files = [Path(name) for name in sys.argv[1:]]
    folders = ("flora", "ferret", "flowertune", "fedllm_bench")
    found = [file for each in folders for file in sorted(HERE.glob(f"{each}/*.yaml"))]
    files = files or [*found, HERE / "preferences.yaml"]
    shutil.rmtree(OUT, ignore_errors=True)
    failed = []
    for file in files:
        out = OUT / file.parent.name / file.stem
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hedgerow", "compare", file, "--smoke", "--out", out]
        began = time.monotonic()
        with out.with_suffix(".log").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        print(f"{file}: {time.monotonic() - began:.0f} s{' (failed)' if code else ''}", flush=True)
        failed += [str(out.with_suffix(".log"))] if code else []
    if failed:
        sys.exit(f"{len(failed)} of {len(files)} failed; why is in {', '.join(failed)}")


if __name__ == "__main__":
    main()
