"""The ledger: append, verify, crash, pack."""

import copy
import dataclasses
import importlib
import json
import re
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from hedgerow import ledger as ledgers
from hedgerow.errors import RunFailed, UserError
from hedgerow.ledger import Base, Ledger
from hedgerow.wire import Entry, Participant

BASE = Base(
    name="tiny", architecture="Llama", parameters=7, dtype="float32", fingerprint="ba5e" * 16
)


def entry(ledger: Ledger) -> Entry:
    number = len(ledger) + 1
    return Entry(
        "flora",
        number,
        ledger.head,
        [Participant("a", 1, 1.0)],
        {"train_loss": 1.0},
        {"x": torch.full((4,), float(number))},
    )


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.create(tmp_path / "ledger", BASE)
    for _ in range(3):
        ledger.append(entry(ledger))
    return ledger


def test_entries_are_a_chain_from_the_base(ledger):
    entries = list(Ledger.open(ledger.folder).entries())
    assert [e.round for e in entries] == [1, 2, 3]
    assert entries[0].parent == BASE.fingerprint
    parents = [record.sha256 for record in ledger.records[:-1]]
    assert [e.parent for e in entries[1:]] == parents
    assert entries[2].tensors["x"].tolist() == [3.0] * 4


@pytest.mark.parametrize("moment", ["while the entry is written", "before it is indexed"])
def test_a_crash_while_appending_leaves_the_old_ledger(ledger, monkeypatch, moment):
    class Crash(BaseException):
        pass

    def crash(*_):
        raise Crash

    if moment == "before it is indexed":
        monkeypatch.setattr(Ledger, "_write_index", crash)
    else:
        monkeypatch.setattr("hedgerow.files.os.fsync", crash)
    with pytest.raises(Crash):
        ledger.append(entry(ledger))
    monkeypatch.undo()
    again = Ledger.open(ledger.folder)
    assert len(list(again.entries())) == 3
    again.append(entry(again))
    assert len(list(Ledger.open(ledger.folder).entries())) == 4


def test_a_full_disk_leaves_the_old_ledger(ledger, monkeypatch):
    def full(self, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Entry, "write", full)
    with pytest.raises(OSError, match="No space"):
        ledger.append(entry(ledger))
    assert len(list(Ledger.open(ledger.folder).entries())) == 3
    assert not list(ledger.folder.glob("*.partial"))
    assert not (ledger.folder / "0004.safetensors").exists()


def damage(ledger: Ledger, how: str) -> None:
    path = ledger.folder / "0002.safetensors"
    data = path.read_bytes()
    if how == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "truncated":
        path.write_bytes(data[:-5])
    elif how == "missing":
        path.unlink()
    elif how == "swapped":
        (ledger.folder / "0003.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("altered", r"0002\.safetensors was altered"),
        ("truncated", r"0002\.safetensors is truncated"),
        ("missing", r"0002\.safetensors is missing"),
        ("swapped", r"0003\.safetensors was altered"),
    ],
)
def test_damage_is_named(ledger, how, says):
    damage(ledger, how)
    with pytest.raises(UserError, match=says):
        list(Ledger.open(ledger.folder).entries())


