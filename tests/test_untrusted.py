"""Nothing that arrives is trusted: it is refused, or it is what the method makes of this model.

Real updates and entries of every method are damaged in every way, `INPUTS` times in all.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
import tracemalloc
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.configurations import METHOD_OPTIONS
from support.doubles import Forgetful, no_past

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.ledger import Base, Ledger
from hedgerow.methods import METHODS
from hedgerow.methods.base import (
    Client,
    ClientRound,
    Expected,
    Method,
    ServerRound,
    Trained,
    check_entry,
)
from hedgerow.model import Model
from hedgerow.seeds import Seeds
from hedgerow.settings import ModelSettings, TrainingSettings
from hedgerow.sketch.coordinates import BITS, lengths
from hedgerow.wire import (
    LARGEST_BROADCAST,
    LARGEST_SENT,
    MAX_HEADER_BYTES,
    Entry,
    FileTensors,
    Participant,
    Update,
    kinds,
    to_safetensors,
)

ROUND, PARENT, SEEDS = 2, "ab" * 32, Seeds(7)
SIZES = [5, 9, 14]
TRAINING = TrainingSettings(steps=3)
WRONG, DAMAGED = 420, 420
"""Of each method's updates, and of its entries: inputs that are wrong in one way, which must be
refused, and inputs that are damaged anywhere, of which some are still right."""
INPUTS = len(METHOD_OPTIONS) * 2 * (WRONG + DAMAGED)
SLOWEST = 5.0
"""Seconds of a core that a single input may take."""


def test_so_many_inputs_are_tried():
    assert {name.split()[0] for name in METHOD_OPTIONS} == METHODS.keys()
    assert INPUTS >= 20_000


# --- what is damaged ------------------------------------------------------------------------------


@dataclass
class File:
    """A safetensors file taken apart: bytes by tensor."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[str, list[int], bytes]]

    @staticmethod
    def of(data: bytes) -> File:
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        metadata = header.pop("__metadata__")
        places = {name: t.pop("data_offsets") for name, t in header.items()}
        return File(
            metadata,
            {
                name: (t["dtype"], t["shape"], data[begin:][slice(*places[name])])
                for name, t in header.items()
            },
        )

    def bytes(self, twice: str | None = None) -> bytes:
        """The file; `twice` names a part that the header has two times."""
        end, described = 0, {"__metadata__": self.metadata}
        for name, (dtype, shape, data) in self.tensors.items():
            place = [end, end := end + len(data)]
            described[name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        parts = [*described.items(), *([(twice, described[twice])] if twice else [])]
        header = "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in parts) + "}"
        data = b"".join(data for *_, data in self.tensors.values())
        return len(header).to_bytes(8, "little") + header.encode() + data

    def torch(self) -> dict[str, torch.Tensor]:
        return safetensors.torch.load(self.bytes())

    def put(self, name: str, tensor: torch.Tensor) -> None:
        part = File.of(b"".join(to_safetensors({"x": tensor}, {})))
        self.tensors[name] = part.tensors["x"]


