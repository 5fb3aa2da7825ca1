"""What secure sums cost beside plain updates: bytes, processor time and memory.

    python bench/secure.py [--rounds N] [--times N] [--numbers N] [--tensors N] [key.path=value …]
    python bench/secure.py --clients N

The built-in demo's rows, divided between ten clients, are trained on by each method with plain
updates and with secure sums in turn; bytes are those of a round, and processor times the medians of
the rounds after the first, evaluation left out. Then, each in a process of its own, a client makes
its part of a sum of an update of so many numbers, beside serialising it plainly, and a server
unmasks the sum, of all ten and of seven. All in one thread.

With `--clients`, a server unmasks the sum of one number of each of so many, and that is all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hedgerow import console
from hedgerow.bundled import MODEL, tasks
from hedgerow.engines import local
from hedgerow.experiment import load
from hedgerow.federation.fleet import Unwatched
from hedgerow.privacy.secure.coordinator import Coordinator
from hedgerow.privacy.secure.fixed_point import Codes, FixedPoint
from hedgerow.privacy.secure.letters import AskKeys
from hedgerow.privacy.secure.party import Party
from hedgerow.runs.rows import read_rows
from hedgerow.wire import Update

CLIENTS, THRESHOLD = 10, 7
METHODS = {
    "FedAvg": ["method={name: fedavg}"],
    "Fed-SB, rank 32": ["method={name: fed_sb, ranks: 32}"],
    "Ferret, 1 bit": ["method={name: ferret, coordinates: random}"],
    "Ferret, 32 bits": ["method={name: ferret, coordinates: random, bits: 32}"],
}
SUMS = {
    "plain": "federation.secure=null",
    "32 bits": "federation.secure={}",
    "16 bits": "federation.secure={bits: 16, largest: 1}",
}
SESSION = "0" * 32


def main() -> None:
    """Print what rounds cost, and what a large update does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--numbers", type=int, default=10**8)
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.clients:
        many(options.clients)
        return
    if options.one:
        print(json.dumps(PARTS[options.one](options.numbers, options.tensors)))
        return
    rounds(options.rounds, options.times, options.overrides)
    large(options.numbers)


# --- rounds ---------------------------------------------------------------------------------------


class Stopwatch(Unwatched):
    """Processor seconds of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def round_begins(self, round: int, rounds: int, clients: int) -> None:
        """Begin."""
        self._began = time.process_time()

    def round_ends(self, row: dict[str, Any]) -> None:
        """End; of the row before training there is no time."""
        if row["round"]:
            self.seconds.append(time.process_time() - self._began)


def rounds(count: int, times: int, overrides: list[str]) -> None:
    """Print bytes and processor time of a round, by method and kind of sum, which take turns."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        experiment = write(Path(folder))
        for name, method in METHODS.items():
            found: dict[str, dict[str, Any]] = {}
            seconds: dict[str, list[float]] = {what: [] for what in SUMS}
            for turn in range(times):
                for what, secure in SUMS.items():
                    changes = [*method, f"federation.rounds={count}", *overrides, secure]
                    out, watch = Path(folder) / f"{name} {what} {turn}", Stopwatch()
                    local.run(load(experiment, changes), out, watch)
                    found[what] = read_rows(out)[-1]
                    seconds[what] += watch.seconds[1:]
            plain = found["plain"]
            for what, row in found.items():
                letters = row.get("secure_bytes", 0)
                rows.append(
                    (
                        *(name, what, f"{row['bytes_up'] / CLIENTS:,.0f}"),
                        *(f"{letters / CLIENTS:,.0f}", f"{row['train_loss']:.4f}"),
                        f"{(row['bytes_up'] + letters) / plain['bytes_up']:.3f}",
                        f"{median(seconds[what]) / median(seconds['plain']):.2f}",
                    )
                )
    header = ["method", "sums", "update", "keys and shares, both ways", "last train loss"]
    header += ["bytes beside plain", "processor time beside plain"]
    console.table(f"bytes of a client and a round, {CLIENTS} clients", header, rows)


def write(folder: Path) -> Path:
    """Write the demo's rows as one file, and an experiment that divides them between ten."""
    together = [row for each in tasks.clients().values() for row in each]
    (folder / "rows.json").write_text(json.dumps(together))
    content = {
        "model": {"path": str(MODEL)},
        "data": {
            "source": "rows.json",
            "partition": {"kind": "iid", "clients": CLIENTS},
            "prompt": "plain",
            "max_length": 96,
        },
        "method": {"name": "fedavg"},
        "training": {"steps": 10, "batch_size": 8, "learning_rate": 1e-3},
    }
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(content))
    return path


# --- one large update -----------------------------------------------------------------------------


