"""Fleet and sites without a network: who is asked what, who catches up, what is refused."""

import dataclasses
import datetime
import itertools
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity
from support.models import DATED, byte_tokenizer
from support.runs import rows_of

from hedgerow.console import ProgressWatcher
from hedgerow.engines.flower.app import App, init
from hedgerow.engines.flower.fleet import FlowerFleet
from hedgerow.engines.flower.messages import (
    Action,
    FileInfo,
    Parcel,
    Reply,
    Request,
    info,
    pack,
)
from hedgerow.engines.flower.server import _main, serve
from hedgerow.engines.flower.site import Site
from hedgerow.engines.flower.worker import Host, WorkerRequest
from hedgerow.errors import Diverged, InvalidMessage, RunFailed, UserError
from hedgerow.experiment import load
from hedgerow.ledger import Ledger
from hedgerow.methods.standalone import Standalone
from hedgerow.model import Model
from hedgerow.runs.preparation import load_test
from hedgerow.runs.rollback import roll_back
from hedgerow.settings import ClientFile
from hedgerow.training import first_order
from hedgerow.wire import Entry

CLIENTS = ["client-000", "client-001", "client-002"]


class Node:
    """A site that a `Loopback` reaches by a function call; `up` is whether it is connected."""

    def __init__(self, number, app, folder, **config):
        self.node_id, self.last_activated_at, self.up = number, "now", True
        self.public_key = f"key {number}".encode()
        self.name, self.app, self.config = "", app, {"folder": str(folder), **config}
        self.host = Host()
        self.answer = lambda reply: reply
        self.actions = []

    def handle(self, message, inbox):
        self.actions.append(Action(message.metadata.message_type))
        parcel = Parcel(message.content, Request)
        files = parcel.save_all(inbox)
        request = WorkerRequest(app=self.app, node=self.config, request=parcel.words, files=files)
        answer = self.host.handle(request)
        content = pack(answer.reply, [] if answer.update is None else [answer.update])
        return self.answer(content)


class Loopback:
    """Flower's grid, as far as the fleet uses it."""

    def __init__(self, nodes, folder):
        self.nodes, self.folder, self.replies = nodes, folder, {}
        self.before = lambda message: None
        self._numbers = itertools.count()

    def get_nodes(self):
        return [node for node in self.nodes if node.up]

    def push_messages(self, messages):
        for message in messages:
            self.before(message)
            (node,) = [n for n in self.nodes if n.node_id == message.metadata.dst_node_id]
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number
            inbox = self.folder / number
            inbox.mkdir()
            if node.up:
                self.replies[number] = Message(node.handle(message, inbox), reply_to=message)
            else:
                self.replies[number] = Message(Error(code=3, reason="gone"), reply_to=message)
            yield number

    def pull_messages(self, ids):
        return [self.replies.pop(number) for number in ids if number in self.replies]


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """What Flower tells a process of itself."""
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Replies are there as soon as messages are sent, or never."""
    monkeypatch.setattr("hedgerow.engines.flower.fleet.POLL", 0.01)


@pytest.fixture
def make(experiment, tmp_path, tiny_model):
    """An app of the tiny experiment, its three sites, and a function that runs it."""

    def make(*overrides, **sections):
        path = experiment(**{"federation": {"rounds": 5, "backoff": 0}, **sections})
        init(load(path, ["data.test=null", *overrides]), tmp_path / "app", "tiny")
        nodes = [
            Node(
                index + 2,
                tmp_path / "app",
                tmp_path / "sites" / name,
                name=name,
                data=str(tmp_path / f"client_{index}.json"),
                model=str(tiny_model),
            )
            for index, name in enumerate(CLIENTS)
        ]
        (tmp_path / "inbox").mkdir()
        grid = Loopback(nodes, tmp_path / "inbox")

        def run(out=tmp_path / "run", scored=(None, None), **changes):
            app = App.load(tmp_path / "app")
            settings = app.experiment.federation.model_copy(update=changes)
            app = dataclasses.replace(
                app, experiment=app.experiment.model_copy(update={"federation": settings})
            )
            with ProgressWatcher() as watcher:
                serve(grid, app, out, watcher, *scored)
            return rows_of(out)

        return SimpleNamespace(path=path, grid=grid, nodes=nodes, run=run, out=tmp_path / "run")

    return make


def ledger(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("ledger/*.safetensors")}


def test_a_client_without_examples_holds_up_nobody(
    make, hedgerow, tmp_path, tiny_model, monkeypatch, capsys
):
    """Its site refuses, the others train as they would in one process."""
    monkeypatch.setattr("hedgerow.engines.flower.fleet.PATIENCE", 0.3)
    made = make(method={"name": "flora", "ranks": [4, 2, 1]})
    (tmp_path / "client_1.json").write_text('[{"instruction": "' + "x" * 99 + '", "output": "y"}]')
    rows = made.run()
    shown = capsys.readouterr()
    assert {row["clients"] for row in rows[1:]} == {2}
    assert "it has no examples to learn from" in shown.out
    assert "begins without client-001" in shown.out
    assert "fills `data.max_length`" in shown.err
    assert hedgerow("run", made.path, "data.test=null", "--out", tmp_path / "local").code == 0
    assert ledger(tmp_path / "local") == ledger(made.out)


def test_a_client_that_never_joined_has_no_part_in_the_clients_mean(
    make, hedgerow, tmp_path, monkeypatch
):
    """Of a method, maybe one's own, that sends updates but has a model for each client."""
    monkeypatch.setattr("hedgerow.engines.flower.fleet.PATIENCE", 0.3)
    monkeypatch.setattr(Standalone, "communicates", True)
    made = make("method={name: standalone, ranks: 2}", "federation.rounds=2")
    (tmp_path / "client_1.json").write_text('[{"instruction": "' + "x" * 99 + '", "output": "y"}]')
    experiment = load(made.path, ["method={name: standalone, ranks: 2}"])
    model = Model.load(experiment.model)
    rows = made.run(scored=(model, load_test(experiment.data, experiment.evaluation, model)))
    local = tmp_path / "local"
    changes = ["method={name: standalone, ranks: 2}", "federation.rounds=2"]
    assert hedgerow("run", made.path, *changes, "--out", local).code == 0
    for row, expected in zip(rows, rows_of(local), strict=True):
        assert list(row["by_client"]) == ["client-000", "client-002"]
        assert row["eval_loss"] == expected["eval_loss"]


METHODS = {
    "flora": [],
    "ferret": ["method.compression=40"],
    "over lora": ["method.over=lora", "method.ranks=2", "method.budget=400"],
    "fedit": ["method.ranks=2"],
    "fedavg": [],
    "fedkseed": ["method.candidates=8"],
}


