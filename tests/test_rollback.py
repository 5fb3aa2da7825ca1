"""Rollback: a run that is taken back to an earlier round, and goes on from there."""

import fcntl
import shutil

import pytest
from support.runs import ledger_bytes, rows_of, tensorboard_of

import hedgerow as hr
from hedgerow.ledger import Ledger
from hedgerow.runs.directory import RunDirectory
from hedgerow.runs.memory import RoundMemory

ROUNDS = 4
CASES = {
    "flora, cut": ["method.compress=true"],
    "flora, new adapters": ["method.restart=zero"],
    "some clients": ["federation.clients_per_round=2", "method.upload_bits=8"],
    "fedavg, adam": ["method={name: fedavg, server: adam}"],
    "sparseloco": ["method={name: sparseloco, up: {name: top_k, k: 4, tile: 64}}"],
    "scaffold": ["method={name: scaffold}"],
    "ditto": ["method={name: ditto, ranks: 2}"],
    "standalone": ["method={name: standalone, ranks: 2}"],
    "fedzo": ["method={name: fedzo}"],
}


@pytest.fixture
def run(hedgerow, experiment, tmp_path):
    """Run an experiment, or go on with it; returns its directory."""

    def run(case, name="run", *more):
        path = experiment(federation={"rounds": ROUNDS, "keep_updates": True})
        out = ["--out", tmp_path / name]
        result = hedgerow("run", path, *CASES.get(case, []), *more, *out)
        assert result.code == 0, result.err
        return tmp_path / name

    return run


def rolled_back(hedgerow, folder, round):
    result = hedgerow("ledger", "rollback", folder, "--round", round)
    assert result.code == 0, result.err
    assert result.out.endswith(
        f"{folder}: as it was after round {round}; hedgerow run EXPERIMENT.yaml --out {folder} "
        "--resume goes on\n"
    )
    return result.out.splitlines()[:-1]


def files(folder):
    """All that there is, but for the lock."""
    found = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(p.relative_to(folder)): data for p, data in found.items() if p.name != ".lock"}


def untimed(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows_of(folder)]


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_an_earlier_round_as_it_did(hedgerow, run, case):
    """The last round that everything is kept of; bit for bit, with memories and kept updates."""
    folder = run(case)
    before, rows = files(folder), untimed(folder)
    assert rolled_back(hedgerow, folder, ROUNDS - 1) == []
    assert len(Ledger.open(folder / "ledger")) == ROUNDS - 1
    assert untimed(folder) == rows[:-1]
    later = f"{ROUNDS:04d}"
    assert not [name for name in files(folder) if later in name]
    assert set(before) - set(files(folder)) == {name for name in before if later in name}
    run(case, "run", "--resume")
    assert untimed(folder) == rows
    after = files(folder)
    assert {n: d for n, d in after.items() if n != "metrics.jsonl"} == {
        n: d for n, d in before.items() if n != "metrics.jsonl"
    }


def test_a_run_without_memories_goes_on_from_any_round_as_it_did(hedgerow, run):
    for case in ("flora, new adapters", "fedzo"):
        folder = run(case, case)
        before = ledger_bytes(folder)
        for round in (2, 1, 0):
            assert rolled_back(hedgerow, folder, round) == []
            run(case, case, "--resume")
            assert ledger_bytes(folder) == before


def test_what_is_not_kept_any_more_is_said_and_begins_anew(hedgerow, run):
    folder = run("flora, cut")
    before = ledger_bytes(folder)
    [said] = rolled_back(hedgerow, folder, 1)
    assert said.startswith(
        "what the server and client-000, client-001, client-002 kept of rounds up to 1 is not "
        "there any more, as the last two rounds alone stay: they begin anew without it"
    )
    assert dict(RoundMemory(folder / "clients/client-000", 2).load()) == {}
    run("flora, cut", "run", "--resume")
    after = ledger_bytes(folder)
    assert after["0001.safetensors"] == before["0001.safetensors"]
    assert after["0002.safetensors"] != before["0002.safetensors"]
    assert hedgerow("ledger", "verify", folder).code == 0
    # Before training, nobody has kept anything yet.
    assert rolled_back(hedgerow, folder, 0) == []
    left = {"data.json", "experiment.yaml", "ledger/ledger.json", "metrics.jsonl"}
    assert files(folder).keys() == left
    run("flora, cut", "run", "--resume")
    assert ledger_bytes(folder) == before


