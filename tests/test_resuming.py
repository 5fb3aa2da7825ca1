"""What clients and the server remember: where it is absurd, damaged or missing."""

import errno
import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from support.runs import ledger_bytes, rows_of
from transformers import AutoModelForCausalLM

import hedgerow as hr
from hedgerow.data import KeptTokens
from hedgerow.data.tokens import Spool
from hedgerow.engines.local import LocalFleet
from hedgerow.errors import RunFailed
from hedgerow.ledger import Ledger
from hedgerow.runs.memory import RoundMemory
from hedgerow.training import first_order
from hedgerow.wire import to_safetensors

FERRET = 'method={"name": "ferret", "compression": 64, "error_feedback": true}'


@pytest.mark.parametrize("what", ["inf gradients", "a step of 1e12"])
@pytest.mark.parametrize("method", ["method.restart=own", "method.restart=shared", FERRET])
def test_a_client_whose_update_was_absurd_begins_anew(
    hedgerow, experiment, tmp_path, monkeypatch, method, what
):
    """One bad step in round 1 costs client 1 that round alone, in a resumed run as well."""
    steps = {"backward": first_order.backward, "make_optimizer": first_order.make_optimizer}
    calls = dict.fromkeys(steps, 0)
    count = 1 if method == FERRET else 2

    def backward(objective, network, *arguments, **options):
        loss = steps["backward"](objective, network, *arguments, **options)
        calls["backward"] += 1
        if calls["backward"] == 2 * count and what == "inf gradients":  # client 1's last
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(torch.inf)
        return loss

    def make_optimizer(trainable, settings, rate):
        calls["make_optimizer"] += 1
        bad = calls["make_optimizer"] == 2 and what == "a step of 1e12"
        return steps["make_optimizer"](trainable, settings, 1e12 if bad else rate)

    monkeypatch.setattr(first_order, "backward", backward)
    monkeypatch.setattr(first_order, "make_optimizer", make_optimizer)
    path = experiment(training={"max_grad_norm": None, "steps": count})
    for name, rounds in (("whole", 3), ("part", 1)):
        calls.update(dict.fromkeys(calls, 0))
        out = ["--out", tmp_path / name]
        result = hedgerow("run", path, method, f"federation.rounds={rounds}", *out)
        assert result.code == 0, result.err
    first, *later = rows_of(tmp_path / "whole")[1:]
    assert first["failures"].keys() == {"client-001"}
    assert [row["failures"] for row in later] == [{}, {}]
    arguments = [path, method, "federation.rounds=3", "--out", tmp_path / "part", "--resume"]
    assert hedgerow("run", *arguments).code == 0
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "part")


def flipped(data):
    """One bit of one number is another."""
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


DAMAGE = {
    "a server's, cut short": ("server/0002.safetensors", lambda data: data[:-7]),
    "a server's, of nothing": ("server/0002.safetensors", lambda data: b""),
    "a server's, missing": ("server/0002.safetensors", None),
    "a client's, cut short": ("clients/client-000/0002.safetensors", lambda data: data[:100]),
    "a client's, missing": ("clients/client-000/0002.safetensors", None),
    "a client's, with a byte flipped": ("clients/client-000/0002.safetensors", flipped),
    "a server's, with a byte flipped": ("server/0002.safetensors", flipped),
    "a client's, with another name in it": (
        "clients/client-000/0002.safetensors",
        lambda data: data.replace(b"lora_A", b"lora_a"),
    ),
    "all of the server's": ("server", None),
    "all of the clients'": ("clients", None),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_memory_that_is_damaged_or_missing_is_one_sentence(hedgerow, experiment, tmp_path, what):
    run, method = tmp_path / "run", "method.compress=true"
    assert hedgerow("run", experiment(), method, "--out", run).code == 0
    name, damage = DAMAGE[what]
    if damage:
        (run / name).write_bytes(damage((run / name).read_bytes()))
    elif (run / name).is_dir():
        shutil.rmtree(run / name)
    else:
        (run / name).unlink()
    before = files(run)
    more = ["federation.rounds=3", "--out", run, "--resume"]
    result = hedgerow("run", experiment(), method, *more)
    assert result.code == 2
    assert str(run / (name if damage else name.rpartition("/")[0] or name)) in result.err
    assert "restore it from a copy" in result.err
    assert "Traceback" not in result.err
    assert files(run) == before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("client-001/0002.safetensors", "owner must be client-000, got client-001"),
        ("client-000/0001.safetensors", "round must be 2, got 1"),
    ],
)
def test_a_memory_of_another_client_or_round_is_refused(
    hedgerow, experiment, tmp_path, source, words
):
    path, run = experiment(method={"ranks": 2}), tmp_path / "run"  # all are of the same shapes
    assert hedgerow("run", path, "--out", run).code == 0
    file = run / "clients/client-000/0002.safetensors"
    shutil.copy(run / "clients" / source, file)
    before = files(run)
    result = hedgerow("run", path, "federation.rounds=3", "--out", run, "--resume")
    assert result.code == 2
    assert str(file) in result.err
    assert words in result.err
    assert files(run) == before


