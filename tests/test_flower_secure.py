"""Secure sums on a real network of ten SuperNodes, some of which are killed at each stage."""

import json
import os

import pytest
from support.network import Network
from support.runs import ledger_bytes, rows_of, run_hedgerow

from hedgerow.engines import local
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult, Unwatched

pytestmark = pytest.mark.slow

CLIENTS = [f"client-{index:03d}" for index in range(10)]
GONE = [CLIENTS[1], CLIENTS[4], CLIENTS[8]]
AFTER = {"keys": "shares", "shares": "masked", "masked": "unmasking"}
"""Stage of a sum, and the one whose letter arrives when its answer has been sent."""

HOOKS = """
import os
import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).name == "flwr-clientapp":
    import psutil

    from hedgerow.engines.flower import worker

    honest = worker.ask

    def ask(place, request):
        letter, doom = request.request.secure, place / "doom"
        if letter is not None and doom.exists():
            whose, stage = doom.read_text().split()
            if letter.stage == stage:
                doom.rename(place / "met")
                end(place, whose)
        return honest(place, request)

    def end(place, whose):
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if "flower.worker" in line and str(place) + " " in line:
                process.kill()
                process.wait()
        if whose == "site":
            os.killpg(0, signal.SIGKILL)

    worker.ask = ask

if Path(sys.argv[0]).name == "flwr-serverapp":
    from hedgerow.ledger import Ledger

    append, doom = Ledger.append, Path(__file__).with_name("doom")

    def killed(*arguments):
        if doom.exists():
            doom.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return append(*arguments)

    Ledger.append = killed
"""
"""Put into Flower's processes: a site ends, all or its worker, when it is sent the letter that its
file `doom` names; the coordinator between unmasking a sum and noting it."""


class Sites:
    """A network of ten sites, and apps for them."""

    def __init__(self, network, folder, model, hooks):
        self.network, self.folder, self.model, self.hooks = network, folder, model, hooks
        for index, name in enumerate(CLIENTS):
            rows = [
                {"instruction": f"Say {'abc'[index % 3]}{i}", "output": f"{index}" * 3}
                for i in range(3 + index)
            ]
            (folder / f"client_{index}.json").write_text(json.dumps(rows))
            network.register(name)
        self.experiment = folder / "experiment.yaml"
        self.experiment.write_text(
            json.dumps(
                {
                    "model": {"path": str(model)},
                    "data": {
                        "clients": {c: f"client_{i}.json" for i, c in enumerate(CLIENTS)},
                        "prompt": "plain",
                        "max_length": 64,
                    },
                    "method": {"name": "fedavg"},
                    "training": {"steps": 1, "batch_size": 4, "learning_rate": 0.01},
                    "federation": {"rounds": 1, "secure": {}, "attempts": 1},
                }
            )
        )

    def start(self):
        """Start all that do not run."""
        for index, name in enumerate(CLIENTS):
            process = self.network.processes.get(name)
            if process is None or process.poll() is not None:
                self.network.processes.pop(name, None)
                data = str(self.folder / f"client_{index}.json")
                self.network.start_node(name, data=data, model=str(self.model))

    def doom(self, names, stage, whose="site"):
        """Have sites end when they get the letter that comes after a stage."""
        for name in names:
            place = self.network.folder / "sites" / name
            place.mkdir(parents=True, exist_ok=True)
            (place / "doom").write_text(f"{whose} {AFTER[stage]}")

    def met(self):
        """The sites that have ended as they were to."""
        return [name for name in CLIENTS if (self.network.folder / "sites" / name / "met").exists()]

    def app(self, out, *changes):
        """An app of the experiment, made once for each run."""
        app = out.with_name(f"{out.name}-app")
        if not app.exists():
            run_hedgerow("flower", "init", self.experiment, app, *changes)
        return app

    def run(self, out, *changes):
        """Run the experiment, or go on with it; its status, and what the coordinator said."""
        self.start()
        run = self.network.submit(self.app(out, *changes), out)
        status = self.network.finish(run)
        return status, " ".join(self.network.run_log(run).split())

    def bare(self, out, *changes, gone=(), at_first=()):
        """The same fixed-point run in one process, without masks; some clients send nothing.

        Args:
            gone: those who never do.
            at_first: those who do not when they are asked for the first time.
        """
        waiting = set(at_first)

        class Fleet(local.LocalFleet):
            def train(self, round, parent, clients, clock, letters=None):
                for result in super().train(round, parent, clients, clock, letters):
                    lost = ClientResult(result.client, failure="gone", absent=True)
                    is_lost = result.client.name in {*gone, *waiting}
                    waiting.discard(result.client.name)
                    yield lost if is_lost else result

        changes = [*changes, "federation.secure.masks=false", "federation.backoff=0"]
        local.run(load(self.experiment, changes), out, Unwatched(), fleet=Fleet)
        return ledger_bytes(out)