def overwrite(path: Path, data: bytes) -> None:
    """Make a file these bytes, in a tenth of the time that emptying it first would take."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
        file.write(data)
        file.truncate()


class Case:
    """A method on the tiny model, with a real update of each client and the entry of them all."""

    def __init__(self, name: str, model: Model, folder: Path) -> None:
        kind = METHODS[name.split()[0]]
        options = {"name": kind().name, **METHOD_OPTIONS[name]}
        self.method: Method = kind.model_validate(options)
        self.model, self.path = model, folder / "file.safetensors"
        self.weights = {n: p.detach().clone() for n, p in model.network.named_parameters()}
        self.clients = [Client(i, f"client-{i:03d}", n) for i, n in enumerate(SIZES)]
        if self.method.pools_data:
            self.clients = [Client(0, "pooled", sum(SIZES))]
        self.shapes = self.method.trained_shapes(model)
        # As the server has them, from ledger.json.
        self.expected = Expected(SEEDS, json.loads(json.dumps(self.shapes)), TRAINING)
        self.updates = [self._update(client) for client in self.clients]
        self.entry = self._entry(list(map(Update.from_bytes, self.updates)))

    def _update(self, client: Client) -> bytes:
        client_round = ClientRound(client, ROUND, SEEDS, TrainingSettings(), Forgetful(), no_past)
        parameters = self.method.start(self.model, client_round)
        generator = torch.Generator().manual_seed(client.index)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        steps: dict[int, float] = {}
        if hasattr(self.method, "directions"):
            directions = self.method.directions(client_round)
            steps = {seed: 0.01 * (step + 1) for step in range(3) for seed in directions(step)}
        payload = self.method.update(self.model, client_round, Trained(parameters, 1.5, steps))
        data = Update(
            method=self.method.name,
            round=ROUND,
            client=client.name,
            parent=PARENT,
            num_examples=client.num_examples,
            train_loss=1.5,
            tensors=payload.tensors,
            about=payload.about,
        ).to_bytes()
        self.model.release()
        return data

    def _entry(self, updates: list[Update]) -> bytes:
        server_round = ServerRound(ROUND, self.clients, None, self.expected, Forgetful())
        aggregate = self.method.aggregate(updates, server_round)
        total = sum(update.num_examples for update in updates)
        metrics = {"train_loss": sum(u.num_examples / total * u.train_loss for u in updates)}
        entry = Entry(
            method=self.method.name,
            round=ROUND,
            parent=PARENT,
            participants=[
                Participant(u.client, u.num_examples, u.num_examples / total) for u in updates
            ],
            metrics=metrics | {"bytes_up": 1000} | aggregate.metrics,
            tensors=aggregate.tensors,
            options=self.method.entry_options(),
        )
        with self.path.open("wb") as file:
            entry.write(file)
        return self.path.read_bytes()

    def receive(self, data: bytes) -> Update:
        """What the server does with the first client's update, in memory and from a file."""
        client = self.clients[0]

        def checked(update: Update) -> Update:
            update.check(self.method.name, ROUND, PARENT, client.name, client.num_examples)
            self.method.check_update(client, update, self.expected)
            return update

        overwrite(self.path, data)
        try:
            update = checked(Update.from_bytes(data))
        except InvalidMessage as error:
            assert_readable(error)
            with pytest.raises(InvalidMessage):
                checked(Update.read(self.path))
            raise
        again = checked(Update.read(self.path))
        assert replace(again, tensors={}) == replace(update, tensors={})
        assert all(torch.equal(again.tensors[n], update.tensors[n]) for n in update.tensors)
        return update

    def arrive(self, data: bytes) -> Entry:
        """What a participant does with an entry before it applies it."""
        overwrite(self.path, data)
        try:
            entry = Entry.read(self.path)
        except UserError as error:
            assert_readable(error)
            raise InvalidMessage(str(error)) from None
        try:
            check_entry(entry, self.method, self.shapes, ROUND, PARENT)
        except InvalidMessage as error:
            assert_readable(error)
            raise
        return entry

    def check_accepted_update(self, update: Update) -> None:
        """The server goes on with it, to an entry that all participants accept."""
        others = map(Update.from_bytes, self.updates[1:])
        self.check_accepted_entry(self.arrive(self._entry([update, *others])))

    def check_accepted_entry(self, entry: Entry) -> None:
        """It can be applied, and what it leaves is finite and of the old shapes."""
        assert all(tensor.isfinite().all() for tensor in entry.tensors.values())
        try:
            self.method.apply(self.model, entry)
            weights = dict(self.model.network.named_parameters())
            assert kinds(weights) == kinds(self.weights)
            for state in (weights, self.model.factors or {}):
                assert all(tensor.isfinite().all() for tensor in state.values())
        finally:
            self.restore()

    def restore(self) -> None:
        """The model is the base again."""
        self.model.factors = None
        with torch.no_grad():
            for name, weight in self.model.network.named_parameters():
                weight.copy_(self.weights[name])


def assert_readable(error: Exception) -> None:
    """One sentence of some length, whatever the sender has written."""
    text = str(error)
    assert text.isprintable()
    assert 0 < len(text) < 2000


@pytest.fixture(scope="module")
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model), device="cpu"))


@pytest.fixture(scope="module", params=METHOD_OPTIONS)
def case(request, model, tmp_path_factory):
    return Case(request.param, model, tmp_path_factory.mktemp("case"))


def test_what_is_right_is_accepted(case):
    case.check_accepted_update(case.receive(case.updates[0]))
    case.check_accepted_entry(case.arrive(case.entry))


# --- ways to be wrong -----------------------------------------------------------------------------


def a_tensor(rng, file):
    return rng.choice(list(file.tensors))


def a_float_tensor(rng, file):
    return rng.choice([n for n, (dtype, *_) in file.tensors.items() if dtype == "F32"])


def renamed(rng, file):
    name = a_tensor(rng, file)
    other = rng.choice([name + "x", name.upper(), "/" + name, "\x1b[2J" + name, "", "__meta__"])
    file.tensors = {other if n == name else n: t for n, t in file.tensors.items()}


def dropped(rng, file):
    for _ in range(rng.randint(1, len(file.tensors))):
        del file.tensors[a_tensor(rng, file)]


def added(rng, file):
    name = rng.choice(["more", a_tensor(rng, file) + ".more", "base_model.model.x.lora_A.weight"])
    file.tensors[name] = ("F32", [1], bytes(4))


def twice(rng, file):
    return file.bytes(twice=rng.choice(["__metadata__", a_tensor(rng, file)]))


def other_shape(rng, file):
    name = a_tensor(rng, file)
    dtype, shape, data = file.tensors[name]
    shapes = [[*shape, 1], [1, *shape], shape[::-1], [math.prod(shape)], [1] * 9]
    file.tensors[name] = (dtype, rng.choice([s for s in shapes if s != shape]), data)


