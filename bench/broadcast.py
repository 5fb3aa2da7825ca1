"""Bytes that FLoRA broadcasts and the loss that they buy: lossless, cut, and beside FLoRIST.

    python bench/broadcast.py EXPERIMENT.yaml OUT [key.path=value ...]

The experiment names model, data and local training. The rows are run one after another, each into
OUT, and go on where they were interrupted. Bytes down are those of one client in one round, beside
the largest client's update.
"""

from __future__ import annotations

import rows

from hedgerow import console

ROWS = {
    "FLoRA": "flora",
    "FLoRA, compress: true": "flora compress=true",
    "FLoRA, compress: {rank: 24}": "flora compress={rank: 24}",
    "FLoRA, compress: {bits: 16, rank: 12}": "flora compress={bits: 16, rank: 12}",
    "FLoRA, compress: {rank: 8}": "flora compress={rank: 8}",
    "FLoRA, compress: {energy: 0.99, bits: 16}": "flora compress={energy: 0.99, bits: 16}",
    **{f"FLoRIST {t}": f"florist threshold={t}" for t in (0.8, 0.9, 0.95, 0.99)},
}


def main() -> None:
    """Run what is missing, then print the table."""
    given = rows.arguments(__doc__.splitlines()[0])
    table, first = [], 0.0
    for name, metrics in zip(ROWS, rows.run(given, list(ROWS.values())), strict=True):
        loss, clients = metrics[-1]["eval_loss"], metrics[-1]["clients"]
        first = first or loss
        # Clients have one rank here, so that the largest update is any.
        down = max(row["bytes_down"] for row in metrics[1:]) / clients
        up = metrics[-1]["bytes_up"] / clients
        table.append((name, f"{loss:.4f}", f"{loss / first - 1:+.2%}", f"{down / up:.2f}"))
    header = ["broadcast", "loss", "beside lossless", "bytes down / largest update"]
    console.table("", header, table)


if __name__ == "__main__":
    main()
