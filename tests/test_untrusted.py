"""Nothing that arrives is trusted: it is refused, or it is what the method makes of this model.

Real updates and entries of every method are damaged in every way, `INPUTS` times in all.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.configurations import METHOD_OPTIONS, method_of

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.ledger import Base, Ledger
from hedgerow.methods import METHODS
from hedgerow.methods.base import check_entry
from hedgerow.model import Model
from hedgerow.seeds import Seeds
from hedgerow.settings import ModelSettings, TrainingSettings
from hedgerow.testing.case import PARENT, Case, assert_readable
from hedgerow.testing.damage import check_damaged, check_wrong
from hedgerow.testing.files import File, overwrite
from hedgerow.testing.wrong import NO_NUMBERS
from hedgerow.wire import (
    LARGEST_BROADCAST,
    LARGEST_SENT,
    MAX_HEADER_BYTES,
    Entry,
    FileTensors,
    Participant,
    Update,
    header_limit,
    kinds,
)

ROUND = 2
WRONG, DAMAGED = 420, 420
"""Of each method's updates, and of its entries: inputs that are wrong in one way, which must be
refused, and inputs that are damaged anywhere, of which some are still right."""
INPUTS = len(METHOD_OPTIONS) * 2 * (WRONG + DAMAGED)


def test_so_many_inputs_are_tried():
    assert {name.split()[0] for name in METHOD_OPTIONS} == METHODS.keys()
    assert INPUTS >= 20_000


@pytest.fixture(scope="module")
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model), device="cpu"))


@pytest.fixture(scope="module", params=METHOD_OPTIONS)
def case(request, model, tmp_path_factory):
    return case_of(request.param, model, tmp_path_factory.mktemp("case"))


def case_of(configuration, model, folder):
    options = method_of(configuration)
    return Case(METHODS[options["name"]].model_validate(options), model, folder)


def test_what_is_right_is_accepted(case):
    case.check_accepted_update(case.receive(case.updates[0]))
    case.check_accepted_entry(case.arrive(case.entry))


# --- wrong in one way, and damaged anywhere -------------------------------------------------------


@pytest.mark.parametrize("direction", ["up", "down"])
def test_what_is_wrong_in_one_way_is_refused(case, direction):
    tried, ways = check_wrong(case, direction, WRONG)
    assert tried == WRONG >= 8 * ways


def test_what_is_damaged_on_its_way_up_is_refused_or_can_be_used(case):
    assert 0 < check_damaged(case, "up", DAMAGED) < DAMAGED / 2


def test_what_is_damaged_on_its_way_down_is_refused_or_can_be_used(case):
    assert 0 < check_damaged(case, "down", DAMAGED) < DAMAGED / 2


# --- limits ---------------------------------------------------------------------------------------


def filled(data, value):
    """The file with `value` for every floating number, in turns above and below zero."""
    file = File.of(data)
    tensors = file.loaded()
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


STACK = {"broadcast": "stack"}


@pytest.mark.parametrize(
    ("method", "participants", "possible"),
    [
        ({"name": "flora", "ranks": 4, **STACK}, 3, {12}),
        ({"name": "flora", "ranks": [4, 2, 1], **STACK}, 3, {7}),
        ({"name": "flora", "ranks": [4, 2, 1], **STACK}, 2, {3, 4, 5, 6}),
        ({"name": "flora", "ranks": [4, 2, 1], "restart": "zero", **STACK}, 2, {3, 4, 5, 6}),
        ({"name": "flora", "ranks": [4, 2, 1]}, 3, set(range(1, 8))),
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
    case = case_of("ferret by norm", model, tmp_path)
    entry = case.arrive(case.entry)
    two = entry.participants[:2]
    total = sum(p.num_examples for p in two)
    two = [replace(p, weight=p.num_examples / total) for p in two]
    with pytest.raises(InvalidMessage, match="sketches of 2 participants, got 3"):
        check_entry(replace(entry, participants=two), case.method, case.shapes, ROUND, PARENT)


def test_an_entry_of_other_seeds_or_another_start_than_the_run_s_is_refused(case):
    """As one of a run with another seed, or of clients with other names or steps."""
    entry, expected = case.arrive(case.entry), case.expected

    def check(entry, **changes):
        other = replace(expected, **changes)
        check_entry(entry, case.method, case.shapes, ROUND, PARENT, expected=other)

    check(entry)
    has_seeds = any(name.endswith(("seed", "seeds")) for name in entry.tensors)
    if has_seeds:
        with pytest.raises(InvalidMessage, match=r"seed.* must be "):
            check(entry, seeds=Seeds(8))
    if case.method.name == "fedzo":
        renamed = [replace(p, client=f"x-{p.client}") for p in entry.participants]
        with pytest.raises(InvalidMessage, match="seeds must be those of directions"):
            check(replace(entry, participants=renamed))
        with pytest.raises(InvalidMessage, match="6 of 18 are not"):
            check(entry, training=TrainingSettings(steps=2))
    for metrics in ({}, {"bytes_up": 7}):
        with pytest.raises(InvalidMessage, match="metrics must have train_loss, or epsilon"):
            check(replace(entry, metrics=metrics))
    check(replace(entry, metrics={"epsilon": 1.5}))


@pytest.mark.parametrize(("steps", "has_start"), [(3, True), (9, False)])
def test_a_start_adapter_is_there_where_clients_start_from_one(model, tmp_path, steps, has_start):
    """With `restart: warm` the number of steps decides, and other options do not say."""
    case = Case(METHODS["flora"](ranks=4), model, tmp_path)
    entry = case.arrive(case.entry)
    assert any(name.startswith("start.") for name in entry.tensors)  # of three steps
    expected = replace(case.expected, training=TrainingSettings(steps=steps))
    arguments = [case.method, case.shapes, ROUND, PARENT]
    without = {n: t for n, t in entry.tensors.items() if not n.startswith("start.")}
    wrong, says = (
        (replace(entry, tensors=without), "is missing|at least") if has_start else (entry, "unexp")
    )
    with pytest.raises(InvalidMessage, match=says):
        check_entry(wrong, *arguments, expected=expected)
    if has_start:
        check_entry(entry, *arguments, expected=expected)


def test_a_client_that_claims_any_number_of_examples_costs_no_time(model, tmp_path):
    """Of fedzo, whose clients' directions are derived one by one."""
    case = case_of("fedzo", model, tmp_path)
    entry = case.arrive(case.entry)
    expected = replace(case.expected, training=TrainingSettings(epochs=1))
    many = [replace(p, num_examples=2**62, weight=1 / 3) for p in entry.participants]
    check_entry(
        replace(entry, participants=many), case.method, case.shapes, ROUND, PARENT, expected
    )
    client, update = case.clients[0], Update.from_bytes(case.updates[0])
    case.method.check_update(replace(client, num_examples=2**62), update, expected)


