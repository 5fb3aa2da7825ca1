"""Whatever a site sends in Flower's objects, the fleet goes on: it is a failure, or an update.

Objects are damaged as they travel, and made again by Flower itself.
"""

import contextlib
import itertools
import json
import random
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from hedgerow.clock import Clock
from hedgerow.engines.flower import messages
from hedgerow.engines.flower.fleet import FlowerFleet
from hedgerow.engines.flower.keys import KEYS, KnownKeys
from hedgerow.engines.flower.messages import (
    Held,
    OwnScores,
    Parcel,
    Reply,
    Request,
    info,
    pack,
    read_reply,
    reading,
)
from hedgerow.errors import InvalidMessage
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult
from hedgerow.ledger import Base, Ledger

QUICK, MANY = 600, 20_000
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """What Flower tells a process of itself; files of few bytes come in several pieces."""
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    monkeypatch.setattr(messages, "PIECE", 1000)
    monkeypatch.setattr("hedgerow.engines.flower.fleet.POLL", 0)


# --- objects as they travel -----------------------------------------------------------------------


def deflated(message):
    """A message's objects by their ids, and the id of the message itself."""
    objects = get_all_nested_objects(message)
    return {key: each.deflate() for key, each in objects.items()}, message.object_id


def inflated(contents, root):
    """The message again, as Flower's grid makes it of what it pulls."""
    message = inflate_object_from_contents(root, dict(contents))
    message.metadata.__dict__["_message_id"] = root
    return message


class Grid:
    """Flower's grid, with two nodes: what they answer is `answers[node]`, in objects."""

    def __init__(self, nodes):
        self.nodes, self.answers, self.sent = nodes, {}, {}
        self._numbers = itertools.count()

    def get_nodes(self):
        return self.nodes

    def push_messages(self, given):
        for message in given:
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number
            self.sent[number] = message
            yield number

    def pull_messages(self, ids):
        for number in ids:
            message = self.sent.pop(number, None)
            if message is not None:
                yield inflated(*self.answers[message.metadata.dst_node_id](message))


def node(number, name):
    return SimpleNamespace(
        node_id=number, name=name, public_key=name.encode(), last_activated_at="0"
    )


class Federation:
    """A fleet of two clients, one of them honest, before the first round."""

    def __init__(self, experiment, folder):
        # An answer to another message than it was asked is none.
        changes = ["data.test=null", "data.client_test=0.3", "federation.deadline=0.05"]
        settings = load(experiment(), changes)
        base = Base(
            name="tiny", fingerprint="ab" * 32, architecture="x", parameters=2000, dtype="float32"
        )
        self.ledger = Ledger.create(folder / "ledger", base, {"q": (40, 50)})
        self.file = folder / "update"
        self.file.write_bytes(random.Random(0).randbytes(4500))
        (folder / "arrived").mkdir()
        self.grid = Grid([node(2, "client-000"), node(3, "client-001")])
        names = ["client-000", "client-001"]
        self.said = []
        self.fleet = FlowerFleet(
            self.grid,
            experiment=settings,
            names=names,
            awaited=names,
            ledger=self.ledger,
            run="0" * 32,
            folder=folder / "arrived",
            keys=KnownKeys(folder / KEYS),
            scorer=None,
            say=self.said.append,
        )
        for number, name in zip((2, 3), names, strict=True):
            self.grid.answers[number] = lambda asked, name=name: deflated(self.honest(name, asked))
        self.clients = list(self.fleet.gather())
        assert [client.name for client in self.clients] == names

    def honest(self, name, asked):
        """What a client answers."""
        request = Parcel(asked.content, Request).words
        reply = Reply(name=name, num_examples=7, held=Held(round=0, head=self.ledger.head))
        if request.score:
            scores = OwnScores(rows=3, values={"eval_loss": 1.5})
            return Message(pack(reply.model_copy(update={"scores": scores})), reply_to=asked)
        if not request.train:
            return Message(pack(reply), reply_to=asked)
        reply = reply.model_copy(update={"files": [info(self.file)]})
        return Message(pack(reply, [self.file]), reply_to=asked)

    def goes_on(self, answer, way):
        """Have the second client answer once; returns whether it is taken for an answer."""
        self.grid.answers[3] = answer
        if way == "join":
            self.grid.nodes[1].last_activated_at += "0"
            self.said.clear()
            self.fleet.gather()
            return "joined" in "".join(self.said)
        if way == "score":
            self.said.clear()
            found = self.fleet.evaluate(lambda done, total: None)
            assert "client-000" in found["eval_loss_by_client"]
            return "client-001" in found["eval_loss_by_client"]
        results = {r.client.name: r for r in self.train()}
        assert results["client-000"].failure is None
        mine = results["client-001"]
        assert (mine.failure is None) == isinstance(mine.update, Path)
        if mine.failure is not None:
            assert mine.failure
            assert len(mine.failure) <= 1000
            assert mine.failure.isprintable()
            return False
        assert mine.update.stat().st_size < 10_000
        return True

    def train(self) -> list[ClientResult]:
        return list(self.fleet.train(1, self.ledger.head, self.clients, Clock()))


