"""What grows with the number of clients, by simulation; and what large models ask for, on paper.

    python bench/scale.py simulate [--clients N] [--methods NAME,…] [key.path=value ...]
    python bench/scale.py paper [--models NAME,…] [--methods NAME,…] [--sites N,…]

`simulate` runs the built-in model on the built-in tasks, with 100 clients and with N, of which 100
take part in a round in both cases; each run is a process of its own. Moments are not kept, so that
who takes part for the second time does the same work as who does for the first. The table has, for
N clients beside 100: the peak of the resident set, libraries included, and how many bytes of it
each further client takes; a round's seconds (median; the first round, which warms caches, is left
out); what goes down in the last round, in which clients get the entries that they have missed; and
all that is beside rounds, as the start, in rounds of a client. Linux only.

`paper` works out Llamas of 1.1 to 70 billion parameters in bfloat16 with `footprint_of`, as
`hedgerow explain --memory` does, without any weights: what a site sends and gets in a round, what
the coordinator gets and sends, the peaks of both, and the seconds that the bytes take on the line
of a site (100 Mbit/s) and on the coordinator's (10 Gbit/s, in and out at the same time). Files'
headers, and what TLS and the transport add, are not counted. FLoRA's broadcast is an upper bound,
since the ranks of its steps may be lower than the sum of the clients'.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from hedgerow import console
from hedgerow.bundled import MODEL, tasks
from hedgerow.experiment import Experiment
from hedgerow.footprint import Footprint, footprint_of
from hedgerow.runs.rows import read_rows

FEW = 100
"""Clients of a round, and of the run that is compared with."""
ROWS = 16
"""Rows of each client."""
SIMULATED = {
    "flora": {"name": "flora", "ranks": 4},
    "fedit": {"name": "fedit", "ranks": 4},
    "ferret": {"name": "ferret"},
    "fedavg": {"name": "fedavg"},
}
ON_PAPER = {
    "flora": {"name": "flora", "ranks": 16},
    "flora-compress": {"name": "flora", "ranks": 16, "compress": True},
    "fedit": {"name": "fedit", "ranks": 16},
    "ferret": {"name": "ferret"},
    "fedavg": {"name": "fedavg"},
}
SITE, COORDINATOR = 100e6, 10e9
"""Bits a second of a site's line and of the coordinator's, each way."""

# Hidden and intermediate size, layers, heads, and heads of keys and values.
SHAPES = {
    "1.1B": (2048, 5632, 22, 32, 4),
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    simulated = commands.add_parser("simulate", help="what grows with the number of clients")
    simulated.add_argument("overrides", nargs="*", metavar="key.path=value")
    simulated.add_argument("--clients", type=_more_than_few, default=10_000)
    simulated.add_argument("--methods", type=_names_of(SIMULATED), default=list(SIMULATED))
    simulated.set_defaults(command=simulate)
    worked_out = commands.add_parser("paper", help="bytes, memory and seconds of large models")
    worked_out.add_argument("--models", type=_names_of(SHAPES), default=list(SHAPES))
    worked_out.add_argument("--methods", type=_names_of(ON_PAPER), default=list(ON_PAPER))
    worked_out.add_argument("--sites", type=_numbers, default=[10, 100, 1000])
    worked_out.set_defaults(command=paper)
    options = parser.parse_args()
    options.command(options)


def _names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """What reads a list of names that are known."""

    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"there is no {name}: choose from {', '.join(known)}"
                )
        return found

    return names


def _numbers(text: str) -> list[int]:
    return list(map(int, text.split(",")))


def _more_than_few(text: str) -> int:
    if int(text) <= FEW:
        raise argparse.ArgumentTypeError(f"give more than {FEW}, which are compared with")
    return int(text)


# --- by simulation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a run took."""

    peak: int
    """Bytes of the process's resident set, at most."""
    seconds: float
    """Median of the rounds but the first."""
    bytes_down: int
    """Of the last round."""
    beside: float
    """Seconds of the process beside its rounds."""