def test_a_memory_of_an_earlier_version_is_read(tmp_path):
    """It says nothing of itself."""
    tensors = {"a": torch.arange(3.0)}
    for part in to_safetensors(tensors, {}):
        with (tmp_path / "0001.safetensors").open("ab") as file:
            file.write(part)
    assert torch.equal(RoundMemory(tmp_path, 2).load()["a"], tensors["a"])


@pytest.mark.parametrize(
    "changes",
    [
        ["method.restart=zero"],
        ["method.compress.carry=false"],
        ["training.optimizer=sgd"],
        ["method.name=fedit", "method.ranks=2"],
        ["federation.clients_per_round=1"],
    ],
    ids=" ".join,
)
def test_a_memory_that_nobody_needs_need_not_be_there(hedgerow, experiment, tmp_path, changes):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), *changes, "--out", run).code == 0
    more = ["federation.rounds=3", "--out", run, "--resume"]
    result = hedgerow("run", experiment(), *changes, *more)
    assert result.code == 0, result.err


def files(run):
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


CODED = {
    "cut": ["method.compress=true", "method.restart=own"],
    "cut with a shared start": ["method.compress=true", "method.restart=shared"],
    "coded updates": ["method.upload_bits=8"],
    "adaptive": ["method.scaling=adaptive"],
}


@pytest.mark.parametrize("case", CODED)
def test_a_run_that_was_stopped_or_killed_ends_as_the_whole(
    hedgerow, experiment, tmp_path, monkeypatch, case
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    path, append = experiment(federation={"rounds": 3}), Ledger.append
    assert hedgerow("run", path, *CODED[case], "--out", whole).code == 0

    def killed(ledger, entry, *checks):
        if entry.round == 2:
            raise SystemExit(9)  # clients and the server have kept what is theirs of this round
        return append(ledger, entry, *checks)

    first = ["federation.rounds=2", "--out", run]
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed)
        assert hedgerow("run", path, *CODED[case], *first).code == 9
    assert hedgerow("run", path, *CODED[case], *first, "--resume").code == 0
    assert hedgerow("run", path, *CODED[case], "--out", run, "--resume").code == 0
    assert ledger_bytes(run) == ledger_bytes(whole)


