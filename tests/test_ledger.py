"""The ledger: append, verify, crash, pack."""

import json
import zipfile
from pathlib import Path

import pytest
import torch

from hedgerow import ledger as ledgers
from hedgerow.errors import UserError
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
        assert Ledger.open(Path(folder) / "ledger").head == ledger.head
        assert (Path(folder) / "experiment.yaml").read_text() == "model: {}\n"


@pytest.mark.parametrize("name", ["../evil", "ledger/../../evil", "/evil", "ledger/x.pkl"])
def test_an_archive_with_anything_else_is_refused(tmp_path, name):
    path = tmp_path / "bad.hedgerow"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="no packed ledger"):
        ledgers.unpack(path)