def test_a_method_of_today_s_signature_goes_on(model, tmp_path):
    """A plug-in that says `check_entry(entry, shapes)` alone is asked nothing else."""

    class Own(METHODS["fedit"]):
        def check_entry(self, entry, shapes):
            super().check_entry(entry, shapes)

    case = Case(Own(name="fedit", ranks=2), model, tmp_path)
    case.check_accepted_entry(case.arrive(case.entry))


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


def test_names_are_compared_before_a_tensor_is_made(case, tmp_path, monkeypatch):
    """And whatever a method looks at before, it is not every number."""
    read = []
    original = FileTensors.__getitem__

    def watched(self, key):
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(FileTensors, "__getitem__", watched)
    file = File.of(case.updates[0])
    extra = {f"{i:x}": ("F32", [1], bytes(4)) for i in range(300)}
    file.tensors = {**file.tensors, **extra}
    with pytest.raises(InvalidMessage):
        case.receive(file.bytes())
    assert not extra.keys() & set(read)


def test_a_header_longer_than_any_of_the_model_s_is_not_parsed(case, tmp_path, monkeypatch):
    """A hundred thousand tensors take seconds, and a hundred megabytes."""
    limit = header_limit(case.shapes)
    lengths = [int.from_bytes(data[:8], "little") for data in case.updates]
    assert 2 * max(lengths) < limit
    assert 2 * int.from_bytes(case.entry[:8], "little") < header_limit(case.shapes, 3)
    parsed = []

    def watched(text, size):
        parsed.append(len(text))
        raise InvalidMessage("parsed")

    monkeypatch.setattr("hedgerow.wire.files._parse_header", watched)
    for length, says in ((limit + 1, f"at most {limit} bytes, got {limit + 1}"), (limit, "parsed")):
        data = length.to_bytes(8, "little") + b"{" * length
        path = tmp_path / "file"
        path.write_bytes(data)
        with pytest.raises(InvalidMessage, match=says):
            Update.from_bytes(data, limit)
        with pytest.raises(InvalidMessage, match=says):
            Update.read(path, limit)
        with pytest.raises(UserError, match=says):
            Entry.read(path, limit)
    assert parsed == [limit] * 3


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