@pytest.mark.parametrize("kind", METHODS)
def test_the_ledger_is_the_local_one_s(make, hedgerow, tmp_path, kind):
    name = {"over lora": "ferret"}.get(kind, kind)
    changes = [f"method.name={name}", *METHODS[kind], "federation.rounds=3"]
    made = make(*changes)
    local = tmp_path / "local"
    assert hedgerow("run", made.path, "data.test=null", *changes, "--out", local).code == 0
    rows = made.run()
    assert len(ledger(local)) == 3
    assert ledger(made.out) == ledger(local)
    for row, expected in zip(rows, rows_of(local), strict=True):
        for key in ("train_loss", "bytes_up", "bytes_down", "participants", "failures"):
            assert row[key] == expected[key]
    for node in made.nodes:
        assert ledger(Path(node.config["folder"])) == ledger(local)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_site_that_begins_anew_compares_with_the_base(make, hedgerow, tmp_path, objective):
    """What it compares with is of the model that the run began with, whenever it is asked."""
    fields = "data.fields={prompt: instruction, chosen: output, rejected: bad}"
    changes = [f"training.objective={objective}", fields, "federation.rounds=3"]
    made = make(*changes)
    for index in range(3):
        path = tmp_path / f"client_{index}.json"
        rows = [{**row, "bad": "nothing"} for row in json.loads(path.read_text())]
        path.write_text(json.dumps(rows))
    local = tmp_path / "local"
    assert hedgerow("run", made.path, "data.test=null", *changes, "--out", local).code == 0

    def restart(message):
        for node in made.nodes:
            node.host = Host()

    made.grid.before = restart
    made.run()
    assert len(ledger(local)) == 3
    assert ledger(made.out) == ledger(local)


def test_a_site_hides_its_examples_by_itself(make, hedgerow, tmp_path, capsys):
    """Its key and its account stay there; with a seed the ledger is the local one's."""
    privacy = {"level": "example", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3}
    for seed in (None, 5):
        changes = [f"privacy={json.dumps(privacy | {'seed': seed})}", "federation.rounds=2"]
        made = make(*changes)
        local = tmp_path / "local" / str(seed)
        assert hedgerow("run", made.path, "data.test=null", *changes, "--out", local).code == 0
        rows = made.run()
        assert (ledger(made.out) == ledger(local)) == (seed is not None)
        assert [row["epsilon"] for row in rows[1:]] == [r["epsilon"] for r in rows_of(local)[1:]]
        assert {row["train_loss"] for row in rows} == {None}
        assert not list(made.out.rglob("privacy.*"))
        for node in made.nodes:
            kept = sorted(path.name for path in Path(node.config["folder"]).rglob("privacy.*"))
            assert kept == ["privacy.json"] + (["privacy.key"] if seed is None else [])
        said = capsys.readouterr().err
        assert "round 2: epsilon " in said
        assert "train loss" not in said
        for folder in ("app", "sites", "inbox", "run"):
            shutil.rmtree(tmp_path / folder)


def test_a_site_keeps_to_its_own_largest_epsilon(make, capsys):
    """It stops where the others, who demand nothing, go on."""
    privacy = {"level": "example", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3}
    made = make(f"privacy={json.dumps(privacy)}", "federation.rounds=2")
    made.nodes[1].config["epsilon"] = 3.9
    rows = made.run()
    assert [list(row["failures"]) for row in rows[1:]] == [[], ["client-001"]]
    assert rows[2]["failures"]["client-001"] == "its privacy budget is spent"


@pytest.mark.parametrize("privacy", ["null", "seeded"])
def test_a_site_that_demands_privacy_takes_no_part_without(make, monkeypatch, capsys, privacy):
    monkeypatch.setattr("hedgerow.engines.flower.fleet.PATIENCE", 0.3)
    seeded = '{"level": "example", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3, "seed": 1}'
    made = make(f"privacy={seeded if privacy == 'seeded' else 'null'}", "federation.rounds=1")
    made.nodes[1].config["epsilon"] = 8.0
    rows = made.run()
    assert rows[1]["participants"] == ["client-000", "client-002"]
    said = " ".join(capsys.readouterr().err.split())
    assert "the node config has epsilon=8, but the experiment does not hide single rows" in said