@pytest.mark.parametrize("case", CODED)
def test_a_coded_run_s_adapter_and_merged_weights_are_one_function(
    hedgerow, experiment, tmp_path, tiny_model, case
):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), *CODED[case], "--out", run).code == 0
    for to in ("merged", "adapter"):
        assert hedgerow("export", run, tmp_path / to, "--to", to).code == 0
    ids = torch.arange(3, 60)[None]
    base, merged = (
        AutoModelForCausalLM.from_pretrained(p) for p in (tiny_model, tmp_path / "merged")
    )
    with torch.inference_mode():
        before, after = base(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    torch.testing.assert_close(adapted, after, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


@pytest.fixture
def tokenized(monkeypatch):
    """Names of whose rows are tokenised, in this process."""
    names, tokenize = [], Spool.tokenize

    def tokenizes(self, name, *arguments, **options):
        names.append(name)
        return tokenize(self, name, *arguments, **options)

    monkeypatch.setattr(Spool, "tokenize", tokenizes)
    return names


def stopped(hedgerow, monkeypatch, path, out, *changes):
    """Interrupt a run in its second round."""
    train = LocalFleet.train

    def until_the_second(self, round, *arguments):
        if round == 2:
            raise KeyboardInterrupt
        return train(self, round, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(LocalFleet, "train", until_the_second)
        assert hedgerow("run", path, *changes, "--out", out).code == 130


CLIENTS = ["client-000", "client-001", "client-002"]


@pytest.mark.parametrize("method", ["fedavg", "centralized"])
def test_a_resume_finds_the_tokens_that_were_made(
    hedgerow, experiment, tmp_path, monkeypatch, tokenized, method
):
    path, whole, part = experiment(), tmp_path / "whole", tmp_path / "part"
    changes = [f"method={method}", "federation.rounds=3"]
    assert hedgerow("run", path, *changes, "--out", whole).code == 0
    assert not (whole / "tokens").exists()
    stopped(hedgerow, monkeypatch, path, part, *changes)
    assert (part / "tokens").stat().st_mode & 0o777 == 0o700
    (part / "tokens-0123abcd").mkdir()  # of a process that was killed while it kept some
    tokenized.clear()
    assert hedgerow("run", path, *changes, "--out", part, "--resume").code == 0
    assert set(tokenized).isdisjoint(CLIENTS)
    assert ledger_bytes(whole) == ledger_bytes(part)
    assert not list(part.glob("tokens*"))
    # Whoever goes on with a run that had come to its end makes them again.
    more = [path, f"method={method}", "federation.rounds=4", "--out", part, "--resume"]
    assert hedgerow("run", *more).code == 0
    assert set(tokenized) >= set(CLIENTS)


def test_tokens_of_rows_that_have_changed_are_made_again(
    hedgerow, experiment, tmp_path, monkeypatch, tokenized
):
    path, out = experiment(), tmp_path / "out"
    stopped(hedgerow, monkeypatch, path, out)
    tokenized.clear()
    (file,) = tmp_path.glob("*_1.json")
    rows = json.loads(file.read_text())
    rows[0]["output"] += " or not"
    file.write_text(json.dumps(rows))
    done = hedgerow("run", path, "--out", out, "--resume")
    assert done.code == 2
    assert "the data of client-001 have changed" in done.err
    assert set(tokenized) & set(CLIENTS) == {"client-001"}


@pytest.mark.parametrize("change", ["data.max_length=20", "data.prompt=alpaca", "data.loss_on=all"])
def test_tokens_of_another_encoding_are_made_again(
    hedgerow, experiment, tmp_path, monkeypatch, tokenized, change
):
    path, out = experiment(data={"max_length": 200}), tmp_path / "out"
    stopped(hedgerow, monkeypatch, path, out)
    elsewhere = tmp_path / "elsewhere"
    stopped(hedgerow, monkeypatch, path, elsewhere, change)
    shutil.rmtree(out / "tokens")
    (elsewhere / "tokens").rename(out / "tokens")
    tokenized.clear()
    assert hedgerow("run", path, "--out", out, "--resume").code == 0
    assert set(tokenized) >= set(CLIENTS)


def test_rows_in_memory_are_in_no_file(experiment, tmp_path, monkeypatch):
    path, out = experiment(), tmp_path / "out"
    clients = {"north": [{"instruction": f"Say {n}", "output": f"aa{n}"} for n in range(4)]}

    def look(*arguments):
        assert not list(out.glob("tokens*"))
        raise RunFailed("looked")

    monkeypatch.setattr(LocalFleet, "train", look)
    with pytest.raises(RunFailed, match="looked"):
        hr.run(path, "method=fedavg", data={"clients": clients}, out=out)


def test_where_tokens_cannot_be_kept_a_run_goes_on(hedgerow, experiment, tmp_path, monkeypatch):
    def full(self, shards):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(KeptTokens, "save", full)
    done = hedgerow("run", experiment(), "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "a resume will have to tokenise again: No space left" in done.out + done.err


def test_a_comparison_leaves_no_tokens(hedgerow, experiment, tmp_path):
    given = ["--methods", "fedavg,centralized", "--out", tmp_path / "out"]
    assert hedgerow("compare", experiment(federation={"rounds": 1}), *given).code == 0
    assert not list((tmp_path / "out").glob("**/tokens*"))