@pytest.mark.parametrize("case", CASES)
def test_every_method_goes_on_without_what_is_not_kept(hedgerow, run, case):
    folder = run(case)
    result = hedgerow("ledger", "rollback", folder, "--round", 1)
    if case == "scaffold":  # the common control variate would keep what clients no longer have
        before = files(folder)
        assert result.code == 2
        assert "what client-000 kept of round 1 is not there any more, without which" in result.err
        assert files(folder) == before
        return
    assert result.code == 0, result.err
    run(case, "run", "--resume")
    assert len(rows_of(folder)) == ROUNDS + 1


KILLS = {
    "before anything": (Ledger, "truncate"),
    "once the ledger is another": (Ledger, "remove_later"),
    "before memories are removed": (RoundMemory, "remove_later"),
    "before rows are written": (RunDirectory, "write_rows"),
    "before memories begin anew": (RoundMemory, "save"),
}


@pytest.mark.parametrize("again", [True, False], ids=["again", "resume"])
@pytest.mark.parametrize("kill", KILLS)
def test_a_rollback_that_is_killed_goes_on(hedgerow, run, monkeypatch, kill, again):
    """Either of the two states is there, whole, and the other is one command away."""
    folder = run("flora, cut")
    before = ledger_bytes(folder)
    round = 1 if kill == "before memories begin anew" else ROUNDS - 1

    def killed(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(*KILLS[kill], killed)
        assert hedgerow("ledger", "rollback", folder, "--round", round).code == 9
    if round == 1 and not again:
        result = hedgerow("run", folder / "experiment.yaml", "--out", folder, "--resume")
        assert result.code == 2
        assert "restore it from a copy, begin anew with another --out, or see" in result.err
        assert "`hedgerow ledger rollback`" in result.err
        return
    if again:
        rolled_back(hedgerow, folder, round)
        assert not [name for name in files(folder) if f"{ROUNDS:04d}" in name]
    run("flora, cut", "run", "--resume")
    assert len(rows_of(folder)) == ROUNDS + 1
    assert (ledger_bytes(folder) == before) == (round != 1)
    assert hedgerow("ledger", "verify", folder).code == 0


def test_a_run_that_another_process_has_open_is_not_rolled_back(hedgerow, run):
    folder = run("flora, new adapters")
    before = files(folder)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = hedgerow("ledger", "rollback", folder, "--round", 1)
    assert (result.code, "is being written to by another" in result.err) == (2, True)
    assert files(folder) == before


def test_mistakes_are_one_sentence_and_change_nothing(hedgerow, run, tmp_path):
    folder = run("flora, cut")
    packed = tmp_path / "packed"
    assert hedgerow("export", folder, packed, "--to", "ledger").code == 0
    site = tmp_path / "site"
    shutil.copytree(folder, site)
    (site / "data.json").unlink()
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "ledger/0002.safetensors").write_bytes(b"")
    forgetful = tmp_path / "forgetful"
    shutil.copytree(folder, forgetful)
    memory = forgetful / "clients/client-001/0003.safetensors"
    memory.write_bytes(memory.read_bytes()[:-1])
    for place, round, says in [
        (folder, ROUNDS + 1, "round 5: the ledger has rounds 0 (the base) to 4"),
        (packed, 1, "is a packed ledger: roll the run's directory back"),
        (folder / "ledger", 1, "is no run directory"),
        (site, 1, "as a site's copy of a run, which follows the coordinator's"),
        (damaged, 3, "0002.safetensors is truncated"),
        (forgetful, 3, "client-001/0003.safetensors"),
    ]:
        before = files(place) if place.is_dir() else place.read_bytes()
        result = hedgerow("ledger", "rollback", place, "--round", round)
        assert result.code == 2, place
        assert says in result.err
        assert "Traceback" not in result.err
        assert (files(place) if place.is_dir() else place.read_bytes()) == before
    assert rolled_back(hedgerow, damaged, 1)  # below what is damaged