def test_a_site_plants_its_canaries_by_itself(make, hedgerow, tmp_path, tiny_model):
    """The ledger is the local one's, and the server audits them without anybody's data."""
    changes = ["audit={client: client-001, canaries: 10}", "federation.rounds=2"]
    made = make(*changes)
    local = tmp_path / "local"
    assert hedgerow("run", made.path, "data.test=null", *changes, "--out", local).code == 0
    made.run()
    assert ledger(made.out) == ledger(local)
    result = hedgerow("audit", made.out, f"model.path={tiny_model}", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert "client-000.json" in found["notes"][0]
    assert hedgerow("audit", local, "--json").code == 0
    expected = json.loads((local / "audit.json").read_text())
    for key in ("planted", "left", "head"):
        assert found[key] == expected[key]
    with pytest.raises(UserError, match="there is no client 'north' with examples"):
        init(load(made.path, ["audit={client: north}"]), tmp_path / "another", "tiny")


def test_a_server_with_the_model_scores_it(make, hedgerow, tmp_path, tiny_model):
    made = make()
    assert hedgerow("run", made.path, "--out", tmp_path / "local").code == 0
    experiment = load(made.path)
    model = Model.load(experiment.model)
    made.run(scored=(model, load_test(experiment.data, experiment.evaluation, model)))
    expected = [row["eval_loss"] for row in rows_of(tmp_path / "local")]
    assert [row["eval_loss"] for row in rows_of(made.out)] == expected
    made.nodes.clear()  # nobody is asked: the run is complete, its model is rebuilt and scored
    again = Model.load(experiment.model)
    rows = made.run(
        deadline=0.5, scored=(again, load_test(experiment.data, experiment.evaluation, again))
    )
    assert [row["eval_loss"] for row in rows] == expected


def test_a_server_claims_nothing_of_examples_that_it_never_sees(make, tmp_path, capsys):
    made = make("federation.rounds=1")
    made.run()
    shutil.rmtree(tmp_path / "app")
    init(load(made.path, ["data.test=null", "data.max_length=70"]), tmp_path / "app", "tiny")
    made.run(rounds=2)
    said = " ".join(capsys.readouterr().out.split())
    assert "data.max_length: other than before; whether the clients' examples" in said
    assert "examples are the same is not known" in said


def test_an_app_that_is_made_again_on_another_day_goes_on_with_the_run_s(
    make, chatty, days, hedgerow, tmp_path, monkeypatch
):
    """Server and sites, as one process does; a day that was set is another matter."""
    folder = chatty(DATED)
    chosen = ["data.prompt=chat", "data.max_length=128", "federation.rounds=1"]
    days(0)
    made = make(*chosen, model={"path": str(folder)}, federation={"deadline": 20})
    changes = ["federation.rounds=2", f"data.template.date={datetime.date.today()}"]
    local = tmp_path / "local"
    assert hedgerow("run", made.path, *chosen, *changes, "--out", local).code == 0
    monkeypatch.syspath_prepend(tmp_path / "app")
    config = {"out": made.out, "model": folder, "test": tmp_path / "test.json"}
    context = SimpleNamespace(run_config={key: str(path) for key, path in config.items()})
    for node in made.nodes:
        node.config["model"] = str(folder)

    def made_again(*changes):
        shutil.rmtree(tmp_path / "app")
        init(load(made.path, ["data.test=null", *chosen, *changes]), tmp_path / "app", "tiny")
        for node in made.nodes:
            node.host = Host()
        _main(made.grid, context)

    _main(made.grid, context)
    days(1)
    made_again("federation.rounds=2")
    assert [row["failed"] for row in rows_of(made.out)] == [0, 0, 0]
    assert ledger(made.out) == ledger(local)
    scores = [[row["eval_loss"] for row in rows_of(run)] for run in (made.out, local)]
    assert scores[0] == scores[1]
    sites = (tmp_path / "sites").glob("*/*/experiment.yaml")
    days_written = {
        load(path).data.template.date for path in [made.out / "experiment.yaml", *sites]
    }
    assert days_written == {load(local / "experiment.yaml").data.template.date}
    with pytest.raises(UserError, match=r"run with data\.template\.date=.*, not 2020-01-01: give"):
        made_again("federation.rounds=3", "data.template.date=2020-01-01")


def at_round(number, do):
    """A function for `Loopback.before` that acts before a round's first client is to train."""
    done = []

    def before(message):
        trains = message.metadata.message_type == Action.train
        if trains and message.metadata.group_id == str(number) and not done:
            done.append(number)
            do()

    return before


def test_a_client_that_was_away_gets_what_it_missed(make, tmp_path):
    made = make()
    away = made.nodes[1]

    def leave():
        away.up = False

    def come_back():
        away.up = True

    leaving, returning = at_round(2, leave), at_round(4, come_back)
    made.grid.before = lambda message: (leaving(message), returning(message))
    rows = made.run(min_clients=2)
    assert [row["failed"] for row in rows] == [0, 0, 1, 1, 1, 0]
    assert set(rows[2]["failures"]) == {"client-001"}
    assert ledger(Path(away.config["folder"])) == ledger(made.out)
    # In round 4 it came too late to be asked.
    assert rows[5]["participants"] == CLIENTS


def test_a_site_that_lost_its_ledger_gets_it_again(make):
    made = make()
    place = Path(made.nodes[0].config["folder"])

    def lose():
        shutil.rmtree(place)
        made.nodes[0].host = Host()

    made.grid.before = at_round(3, lose)
    rows = made.run()
    assert [row["failed"] for row in rows] == [0] * 6
    assert ledger(place) == ledger(made.out)


def test_sites_take_the_history_of_a_server_that_lost_its_own(make, tmp_path):
    """The last entries are gone from the server, and come out otherwise the second time."""
    made = make()
    made.run()
    index = json.loads((made.out / "ledger/ledger.json").read_text())
    del index["entries"][2:]
    (made.out / "ledger/ledger.json").write_text(json.dumps(index))
    for path in sorted((made.out / "ledger").glob("*.safetensors"))[2:]:
        path.unlink()

    def leave():
        made.nodes[2].up = False

    made.grid.before = at_round(3, leave)
    rows = made.run(min_clients=2)
    assert rows[-1]["participants"] == CLIENTS[:2]
    assert ledger(Path(made.nodes[0].config["folder"])) == ledger(made.out)


def test_sites_follow_a_rollback_and_say_what_they_have_not_kept(make, capsys):
    """Clients that go on from their own adapters have those of the last two rounds."""
    made = make("method.restart=own")
    made.run()
    before, site = ledger(made.out), Path(made.nodes[0].config["folder"])
    assert roll_back(made.out, 4) == [
        "what clients kept of rounds up to then is at their sites, which say in their logs where "
        "it is not there any more"
    ]
    made.run()
    assert ledger(made.out) == ledger(site) == before
    capsys.readouterr()
    roll_back(made.out, 1)
    rows = made.run()
    assert [row["failed"] for row in rows] == [0] * 6
    said = "round 2: what it kept of round 1 is not there any more, so that it begins anew"
    err = capsys.readouterr().err
    for name in CLIENTS:
        assert err.count(f"hedgerow: {name}: {said}") == 1
    assert ledger(made.out) == ledger(site)
    assert ledger(made.out)["0001.safetensors"] == before["0001.safetensors"]
    assert ledger(made.out)["0002.safetensors"] != before["0002.safetensors"]


def test_a_client_that_cannot_begin_anew_takes_no_part(make):
    made = make("method={name: scaffold}")
    made.run()
    roll_back(made.out, 1)
    with pytest.raises(RunFailed, match=r"kept of round 1 is not there .* scaffold would go wrong"):
        made.run()
    roll_back(made.out, 0)
    assert len(made.run()) == 6


def test_fedit_sends_a_client_only_the_last_entry(make):
    made = make("method.name=fedit", "method.ranks=2")
    away = made.nodes[1]
    away.up = False

    def come_back():
        away.up = True

    made.grid.before = at_round(3, come_back)
    rows = made.run(min_clients=2, deadline=0.5)
    assert rows[-1]["participants"] == CLIENTS
    held = ledger(Path(away.config["folder"]))
    assert held.keys() < ledger(made.out).keys()
    assert held["0005.safetensors"] == ledger(made.out)["0005.safetensors"]


def test_a_round_with_too_few_is_tried_again_and_then_given_up(make, capsys):
    made = make()
    made.nodes[0].up = False
    with pytest.raises(RunFailed, match="2 of the 3 clients that a round needs joined"):
        made.run(min_clients=3, deadline=0.5)
    made.nodes[0].up = True
    tries = []

    def leave_for_a_try(message):
        if message.metadata.group_id == "2" and message.metadata.message_type == Action.train:
            tries.append(message.metadata.dst_node_id)
            made.nodes[0].up = len(tries) > 3

    made.grid.before = leave_for_a_try
    with pytest.raises(RunFailed, match=r"round 2 has 2 of the 3 usable updates .* in 2 tries"):
        made.run(min_clients=3, attempts=2)
    assert "updates are missing: client-000 will be asked again" in capsys.readouterr().out
    made.grid.before = lambda message: None
    made.nodes[0].up = True
    rows = made.run(min_clients=3, attempts=2)  # the same run goes on
    assert [row["clients"] for row in rows] == [0, 3, 3, 3, 3, 3]


def test_who_answered_is_not_asked_again_and_a_second_answer_is_the_first(make):
    made = make()
    asked = []

    def lose_one_answer(message):
        if message.metadata.message_type == Action.train and message.metadata.group_id == "1":
            asked.append(message.metadata.dst_node_id)
            made.nodes[0].answer = lambda reply: (
                RecordDict() if len(asked) == 1 else reply  # what arrives is nothing
            )

    made.grid.before = lose_one_answer
    rows = made.run()
    assert rows[1]["failures"] == {"client-000": "the message has no words"}
    assert asked == [2, 3, 4]


def test_what_a_site_says_cannot_hurt_the_server(make, capsys):
    """Markup and terminal escapes in its sentences, keys and errors; messages that are none."""
    made = make()
    evil = made.nodes[2]
    hurt = "[/x] [link=http://evil]\x1b[2J\r" + "y" * 5000

    def sentence(reply):
        words = json.loads(reply["words"]["json"])
        if words["files"]:
            words |= {"files": [], "failure": hurt[:900]}
        return RecordDict({"words": ConfigRecord({"json": json.dumps(words)})})

    def key(reply):
        return RecordDict({"words": ConfigRecord({"json": json.dumps({hurt: 1})})})

    answers = iter([lambda reply: reply, sentence, key, sentence, sentence])
    honest, push, pull = evil.handle, made.grid.push_messages, made.grid.pull_messages

    def handle(message, inbox):
        evil.answer = next(answers, sentence)
        if message.metadata.group_id == "4":
            raise KeyError("an object that Flower cannot read")
        return honest(message, inbox)

    def pushed(messages):
        try:
            yield from push(messages)
        except KeyError:
            yield "broken"

    def pulled(ids):
        if ids == ["broken"]:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        return pull(ids)

    evil.handle, made.grid.push_messages, made.grid.pull_messages = handle, pushed, pulled
    rows = made.run()
    assert [row["participants"] for row in rows[1:]] == [CLIENTS[:2]] * 5
    failures = [row["failures"]["client-002"] for row in rows[1:]]
    assert any("the message cannot be read: UnicodeDecodeError" in text for text in failures)
    assert any("invalid words" in failure for failure in failures)
    out = capsys.readouterr().out
    for text in [out.replace("\n", ""), *failures]:
        assert "\x1b" not in text
        assert "\r" not in text
    assert all(len(failure) <= 1000 for failure in failures)
    assert "[/x]" in out


def test_a_site_refuses_entries_that_the_method_would_not_make(make):
    """A server that sends other bytes than it announces, or what its method cannot make."""
    made = make()
    tampered = []

    def tamper(message):
        pieces = message.content.array_records.get("file-0")
        if message.metadata.group_id == "3" and pieces and not tampered:
            tampered.append(message.metadata.dst_node_id)
            data = bytearray(pieces["000000"].data)
            data[-1] ^= 1
            pieces["000000"] = Array("uint8", (len(data),), "bytes", bytes(data))

    made.grid.before = tamper
    honest = made.nodes[0].handle

    def handle(message, inbox):
        try:
            return honest(message, inbox)
        except InvalidMessage as error:
            return RecordDict({"words": ConfigRecord({"json": str(error)})})

    made.nodes[0].handle = handle
    rows = made.run()
    assert tampered == [2]
    assert list(rows[3]["failures"]) == ["client-000"]
    assert rows[4]["failed"] == 0
    assert ledger(Path(made.nodes[0].config["folder"])) == ledger(made.out)

    # A first entry of twice the rank that its clients have, announced and chained as it should be.
    first = Entry.read(made.out / "ledger/0001.safetensors")
    tensors = {
        name: torch.cat([factor, factor], dim=0 if "lora_A" in name else 1)
        for name, factor in first.tensors.items()
    }
    forged = made.out.parent / "forged.safetensors"
    with forged.open("wb") as file:
        dataclasses.replace(first, tensors=tensors).write(file)
    node = made.nodes[1].config | {"folder": str(made.out.parent / "another site")}
    request = Request(run="1" * 32, records=[info(forged)], files=[info(forged)], train=True)
    asked = WorkerRequest(app=made.nodes[1].app, node=node, request=request, files=[forged])
    reply = Host().handle(asked).reply
    assert "sent an entry that it does not accept" in reply.refused
    assert not ledger(Path(node["folder"]))
    # One of more tensors than it could have, of which none is looked at.
    many = {f"{i:x}": torch.ones(1) for i in range(20_000)}
    with forged.open("wb") as file:
        dataclasses.replace(first, tensors=many).write(file)
    request = Request(run="2" * 32, records=[info(forged)], files=[info(forged)], train=True)
    asked = WorkerRequest(app=made.nodes[1].app, node=node, request=request, files=[forged])
    reply = Host().handle(asked).reply
    assert "the entry of round 1 cannot be read" in reply.refused


def test_a_site_says_once_what_an_adapter_leaves_out(make, tmp_path, capsys):
    config = transformers.MixtralConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    folder = tmp_path / "mixture"
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    made = make("federation.rounds=2", model={"path": str(folder)})
    for node in made.nodes:
        node.config["model"] = str(folder)
    made.run()
    said = capsys.readouterr().err
    assert said.count("left out are model.layers.*.mlp.gate.weight") == len(made.nodes)


def test_a_site_says_of_its_rows_what_is_so_however_often_it_is_asked(make, tmp_path, capsys):
    """It refuses, and is invited again, as long as it has nothing to learn from."""
    made = make()
    rows = [{"instruction": "y" * 99, "output": "x"}, {"instruction": "x", "output": None}]
    (tmp_path / "client_1.json").write_text(json.dumps(rows))
    host, node = Host(), made.nodes[1]
    for run in ("1", "1", "2"):
        asked = Request(run=run * 32)
        reply = host.handle(WorkerRequest(app=node.app, node=node.config, request=asked, files=[]))
        assert "no examples to learn from" in reply.reply.refused
    said = capsys.readouterr().err
    assert said.count("1 row left out: no answer") == 1
    assert "2 rows" not in said


def test_each_client_of_one_site_has_remarks_of_its_own(make, tmp_path, capsys):
    """As in a simulation, where a process trains for several."""
    made = make()
    for index, missing in enumerate((1, 2)):
        rows = json.loads((tmp_path / f"client_{index}.json").read_text())
        rows += [{"instruction": "x", "output": None}] * missing
        (tmp_path / f"client_{index}.json").write_text(json.dumps(rows))
    app = App.load(tmp_path / "app")
    model = load(made.path).model
    files = [
        ClientFile(name=f"client-00{n}", file=str(tmp_path / f"client_{n}.json")) for n in (0, 1)
    ]
    data = app.experiment.data.model_copy(update={"clients": files})
    experiment = app.experiment.model_copy(update={"model": model, "data": data})
    site = Site(dataclasses.replace(app, experiment=experiment), tmp_path / "sites")
    for run in ("1", "2"):
        for name in CLIENTS[:2]:
            reply, _ = site.handle(name, Request(run=run * 32), [])
            assert reply.num_examples
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert [line.split(" (")[0] for line in said] == [
        "hedgerow: client-000: 1 row left out: no answer",
        "hedgerow: client-001: 2 rows left out: no answer",
    ]


def test_a_server_that_was_killed_before_the_end_delivers_the_last_entry(make, monkeypatch):
    made = make()
    with monkeypatch.context() as patch:
        patch.setattr(FlowerFleet, "finish", lambda self: None)
        made.run()
    place = Path(made.nodes[0].config["folder"])
    assert len(ledger(place)) == 4
    made.run()
    assert ledger(place) == ledger(made.out)


def test_a_site_may_come_back_under_another_id(make):
    made = make()

    def move():
        made.nodes[0].up = False
        made.nodes.append(Node(9, made.nodes[0].app, **made.nodes[0].config))

    made.grid.before = at_round(2, move)
    rows = made.run(min_clients=2)
    assert rows[-1]["participants"] == CLIENTS
    assert sum(row["failed"] for row in rows) <= 2


def test_an_update_larger_than_any_can_be_is_not_written(make, monkeypatch):
    made = make()
    monkeypatch.setattr("hedgerow.engines.flower.fleet.MAX_HEADER_BYTES", -20000)
    with pytest.raises(RunFailed, match="files must have at most"):
        made.run()


REFUSALS = {
    "unknown": ({"name": "stranger"}, "the experiment has no client stranger"),
    "no data": ({"data": "/nowhere/secret.json"}, "its own settings or data are wrong"),
    "no model": ({"model": "/nowhere/secret"}, "its own settings or data are wrong"),
    "wrong key": ({"datum": "x"}, "its own settings or data are wrong"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_site_that_is_set_up_wrongly_stays_out_and_keeps_its_paths(make, capsys, kind):
    made = make()
    change, sentence = REFUSALS[kind]
    made.nodes[2].config |= change
    rows = made.run(deadline=0.5)
    assert rows[-1]["participants"] == CLIENTS[:2]
    out, err = capsys.readouterr()
    assert sentence in out
    assert "secret" not in out
    if "secret" in str(change):
        assert "secret" in err  # the site's own log


def test_two_sites_of_one_name(make, capsys):
    made = make()
    made.nodes[2].config |= {"name": "client-001", "data": made.nodes[1].config["data"]}
    rows = made.run(deadline=0.5)
    assert rows[-1]["participants"] == CLIENTS[:2]
    assert "another SuperNode is client-001 already" in capsys.readouterr().out


def registered(node, name, key):
    node.name, node.public_key = name, key


def fingerprint_of(path):
    """As the person sees it who made the key."""
    listed = subprocess.run(["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True)
    return listed.stdout.split()[1]


def a_key(folder, name):
    """A public key as Flower has it, and its fingerprint."""
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    path = folder / f"{name}.pub"
    path.write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), path


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not here")
def test_a_name_keeps_the_key_that_it_joined_with_first(make, tmp_path, capsys):
    """When the run goes on, and its own site is away; until somebody says that it is another."""
    made = make("federation.rounds=2")
    keys = [a_key(tmp_path, name) for name in CLIENTS]
    for node, name, (key, _) in zip(made.nodes, CLIENTS, keys, strict=True):
        registered(node, name, key)
    made.run(rounds=1)
    prints = {name: fingerprint_of(path) for name, (_, path) in zip(CLIENTS, keys, strict=True)}
    assert json.loads((made.out / "sites.json").read_text()) == prints
    assert f"by the key {prints['client-000']}" in " ".join(capsys.readouterr().out.split())

    other, path = a_key(tmp_path, "other")
    registered(made.nodes[0], "client-000", other)
    rows = made.run(min_clients=2, deadline=0.5)
    assert rows[-1]["participants"] == CLIENTS[1:]
    said = " ".join(capsys.readouterr().out.split())
    sentence = f"client-000 has the key {prints['client-000']} in this run, and this is"
    assert f"{sentence} {fingerprint_of(path)}: if the site has a new key, remove" in said
    registered(made.nodes[0], "", other)  # registered without a name, it is not let in either
    assert made.run(min_clients=2, deadline=0.5, rounds=3)[-1]["participants"] == CLIENTS[1:]

    registered(made.nodes[0], "client-000", other)
    del prints["client-000"]
    (made.out / "sites.json").write_text(json.dumps(prints))
    assert made.run(rounds=4)[-1]["participants"] == CLIENTS


def test_of_two_keys_of_one_name_neither_wins_before_one_is_known(make, tmp_path, capsys):
    made = make("federation.rounds=2")
    for node, name in zip(made.nodes, CLIENTS, strict=True):
        registered(node, name, name.encode())
    second = Node(9, made.nodes[0].app, **made.nodes[0].config)
    registered(second, "client-000", b"another")
    made.nodes.append(second)
    rows = made.run(min_clients=2, deadline=0.5)
    assert rows[-1]["participants"] == CLIENTS[1:]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("several SuperNodes are registered as client-000, with the keys") >= 2
    made.nodes.remove(second)
    assert made.run(rounds=3)[-1]["participants"] == CLIENTS
    made.nodes.insert(0, second)  # now the first is known
    rows = made.run(rounds=4)
    assert rows[-1]["participants"] == CLIENTS
    assert rows[-1]["failed"] == 0


def test_a_key_without_a_name_gives_way_to_one_that_has_it(make, capsys):
    made = make("federation.rounds=3")
    own, squatter = made.nodes[0], Node(9, made.nodes[0].app, **made.nodes[0].config)
    own.up = False
    made.nodes.append(squatter)

    def come():
        own.up = True
        registered(own, "client-000", b"its own")

    made.grid.before = at_round(1, come)
    rows = made.run()
    assert [row["participants"] for row in rows[1:]] == [CLIENTS] * 3
    assert squatter.actions.count(Action.train) == 1
    assert own.actions.count(Action.train) == 2
    assert json.loads((made.out / "sites.json").read_text()).keys() == {"client-000"}
    said = " ".join(capsys.readouterr().out.split())
    assert "SuperNode 9 was not let in: client-000 has the key" in said


def test_a_damaged_file_of_keys_is_one_sentence(make):
    made = make("federation.rounds=2")
    made.run(rounds=1)
    (made.out / "sites.json").write_text('{"client-000": 3}')
    with pytest.raises(UserError, match=r"sites\.json is damaged: restore it from a copy"):
        made.run()


def test_data_that_change_during_a_run_are_refused_by_the_site(make):
    made = make()

    def change():
        path = Path(made.nodes[0].config["data"])
        path.write_text(json.dumps([{"instruction": "Say x", "output": "xx"}] * 5))
        made.nodes[0].host = Host()

    made.grid.before = at_round(3, change)
    rows = made.run()
    assert "its data have changed" in rows[3]["failures"]["client-000"]
    assert rows[2]["failed"] == 0


def test_an_app_has_no_paths_and_says_who_takes_part(make, tmp_path, tiny_model):
    made = make()
    for file in (tmp_path / "app").iterdir():
        assert str(tmp_path) not in file.read_text()
        assert str(tiny_model.parent) not in file.read_text()
    assert App.load(tmp_path / "app").clients == CLIENTS
    with pytest.raises(UserError, match="exists already"):
        init(load(made.path), tmp_path / "app", "again")


MISTAKES = {
    "data.clients=null data.source=client_0.json data.partition={kind: iid, clients: 2}": (
        "name the clients in data.clients"
    ),
    "method.name=standalone": "is a baseline that sends nothing",
    "federation.min_clients=4": "is above the 3 clients",
    "data.max_length=5000": "data.max_length",
    "method.ranks=[4, 2]": "2 ranks for 3 clients",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_mistakes_in_an_app_are_one_sentence(experiment, hedgerow, tmp_path, change):
    changes = change.replace(" data.", "\ndata.").split("\n")
    result = hedgerow("flower", "init", experiment(), tmp_path / "app", *changes)
    assert result.code == 2
    assert MISTAKES[change] in result.err
    assert result.err.splitlines()[-1].startswith("hedgerow: ")
    assert not (tmp_path / "app").exists()


def test_an_app_says_nothing_that_is_its_owner_s_alone(experiment, hedgerow, tmp_path, tiny_model):
    path = experiment(tracking={"to": ["tensorboard"], "name": "mine", "project": "shared"})
    path.write_text("about: what this is for\n" + path.read_text())
    assert hedgerow("flower", "init", path, tmp_path / "app").code == 0
    text = "".join(file.read_text() for file in (tmp_path / "app").iterdir())
    for word in (str(tmp_path), str(tiny_model.parent), "what this is for", "mine"):
        assert word not in text
    tracked = App.load(tmp_path / "app").experiment.tracking
    assert (tracked.to, tracked.project) == (["tensorboard"], "shared")  # for the coordinator


def test_words_and_files_are_what_was_announced(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(random.Random(0).randbytes(9 << 20))
    request = Request(run="0" * 32, records=[info(file)], files=[info(file)])

    def arrived():
        return pack(request, [file])

    parcel = Parcel(arrived(), Request)
    parcel.save(0, tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == file.read_bytes()
    assert parcel.words == request

    short, long, other, missing = (arrived() for _ in range(4))
    del short.array_records["file-0"]["000002"]
    long.array_records["file-0"]["000003"] = long.array_records["file-0"]["000002"]
    other.array_records["file-0"]["000000"] = other.array_records["file-0"]["000001"]
    del missing["file-0"]
    for content in (short, long, other, missing):
        with pytest.raises(InvalidMessage):
            Parcel(content, Request).save(0, tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()


def test_words_of_any_other_kind_are_refused():
    good = Reply(name="a", num_examples=3).model_dump()
    wrong = [
        {"name": "../up"},
        {"name": ""},
        {"name": "a" * 201},
        {"num_examples": 0},
        {"num_examples": True},
        {"num_examples": 2**63},
        {"num_examples": 1.5},
        {"held": {"round": -1, "head": "0" * 64}},
        {"held": {"round": 1, "head": "zz"}},
        {"files": [{"bytes": -1, "sha256": "0" * 64}]},
        {"refused": "x" * 1001},
        {"more": 1},
    ]
    for change in wrong:
        content = RecordDict({"words": ConfigRecord({"json": json.dumps(good | change)})})
        with pytest.raises(InvalidMessage, match="words"):
            Parcel(content, Reply)
    for text in ("", "[]", "{", "[" * 100_000, '{"name": NaN}', b"\xff", 3, 2.5):
        content = RecordDict({"words": ConfigRecord({"json": text})})
        with pytest.raises(InvalidMessage, match="words"):
            Parcel(content, Reply)
    for content in (RecordDict(), RecordDict({"words": ConfigRecord()})):
        with pytest.raises(InvalidMessage, match="no words"):
            Parcel(content, Reply)
    # What people will see in a terminal cannot move its cursor.
    shown = Reply(name="a", refused="red \x1b[31m\r\nand \x07 more").refused
    assert shown.isprintable()
    assert FileInfo(bytes=0, sha256="0" * 64).bytes == 0


# --- models and test rows of clients' own ---------------------------------------------------------

OWN = {
    "fedsa_lora": ["method={name: fedsa_lora, ranks: 2}"],
    "ditto": ["method={name: ditto, ranks: 2}"],
    "flora": [],
}


@pytest.fixture
def tested(make, tmp_path):
    """An app whose sites have test rows of their own, each in a file that it alone names."""

    def tested(*changes):
        for index in range(3):
            rows = [
                {"instruction": f"Say {n}", "output": "abc"[index] * 3} for n in range(index + 2)
            ]
            (tmp_path / f"own_{index}.json").write_text(json.dumps(rows))
        made = make("data.client_test=own_{}.json", *changes)
        for index, node in enumerate(made.nodes):
            node.config["test"] = str(tmp_path / f"own_{index}.json")
        return made

    return tested


@pytest.mark.parametrize("name", OWN)
def test_sites_score_as_one_process_does(tested, hedgerow, tmp_path, name):
    changes = [*OWN[name], "federation.rounds=3", "federation.clients_per_round=2"]
    made = tested(*changes)
    local = tmp_path / "local"
    given = ["data.client_test=own_{}.json", "data.test=null", *changes, "--out", local]
    assert hedgerow("run", made.path, *given).code == 0
    rows = made.run()
    assert ledger(made.out) == ledger(local)
    expected = rows_of(local)
    for row, other in zip(rows, expected, strict=True):
        assert list(row["eval_loss_by_client"]) == CLIENTS
        for key in row.keys() - {key for key in row if key.endswith("seconds")}:
            assert row[key] == other[key], key
    # Nothing of a client's own is at the coordinator.
    assert not (made.out / "clients").exists()
    assert "own_" not in (made.out / "experiment.yaml").read_text()


def test_sites_are_asked_for_scores_only_where_some_are_due(tested, hedgerow, tmp_path):
    changes = ["evaluation.metrics=[exact_match]", "evaluation.answers_every=2"]
    changes += ["federation.rounds=3", "data.test=null"]
    made = tested(*changes)
    asked = []

    def before(message):
        if message.metadata.message_type == Action.score:
            asked.append(message.metadata.dst_node_id)

    made.grid.before = before
    rows = made.run()
    assert len(asked) == 9  # three sites, after rounds 0, 2 and 3
    assert ["exact_match_by_client" in row for row in rows] == [True, False, True, True]
    local = tmp_path / "local"
    given = ["data.client_test=own_{}.json", *changes, "--out", local]
    assert hedgerow("run", made.path, *given).code == 0
    for row, other in zip(rows, rows_of(local), strict=True):
        of_time = {key for key in row if key.endswith("seconds")}
        assert {key: other.get(key) for key in row.keys() - of_time} == {
            key: row[key] for key in row.keys() - of_time
        }


def test_sites_say_of_their_test_rows_no_more_than_of_others(tested):
    made = tested(*OWN["ditto"], "federation.rounds=1", "federation.says.examples=rounded")
    for row in made.run():
        assert list(row["test_rows_by_client"].values()) == [2, 4, 4]  # 2, 3 and 4


@pytest.mark.parametrize("name", ["fedsa_lora", "ditto"])
def test_a_client_s_own_model_is_looked_at_at_its_site(tested, hedgerow, tmp_path, name):
    made = tested(*OWN[name], "federation.rounds=2")
    rows = made.run()
    base = f"model.path={made.nodes[0].config['model']}"
    named = ["--to", "merged", "--client", CLIENTS[1]]
    result = hedgerow("export", made.out, tmp_path / "out", base, *named)
    assert (result.code, "lies where it trains" in result.err) == (2, True)
    for node, client in zip(made.nodes, CLIENTS, strict=True):
        (site,) = Path(node.config["folder"]).glob("*/experiment.yaml")
        named = ["--client", client]
        scores = json.loads(hedgerow("evaluate", site.parent, *named, "--json").out)
        assert scores["eval_loss_by_client"] == {client: rows[-1]["eval_loss_by_client"][client]}
        out = tmp_path / client
        assert hedgerow("export", site.parent, out, "--to", "adapter", *named).code == 0


def test_a_share_of_a_site_s_rows_is_held_out_there(make, hedgerow, tmp_path):
    changes = [*OWN["ditto"], "data.client_test=0.3", "federation.rounds=2"]
    made = make(*changes)
    local = tmp_path / "local"
    assert hedgerow("run", made.path, "data.test=null", *changes, "--out", local).code == 0
    rows = made.run()
    assert ledger(made.out) == ledger(local)
    expected = [row["eval_loss_by_client"] for row in rows_of(local)]
    assert [row["eval_loss_by_client"] for row in rows] == expected


def test_a_site_without_test_rows_has_no_score(tested, capsys):
    made = tested(*OWN["ditto"], "federation.rounds=1")
    del made.nodes[0].config["test"]
    row = made.run()[-1]
    assert list(row["eval_loss_by_client"]) == CLIENTS[1:]
    assert 'the node config has no test="…"' in capsys.readouterr().err


def test_a_site_that_is_away_has_no_score_and_holds_up_nobody(tested, capsys):
    made = tested("federation.rounds=2")
    away = made.nodes[2]

    def before(message):
        away.up = message.metadata.message_type != Action.score

    made.grid.before = before
    rows = made.run()
    assert all(list(row["eval_loss_by_client"]) == CLIENTS[:2] for row in rows)
    assert "client-002 has no score on its own test rows" in " ".join(
        capsys.readouterr().out.split()
    )
    assert rows[-1]["participants"] == CLIENTS[:2]


def said_in(content):
    return json.loads(content.config_records["words"]["json"])


WRONG_SCORES = {
    "another score": {"rows": 2, "values": {"eval_loss": 1.0, "mine": 2.0}},
    "not a number": {"rows": 2, "values": {"eval_loss": "1.0"}},
    "NaN": {"rows": 2, "values": {"eval_loss": float("nan")}},
    "infinity": {"rows": 2, "values": {"eval_loss": float("inf")}},
    "absurd": {"rows": 2, "values": {"eval_loss": 1e308}},
    "no rows": {"rows": 0, "values": {"eval_loss": 1.0}},
    "a fraction of a row": {"rows": 1.5, "values": {"eval_loss": 1.0}},
    "too many rows": {"rows": 2**63, "values": {"eval_loss": 1.0}},
    "no count": {"values": {"eval_loss": 1.0}},
    "rows of data": {"rows": 2, "values": {"eval_loss": 1.0}, "data": ["x"]},
    "a list": [1.0],
    "too many": {"rows": 2, "values": {f"score{n}": 1.0 for n in range(1000)}},
    "a long name": {"rows": 2, "values": {"x" * 100_000: 1.0}},
}


@pytest.mark.parametrize("wrong", WRONG_SCORES.values(), ids=WRONG_SCORES)
def test_wrong_scores_are_refused_with_their_sender_s_name(tested, wrong, capsys):
    made = tested("federation.rounds=1")

    def answer(content):
        said = said_in(content)
        if "scores" in said:
            content["words"] = ConfigRecord({"json": json.dumps(said | {"scores": wrong})})
        return content

    made.nodes[1].answer = answer
    rows = made.run()
    assert all(list(row["eval_loss_by_client"]) == [CLIENTS[0], CLIENTS[2]] for row in rows)
    said = " ".join(capsys.readouterr().out.split())
    assert "client-001 has no score on its own test rows" in said
    assert len(said) < 10_000


def test_scores_that_are_no_number_arrive_as_none(tested, monkeypatch):
    """As of a model that has diverged: they are left out on the way, and null in the row."""
    made = tested("federation.rounds=1")

    def answer(content):
        said = said_in(content)
        if "scores" in said:
            said["scores"]["values"] = {}
            content["words"] = ConfigRecord({"json": json.dumps(said)})
        Parcel(content, Reply)
        return content

    made.nodes[0].answer = answer
    row = made.run()[-1]
    assert row["eval_loss_by_client"][CLIENTS[0]] is None
    assert row["eval_loss_over_clients"] is None


def test_a_site_catches_up_before_it_scores(tested, hedgerow, tmp_path):
    """Its copy of the ledger is lost; without a global model its own part is what it has kept."""
    for name in ("flora", "fedsa_lora"):
        for folder in ("app", "sites", "run", "inbox"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        made = tested(*OWN[name], "federation.rounds=2")
        lost = Path(made.nodes[0].config["folder"])

        def before(message, lost=lost):
            if message.metadata.message_type == Action.score:
                for folder in lost.glob("*/ledger"):
                    shutil.rmtree(folder)

        made.grid.before = before
        rows = made.run()
        assert all(list(row["eval_loss_by_client"]) == CLIENTS for row in rows)


def test_test_data_on_the_coordinator_need_a_global_model(make, tmp_path, monkeypatch, tiny_model):
    make(*OWN["fedsa_lora"])
    monkeypatch.syspath_prepend(tmp_path / "app")
    config = {"out": str(tmp_path / "out"), "model": str(tiny_model), "test": "test.json"}
    with pytest.raises(UserError, match="has no global model"):
        _main(None, SimpleNamespace(run_config=config))
    assert not (tmp_path / "out").exists()


def test_the_app_names_no_file_of_test_rows(tested, tmp_path):
    tested()
    data = load(tmp_path / "app" / "experiment.yaml").data
    assert isinstance(data.client_test, list)
    assert [Path(test.file).name for test in data.client_test] == [
        f"{c}-test.json" for c in CLIENTS
    ]


# --- secure sums ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fedavg", "ferret", "fed_sb"])
def test_secure_sums_give_the_local_ledger_and_tell_the_server_of_none(
    make, hedgerow, tmp_path, kind
):
    options = {"fedavg": [], "ferret": ["method.coordinates=random", "method.compression=40"]}
    changes = [f"method.name={kind}", *options.get(kind, ["method.ranks=4"])]
    changes += ["federation.rounds=2", "federation.secure=true"]
    made = make(*changes)
    seen = []
    for node in made.nodes:
        node.answer = lambda reply: seen.append(reply) or reply
    local = tmp_path / "local"
    bare = [*changes, "federation.secure={masks: false}"]
    assert hedgerow("run", made.path, "data.test=null", *bare, "--out", local).code == 0
    rows = made.run()
    assert ledger(made.out) == ledger(local)
    assert [row["failures"] for row in rows] == [{}] * 3
    assert rows[1]["secure_bytes"] > 1000
    assert "train_loss_by_client" not in rows[1]
    said = [json.loads(reply.config_records["words"]["json"]) for reply in seen]
    assert not any("train_loss" in json.dumps(each) for each in said)


def stage_of(message):
    """Stage of a secure sum that a message is of; None where it is of none."""
    letter = json.loads(message.content.config_records["words"]["json"]).get("secure")
    return letter and letter["stage"]


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "unmasking"])
def test_a_site_that_is_gone_at_any_stage(make, hedgerow, tmp_path, stage):
    """The sum is that of the others; of all, where it is gone when its numbers have arrived."""
    changes = ["method.name=fedavg", "federation.rounds=1"]
    made = make(*changes, "federation.secure={threshold: 2}", "federation.deadline=5")
    gone = made.nodes[1]

    def before(message):
        if message.metadata.dst_node_id == gone.node_id and stage_of(message) == stage:
            gone.up = False

    made.grid.before = before
    rows = made.run()
    assert list(rows[1]["failures"]) == [CLIENTS[1]]
    files = {name: f"client_{index}.json" for index, name in enumerate(CLIENTS)}
    if stage != "unmasking":
        del files[CLIENTS[1]]
    assert rows[1]["participants"] == list(files)
    local = tmp_path / "local"
    clients = f"data.clients={json.dumps(files)}"
    result = hedgerow("run", made.path, "data.test=null", clients, *changes, "--out", local)
    assert result.code == 0, result.err
    found, expected = (Ledger.open(out / "ledger").read(1) for out in (made.out, local))
    for name, each in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], each, rtol=1e-3, atol=1e-6)


def test_fewer_sites_than_the_threshold_have_no_result(make):
    secure = "federation.secure={threshold: 3}"
    made = make("method.name=fedavg", "federation.rounds=1", secure, "federation.attempts=1")

    def before(message):
        if message.metadata.dst_node_id == made.nodes[1].node_id:
            made.nodes[1].up = stage_of(message) != "masked"

    made.grid.before = before
    with pytest.raises(RunFailed, match=r"round 1 has no secure sum: 2 of the 3 clients that it"):
        made.run()
    assert not ledger(made.out)


@pytest.mark.parametrize("others", ["the same", "fewer"])
def test_a_site_does_not_help_with_two_sums_of_one_round(make, monkeypatch, others):
    """Whose difference would be one client's update; with the same once more, after a kill."""
    changes = ["method.name=fedavg", "federation.rounds=1", "federation.attempts=1"]
    made = make(*changes, "federation.secure={threshold: 2}")
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(Ledger, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            made.run()
    if others == "the same":
        rows = made.run()
        assert rows[1]["participants"] == CLIENTS
        return
    (made.out / "secure.json").unlink()  # the server's record, by which it would not even ask
    made.nodes[1].up = False
    with pytest.raises(RunFailed, match="the sum of other clients of this round was unmasked"):
        made.run(deadline=0.5)


@pytest.mark.parametrize("demand", ["plain", "letter"])
def test_a_site_sends_no_plain_update_where_sums_are_secure(make, demand):
    """Whatever the server asks."""
    secure = demand == "plain"
    made = make("method.name=fedavg", *(["federation.secure=true"] if secure else []))
    host = made.nodes[0].host
    words = {"run": "0" * 32, "train": secure}
    if not secure:
        words["secure"] = {"stage": "keys", "session": "0" * 32}
    request = WorkerRequest(
        app=made.nodes[0].app, node=made.nodes[0].config, request=Request(**words), files=[]
    )
    reply = host.handle(request).reply
    assert reply.refused == "the server asks otherwise than federation.secure says"


SAYS = [
    "federation.says={losses: false, examples: rounded, failures: kind}",
    "federation.says={examples: withheld}",
    "federation.says={losses: false, examples: rounded} federation.secure=true",
]


def said_of(reply):
    """All that is said in a reply: its words, and the metadata of its update."""
    yield reply.config_records["words"]["json"]
    for record in reply.array_records.values():
        data = b"".join(record[piece].data for piece in sorted(record))
        length = int.from_bytes(data[:8], "little")
        yield json.dumps(json.loads(data[8 : 8 + length])["__metadata__"])


@pytest.mark.parametrize("change", SAYS)
def test_sites_say_as_one_process_does_and_no_more(make, hedgerow, tmp_path, capsys, change):
    changes = ["method.name=fedavg", "federation.rounds=2", *re.split(" (?=federation)", change)]
    made = make(*changes)
    local = tmp_path / "local"
    bare = [each.replace("secure=true", "secure={masks: false}") for each in changes]
    assert hedgerow("run", made.path, "data.test=null", *bare, "--out", local).code == 0
    said = []
    for node in made.nodes:
        node.answer = lambda reply: said.extend(said_of(reply)) or reply
    capsys.readouterr()
    rows = made.run()
    assert ledger(made.out) == ledger(local)
    for row, other in zip(rows, rows_of(local), strict=True):
        for key in ("train_loss", "participants", "failures", "sent_by_client"):
            assert row.get(key) == other.get(key)
        assert row.get("train_loss_by_client") == other.get("train_loss_by_client")
    numbers = [1] if "withheld" in change else [8, 16]
    assert sum("hedgerow.update/1" in text for text in said) == 6
    for text in said:
        words = json.loads(text)
        if words.get("num_examples"):
            assert int(words["num_examples"]) in numbers
        assert ("train_loss" in words) <= ("losses: false" not in change)
    out = capsys.readouterr().out
    assert not any(f"{size} examples" in out for size in (5, 9, 14))
    assert ("examples" in out) == ("withheld" not in change)


def test_a_site_says_why_it_failed_in_its_own_log(make, monkeypatch, capsys):
    trained = first_order.train

    def diverges(job, parameters, **options):
        if len(job.data) == 9:
            raise Diverged("its loss was nan at step 1")
        return trained(job, parameters, **options)

    monkeypatch.setattr(first_order, "train", diverges)
    made = make("method={name: fedit, ranks: 2}", "federation.says.failures=kind")
    said = []
    for node in made.nodes:
        node.answer = lambda reply: said.extend(said_of(reply)) or reply
    assert made.run()[1]["failures"] == {"client-001": "its training diverged"}
    assert not any("nan" in text for text in said)
    shown = capsys.readouterr()
    assert "client-001: round 1: its loss was nan at step 1" in shown.err
    assert "nan" not in shown.out
