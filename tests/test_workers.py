"""Clients side by side: `--workers`, and the processes behind it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from support.runs import hear_interrupts, ledger_bytes, rows_of

from hedgerow.engines.local import LocalFleet
from hedgerow.errors import ClientFailed, UserError
from hedgerow.evaluation import likelihood
from hedgerow.workers import ALONE, WorkerDied, Workers

TWO = Workers(2)

# --- processes ------------------------------------------------------------------------------------


def square(number: int) -> int:
    if number == 3:
        raise ClientFailed("three is odd", kind="odd")
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        os._exit(4)
    return number * number


def test_outcomes_come_in_the_order_of_the_items():
    def slow_first(number):
        time.sleep(0.3 if number == 0 else 0)
        return number

    assert list(TWO.map(slow_first, range(7))) == list(range(7))
    assert list(ALONE.map(slow_first, range(3))) == [0, 1, 2]


def test_what_goes_wrong_costs_one_item():
    found = list(TWO.each(square, range(9)))
    assert [each.result for each in found] == [0, 1, 4, None, 16, None, 36, None, 64]
    assert isinstance(found[3].error, ClientFailed)
    assert found[3].error.kind == "odd"
    assert isinstance(found[5].error, WorkerDied)
    assert "SIGKILL" in str(found[5].error)
    assert "code 4" in str(found[7].error)
    with pytest.raises(WorkerDied):
        list(TWO.map(square, [1, 5, 2]))


def test_an_unexpected_error_says_where_it_was():
    def wrong(number):
        return number / 0

    [outcome] = TWO.each(wrong, [1])
    assert isinstance(outcome.error, ZeroDivisionError)
    assert "in wrong" in outcome.error.__notes__[0]


def test_what_is_changed_stays_with_the_process():
    seen = [0]

    def count(number):
        seen[0] += 1
        return os.getpid()

    used = set(TWO.map(count, range(6)))
    assert seen == [0]
    assert len(used) <= 2
    assert os.getpid() not in used


def test_whoever_stops_listening_ends_them(tmp_path):
    def begun(number):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.01 if number == 0 else 600)

    outcomes = TWO.each(begun, [0, 1, 2])
    next(outcomes)
    outcomes.close()
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.name), 0)


CHILD = """
import os, time
from hedgerow.workers import Workers
def begun(place):
    print(os.getpid(), flush=True)
    time.sleep(600)
list(Workers(2).map(begun, [0, 1]))
"""


def test_they_end_with_whoever_forked_them():
    parent = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(is_there(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("given", [0, -1, "two", "", 1.5, "0", True])
def test_other_numbers_are_refused(given):
    with pytest.raises(UserError, match="give 1 or more, or auto"):
        Workers.of(given)


def test_auto_is_what_is_free():
    auto = Workers.of("auto")
    assert 1 <= auto.count <= len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with auto.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


# --- runs -----------------------------------------------------------------------------------------

PRIVATE = "privacy={level: example, clip: 1, noise_multiplier: 1, delta: 1e-3, seed: 3}"
SECRET = PRIVATE.replace(", seed: 3", "")


@pytest.mark.parametrize(
    "overrides",
    [
        ["method={name: flora, ranks: [4, 2, 1]}"],
        ["method=fedavg"],
        ["method={name: ferret, compression: 64}"],
        ["method={name: fedit, ranks: 2}", "federation.secure=true"],
        ["method={name: fedit, ranks: 2}", "federation.weights=multi_krum"],
        ["method={name: standalone, ranks: 2}"],
        ["method=fedavg", PRIVATE],
    ],
    ids=["flora", "fedavg", "ferret", "secure", "weighed", "standalone", "private"],
)
def test_bytes_are_those_of_one_process(overrides, hedgerow, experiment, tmp_path):
    metrics = "evaluation.metrics=[loss, rouge_l]"
    path = experiment(federation={"rounds": 3})
    for name, *more in (["one"], ["two", "--workers", "2"]):
        done = hedgerow("run", path, *overrides, metrics, *more, "--out", tmp_path / name)
        assert done.code == 0, done.err
    one, two = tmp_path / "one", tmp_path / "two"
    assert ledger_bytes(one) == ledger_bytes(two)
    for before, after in zip(rows_of(one), rows_of(two), strict=True):
        timed = {key for key in before | after if key.endswith("seconds")}
        assert {k: v for k, v in before.items() if k not in timed} == {
            k: v for k, v in after.items() if k not in timed
        }
    assert [row["failures"] for row in rows_of(two)[1:]] == [{}, {}, {}]
    assert not (two / "arriving").exists()


def test_all_have_one_secret_key_and_a_resumed_run_has_the_same(hedgerow, experiment, tmp_path):
    """It is made in the first round, before there is anybody who could make another."""
    path, two = experiment(federation={"rounds": 3}), ["--workers", "2"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    given = [path, "method=fedavg", SECRET]
    done = hedgerow("run", *given, "federation.rounds=1", *two, "--out", part)
    assert done.code == 0, done.err
    shutil.copytree(part, whole)
    for out in (whole, part):
        more = two if out == part else []
        done = hedgerow("run", *given, *more, "--out", out, "--resume")
        assert done.code == 0, done.err
    assert ledger_bytes(whole) == ledger_bytes(part)
    assert [row["failures"] for row in rows_of(part)[1:]] == [{}, {}, {}]


def test_a_process_that_dies_while_scoring_stops_the_run(
    hedgerow, experiment, tmp_path, monkeypatch
):
    def dying(*given, **more):
        os.kill(os.getpid(), signal.SIGKILL)

    path = experiment(federation={"rounds": 1}, evaluation={"every": 1, "batch_size": 1})
    monkeypatch.setattr(likelihood, "batch_losses", dying)
    done = hedgerow("run", path, "--workers", "2", "--out", tmp_path / "run")
    assert done.code == 1
    assert "a worker ended before it was done (SIGKILL)" in done.err
    assert "give fewer --workers" in done.err


def test_a_killed_run_leaves_nobody_and_goes_on(experiment, tmp_path):
    path, run = experiment(federation={"rounds": 8}, training={"steps": 20}), tmp_path / "run"
    command = [sys.executable, "-m", "hedgerow", "run", str(path), "--workers", "2"]
    process = subprocess.Popen([*command, "--out", str(run)], stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run([*command, "--out", str(run), "--resume"], check=True, capture_output=True)
    whole = [*command[:-1], "1", "--out", str(tmp_path / "whole")]
    subprocess.run(whole, check=True, capture_output=True)
    assert ledger_bytes(run) == ledger_bytes(tmp_path / "whole")
    assert not (run / "arriving").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_a_run_is_told_once(experiment, tmp_path, number):
    path, run = experiment(training={"steps": 100_000}), tmp_path / "run"
    command = [sys.executable, "-m", "hedgerow", "run", str(path), "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--out", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    while process.poll() is None and not (run / "arriving").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (130, 143)
    assert said.count("interrupted") == 1
    assert "Traceback" not in said


def test_no_update_is_held_while_the_next_client_trains(
    hedgerow, experiment, tmp_path, monkeypatch
):
    trained, held = LocalFleet._trained, []

    def watched(self, *given):
        assert all(each() is None for each in held)
        update = trained(self, *given)
        held.append(weakref.ref(update))
        return update

    monkeypatch.setattr(LocalFleet, "_trained", watched)
    done = hedgerow("run", experiment(federation={"rounds": 1}), "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert len(held) == 3


def test_on_a_gpu_clients_train_one_after_another():
    assert Workers(2, is_auto=True).on("cuda") is ALONE
    assert Workers(2).on("cpu").count == 2
    with pytest.raises(UserError, match=r"give model\.device=cpu"):
        Workers(2).on("cuda")


class Odd(Exception):
    """An error that cannot be read by another process."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def test_an_error_that_cannot_travel_is_told_in_words():
    def wrong(number):
        raise Odd(1, 2)

    [outcome] = TWO.each(wrong, [1])
    assert isinstance(outcome.error, RuntimeError)
    assert "Odd: 1 and 2" in str(outcome.error)


