"""What `hedgerow explain --memory` says beside measured peaks, in eight settings.

    python bench/footprint.py [NAME…]

Each setting is a random Llama, a method, an optimiser and a batch shape. In a process of its own a
client takes two rounds of two steps, and sends its update; in another, a server aggregates four.
Beside quantized weights there is as much learnt as there may be at the end of the run. What is
measured is the kernel's high-water mark of the resident set, above what the process had after it
had done the same with a tiny model, so that libraries and compiled kernels are not counted. In
these processes glibc maps whatever has 64 KiB or more (`MALLOC_MMAP_THRESHOLD_`), so that freed
memory is not counted either. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hedgerow import console
from hedgerow.clock import Clock
from hedgerow.data import Example, learnt_from
from hedgerow.experiment import Experiment
from hedgerow.federation.participant import train_client
from hedgerow.footprint import FLOWER, footprint_of
from hedgerow.lowrank import Factors
from hedgerow.methods.base import Client, ClientRound, ServerRound
from hedgerow.methods.lora import LoraOptions
from hedgerow.model import Model
from hedgerow.runs.memory import RoundMemory
from hedgerow.seeds import Seeds
from hedgerow.testing.models import random_llama
from hedgerow.wire import Entry, Participant, Update

CLIENTS = 4
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "heads": 6}
MIDDLE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "heads": 8}
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "heads": 12}


@dataclass(frozen=True)
class Setting:
    """A setting that is measured."""

    model: dict[str, int]
    method: dict[str, Any]
    batch: tuple[int, int]
    """Texts, and tokens of each."""
    training: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    vocabulary: int = 8000
    quantization: str | None = None

    def experiment(self, model: Path, *, steps: int = 2) -> Experiment:
        """The experiment, on a model in a folder."""
        texts, tokens = self.batch
        partition = {"kind": "iid", "clients": CLIENTS}
        return Experiment(
            model={
                **{"path": str(model), "dtype": self.dtype, "device": "cpu"},
                "quantization": self.quantization,
            },
            data={"source": "demo", "partition": partition, "max_length": tokens},
            method=self.method,
            training={"steps": steps, "batch_size": texts, **self.training},
            federation={"rounds": 2},
        )


PLAIN_SGD = {"optimizer": "sgd", "max_grad_norm": None}

SETTINGS = {
    "fedavg": Setting(SMALL, {"name": "fedavg"}, (4, 64)),
    "fedit": Setting(LARGE, {"name": "fedit", "ranks": 16}, (4, 128)),
    "flora": Setting(
        MIDDLE,
        {"name": "flora", "ranks": [32, 16, 16, 8]},
        (8, 64),
        {"gradient_accumulation": 2},
        vocabulary=16000,
    ),
    "ferret": Setting(MIDDLE, {"name": "ferret"}, (2, 32)),
    "ferret, plain SGD": Setting(
        MIDDLE, {"name": "ferret", "coordinates": "random"}, (1, 32), PLAIN_SGD, "bfloat16"
    ),
    "fedit, bfloat16": Setting(
        LARGE,
        {"name": "fedit", "ranks": 8, "targets": ["q_proj", "v_proj"]},
        (1, 64),
        dtype="bfloat16",
    ),
    "fedit, nf4": Setting(LARGE, {"name": "fedit", "ranks": 16}, (1, 64), quantization="nf4"),
    "flora, int8": Setting(
        MIDDLE, {"name": "flora", "ranks": [16, 8, 8, 4]}, (2, 64), quantization="int8"
    ),
}


def main() -> None:
    """Print the table; or, in a process of a setting's own, what is measured there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="Settings; by default all.")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        (name,) = options.names
        print(ROLES[options.role](SETTINGS[name], options.measure))
        return
    rows = []
    for name in options.names or SETTINGS:
        for role, (said, peak) in compared(name).items():
            rows.append((name, role, *map(console.size, (said, peak)), f"{said / peak:.3f}"))
    console.table("", ["setting", "role", "predicted", "measured", "ratio"], rows)


def compared(name: str) -> dict[str, tuple[int, int]]:
    """What is said of a setting, and what is measured of it: the peak by role, in bytes."""
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_models(setting, folder)
        predicted = footprint_of(setting.experiment(folder / "model"))
        environment = os.environ | {
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
            "OMP_NUM_THREADS": "1",
        }
        measured = {}
        for role in ROLES:
            command = [sys.executable, __file__, name, "--measure", place, "--role", role]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            measured[role] = int(done.stdout.splitlines()[-1])
    # The server here reads files, and is none of Flower's.
    server = predicted.server.peak - predicted.server.parts[FLOWER]
    said = {"client": predicted.client.peak, "server": server}
    return {role: (said[role], measured[role]) for role in said}