def absurd_shape(rng, file):
    name = a_tensor(rng, file)
    dtype, _, data = file.tensors[name]
    shapes = [[0], [0, 2**63], [2**32, 2**32], [-4], [2**64], [1.5], "4", [[4]], [True], [1] * 5000]
    file.tensors[name] = (dtype, rng.choice(shapes), rng.choice([data, b""]))


def longer(rng, file):
    name = a_tensor(rng, file)
    dtype, shape, data = file.tensors[name]
    one = len(data) // shape[0]
    less = shape[0] > 1 and rng.random() < 0.5
    content = data[:-one] if less else data + data[:one]
    file.tensors[name] = (dtype, [shape[0] + (-1 if less else 1), *shape[1:]], content)


def other_dtype(rng, file):
    name = a_tensor(rng, file)
    tensor = file.torch()[name]
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64]
    file.put(name, tensor.to(rng.choice([t for t in types if t != tensor.dtype])))


def unknown_dtype(rng, file):
    name = a_tensor(rng, file)
    _, shape, data = file.tensors[name]
    file.tensors[name] = (rng.choice(["F8_E4M3", "C64", "BOOL", "X" * 999, "", 7]), shape, data)


def not_finite(rng, file):
    name = a_float_tensor(rng, file)
    tensor = file.torch()[name]
    value = rng.choice([math.nan, math.inf, -math.inf])
    tensor.view(-1)[rng.randrange(tensor.numel())] = value
    file.put(name, tensor)


def huge(rng, file):
    name = a_float_tensor(rng, file)
    tensor = file.torch()[name]
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([1e18, -1e18, 3e38])
    file.put(name, tensor)


def cut(rng, file):
    data = file.bytes()
    return data[: rng.randrange(len(data))]


def extended(rng, file):
    return file.bytes() + rng.randbytes(rng.randint(1, 99))


def announced_longer(rng, file):
    data = file.bytes()
    return rng.choice([2**63, 2**64 - 1, MAX_HEADER_BYTES, 10**8]).to_bytes(8, "little") + data[8:]


def overlapping(rng, file):
    header_length = int.from_bytes(file.bytes()[:8], "little")
    header = json.loads(file.bytes()[8 : 8 + header_length])
    name = a_tensor(rng, file)
    begin, end = header[name]["data_offsets"]
    places = [[begin + 4, end + 4], [begin, end - 1], [-1, end], [end, begin], [begin], [0, 2**70]]
    header[name]["data_offsets"] = rng.choice([*places, None, [begin, end, end], ["0", end]])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + file.bytes()[8 + header_length :]


def unreadable(rng, file):
    headers = [b"[" * 100_000, b'{"a":' * 50_000, b"{}", b"[]", b"null", b"\xff\xfe{}", b" {}"]
    header = rng.choice([*headers, b'{"__metadata__":{},"__metadata__":{}}', b"9" * 9999])
    return len(header).to_bytes(8, "little") + header


NO_NUMBERS = [
    "0",
    "-1",
    "１２",
    "1_000",
    " 7 ",
    "7\n",
    "007",
    "9" * 5000,
    str(2**63),
    "",
    "+7",
    "7.0",
]


def other_metadata(key, *values):
    def wrong(rng, file):
        file.metadata[key] = rng.choice([v for v in values if v != file.metadata[key]])

    wrong.__name__ = f"other_{key}"
    return wrong


def lacking(rng, file):
    del file.metadata[rng.choice([k for k in file.metadata if k != "options"])]


def more_metadata(rng, file):
    file.metadata |= rng.choice([{"x": "1"}, {"x" * 9999: "1"}, {"\x1b[2J": "1"}, {"x": 1}])


def no_texts(rng, file):
    values = [7, None, ["a"], {}, "x" * 100_000, "a\nb", "\udcff", True]
    file.metadata[rng.choice(list(file.metadata))] = rng.choice(values)


def other_rank(rng, file):
    """All factors of one more or one less, and `r` and `lora_alpha` to go with it."""
    change = rng.choice([-1, 1])
    factors = {name: tensor for name, tensor in file.torch().items() if tensor.ndim == 2}
    for name, tensor in factors.items():
        wide = tensor if ".lora_A." in name else tensor.T
        if len(wide) + change == 0:
            change = 1
        other = torch.cat([wide, wide[:1]]) if change == 1 else wide[:-1]
        file.put(name, other if ".lora_A." in name else other.T.contiguous())
    if "r" in file.metadata and rng.random() < 0.5:
        file.metadata["r"] = str(int(file.metadata["r"]) + change)
        file.metadata["lora_alpha"] = str(2 * int(file.metadata["r"]))


def too_large_rank(rng, file):
    """The factors of one matrix of more rank than anybody may have given it."""
    keys = [name for name in file.tensors if name.startswith("base") and ".lora_A." in name]
    key = rng.choice(keys)
    other = key.replace(".lora_A.", ".lora_B.")
    rank = rng.choice([50, 1000])
    file.put(key, torch.ones(rank, file.torch()[key].shape[1]))
    file.put(other, torch.ones(file.torch()[other].shape[0], rank))