def test_a_run_is_rolled_back_from_python(run):
    folder = run("flora, cut")
    opened = hr.open_run(folder)
    assert opened.rollback(3) == []
    assert opened.rounds == 3
    assert len(opened.metrics) == 4
    [said] = opened.rollback(round=1)
    assert "client-002 kept of rounds up to 1" in said
    assert opened.rollback(1) == []  # there is nothing left to be said
    with pytest.raises(hr.UserError, match="rounds 0"):
        opened.rollback(-1)


PRIVATE = {
    "example": (["method.restart=zero"], "clip: 0.5, noise_multiplier: 1.0"),
    "client": (
        ["method={name: fedavg}", "training.keep_optimizer=false"],
        "clip: 0.1, noise_multiplier: 2.0",
    ),
}


@pytest.mark.parametrize("level", PRIVATE)
def test_what_private_rounds_have_spent_stays_spent(hedgerow, run, level):
    """Rounds that are gone were seen, and count on beside what is made in their place."""
    method, noise = PRIVATE[level]
    private = [*method, f"privacy={{level: {level}, {noise}, delta: 1e-3, seed: 1}}"]
    folder = run("", "run", *private)
    spent, before = rows_of(folder)[-1]["epsilon"], files(folder)
    said = rolled_back(hedgerow, folder, 2)
    assert "the account of privacy stays as it is" in said[-1]
    accounts = {n: d for n, d in before.items() if "privacy" in n}
    assert accounts
    assert accounts.items() <= files(folder).items()
    run("", "run", *private, "--resume")
    third, last = rows_of(folder)[3:]
    assert third["epsilon"] == spent  # the same once more, which costs nothing
    assert last["epsilon"] > spent  # from another entry, since it says what was spent
    assert hedgerow("ledger", "verify", folder).code == 0


def test_trackers_are_told_what_is_made_in_place_of_what_is_gone(hedgerow, run):
    pytest.importorskip("tensorboard")
    folder = run("flora, cut", "run", "tracking.to=tensorboard")
    rolled_back(hedgerow, folder, 1)
    run("flora, cut", "run", "tracking.to=tensorboard", "--resume")
    losses = [(row["round"], row["eval_loss"]) for row in rows_of(folder)]
    assert tensorboard_of(folder)["eval_loss"] == [
        (round, pytest.approx(loss, rel=1e-6)) for round, loss in losses
    ]


def test_a_memory_of_another_history_is_refused(hedgerow, run):
    """Of a run with the same clients and shapes, in which they trained from another entry."""
    folder = run("ditto")
    other = run("ditto", "other", "training.learning_rate=0.02")
    name = f"clients/client-001/{ROUNDS:04d}.safetensors"
    shutil.copy(other / name, folder / name)
    before = files(folder)
    more = ["federation.rounds=5", "--out", folder, "--resume"]
    result = hedgerow("run", folder / "experiment.yaml", *more)
    assert result.code == 2
    assert f"{folder / name} is of another history of the run" in result.err
    result = hedgerow("evaluate", folder, "--client", "client-001")
    assert (result.code, "is of another history" in result.err) == (2, True)
    assert files(folder) == before


def test_a_memory_of_an_earlier_history_does_not_count(tmp_path):
    """As after a rollback, where a client has taken part in the round once more."""
    for parent, folder in (("aa", "old"), ("bb", "new")):
        memory = RoundMemory(tmp_path / folder, 3, parent=lambda _, parent=parent: parent)
        memory.save({})
    for folder, lacks in (("old", True), ("new", False)):
        memory = RoundMemory(tmp_path / folder, 4, parent=lambda _: "bb")
        assert memory.lacks(3) == lacks
        assert not memory.lacks(0)