def test_a_process_that_dies_costs_its_client_a_round(hedgerow, experiment, tmp_path, monkeypatch):
    trained = LocalFleet._trained

    def dying(self, client_round, *given):
        if (client_round.client.name, client_round.round) == ("client-001", 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return trained(self, client_round, *given)

    monkeypatch.setattr(LocalFleet, "_trained", dying)
    path = experiment(federation={"rounds": 2})
    done = hedgerow("run", path, "--workers", "2", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    _, first, second = rows_of(tmp_path / "run")
    assert list(first["failures"]) == ["client-001"]
    assert "SIGKILL" in first["failures"]["client-001"]
    assert second["failures"] == {}
    assert hedgerow("ledger", "verify", tmp_path / "run").code == 0


def test_a_comparison_has_them_too(hedgerow, experiment, tmp_path):
    methods = ["--methods", "flora ranks=2,fedit ranks=2"]
    for name, *more in (["one"], ["two", "--workers", "2"]):
        done = hedgerow("compare", experiment(), *methods, *more, "--out", tmp_path / name)
        assert done.code == 0, done.err
    for run in (tmp_path / "one" / "runs").iterdir():
        assert ledger_bytes(run) == ledger_bytes(tmp_path / "two" / "runs" / run.name)


def test_mistakes_are_sentences(hedgerow, experiment, tmp_path):
    done = hedgerow("run", experiment(), "--workers", "many", "--out", tmp_path / "run")
    assert done.code == 2
    assert "workers many: give 1 or more, or auto" in done.err
    more = ["--workers", "2", "--engine", "flower"]
    done = hedgerow("run", experiment(), *more, "--out", tmp_path / "run")
    assert done.code == 2
    assert "take engine=local" in done.err
    assert not (tmp_path / "run").exists()


def test_a_run_is_evaluated_by_them_too(hedgerow, experiment, tmp_path, monkeypatch):
    assert hedgerow("run", experiment(), "--out", tmp_path / "run").code == 0
    metrics = ["--metrics", "loss,exact_match", "--json"]
    alone = hedgerow("evaluate", tmp_path / "run", *metrics)
    forked = []
    original = Workers._forked

    def counted(self, work, items):
        forked.append(len(items))
        return original(self, work, items)

    monkeypatch.setattr(Workers, "_forked", counted)
    small = "evaluation.batch_size=1"
    done = hedgerow("evaluate", tmp_path / "run", small, *metrics, "--workers", "2")
    assert done.code == 0, done.err
    assert forked
    assert json.loads(done.out) == pytest.approx(json.loads(alone.out))
    refused = hedgerow("evaluate", tmp_path / "run", "--harness", "mmlu", "--workers", "2")
    assert refused.code == 2
    assert "--workers: lm-eval's tasks are asked in one process" in refused.err