def start_as_residual(rng, file):
    """The two parts of an entry in each other's place."""
    file.tensors = {
        name.removeprefix("start.") if name.startswith("start.") else f"start.{name}": tensor
        for name, tensor in file.tensors.items()
    }


def with_counts(change):
    """A sketch that is whole, with other counts."""

    def wrong(rng, file):
        name = rng.choice([name for name in file.tensors if name.endswith("counts")])
        counts = file.torch()[name].tolist()
        sizes = {n: len(tensor) for n, tensor in file.torch().items()}
        for bits in BITS:
            parts = {
                name.replace("counts", n): sum(of) for n, (_, of) in lengths(counts, bits).items()
            }
            if parts.items() <= sizes.items():
                break
        change(rng, counts)
        for part, (dtype, each) in lengths(counts, bits).items():
            file.put(name.replace("counts", part), torch.zeros(sum(each), dtype=dtype))
        file.put(name, torch.tensor(counts, dtype=torch.int32))

    wrong.__name__ = change.__name__
    return wrong


def other_counts(rng, counts):
    counts[rng.randrange(len(counts))] += rng.choice([1, 1000])


def no_coordinate_of_a_block(rng, counts):
    first, second = rng.sample(range(len(counts)), 2)
    counts[first], counts[second] = 0, counts[second] + counts[first]


def other_seed(rng, file):
    name = rng.choice([name for name in file.tensors if name.endswith(("seed", "seeds"))])
    seeds = file.torch()[name]
    seeds[rng.randrange(len(seeds))] = rng.choice([-1, 12345, -(2**63)])
    file.put(name, seeds)


def negative_seed(rng, file):
    name = rng.choice([name for name in file.tensors if name.endswith(("seed", "seeds"))])
    file.put(name, -1 - file.torch()[name])


def other_sketches(rng, file):
    """Two in another order, one in another's place, or one more than there are participants."""
    sketches = {
        prefix: {n: t for n, t in file.tensors.items() if n.startswith(prefix)}
        for prefix in sorted({name[:2] for name in file.tensors if name[1] == "."})
    }

    def put(source, target):
        parts = sketches[source].items()
        file.tensors |= {target + name.removeprefix(source): part for name, part in parts}

    if len(sketches) > 1 and rng.random() < 0.8:
        first, second = rng.sample(list(sketches), 2)
        put(first, second)
        if rng.random() < 0.5:
            put(second, first)
    else:
        put("0.", f"{len(sketches)}.")


def one_seed_twice(rng, file):
    seeds = file.torch()["seeds"]
    seeds[-1] = seeds[0]
    file.put("seeds", seeds)


def too_many_steps(rng, file):
    count = rng.randint(65, 200)
    file.put("seeds", torch.arange(count))
    file.put("coordinates", torch.ones(count))


def participants(change):
    def wrong(rng, file):
        everybody = json.loads(file.metadata["participants"])
        someone = rng.choice(everybody)
        changed = change(rng, everybody, someone)
        file.metadata["participants"] = json.dumps(everybody if changed is None else changed)

    wrong.__name__ = f"participants_{change.__name__}"
    return wrong


def nobody(rng, everybody, someone):
    return rng.choice([[], {}, "client-000", [[]], [None]])


def one_less(rng, everybody, someone):
    everybody.remove(someone)


def one_twice(rng, everybody, someone):
    everybody.append(dict(someone))
    for each in everybody:
        each["weight"] = each["num_examples"] / sum(p["num_examples"] for p in everybody)


def bad_name(rng, everybody, someone):
    someone["client"] = rng.choice(["", "../x", "a/b", ".x", "x\n", "\x1b[2J", "x" * 300, 7, None])


def bad_size(rng, everybody, someone):
    someone["num_examples"] = rng.choice([0, -1, "7", True, 7.0, None, 2**63, 10**400])


def bad_weight(rng, everybody, someone):
    weights = [0, -0.1, 1.5, math.nan, math.inf, "0.5", True, None, someone["weight"] + 1e-5]
    someone["weight"] = rng.choice(weights)


def bad_key(rng, everybody, someone):
    if rng.random() < 0.5:
        someone["x"] = 1
    else:
        del someone[rng.choice(list(someone))]