@pytest.fixture
def federation(experiment, tmp_path):
    return Federation(experiment, tmp_path)


# --- damage ---------------------------------------------------------------------------------------

BODIES = [
    b"",
    b"[]",
    b"5",
    b"{}",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"9" * 5000,
    b"1e999",
    b'{"a": [1], "b": {"c": null}}',
    b'{"dtype": "uint8", "shape": [1], "stype": "bytes", "arraychunk_ids": [99]}',
    b'{"dtype": "uint8", "shape": [1], "stype": "bytes", "arraychunk_ids": [-1]}',
    b'{"dtype": 1, "shape": 5, "stype": [], "arraychunk_ids": null}',
    b'{"dtype": "uint8", "shape": [1e400], "stype": "bytes", "arraychunk_ids": [0.5]}',
]
TYPES = [
    "ArrayChunk",
    "Array",
    "ArrayRecord",
    "ConfigRecord",
    "MetricRecord",
    "Message",
    "RecordDict",
    "object",
    "",
]
LENGTHS = ["0", "-1", "9" * 5000, "1e9", "", "x", str(2**63)]
ODD = [None, True, -1, 0, 2**63, 2**64, 1.5, "", "x" * 5000, "\ud800", [], {}, [[]], {"a": {}}]


def with_head(content, rng, ids):
    """The object with another head: another type, other children, another length."""
    head, _, body = content.partition(b"\0")
    kind, children, length = head.decode().split(" ")
    way = rng.randrange(4)
    if way == 0:
        kind = rng.choice(TYPES)
    elif way == 1:
        some = rng.choices([*ids, "0" * 64, "x", ""], k=rng.randint(0, 4))
        children = ",".join(some)
    elif way == 2:
        length = rng.choice(LENGTHS)
    else:
        return f"{kind} {children}".encode() + rng.choice([b"", b"\0", b" 5 5 5\0"]) + body
    return f"{kind} {children} {length}".encode() + b"\0" + body