def test_an_entry_out_of_place_is_named_even_with_a_forged_index(ledger):
    (ledger.folder / "0003.safetensors").write_bytes(
        (ledger.folder / "0002.safetensors").read_bytes()
    )
    index = json.loads((ledger.folder / "ledger.json").read_text())
    index["entries"][2] |= {key: index["entries"][1][key] for key in ("sha256", "bytes")}
    (ledger.folder / "ledger.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="out of place"):
        list(Ledger.open(ledger.folder).entries())


def test_an_index_cannot_name_files_elsewhere(ledger):
    index = json.loads((ledger.folder / "ledger.json").read_text())
    index["entries"][0]["file"] = "../../0001.safetensors"
    (ledger.folder / "ledger.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"ledger\.json is damaged"):
        Ledger.open(ledger.folder)


@pytest.mark.parametrize("what", ["architecture", "parameters", "dtype", "fingerprint"])
def test_another_base_is_named(ledger, what):
    other = BASE.model_copy(update={what: 8 if what == "parameters" else "other"})
    with pytest.raises(UserError, match=f"its {what} is"):
        ledger.check_base(other, "model.path x")
    ledger.check_base(BASE.model_copy(update={"name": "moved"}), "model.path x")


def test_a_packed_ledger_is_the_same_ledger_and_always_the_same_file(ledger, tmp_path):
    packed = [tmp_path / "one.hedgerow", tmp_path / "two.hedgerow"]
    for path in packed:
        ledger.pack(path, "model: {}\n")
    assert packed[0].read_bytes() == packed[1].read_bytes()
    with ledgers.unpack(packed[0]) as folder:
        assert Ledger.open(folder / "ledger").head == ledger.head
        assert (folder / "experiment.yaml").read_text() == "model: {}\n"


@pytest.mark.parametrize("name", ["../evil", "ledger/../../evil", "/evil", "ledger/x.pkl"])
def test_an_archive_with_anything_else_is_refused(tmp_path, name):
    path = tmp_path / "bad.hedgerow"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="no packed ledger"), ledgers.unpack(path):
        pass


def test_an_archive_whose_members_overlap_is_refused(ledger, tmp_path):
    """Many names of one stored member would unpack to many times the file's size."""
    path = tmp_path / "bad.hedgerow"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ledger/0001.safetensors", bytes(100_000))
        member = archive.infolist()[0]
        for round in range(2, 9):
            again = copy.copy(member)
            again.filename = f"ledger/{round:04d}.safetensors"
            archive.filelist.append(again)
    says = "no packed ledger: it says that it holds more than it is"
    with pytest.raises(UserError, match=says), ledgers.unpack(path):
        pass


# --- what a method makes is checked before it is committed ----------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


ONE = torch.ones(1)
WRONG_ENTRIES = {
    "a metric's name": ({"metrics": {"loss%": 1.0}}, "metric `loss%` must be named by"),
    "a metric that is no text": ({"metrics": {1: 1.0}}, "metric `1` must be named by"),
    "names of two kinds": ({"metrics": {1: 1.0, "b": 1.0}}, "metrics cannot be written"),
    "NaN": ({"metrics": {"loss": float("nan")}}, "metric `loss` must be a finite number, got nan"),
    "infinity": (
        {"metrics": {"loss": float("inf")}},
        "metric `loss` must be .*, got inf",
    ),
    "a flag": ({"metrics": {"good": True}}, "metric `good` must be a finite number, got True"),
    "a tensor for a metric": ({"metrics": {"loss": ONE}}, "metrics cannot be written: .*Tensor"),
    "a type of number": ({"tensors": {"x": ONE.bool()}}, "dtype of x must be one of .* got 'bool'"),
    "complex numbers": (
        {"tensors": {"x": ONE.cfloat()}},
        "dtype of x .* got 'complex64'",
    ),
    "an empty tensor": (
        {"tensors": {"x": torch.ones(0, 3)}},
        "shape of x must be a list",
    ),
    "nine dimensions": (
        {"tensors": {"x": torch.ones([1] * 9)}},
        "shape of x must be a list",
    ),
    "a tensor's name": ({"tensors": {"x" * 513: ONE}}, "tensor names must have"),
    "a name with a line break": ({"tensors": {"x\n": ONE}}, "tensor names must have"),
    "a reserved name": ({"tensors": {"__metadata__": ONE}}, "metadata must map printable"),
    "a name that is no text": ({"tensors": {7: ONE}}, "name is 7, no text"),
    "an array": ({"tensors": {"x": ONE.numpy()}}, "x is no tensor, but a ndarray"),
    "a sparse tensor": ({"tensors": {"x": ONE.to_sparse()}}, "x is no dense tensor"),
    "no mapping": ({"tensors": [ONE]}, "tensors must be a mapping"),
    "a number that is none": ({"tensors": {"x": ONE * torch.nan}}, "x contains NaN or infinity"),
    "a huge number": ({"tensors": {"x": ONE * 1e18}}, r"x contains values above 1e\+17"),
    "a whole weight": ({"participants": [Participant("a", 1, 1)]}, "participants must each have"),
    "a weight that is none": (
        {"participants": [Participant("a", 1, float("nan"))]},
        "participants must each have",
    ),
    "a heavy weight": (
        {"participants": [Participant("a", 1, 101.0)]},
        "weight of a must be between",
    ),
    "nobody": ({"participants": []}, "at least one participant"),
    "options that JSON lacks": ({"options": {"x": {1}}}, "options cannot be written: .*set"),
    "options that JSON changes": ({"options": {"x": (1, 2)}}, r"would be read as {'x': \[1, 2\]}"),
}


@pytest.mark.parametrize("what", WRONG_ENTRIES)
def test_what_nobody_could_read_is_not_appended(ledger, what):
    changes, says = WRONG_ENTRIES[what]
    before = files_of(ledger.folder)
    with pytest.raises(RunFailed, match="method flora made an entry that no participant") as error:
        ledger.append(dataclasses.replace(entry(ledger), **changes))
    assert re.search(says, str(error.value))
    assert "\n" not in str(error.value)
    assert files_of(ledger.folder) == before
    assert ledger.append(entry(ledger)).round == 4


def test_whatever_a_ledger_takes_it_reads(ledger):
    """Numbers of each type that may travel, one without dimensions, and the longest names."""
    types = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
    tensors = {str(dtype): torch.ones(2, 3, dtype=dtype).T for dtype in types}
    tensors |= {"x" * 512: torch.tensor(2.0)}
    metrics = {"a" * 64: 7, "b_2": 1e300}
    made = dataclasses.replace(entry(ledger), tensors=tensors, metrics=metrics)
    ledger.append(dataclasses.replace(made, options={"x": [1, {"y": None}]}))
    read = Ledger.open(ledger.folder).read(4)
    assert read.metrics == metrics
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in tensors.items())


