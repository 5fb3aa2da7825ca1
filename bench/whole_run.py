"""The memory and the time of a whole run in one process, but for training.

    python bench/whole_run.py [--hidden 1024 --layers 14 --intermediate 2816 --heads 16
        --kv-heads 16] [--coordinates largest|random] [--rounds 2]

A Llama of these dimensions with random bfloat16 weights is written to a folder, and `hedgerow run`
tunes all its parameters on the demo's data with Ferret, two clients a round. What the process holds
of anonymous memory (what cannot be given back: pages of files can) is looked at a hundred times a
second, and what the same run on the bundled small model holds is taken off: clients, server and
scores together, at their peak. Beside it stand the seconds of a round in which updates are encoded,
aggregated with the broadcast, and applied. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import add_dimensions, gigabytes, random_llama
from transformers import AutoTokenizer

from hedgerow import console, demo
from hedgerow.experiment import load

PARTS = ("update", "aggregate", "apply")
"""Parts of a round whose time is told, as rows of metrics name them."""


def main() -> None:
    """Run both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_dimensions(parser, hidden=1024, layers=14, intermediate=2816, heads=16, kv_heads=16)
    parser.add_argument("--coordinates", choices=("largest", "random"), default="largest")
    parser.add_argument("--rounds", type=int, default=2)
    options = vars(parser.parse_args())
    coordinates, rounds = options.pop("coordinates"), options.pop("rounds")
    with tempfile.TemporaryDirectory() as folder:
        file = demo.prepare(Path(folder) / "demo")
        changes = [f"method={{name: ferret, coordinates: {coordinates}}}"]
        changes += [f"federation.rounds={rounds}", "federation.clients_per_round=2"]
        changes += ["training.optimizer=sgd", "training.max_grad_norm=null", "training.steps=2"]
        changes += [
            "training.batch_size=1",
            "evaluation.metrics=[loss]",
            f"evaluation.every={rounds}",
        ]
        bundled = load(file).model.path
        beside = peak(file, Path(folder) / "small", changes)
        network, place = random_llama(**options), Path(folder) / "large"
        weights = 2 * sum(p.numel() for p in network.parameters())
        network.save_pretrained(place)
        AutoTokenizer.from_pretrained(bundled).save_pretrained(place)
        del network
        changes += [f"model.path={place}", "model.dtype=bfloat16"]
        whole = peak(file, Path(folder) / "run", changes) - beside
        last = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    console.table(
        f"{weights / 2e9:.2f}B parameters in bfloat16 ({gigabytes(weights)}), {rounds} rounds",
        ["coordinates", "peak beside the small model's", "in copies of the weights", *PARTS],
        [
            (
                coordinates,
                gigabytes(whole),
                f"{whole / weights:.2f}",
                *(f"{json.loads(last)[f'{part}_seconds']:.1f} s" for part in PARTS),
            )
        ],
    )


def peak(file: Path, out: Path, changes: list[str]) -> int:
    """Most bytes of anonymous memory that a run holds."""
    command = [sys.executable, "-m", "hedgerow", "run", str(file), *changes, "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        most = 0
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    most = max(most, 1024 * int(line.split()[1]))
            time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{' '.join(command)} has ended with {process.returncode}")
    return most


if __name__ == "__main__":
    main()