ANY_FILE = [
    renamed,
    dropped,
    added,
    twice,
    other_shape,
    absurd_shape,
    longer,
    other_dtype,
    not_finite,
    unknown_dtype,
    huge,
    cut,
    extended,
    announced_longer,
    overlapping,
    unreadable,
    lacking,
    more_metadata,
    no_texts,
    other_metadata("format", "hedgerow.update/2", "pt", ""),
    other_metadata("method", "flora", "fedavg", "", "x" * 400),
    other_metadata("round", "1", "3", *NO_NUMBERS),
    other_metadata("parent", "ab" * 31, "cd" * 32, "", "AB" * 32),
]
ANY_UPDATE = [
    *ANY_FILE,
    other_metadata("client", "client-001", "", "x" * 400),
    other_metadata("num_examples", "6", *NO_NUMBERS),
    other_metadata("train_loss", "nan", "inf", "1e999", "1e300", "1_0", " 1.5", "１", "", "0x1p3"),
]
ANY_ENTRY = [
    *ANY_FILE,
    *map(participants, (nobody, one_less, one_twice, bad_name, bad_size, bad_weight, bad_key)),
    other_metadata("participants", "[" * 9999, "", "null", '[{"client": NaN}]'),
    other_metadata("metrics", '{"x": NaN}', '{"x": 1e999}', '{"x": "1"}', '{"x": true}', "[]", ""),
    other_metadata("metrics", '{"\\ud800": 1}', '{"X y": 1}', '{"x": {}}', "{" * 9999, "{]"),
]


def kinds_of_wrong(method: Method, direction: str) -> list[Any]:
    """The ways in which such a file can be wrong so that it must be refused."""
    ways = list(ANY_UPDATE if direction == "up" else ANY_ENTRY)
    if method.name == "ferret":
        ways.append(other_seed if direction == "up" else negative_seed)
        # Sums of coordinates on different numbers of bases may have any number between.
        ways.append(with_counts(no_coordinate_of_a_block))
        if direction == "up" or (method.allocation, method.basis) != ("norm", "rademacher"):
            ways.append(with_counts(other_counts))
        if direction == "down":
            ways.append(other_sketches)
    elif method.name in ("fedkseed", "fedzo"):
        ways += [one_seed_twice, other_seed if direction == "up" else negative_seed]
        if direction == "up" or method.name == "fedkseed":
            ways.append(too_many_steps)
    elif method.name != "fedavg":
        # Where each matrix has a rank of its own, one more or less may be right.
        free = method.name == "flora_adalora" or (method.name == "florist" and direction == "down")
        ways.append(too_large_rank if free else other_rank)
        if method.name == "fedex_lora" and direction == "down":
            ways += [too_large_rank, start_as_residual]
        if method.name == "ffa_lora" and direction == "down":
            ways.append(negative_seed)
        if direction == "up":
            ways += [
                other_metadata("r", "5", "0", "-1", "x", "9" * 99),
                other_metadata("lora_alpha", "nan", "1e30", "", "0"),
            ]
    if direction == "down" and not method.entry_options():
        ways.append(other_options)
    elif direction == "down":
        ways.append(other_metadata("options", "{}", "[]", "null", "{" * 9999, '{"x": NaN}'))
    return ways


def other_options(rng, file):
    file.metadata["options"] = rng.choice(['{"x": 1}', "[]", "null", "", "{" * 9999])


# --- damage anywhere ------------------------------------------------------------------------------


def flipped(rng, data, first, last):
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damaged(rng, data):
    """Damage that may leave the file right: mostly of its header, where most is decided."""
    begin = 8 + int.from_bytes(data[:8], "little")
    way = rng.random()
    if way < 0.6:
        return flipped(rng, data, 0, begin)
    if way < 0.7:
        return flipped(rng, data, begin, len(data))
    if way < 0.85:  # a piece of the file stands somewhere else, too
        length = rng.randint(1, 40)
        source, target = (rng.randrange(begin) for _ in range(2))
        return data[:target] + data[source : source + length] + data[target + length :]
    if way < 0.95:  # a digit of the header is another
        digits = [i for i in range(8, begin) if chr(data[i]).isdigit()]
        place = rng.choice(digits)
        return data[:place] + str(rng.randrange(10)).encode() + data[place + 1 :]
    file = File.of(data)  # other numbers that are possible
    name = a_float_tensor(rng, file)
    file.put(name, file.torch()[name] * rng.choice([0, -1, 1e-30, 1e3, 1e9]))
    return file.bytes()


def timed(function, data):
    """What `function` makes of `data`, or the reason why it refuses it; within `SLOWEST`."""
    began = time.process_time()
    try:
        return function(data)
    except InvalidMessage as error:
        return error
    finally:
        assert time.process_time() - began < SLOWEST


@pytest.mark.parametrize("direction", ["up", "down"])
def test_what_is_wrong_in_one_way_is_refused(case, direction):
    whole, function = (
        (case.updates[0], case.receive) if direction == "up" else (case.entry, case.arrive)
    )
    rng, ways = random.Random(1), kinds_of_wrong(case.method, direction)
    tried = 0
    for number in range(WRONG):
        way, file = ways[number % len(ways)], File.of(whole)
        data = way(rng, file) or file.bytes()
        assert data != whole, way.__name__
        assert isinstance(timed(function, data), InvalidMessage), (way.__name__, data[:3000])
        tried += 1
    assert tried == WRONG >= 8 * len(ways)


def test_what_is_damaged_on_its_way_up_is_refused_or_can_be_used(case):
    rng, accepted = random.Random(2), 0
    for _ in range(DAMAGED):
        update = timed(case.receive, damaged(rng, case.updates[0]))
        if isinstance(update, Update):
            accepted += 1
            case.check_accepted_update(update)
    assert 0 < accepted < DAMAGED / 2


