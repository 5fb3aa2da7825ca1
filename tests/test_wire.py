"""Updates and entries as bytes: canonical to write, checked to read."""

import dataclasses
import io
import json

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgerow.errors import InvalidMessage
from hedgerow.wire import MAX_HEADER_BYTES, Entry, Participant, Update, header_limit

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
}


def update(**changes):
    values = {
        "method": "flora",
        "round": 3,
        "client": "site-a",
        "parent": "0" * 64,
        "num_examples": 17,
        "train_loss": 1.25,
        "tensors": TENSORS,
        "about": {"r": "4", "lora_alpha": "8"},
    }
    return Update(**values | changes)


def test_an_update_survives_the_wire():
    read = Update.from_bytes(update().to_bytes())
    assert vars(read).keys() == vars(update()).keys()
    for name, tensor in TENSORS.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
    assert (read.client, read.round, read.num_examples) == ("site-a", 3, 17)
    assert read.train_loss == 1.25
    assert read.about == {"r": "4", "lora_alpha": "8"}


def test_an_update_in_a_file_is_the_update(tmp_path):
    path = tmp_path / "update.safetensors"
    with path.open("wb") as file:
        update().write(file)
    assert path.read_bytes() == update().to_bytes()
    read = Update.read(path)
    assert dataclasses.replace(read, tensors={}) == update(tensors={})
    assert dict(read.tensors).keys() == TENSORS.keys()
    assert all(torch.equal(read.tensors[name], TENSORS[name]) for name in TENSORS)
    with pytest.raises(OSError, match="No such file"):
        Update.read(tmp_path / "missing")


def test_any_reader_of_safetensors_reads_it(tmp_path):
    path = tmp_path / "update.safetensors"
    path.write_bytes(update().to_bytes())
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["num_examples"] == "17"
        assert file.metadata()["r"] == "4"
        assert torch.equal(file.get_tensor("b"), TENSORS["b"])


def test_equal_content_gives_equal_bytes_in_whatever_order():
    backwards = dict(reversed(TENSORS.items()))
    assert update().to_bytes() == update(tensors=backwards).to_bytes()


def test_numbers_that_are_not_finite_are_refused():
    bad = {"x": torch.tensor([1.0, float("nan")])}
    with pytest.raises(InvalidMessage, match="x contains NaN or infinity"):
        Update.from_bytes(update(tensors=bad).to_bytes())


def test_numbers_of_a_kind_that_nothing_sends_are_refused():
    data = safetensors.torch.save(
        {"w": torch.zeros(3).to(torch.float8_e4m3fn)}, {"format": "hedgerow.update/1"}
    )
    with pytest.raises(InvalidMessage, match="F8_E4M3"):
        Update.from_bytes(data)


def test_numbers_that_could_overflow_a_sum_are_refused():
    bad = {"x": torch.tensor([1.0, -3e38])}
    with pytest.raises(InvalidMessage, match=r"x contains values above 1e\+10"):
        Update.from_bytes(update(tensors=bad).to_bytes())


def test_another_format_is_refused():
    data = safetensors.torch.save({"x": torch.ones(1)}, metadata={"format": "pt"})
    with pytest.raises(InvalidMessage, match="format"):
        Update.from_bytes(data)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    with pytest.raises(InvalidMessage):
        Update.from_bytes(data)


@settings(max_examples=500)
@given(st.data())
def test_a_damaged_update_is_refused_or_still_an_update(data):
    whole = bytearray(update().to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        read = Update.from_bytes(cut)
    except InvalidMessage:
        return
    assert all(tensor.isfinite().all() for tensor in read.tensors.values())


def test_an_entry_says_its_hash_and_size(tmp_path):
    participants = [Participant("a", 3, 0.75), Participant("b", 1, 0.25)]
    entry = Entry("flora", 1, "f" * 64, participants, {"train_loss": 2.0}, TENSORS)
    file = io.BytesIO()
    sha256, size = entry.write(file)
    path = tmp_path / "0001.safetensors"
    path.write_bytes(file.getvalue())
    assert size == len(file.getvalue())
    assert len(sha256) == 64
    read = Entry.read(path)
    assert read.participants == participants
    assert read.metrics == {"train_loss": 2.0}
    assert dict(read.tensors).keys() == TENSORS.keys()
    header = json.loads(file.getvalue()[8 : 8 + int.from_bytes(file.getvalue()[:8], "little")])
    assert next(iter(header)) == "__metadata__"


def test_the_header_s_limit_grows_with_what_is_trained_and_with_the_clients():
    few, more = ({f"layer.{i}": [4, 4] for i in range(count)} for count in (10, 1000))
    assert header_limit(few) < header_limit(more) < header_limit(more, 2) < MAX_HEADER_BYTES
    assert header_limit(more, 10_000) == MAX_HEADER_BYTES
    assert header_limit({}) < MAX_HEADER_BYTES