def with_body(content, rng, body=None):
    """The object with another body; the length in its head may be right."""
    head, _, old = content.partition(b"\0")
    if body is None:
        body = rng.choice([*BODIES, old[: len(old) // 2], old + old])
    kind, children, length = head.decode().split(" ")
    if rng.random() < 0.7:
        length = str(len(body))
    return f"{kind} {children} {length}".encode() + b"\0" + body


def with_words(content, rng):
    """A JSON body, of which one value is another."""
    head, _, body = content.partition(b"\0")
    try:
        said = json.loads(body)
    except ValueError:
        return with_body(content, rng)
    if isinstance(said, dict) and said:
        key = rng.choice(list(said))
        said[key] = rng.choice([*ODD, *said.values()])
        if rng.random() < 0.3:
            said[rng.choice(["words", "file-0", "file-1", "", "x" * 10_000])] = said.pop(key)
    return with_body(head + b"\0", rng, json.dumps(said).encode())


def flipped(content, rng):
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        way = rng.randrange(3)
        if way == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif way == 1:
            del data[place : place + rng.randint(1, 20)]
        else:
            data[place:place] = rng.randbytes(rng.randint(1, 20))
        if not data:
            break
    return bytes(data)


def repeated(content, rng):
    """An array that names its first chunk many times."""
    head, _, body = content.partition(b"\0")
    if not head.startswith(b"Array "):
        return flipped(content, rng)
    said = json.loads(body)
    said["arraychunk_ids"] = [0] * rng.randint(0, 300)
    return with_body(head + b"\0", rng, json.dumps(said).encode())


def damaged(contents, root, rng):
    """A message's objects, of which some are not as they were."""
    contents = dict(contents)
    ids = list(contents)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        key = rng.choice(list(contents))
        way = rng.randrange(7)
        if way == 0 and len(contents) > 1:
            del contents[key]
        elif way == 1:
            contents[key] = contents[rng.choice(list(contents))]
        elif way == 2:
            root = rng.choice(ids)
        else:
            change = rng.choice([with_head, with_body, with_words, flipped, repeated])
            try:
                contents[key] = (
                    change(contents[key], rng, ids)
                    if change is with_head
                    else change(contents[key], rng)
                )
            except ValueError:  # what has no head any more
                contents[key] = flipped(contents[key], rng) if contents[key] else b"\0"
    return contents, root


def with_other_words(message, rng):
    """The message, of which one thing that it says is another."""
    said = json.loads(message.content["words"]["json"])
    for _ in range(rng.randint(1, 2)):
        said[rng.choice([*said, "refused", "failure", "scores", "more"])] = rng.choice(
            [*ODD, *said.values(), [{"bytes": 2**62, "sha256": "0" * 64}] * rng.randint(1, 3)]
        )
    text = json.dumps(said)
    message.content["words"] = ConfigRecord({"json": text.encode("utf-8", "replace").decode()})
    return message


def at_random(asked, rng):
    """A message of Flower's, of random records."""

    def key():
        return rng.choice(["words", "file-0", "file-1", "json", "x", "", "é" * 3])

    def record():
        way = rng.randrange(3)
        if way == 0:
            values = [True, 1, 2.5, "x", b"\xff", "[" * 9999, [1, 2], ["a"], [b"b"], [], '{"a":1}']
            return ConfigRecord({key(): rng.choice(values) for _ in range(rng.randint(0, 3))})
        if way == 1:
            return MetricRecord(
                {key(): rng.choice([1, 2.5, [1]]) for _ in range(rng.randint(0, 3))}
            )
        arrays = [
            Array("uint8", (3,), "bytes", b"abc"),
            Array("uint8", (0,), "bytes", b""),
            Array("x", (-1, 2**70), "", b"abc" * 99),
            Array(np.ones(3)),
        ]
        return ArrayRecord({key(): rng.choice(arrays) for _ in range(rng.randint(0, 3))})

    if rng.random() < 0.1:
        return Message(Error(code=rng.randint(0, 9), reason="\x1b[2J" * 999), reply_to=asked)
    return Message(RecordDict({key(): record() for _ in range(rng.randint(0, 4))}), reply_to=asked)


def fuzz(federation, inputs, seed):
    """Damage so many answers; returns how many were taken all the same."""
    rng, taken = random.Random(seed), 0

    def answer(asked):
        way = rng.random()
        if way < 0.1:
            return deflated(at_random(asked, rng))
        message = federation.honest("client-001", asked)
        if way < 0.3:
            return deflated(with_other_words(message, rng))
        return damaged(*deflated(message), rng)

    for _ in range(inputs):
        taken += federation.goes_on(answer, rng.choice(["join", "score", "train", "train"]))
    return taken


def test_the_fleet_goes_on_whatever_a_site_sends(federation):
    assert 0 < fuzz(federation, QUICK, seed=1) < QUICK / 2


@pytest.mark.slow
def test_the_fleet_goes_on_whatever_a_site_sends_many_times(federation):
    assert 0 < fuzz(federation, MANY, seed=2) < MANY / 2


# --- one by one -----------------------------------------------------------------------------------


def changed(federation, change):
    """Answer with the honest message's objects, of which `change` has made others."""

    def answer(asked):
        contents, root = deflated(federation.honest("client-001", asked))
        return change(contents, root) or (contents, root)

    return answer


def of_kind(contents, kind):
    """The ids of the objects of a kind."""
    return [key for key, content in contents.items() if content.startswith(kind.encode() + b" ")]


def body_of(contents, kind, body):
    for key in of_kind(contents, kind):
        children = contents[key].partition(b"\0")[0].decode().split(" ")[1]
        contents[key] = f"{kind} {children} {len(body)}".encode() + b"\0" + body


def no_content(contents, root):
    body = contents[root].partition(b"\0")[2]
    contents[root] = f"Message  {len(body)}".encode() + b"\0" + body


def a_record_as_chunk(contents, root):
    for key in of_kind(contents, "ArrayChunk"):
        contents[key] = b"ConfigRecord  0\0"


def another_root(contents, root):
    return contents, of_kind(contents, "ConfigRecord")[0]


HOSTILE = {
    "a chunk that is not there": lambda c, r: body_of(
        c,
        "Array",
        b'{"dtype": "uint8", "shape": [1], "stype": "bytes", "arraychunk_ids": [99]}',
    ),
    "no content": no_content,
    "a chunk that is a record": a_record_as_chunk,
    "a message that is a record": another_root,
    "a list for a record": lambda c, r: body_of(c, "ArrayRecord", b"[]"),
    "a number for an array": lambda c, r: body_of(c, "Array", b"5"),
    "a deep body": lambda c, r: body_of(c, "RecordDict", b"[" * 200_000),
    "a long number": lambda c, r: c.update({r: b"Message  " + b"9" * 5000 + b"\0"}),
    "no head": lambda c, r: c.update({r: b"x"}),
    "its own child": lambda c, r: c.update({r: f"Message {r} 0".encode() + b"\0"}),
    "keys that are numbers": lambda c, r: body_of(c, "ArrayRecord", b'{"1": 2}'),
}


@pytest.mark.parametrize("way", ["join", "score", "train"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_malformed_object_fails_its_sender_alone(federation, what, way):
    taken = federation.goes_on(changed(federation, HOSTILE[what]), way)
    assert not taken or way != "train"  # only that answer has arrays, which may be malformed
    assert federation.goes_on(changed(federation, lambda contents, root: None), way)


def test_files_that_nobody_asked_for_are_refused(federation):
    """A reply to an invitation, with a file."""

    def answer(asked):
        reply = Reply(name="client-001", num_examples=7, files=[info(federation.file)])
        return deflated(Message(pack(reply, [federation.file]), reply_to=asked))

    assert not federation.goes_on(answer, "join")
    assert "files must have at most 0 bytes" in federation.said[0]


def test_a_reply_to_another_message_is_not_taken_for_one(federation):
    """As what a node sends to the SuperLink unasked."""
    asked = Message(RecordDict(), 3, "train.round")
    asked.metadata.__dict__["_message_id"] = "other"
    federation.grid.sent["mine"] = asked
    federation.grid.answers[3] = lambda asked: deflated(
        Message(pack(Reply(name="client-001", num_examples=7)), reply_to=asked)
    )
    assert read_reply(federation.grid, "mine", 0) is None


def test_equal_files_are_both_saved(federation, tmp_path):
    """Flower sends them once."""
    file = federation.file
    reply = Reply(name="a", files=[info(file)] * 2)
    contents, root = deflated(Message(pack(reply, [file] * 2), 3, "train.round"))
    with reading():
        parcel = Parcel(inflated(contents, root).content, Reply)
    for path in parcel.save_all(tmp_path):
        assert path.read_bytes() == file.read_bytes()


# --- memory ---------------------------------------------------------------------------------------


def one_array_of_many_chunks(contents, times):
    (key,) = of_kind(contents, "Array")
    head, _, body = contents[key].partition(b"\0")
    said = json.loads(body) | {"arraychunk_ids": [0] * times}
    body = json.dumps(said).encode()
    contents[key] = head.rpartition(b" ")[0] + f" {len(body)}".encode() + b"\0" + body


def many_arrays_of_one_chunk(contents, times):
    (key,) = of_kind(contents, "ArrayRecord")
    (array,) = of_kind(contents, "Array")
    ids = [f"{number:064x}" for number in range(times)]
    contents |= dict.fromkeys(ids, contents[array])
    del contents[array]
    body = json.dumps({str(number): each for number, each in enumerate(ids)}).encode()
    contents[key] = f"ArrayRecord {','.join(ids)} {len(body)}".encode() + b"\0" + body


@pytest.fixture
def repetitive(federation, monkeypatch):
    """A grid whose one reply has a file of one piece, after `repeat` has changed it."""
    monkeypatch.setattr(messages, "PIECE", MIB)
    federation.file.write_bytes(bytes(MIB))
    asked = Message(RecordDict(), 3, "train.round")
    reply = Reply(name="client-001", num_examples=7, files=[info(federation.file)])
    contents, root = deflated(Message(pack(reply, [federation.file]), reply_to=asked))

    def repetitive(repeat):
        repeat(contents, 10_000)
        return SimpleNamespace(pull_messages=lambda ids: [inflated(contents, root)])

    return repetitive


@contextlib.contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


def test_an_array_that_names_a_chunk_ten_thousand_times_is_that_chunk(repetitive, tmp_path):
    """It would be ten gigabytes."""
    grid = repetitive(one_array_of_many_chunks)
    with little_memory():
        read_reply(grid, "", 2 * MIB).save(0, tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_size == MIB


def test_ten_thousand_arrays_of_one_chunk_are_more_than_was_announced(repetitive):
    grid = repetitive(many_arrays_of_one_chunk)
    with little_memory(), pytest.raises(InvalidMessage, match="exceeds the 1048576 bytes announ"):
        read_reply(grid, "", 2 * MIB)


def test_flower_reads_as_before_when_a_message_has_been_read():
    big = Array(np.arange(2 * MIB))  # of several chunks
    contents, root = deflated(Message(RecordDict({"x": ArrayRecord({"y": big})}), 3, "train.x"))
    with pytest.raises(InvalidMessage, match="an array must come in one piece"), reading():
        inflated(contents, root)
    read = inflated(contents, root).content["x"]["y"]
    assert read.data == big.data