def test_what_is_damaged_on_its_way_down_is_refused_or_can_be_used(case):
    rng, accepted = random.Random(3), 0
    for _ in range(DAMAGED):
        entry = timed(case.arrive, damaged(rng, case.entry))
        if isinstance(entry, Entry):
            accepted += 1
            case.check_accepted_entry(entry)
    assert 0 < accepted < DAMAGED / 2


# --- limits ---------------------------------------------------------------------------------------


def filled(data, value):
    """The file with `value` for every floating number, in turns above and below zero."""
    file = File.of(data)
    tensors = file.torch()
    for name, tensor in tensors.items():
        codes = tensors.get(name.replace(".step", ".weight"), tensor)
        # A factor in few bits is its codes times its steps.
        most = 1 if codes.is_floating_point() else -torch.iinfo(codes.dtype).min
        signs = 1 - 2 * (torch.arange(tensor.numel()) % 2)
        if tensor.is_floating_point():
            file.put(name, (value / most * signs).to(tensor.dtype).view(tensor.shape))
        elif tensor.dtype in (torch.int8, torch.int16):
            file.put(name, ((most - 1) * signs).to(tensor.dtype).view(tensor.shape))
    return file.bytes()


def test_the_largest_numbers_that_are_accepted_do_no_harm(case):
    """Sums, scales and products of them are still finite; and the next larger are refused."""
    case.check_accepted_update(case.receive(filled(case.updates[0], LARGEST_SENT)))
    case.check_accepted_entry(case.arrive(filled(case.entry, LARGEST_BROADCAST)))
    with pytest.raises(InvalidMessage, match="above "):
        case.receive(filled(case.updates[0], 1.001 * LARGEST_SENT))
    with pytest.raises(InvalidMessage, match="above "):
        case.arrive(filled(case.entry, 1.001 * LARGEST_BROADCAST))


def tensor(**changes):
    return {"x": ("F32", changes.get("shape", [1]), changes.get("data", bytes(4)))}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"tensors": tensor(shape=[True])},
            "shape of x must be a list of at most 8 positive integers",
        ),
        (
            {"tensors": tensor(shape=[1.0])},
            "shape of x must be a list of at most 8 positive integers",
        ),
        (
            {"tensors": tensor(shape=[1] * 9)},
            "shape of x must be a list of at most 8 positive integers",
        ),
        (
            {"tensors": tensor(shape=[0], data=b"")},
            "shape of x must be a list of at most 8 positive integers",
        ),
        ({"tensors": tensor(shape=[2**62])}, "data_offsets of x"),
        ({"tensors": {"x" * 513: tensor()["x"]}}, "tensor names must have 1 to 512"),
        ({"round": str(2**63)}, "round must be a positive integer .* got '9223372036854775808'"),
        ({"num_examples": "1_000"}, "num_examples must be .* got '1_000'"),
        ({"train_loss": "1e11"}, "train_loss must be .* got 1e11"),
        ({"about": "x" * 513}, "at most 512 characters"),
    ],
)
def test_a_reader_refuses_what_nobody_asked_it_about(change, says):
    """Before a method compares an update with what it expects."""
    update = Update("fedavg", 1, "a", PARENT, 7, 1.5, {"x": torch.ones(1)}, {"about": "x"})
    file = File.of(update.to_bytes())
    file.tensors = change.get("tensors", file.tensors)
    file.metadata |= {key: text for key, text in change.items() if key != "tensors"}
    with pytest.raises(InvalidMessage, match=says):
        Update.from_bytes(file.bytes())


@pytest.mark.parametrize(
    ("participant", "says"),
    [
        ({"num_examples": True}, "participants must each have"),
        ({"num_examples": 2**63}, "participants must each have"),
        ({"weight": math.nan}, "participants must each have"),
        ({"weight": 1}, "participants must each have"),
        ({"client": "x" * 256}, "participants must each have"),
        ({"weight": 1.0000005}, "weight of a must be 1.0, got 1.0000005"),
        ({"weight": 0.9999}, "weight of a must be 1.0, got 0.9999"),
    ],
)
def test_a_participant_has_a_name_a_size_and_a_weight(tmp_path, participant, says):
    path, method = tmp_path / "entry", METHODS["fedavg"]()
    valid = {"client": "a", "num_examples": 1, "weight": 1.0}
    with path.open("wb") as file:
        entry = Entry("fedavg", 1, PARENT, [Participant(**valid | participant)], {}, {})
        replace(entry, tensors={"x": torch.ones(1)}).write(file)
    with pytest.raises((UserError, InvalidMessage), match=says):
        check_entry(Entry.read(path), method, {"x": [1]}, 1, PARENT)


