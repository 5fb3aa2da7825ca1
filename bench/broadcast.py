"""Bytes that FLoRA broadcasts and the loss that they buy: lossless, cut, and beside FLoRIST.

    python bench/broadcast.py EXPERIMENT.yaml OUT [key.path=value ...]

The experiment names model, data and local training. The rows are run one after another, each into
OUT, and go on where they were interrupted. Bytes down are those of one client in one round, beside
the largest client's update.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hedgerow import console
from hedgerow.engines import local
from hedgerow.experiment import load
from hedgerow.rundir import read_rows

WARM, FLORIST = ["method.name=flora"], ["method.name=florist"]
ROWS = {
    "FLoRA": WARM,
    "FLoRA, compress: true": [*WARM, "method.compress=true"],
    "FLoRA, compress: {rank: 24}": [*WARM, "method.compress={rank: 24}"],
    "FLoRA, compress: {bits: 16, rank: 12}": [*WARM, "method.compress={bits: 16, rank: 12}"],
    "FLoRA, compress: {rank: 8}": [*WARM, "method.compress={rank: 8}"],
    "FLoRA, compress: {energy: 0.99, bits: 16}": [
        *(*WARM, "method.compress={energy: 0.99, bits: 16}")
    ],
    **{f"FLoRIST {t}": [*FLORIST, f"method.threshold={t}"] for t in (0.8, 0.9, 0.95, 0.99)},
}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    table, first = [], 0.0
    for index, (name, method) in enumerate(ROWS.items()):
        experiment = load(arguments.experiment, [*arguments.overrides, *method])
        directory = arguments.out / str(index)
        with console.ProgressWatcher(name) as watcher:
            local.run(experiment, directory, watcher, resume=True)
        rows = read_rows(directory)
        loss, clients = rows[-1]["eval_loss"], rows[-1]["clients"]
        first = first or loss
        # Clients have one rank here, so that the largest update is any.
        down = max(row["bytes_down"] for row in rows[1:]) / clients
        up = rows[-1]["bytes_up"] / clients
        table.append((name, f"{loss:.4f}", f"{loss / first - 1:+.2%}", f"{down / up:.2f}"))
    header = ["broadcast", "loss", "beside lossless", "bytes down / largest update"]
    console.table("", header, table)


if __name__ == "__main__":
    main()