def large(numbers: int) -> None:
    """Print what a client's and the server's part cost."""
    found = {
        part: json.loads(
            subprocess.run(
                [sys.executable, *sys.argv, "--one", part], stdout=subprocess.PIPE, check=True
            ).stdout.splitlines()[-1]
        )
        for part in PARTS
    }
    plain = found["plain update"]["seconds"]
    rows = [
        (
            *(part, f"{1e9 * each['seconds'] / numbers:.2f}", f"{each['seconds'] / plain:.1f}"),
            f"{each['peak'] / (4 * numbers):.2f}",
        )
        for part, each in found.items()
    ]
    console.table(
        f"{numbers:,} numbers, {CLIENTS} clients",
        ["", "ns a number (ms a million)", "beside the plain update", "peak in updates of float32"],
        rows,
    )


def tensors(numbers: int, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """An update's numbers, one tensor at a time."""
    generator = np.random.default_rng(0)
    for index in range(count):
        yield f"{index:04d}", generator.uniform(-1, 1, numbers // count).astype(np.float32)


def plain(numbers: int, count: int) -> dict[str, float]:
    """Serialise an update as it is."""
    found = {name: torch.from_numpy(each) for name, each in tensors(numbers, count)}
    update = Update("fedavg", 1, "client", "0" * 64, 1, 1.0, found)
    return measured(lambda: [len(part) for part in update._parts()], held=4 * numbers)


def encoded(numbers: int, count: int) -> dict[str, float]:
    """Make codes of an update, tensor by tensor."""
    point, codes, seconds = FixedPoint(32, 1.0, CLIENTS), [], 0.0
    floor = status("VmRSS")
    for _, each in tensors(numbers, count):
        began = time.process_time()
        codes.append(point.encode(each, 0.7))
        seconds += time.process_time() - began
    return {"seconds": seconds, "peak": status("VmHWM") - floor}


def masked(numbers: int, count: int) -> dict[str, float]:
    """Mask codes, with a client's own mask and those of nine pairs."""
    people, server = begun()
    codes = ready(numbers, count)
    ask = server.asks_masked("client-0")
    return measured(lambda: people["client-0"].mask(ask, codes), held=4 * numbers)


def unmasked(numbers: int, count: int, gone: int = 0) -> dict[str, float]:
    """Take the masks from a sum, and make its mean of it."""
    people, server = begun()
    point = FixedPoint(32, 1.0, CLIENTS)
    named = {f"{index:04d}": each for index, each in enumerate(ready(numbers, count))}
    server.total = named
    for name, party in list(people.items())[gone:]:
        party.mask(server.asks_masked(name), [])
        server.arrived.append(name)
    answers = {name: people[name].unmasking(server.asks_unmasking) for name in server.arrived}

    def work() -> None:
        server.unmask(answers)
        for name in list(named):
            point.decode(named.pop(name), 7.0, np.float32)

    return measured(work, held=4 * numbers)


def many(count: int) -> None:
    """Print what unmasking costs the server where there is next to nothing to unmask."""
    people, server = begun(count, 2 * count // 3 + 1)
    for name, party in people.items():
        codes = np.ones(1, np.uint32)
        party.mask(server.asks_masked(name), [codes])
        server.add(name, [("", codes)])
    answers = {name: people[name].unmasking(server.asks_unmasking) for name in server.arrived}
    seconds = measured(lambda: server.unmask(answers), held=0)["seconds"]
    assert server.total[""] == [count]
    print(f"unmasking a sum of {count} clients: {seconds:.3f} s of processor time")


def begun(count: int = CLIENTS, threshold: int = THRESHOLD) -> tuple[dict[str, Party], Coordinator]:
    """Clients and their server, when all have sent shares."""
    people = {f"client-{i}": Party(f"client-{i}", threshold, "a sum") for i in range(count)}
    server = Coordinator(threshold, "a sum", SESSION, most_examples=1)
    for name, party in people.items():
        server.add_keys(name, party.keys(AskKeys(session=SESSION)))
    for name, party in people.items():
        server.add_shares(name, party.shares(server.asks_shares))
    return people, server


def ready(numbers: int, count: int) -> list[Codes]:
    """Codes, in memory that is there already."""
    return [np.ones(numbers // count, np.uint32) for _ in range(count)]


def measured(work: Callable[[], object], held: int) -> dict[str, float]:
    """Processor seconds of something, and the peak, with what is held of it before."""
    floor, began = status("VmRSS") - held, time.process_time()
    work()
    return {"seconds": time.process_time() - began, "peak": status("VmHWM") - floor}


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1]) * 1024


PARTS = {
    "plain update": plain,
    "codes": encoded,
    "masks": masked,
    "unmasking the sum of ten": unmasked,
    "the same, of seven": lambda numbers, count: unmasked(numbers, count, gone=3),
}


if __name__ == "__main__":
    main()