PLUG_IN = """
    from hedgerow.methods import FedAvg

    def aggregated(aggregate, turn): return aggregate
    def updated(payload, turn): return payload

    class Mine(FedAvg):
        def aggregate(self, updates, turn):
            made = super().aggregate(updates, turn)
            return aggregated(made, turn) if turn.round == 2 else made

        def update(self, model, turn, trained):
            made = super().update(model, turn, trained)
            return updated(made, turn) if turn.round == 2 else made
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """A method in a module of its own, and what makes it a wrong one for a while."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "plugged.py").write_text(textwrap.dedent(PLUG_IN))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "plugged", raising=False)
    return importlib.import_module("plugged")


WRONG_AGGREGATES = {
    "a metric": (lambda a, _: a._replace(metrics={"loss%": 1.0}), "metric `loss%`"),
    "one tensor less": (
        lambda a, _: a._replace(tensors=dict([*a.tensors.items()][1:])),
        "is missing",
    ),
    "another type": (
        lambda a, _: a._replace(tensors={n: t.double() for n, t in a.tensors.items()}),
        r"expected dtype float32 of shape \[.*\], got dtype float64",
    ),
    "a weight too few": (
        lambda a, _: a._replace(weights=[0.5, 0.5]),
        "2 weights for the 3 updates",
    ),
    "what it keeps": (
        lambda a, turn: turn.memory.save({"x": ONE.bool()}),
        "could not aggregate round 2: dtype of x must be one of .* got 'bool'",
    ),
    "other weights": (
        lambda a, _: a._replace(weights=[0.5, 0.25, 0.25]),
        "weight of client-000 must be",
    ),
}


@pytest.mark.parametrize("what", WRONG_AGGREGATES)
def test_a_wrong_method_stops_a_run_that_goes_on_with_a_right_one(
    hedgerow, experiment, tmp_path, plug_in, monkeypatch, what
):
    wrong, says = WRONG_AGGREGATES[what]
    path, run, whole = experiment(method={"name": "plugged:Mine"}), tmp_path / "run", tmp_path / "w"
    drop_options(path)
    with monkeypatch.context() as patch:
        patch.setattr(plug_in, "aggregated", wrong)
        result = hedgerow("run", path, "--out", run)
    assert result.code == 1, result.err
    [line] = [line for line in result.err.splitlines() if line.startswith("hedgerow: ")]
    assert "method plugged:Mine" in line
    assert re.search(says, line)
    assert sorted(files_of(run / "ledger")) == ["0001.safetensors", "ledger.json"]
    assert len(Ledger.open(run / "ledger")) == 1
    assert hedgerow("run", path, "--out", run, "--resume").code == 0
    assert hedgerow("run", path, "--out", whole).code == 0
    assert files_of(run / "ledger") == files_of(whole / "ledger")


WRONG_UPDATES = {
    "a type of number": (lambda p, _: p._replace(tensors={"x": ONE.bool()}), "got 'bool'"),
    "what it keeps": (
        lambda p, turn: turn.memory.save({"x": torch.ones(0)}),
        "shape of x must be a list",
    ),
    "a number for a text": (lambda p, _: p._replace(about={"r": 4}), "`about` has 'r': 4"),
    "another's word": (lambda p, _: p._replace(about={"round": "7"}), "`about` has 'round': '7'"),
    "a line break": (
        lambda p, _: p._replace(about={"r": "4\n"}),
        "map printable strings",
    ),
    "no mapping": (lambda p, _: p._replace(about=None), "`about` must map strings"),
}


@pytest.mark.parametrize("what", WRONG_UPDATES)
def test_a_wrong_update_is_its_client_s_failure(
    hedgerow, experiment, tmp_path, plug_in, monkeypatch, what
):
    wrong, says = WRONG_UPDATES[what]
    path, run = experiment(method={"name": "plugged:Mine"}), tmp_path / "run"
    drop_options(path)
    with monkeypatch.context() as patch:
        patch.setattr(plug_in, "updated", wrong)
        result = hedgerow("run", path, "--out", run)
    assert result.code == 1, result.err
    assert "no usable update from its 3 clients" in result.err
    assert "method plugged:Mine made what cannot be written: " in result.err
    assert says in result.err
    assert "Traceback" not in result.err
    assert len(Ledger.open(run / "ledger")) == 1
    assert hedgerow("run", path, "--out", run, "--resume").code == 0


def drop_options(path: Path) -> None:
    """Leave only the method's name in an experiment file."""
    content = yaml.safe_load(path.read_text())
    content["method"] = {"name": content["method"]["name"]}
    path.write_text(yaml.safe_dump(content))
