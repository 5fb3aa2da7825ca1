"""The process at a site that stays, asked as the ClientApp asks it."""

import concurrent.futures
import os
import subprocess
import sys
import time

import psutil
import pytest
from support.network import wait_for

from hedgerow.engines.flower.app import init
from hedgerow.engines.flower.messages import Request
from hedgerow.engines.flower.node import place_of
from hedgerow.engines.flower.worker import WorkerRequest, ask, inbox
from hedgerow.experiment import load
from hedgerow.privacy.secure.letters import AskKeys

REQUEST = Request(run="0" * 32)


@pytest.fixture
def worker_request(experiment, tmp_path, tiny_model):
    init(load(experiment(), ["data.test=null"]), tmp_path / "app", "tiny")
    place = tmp_path / "site"
    place.mkdir()
    node = {
        "name": "client-000",
        "data": str(tmp_path / "client_0.json"),
        "model": str(tiny_model),
        "folder": str(place),
    }
    yield WorkerRequest(app=tmp_path / "app", node=node, request=REQUEST, files=[])
    for process in workers(place):
        process.kill()


def workers(place):
    """The workers of a site."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(place) in line and "hedgerow.engines.flower.worker" in line:
            found.append(process)
    return found


def test_one_worker_answers_all_keeps_the_model_and_trains_once(worker_request, tmp_path, capfd):
    place = place_of(worker_request.node)
    train = worker_request.model_copy(update={"request": Request(run="0" * 32, train=True)})
    # As after a restart, when an invitation and a round may wait together.
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        replies = list(
            pool.map(lambda q: ask(place, q).reply, [worker_request, train, worker_request])
        )
    assert [reply.num_examples for reply in replies] == [5, 5, 5]
    (worker,) = workers(place)
    first = ask(place, train)
    assert first.update.read_bytes() == ask(place, train).update.read_bytes()
    assert workers(place) == [worker]
    # Asked three times, trained once, from one model that was loaded once.
    assert capfd.readouterr().err.count("round 1: training") == 1


def test_a_worker_ends_when_nothing_is_asked_and_is_started_again(worker_request):
    place = place_of(worker_request.node)
    short = worker_request.model_copy(update={"node": worker_request.node | {"idle": 0.5}})
    assert ask(place, short).reply.num_examples == 5
    wait_for(lambda: not workers(place), "the worker's end")
    assert ask(place, worker_request).reply.num_examples == 5


@pytest.mark.slow
def test_a_worker_that_has_a_part_in_a_sum_waits_for_the_others(worker_request, experiment):
    """Its keys are in memory alone: who trains for longer than it rests would end the sum."""
    changes = ["data.test=null", "method={name: fedavg}", "federation.secure=true"]
    app = worker_request.app.with_name("secure")
    init(load(experiment(), [*changes, "federation.deadline=2"]), app, "tiny")
    place = place_of(worker_request.node)
    letter = AskKeys(session="0" * 32)
    node = worker_request.node | {"idle": 0.1}
    request = Request(run="0" * 32, secure=letter)
    keys = WorkerRequest(app=app, node=node, request=request, files=[])
    assert ask(place, keys).reply.secure is not None
    (worker,) = workers(place)
    began = time.monotonic()
    wait_for(lambda: not workers(place), "the worker's end")
    assert time.monotonic() - began > 1.5
    assert ask(place, worker_request).reply.num_examples == 5
    assert worker not in workers(place)


def test_a_worker_ends_with_who_started_it(worker_request):
    place = place_of(worker_request.node)
    # Its parent is the parent of the process that asks: here one that ends at once.
    script = (
        "import sys; from hedgerow.engines.flower.worker import *;"
        "print(ask(Path(sys.argv[1]), WorkerRequest.model_validate_json(sys.argv[2])).reply.name)"
    )
    inner = [sys.executable, "-c", script, str(place), worker_request.model_dump_json()]
    outer = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
    subprocess.run([sys.executable, "-c", outer, *inner], check=True)
    wait_for(lambda: not workers(place), "the worker's end")


def test_what_a_killed_process_received_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f"inbox-{gone.pid}").mkdir()
    (tmp_path / f"inbox-{os.getppid()}").mkdir()  # of one that is alive
    (tmp_path / "inbox-of-mine").mkdir()  # nobody's
    (tmp_path / f"inbox-{2**99}").mkdir()
    with inbox(tmp_path) as folder:
        (folder / "file").write_text("x")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"inbox-{os.getppid()}", "inbox-of-mine"}


@pytest.mark.parametrize("name", [None, "", "north west", "../up", "x" * 201])
def test_a_site_has_a_name(name):
    with pytest.raises(RuntimeError, match="names no client"):
        place_of({"name": name})