@pytest.fixture(scope="module")
def sites(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("secure")
    hooks = folder / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOKS)
    with pytest.MonkeyPatch.context() as patch:
        path = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(hooks), *([path] if path else [])]))
        with Network(folder / "network") as network:
            yield Sites(network, folder, tiny_model, hooks)


@pytest.fixture(autouse=True)
def _no_doom(sites):
    yield
    for file in ("doom", "met"):
        for each in (sites.network.folder / "sites").glob(f"*/{file}"):
            each.unlink()
    (sites.hooks / "doom").unlink(missing_ok=True)


def test_the_ledger_is_that_of_the_same_sums_without_masks(sites, tmp_path):
    out = tmp_path / "run"
    status, log = sites.run(out, "federation.rounds=2")
    assert status == "finished:completed", log
    assert ledger_bytes(out) == sites.bare(tmp_path / "bare", "federation.rounds=2")
    rows = rows_of(out)
    assert [row["failures"] for row in rows] == [{}] * 3
    assert [row["participants"] for row in rows[1:]] == [CLIENTS] * 2
    assert all(row["secure_bytes"] > 1000 for row in rows[1:])


@pytest.mark.parametrize("stage", AFTER)
def test_three_of_ten_are_killed(sites, tmp_path, stage):
    """The sum is that of the seven; of all, where the three have sent their numbers."""
    out = tmp_path / "run"
    sites.doom(GONE, stage)
    status, log = sites.run(out)
    assert status == "finished:completed", log
    assert sites.met() == GONE
    row = rows_of(out)[1]
    assert sorted(row["failures"]) == GONE
    gone = GONE if stage != "masked" else []
    assert row["participants"] == [name for name in CLIENTS if name not in gone]
    assert ledger_bytes(out) == sites.bare(tmp_path / "bare", gone=gone)


def test_a_site_whose_worker_was_killed_is_out_of_that_try(sites, tmp_path):
    out = tmp_path / "run"
    sites.doom(GONE[:1], "keys", "worker")
    sites.doom(GONE[1:2], "shares", "worker")
    status, log = sites.run(out)
    assert status == "finished:completed", log
    row = rows_of(out)[1]
    assert sorted(row["failures"]) == GONE[:2]
    assert all("its keys are gone" in why for why in row["failures"].values())
    assert ledger_bytes(out) == sites.bare(tmp_path / "bare", gone=GONE[:2])


def test_a_second_try_is_a_sum_of_its_own(sites, tmp_path):
    """With whoever could not stay in the first: their workers are there again."""
    out = tmp_path / "run"
    changes = ["federation.attempts=2", "federation.backoff=1"]
    sites.doom(CLIENTS[:4], "shares", "worker")
    status, log = sites.run(out, *changes)
    assert status == "finished:completed", log
    assert sites.met() == CLIENTS[:4]
    assert rows_of(out)[1]["failures"] == {}
    # Of which bytes_up knows, too.
    assert ledger_bytes(out) == sites.bare(tmp_path / "bare", *changes, at_first=CLIENTS[:4])


def test_four_of_ten_gone_leave_a_sentence_and_no_result(sites, tmp_path):
    """And when they are back, the run goes on."""
    out = tmp_path / "run"
    sites.doom(CLIENTS[:4], "shares")
    status, log = sites.run(out)
    assert status.startswith("finished:failed"), log
    assert "round 1 has no secure sum: 6 of the 7 clients that it takes stayed to the end" in log
    assert not list((out / "ledger").glob("*.safetensors"))
    assert [row["round"] for row in rows_of(out)] == [0]
    status, log = sites.run(out)
    assert status == "finished:completed", log
    assert ledger_bytes(out) == sites.bare(tmp_path / "bare")


def test_a_killed_coordinator_gets_the_same_sum_again_and_no_other(sites, tmp_path):
    """It knew the sum; the difference from one without a client would be that client's update."""
    out = tmp_path / "run"
    (sites.hooks / "doom").touch()
    status, log = sites.run(out)
    assert status.startswith("finished:failed"), log
    assert not (sites.hooks / "doom").exists()
    assert not list((out / "ledger").glob("*.safetensors"))
    sites.doom(GONE[:1], "keys")
    status, log = sites.run(out)
    assert status.startswith("finished:failed"), log
    assert ("9 of the 10 clients that it takes stayed to the end: client-001 failed because") in log
    assert f"The sum of the 10 clients that {out / 'secure.json'} names was to be unmasked" in log
    # Sites do not rely on the server's record.
    (out / "secure.json").unlink()
    sites.doom(GONE[:1], "keys")
    status, log = sites.run(out)
    assert (
        "client-000 and 8 more failed because secure sum: the sum of other clients of this round "
        "was unmasked before"
    ) in log
    (out / "secure.json").unlink()
    status, log = sites.run(out)
    assert status == "finished:completed", log
    assert rows_of(out)[1]["failures"] == {}
    assert ledger_bytes(out) == sites.bare(tmp_path / "bare")