def simulate(options: argparse.Namespace) -> None:
    """Run each method with few and with many clients, and print what differs."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        places = {count: Path(folder) / str(count) for count in (FEW, options.clients)}
        for count, place in places.items():
            write_clients(place, count)
        for name in options.methods:
            few, many = (
                measured(place, SIMULATED[name], options.overrides) for place in places.values()
            )
            further = options.clients - FEW
            rows.append(
                (
                    name,
                    f"{many.peak / few.peak:.3f}",
                    console.size(max(0, many.peak - few.peak) // further),
                    f"{many.seconds / few.seconds:.2f}",
                    f"{many.bytes_down / few.bytes_down:.2f}",
                    f"{(many.beside - few.beside) / further / (few.seconds / FEW):.3f}",
                )
            )
            sizes = " and ".join(console.size(each.peak) for each in (few, many))
            console.out.print(
                f"{name}: {sizes}; {few.seconds:.1f} and {many.seconds:.1f} s a round; "
                f"{few.beside:.0f} and {many.beside:.0f} s beside rounds"
            )
    console.table(
        f"{options.clients:,} clients beside {FEW}, {FEW} of them in a round",
        [
            "method",
            "peak",
            "a further client",
            "round",
            "bytes down",
            "beside rounds, in client rounds",
        ],
        rows,
    )


def write_clients(place: Path, count: int) -> None:
    """Write so many clients' files of the built-in tasks, and the experiment that they have."""
    place.mkdir()
    everybody = (own for seed in itertools.count() for own in tasks.clients(seed).values())
    for number, own in enumerate(itertools.islice(everybody, count)):
        (place / f"{number}.json").write_text(json.dumps(own[:ROWS]))
    content = {
        "model": {"path": str(MODEL), "device": "cpu"},
        "data": {"clients": "{}.json", "prompt": "plain", "max_length": 96},
        "method": "fedit",
        "training": {"steps": 2, "batch_size": 4, "keep_optimizer": False},
        "federation": {"rounds": 3, "clients_per_round": FEW},
    }
    (place / "experiment.yaml").write_text(yaml.safe_dump(content))


def measured(place: Path, method: dict[str, Any], overrides: Iterable[str]) -> Measured:
    """Run an experiment with a method in a process of its own."""
    out = place / str(method["name"])
    command = [sys.executable, "-m", "hedgerow", "run", str(place / "experiment.yaml")]
    command += [f"method={json.dumps(method)}", *overrides, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)  # which alone says the peak of this one child
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} has failed")
    took = time.perf_counter() - began
    rounds = read_rows(out)[1:]
    seconds = [row["seconds"] for row in rounds]
    return Measured(
        peak=used.ru_maxrss * 1024,
        seconds=median(seconds[1:]),
        bytes_down=rounds[-1]["bytes_down"],
        beside=took - sum(seconds),
    )


# --- on paper -------------------------------------------------------------------------------------


def paper(options: argparse.Namespace) -> None:
    """Work out each model with each method and number of sites."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            config = write_config(Path(folder) / model, *SHAPES[model])
            for name, sites in itertools.product(options.methods, options.sites):
                found = footprint_of(on_paper(config, ON_PAPER[name], sites))
                rows.append((model, name, f"{sites:,}", *map(str, line(found))))
    console.out.width = max(console.out.width, 200)
    console.table(
        "a round: site at 100 Mbit/s, coordinator at 10 Gbit/s",
        [
            *("model", "method", "sites", "site up", "site down", "coordinator in", "out"),
            *("site's memory", "coordinator's", "site's seconds", "coordinator's"),
        ],
        rows,
    )


def write_config(
    folder: Path, hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int
) -> Path:
    """The config.json of a Llama without weights, in a folder of its own."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def on_paper(model: Path, method: dict[str, Any], sites: int) -> Experiment:
    """An experiment on so many sites, with one text of 512 tokens in a batch."""
    return Experiment(
        model={"path": str(model), "dtype": "bfloat16"},
        data={
            "source": "demo",
            "partition": {"kind": "iid", "clients": sites},
            "max_length": 512,
        },
        method=method,
        training={"steps": 10, "batch_size": 1},
        federation={"rounds": 1},
    )


def line(found: Footprint) -> list[str]:
    """Bytes, peaks and seconds of a footprint, as the table has them."""
    sent = [found.update, found.entry, found.bytes_up, found.bytes_down]
    peaks = [found.site.peak, found.server.peak]
    at_site = 8 * (found.update + found.entry) / SITE
    at_coordinator = 8 * max(found.bytes_up, found.bytes_down) / COORDINATOR
    times = [
        f"{seconds:,.3g}" if seconds < 1000 else f"{seconds:,.0f}"
        for seconds in (at_site, at_coordinator)
    ]
    return [*map(console.size, (*sent, *peaks)), *times]


if __name__ == "__main__":
    main()