def test_an_update_of_another_client_round_or_model_is_named(case):
    client = case.clients[0]
    update = Update.from_bytes(case.updates[0])
    asked = [case.method.name, ROUND, PARENT, client.name, client.num_examples]
    update.check(*asked)
    for place, (what, other) in enumerate(
        [
            ("method", "other"),
            ("round", 3),
            ("parent", "cd" * 32),
            ("client", "client-001"),
            ("num_examples", 6),
        ]
    ):
        with pytest.raises(InvalidMessage, match=f"{what} must be {other}, got "):
            update.check(*asked[:place], other, *asked[place + 1 :])


@pytest.mark.parametrize(
    ("method", "participants", "possible"),
    [
        ({"name": "flora", "ranks": 4}, 3, {12}),
        ({"name": "flora", "ranks": [4, 2, 1]}, 3, {7}),
        ({"name": "flora", "ranks": [4, 2, 1]}, 2, {3, 4, 5, 6}),
        ({"name": "flora", "ranks": [4, 2, 1], "restart": "zero"}, 2, {3, 4, 5, 6}),
        ({"name": "fedit", "ranks": 4}, 3, {4}),
        ({"name": "zero_padding", "ranks": [4, 2, 1]}, 3, {4}),
        ({"name": "zero_padding", "ranks": [4, 2, 1]}, 2, {2, 4}),
        ({"name": "zero_padding", "ranks": [4, 2, 1]}, 1, {1, 2, 4}),
        ({"name": "centralized", "ranks": [4, 2, 1]}, 1, {4}),
    ],
)
def test_the_rank_of_an_entry_is_its_participants(method, participants, possible):
    shapes = {"model.q": (60, 50), "model.v": (30, 50)}
    method = METHODS[method["name"]].model_validate(method)
    everybody = [Participant(f"c{i}", 1, 1 / participants) for i in range(participants)]
    accepted = set()
    for rank in range(1, 15):
        tensors = {}
        for module, (m, n) in shapes.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, n)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(m, rank)
        entry = Entry(method.name, 1, PARENT, everybody, {}, tensors)
        with contextlib.suppress(InvalidMessage):
            check_entry(entry, method, shapes, 1, PARENT)
            accepted.add(rank)
    assert accepted == possible


def test_more_participants_than_clients_are_refused():
    method = METHODS["flora"].model_validate({"ranks": [4, 2, 1]})
    everybody = [Participant(f"c{i}", 1, 1 / 4) for i in range(4)]
    with pytest.raises(InvalidMessage, match=r"at most 3 participants.* got 4"):
        check_entry(Entry("flora", 1, PARENT, everybody, {}, {}), method, {"q": (6, 5)}, 1, PARENT)


def test_more_sketches_than_participants_are_refused(model, tmp_path):
    case = Case("ferret by norm", model, tmp_path)
    entry = case.arrive(case.entry)
    two = entry.participants[:2]
    total = sum(p.num_examples for p in two)
    two = [replace(p, weight=p.num_examples / total) for p in two]
    with pytest.raises(InvalidMessage, match="sketches of 2 participants, got 3"):
        check_entry(replace(entry, participants=two), case.method, case.shapes, ROUND, PARENT)


def test_a_replay_refuses_an_entry_that_is_not_the_methods(case, tmp_path):
    """Even one that the ledger's index vouches for; and the model stays as it was."""
    ledger = Ledger.create(tmp_path / "ledger", Base.of(case.model), case.shapes)
    whole = case.arrive(case.entry)
    bad = {name: tensor for name, tensor in whole.tensors.items() if name != min(whole.tensors)}
    ledger.append(replace(whole, round=1, parent=ledger.head, tensors=bad))
    with pytest.raises(UserError, match="the entry of round 1 does not fit: "):
        ledger.replay(case.method, case.model)
    assert all(torch.equal(p, case.weights[n]) for n, p in case.model.network.named_parameters())
    good = Ledger.create(tmp_path / "good", Base.of(case.model), case.shapes)
    good.append(replace(whole, round=1, parent=good.head, tensors=dict(whole.tensors)))
    try:
        good.replay(case.method, case.model)
    finally:
        case.restore()


# --- memory ---------------------------------------------------------------------------------------


def test_a_file_is_checked_with_one_tensor_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "update.safetensors"
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(20)}
    path.write_bytes(Update("fedavg", 1, "c", PARENT, 7, 1.0, tensors).to_bytes())
    alive: list[weakref.ref[torch.Tensor]] = []
    read = FileTensors.__getitem__

    def watched(self, key):
        assert not any(reference() is not None for reference in alive)
        tensor = read(self, key)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(FileTensors, "__getitem__", watched)
    Update.read(path)
    assert len(alive) == 20
    entry_path = tmp_path / "entry.safetensors"
    method = METHODS["fedavg"]()
    with entry_path.open("wb") as file:
        Entry("fedavg", 1, PARENT, [Participant("c", 7, 1.0)], {}, tensors).write(file)
    alive.clear()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_entry(Entry.read(entry_path), method, shapes, 1, PARENT)
    assert len(alive) == 20