def save_models(setting: Setting, folder: Path) -> None:
    """The setting's model, and a tiny one."""
    for name, sizes in {
        "model": {**setting.model, "vocab_size": setting.vocabulary},
        "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "heads": 2},
    }.items():
        heads = sizes.pop("heads")
        random_llama(folder / name, **sizes, num_attention_heads=heads, num_key_value_heads=heads)


class Texts:
    """Texts of so many tokens, all of which are learnt."""

    def __init__(self, count: int, length: int) -> None:
        self.lengths = self.widths = np.full(count, length, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        tokens = np.random.default_rng(index).integers(3, 200, self.lengths[index], dtype=np.int32)
        return Example(tokens, 1, learnt=learnt_from(0, len(tokens)))


def client_peak(setting: Setting, folder: Path) -> int:
    """The most that a client holds, in bytes; its update stays in the folder."""
    for what in ("tiny", "warm"):  # the second time, nothing is compiled or read any more
        rounds(setting, model_in(setting, folder / "tiny"), folder / what)
    print(f"the process itself: {console.size(status('VmRSS'))}", file=sys.stderr)
    peak = Peak()
    model = model_in(setting, folder / "model")
    learn_beside(setting, model)
    (folder / "shapes").write_text(json.dumps(dict(trained_by(setting, model))))
    peak.begin()  # while a model is loaded its file is mapped, which is not held
    rounds(setting, model, folder / "client")
    return peak.end()


def server_peak(setting: Setting, folder: Path) -> int:
    """The most that a server holds, in bytes, which has the update of a client in the folder."""
    for _ in range(2):
        server(setting, folder / "warm", trained_by(setting, model_in(setting, folder / "tiny")))
    shapes = json.loads((folder / "shapes").read_text())
    peak = Peak()
    peak.begin()
    server(setting, folder / "client", shapes)
    return peak.end()


ROLES = {"client": client_peak, "server": server_peak}


def trained_by(setting: Setting, model: Model) -> Any:
    """Shapes of what clients train of a model."""
    return setting.experiment(Path()).method.trained_shapes(model)


def model_in(setting: Setting, place: Path) -> Model:
    """The model in a folder."""
    return Model.load(setting.experiment(place).model)


def learn_beside(setting: Setting, model: Model) -> None:
    """Merge as much into a quantized base as a run merges."""
    experiment = setting.experiment(Path())
    method = experiment.method
    if setting.quantization is None or not isinstance(method, LoraOptions) or not method.merges:
        return
    clients = [Client(index, f"client-{index:03d}", 8) for index in range(CLIENTS)]
    ranks = [method.rank(client) for client in clients]
    learnt = experiment.federation.rounds * (sum(ranks) + max(ranks))
    for name, (m, n) in method.trained_shapes(model).items():
        rank = min(learnt, m, n)
        model.merge(name, Factors(torch.randn(rank, n), torch.randn(m, rank)))


def rounds(setting: Setting, model: Model, out: Path) -> None:
    """Two rounds of a client, the one of the largest rank, and its update in a file."""
    experiment, seeds = setting.experiment(Path()), Seeds(0)
    texts, tokens = setting.batch
    client = Client(0, "client-000", 4 * texts)
    for round in (1, 2):
        memory = RoundMemory(out, round)
        client_round = ClientRound(client, round, seeds, experiment.training, memory, no_past)
        examples: Any = Texts(4 * texts, tokens)
        update = train_client(experiment, model, examples, client_round, "0" * 64, Clock())
        content = update.to_bytes()
        del update
        out.mkdir(exist_ok=True)
        (out / "update").write_bytes(content)
        del content


def server(setting: Setting, sent: Path, shapes: Any) -> None:
    """Aggregate one update, as if each client had sent it, and write the entry."""
    experiment = setting.experiment(Path())
    method = experiment.method
    clients = [Client(index, f"client-{index:03d}", 8) for index in range(CLIENTS)]
    asked = ServerRound(1, clients, None, experiment.expected(shapes), Forgetful())

    def updates() -> Iterator[Update]:
        for client in clients:
            yield replace(Update.read(sent / "update"), client=client.name)

    aggregate = method.aggregate(updates(), asked)
    participants = [Participant(client.name, 8, 1 / CLIENTS) for client in clients]
    entry = Entry(method.name, 1, "0" * 64, participants, {}, aggregate.tensors)
    with (sent / "entry").open("wb") as file:
        entry.write(file)


class Forgetful:
    """No memory from round to round."""

    def load(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def save(self, tensors: object) -> None:
        """Forget them."""


def no_past(round: int) -> Entry:
    """Nothing: no method here reads an earlier entry."""
    raise AssertionError("nobody reads an earlier entry")


class Peak:
    """The high-water mark of a part of the process, in bytes above what it had before."""

    def __init__(self) -> None:
        gc.collect()
        self._floor = status("VmRSS")

    def begin(self) -> None:
        """Forget the mark so far."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")

    def end(self) -> int:
        """The mark since then, above what there was when this was made."""
        return status("VmHWM") - self._floor


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