@pytest.mark.parametrize("piece", ['"%07d":{},', '"%07d":0,', '"%07d":[[],[]],', '"%07d":"",'])
def test_a_header_takes_a_bounded_multiple_of_its_size(piece):
    text = "".join(piece % number for number in range(10_000)).rstrip(",")
    for header in ("{" + text + "}", '{"__metadata__":{' + text + "}}", '{"x":{' + text + "}}"):
        data = len(header).to_bytes(8, "little") + header.encode()
        assert memory(lambda data=data: Update.from_bytes(data)) < 40 * len(data)


def test_a_header_that_announces_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "huge"
    for length in (2**62, MAX_HEADER_BYTES + 1, 1 << 30):
        with path.open("wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(1 << 31)  # a hole, which takes no room
        assert memory(lambda: Update.read(path)) < 1 << 20
    tensors = b'{"x":{"dtype":"F32","shape":[999999999],"data_offsets":[0,3999999996]}}'
    path.write_bytes(len(tensors).to_bytes(8, "little") + tensors)
    assert memory(lambda: Update.read(path)) < 1 << 20


def memory(refused):
    """Bytes that Python allocates at most while an input is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidMessage):
            refused()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- anything at all ------------------------------------------------------------------------------

CHECKED = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refused_or_right(data: bytes, path: Path) -> bool:
    """Whether any of the readers takes the data; those of updates and safetensors' own agree."""
    overwrite(path, data)
    try:
        Entry.read(path)
        taken = True
    except UserError as error:
        assert_readable(error)
        taken = False
    try:
        update = Update.from_bytes(data)
    except InvalidMessage as error:
        assert_readable(error)
        with pytest.raises(InvalidMessage):
            Update.read(path)
        return taken
    theirs = safetensors.torch.load(data)
    for ours in (update.tensors, Update.read(path).tensors):
        assert kinds(ours) == kinds(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return True


@settings(CHECKED, max_examples=500)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused(tmp_path, data):
    assert not refused_or_right(data, tmp_path / "file")


@settings(CHECKED, max_examples=500)
@given(st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_header_is_refused(tmp_path, header):
    for text in (header, b"{" + header + b"}"):
        data = len(text).to_bytes(8, "little") + text
        assert not refused_or_right(data, tmp_path / "file")


ODD = st.integers(-1, 4) | st.sampled_from([2**31, 2**63, 2**64, 1.0, True, None, "1", [], {}])
SAID = {
    "update": {
        "format": "hedgerow.update/1",
        "method": "flora",
        "round": "1",
        "client": "a",
        "parent": "ab",
        "num_examples": "7",
        "train_loss": "1.5",
    },
    "entry": {
        "format": "hedgerow.entry/1",
        "method": "flora",
        "round": "1",
        "parent": "ab",
        "participants": '[{"client": "a", "num_examples": 1, "weight": 1.0}]',
        "metrics": '{"x": 1}',
    },
}


@st.composite
def files(draw):
    """Files in the format, most with one part that is not as it should be."""
    odd = draw(st.sampled_from(["", "said", "dtype", "shape", "place", "content", "end", "name"]))
    described, end = [], 0
    for name in draw(st.lists(st.sampled_from("abc"), max_size=3, unique=odd != "name")):
        dtype = draw(st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "I32", "U8"]))
        shape = draw(st.lists(st.integers(1, 3), max_size=3))
        width = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I32": 4}.get(dtype, 8)
        place = [end, end := end + math.prod(shape) * width]
        if odd == "dtype":
            dtype = draw(st.sampled_from(["F8_E4M3", "C64", "Q", "", 3, "I64", "U8"]))
        elif odd == "shape":
            shape = draw(st.lists(ODD, max_size=4) | ODD)
        elif odd == "place":
            place = draw(st.lists(ODD, max_size=3) | ODD)
        content = {"dtype": dtype, "shape": shape, "data_offsets": place}
        if odd == "content":
            content = draw(st.sampled_from([None, [], {}, {**content, "x": 1}]))
        described.append((draw(st.text(max_size=3)) if odd == "name" else name, content))
    metadata = dict(draw(st.sampled_from(list(SAID.values()))))
    if odd == "said":
        key = draw(st.sampled_from([*metadata, "x"]))
        values = st.sampled_from([*metadata.values(), *NO_NUMBERS, "nan", "[{}]", "{", None, 1])
        metadata[key] = draw(values | st.text(max_size=5))
    parts = [("__metadata__", metadata), *described]
    header = ("{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in parts) + "}").encode()
    data = random.Random(draw(st.integers(0, 9))).randbytes(end)
    if odd == "end":
        data = data[: draw(st.integers(0, end))] + draw(st.binary(max_size=3))
    return len(header).to_bytes(8, "little") + header + data


def test_files_in_the_format_are_refused_or_read_as_safetensors_reads_them(tmp_path):
    taken = []

    @settings(CHECKED, max_examples=600)
    @given(files())
    def check(data):
        taken.append(refused_or_right(data, tmp_path / "file"))

    check()
    assert 40 < sum(taken) < len(taken) / 2
