"""What goes wrong on real networks, with real processes: kills, strangers, other bases, garbage."""

import json
import re
import shutil
import signal

import psutil
import pytest
from safetensors.torch import load_file, save_file
from support.experiments import SITES, dolly
from support.network import Network, wait_for
from support.runs import entries, rows_of, run_hedgerow

pytestmark = [pytest.mark.shared, pytest.mark.slow]

FLORA = {"name": "flora", "ranks": [16, 8, 4, 2]}


class Sites:
    """A network whose sites have Dolly's data, and an app for them."""

    def __init__(self, network, shared, folder, **sections):
        self.network, self.shared, self.folder = network, shared, folder
        self.experiment = dolly(shared, folder / "dolly.yaml", FLORA, **sections)
        run_hedgerow("flower", "init", self.experiment, folder / "app")

    def start(self, key, /, **node):
        index = SITES.index(key) if key in SITES else 0
        own = {
            "data": str(self.shared / f"data/dolly/local_training_{index}.json"),
            "model": str(self.shared / "models/stories260k"),
        }
        self.network.start_node(key, **(own | node))

    def submit(self):
        return self.network.submit(self.folder / "app", self.folder / "run")

    def rows(self):
        path = self.folder / "run"
        return rows_of(path) if (path / "metrics.jsonl").exists() else []

    def rounds(self):
        return max((row["round"] for row in self.rows()), default=-1)

    def site_ledger(self, name):
        run = json.loads((self.folder / "run/flower.json").read_text())["run"]
        return entries(self.network.folder / "sites" / name / run)


@pytest.fixture
def sites(shared, tmp_path):
    """Makes a network with four registered sites, none of them started."""
    with Network(tmp_path / "network") as network:
        for name in SITES:
            network.register(name)

        def make(**sections):
            return Sites(network, shared, tmp_path, **sections)

        yield make


def processes(needle, folder):
    """The processes with `needle` in their command line that belong to a network."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if needle in line and (str(folder) in line or folder_of(process) == str(folder)):
            found.append(process)
    return found


def folder_of(process):
    try:
        return process.cwd()
    except psutil.Error:
        return None


def test_a_supernode_killed_in_training_comes_back_and_catches_up(sites):
    sites = sites(
        training={"steps": 30}, federation={"rounds": 8, "deadline": 40, "min_clients": 2}
    )
    network = sites.network
    for name in SITES:
        sites.start(name)
    run = sites.submit()
    wait_for(lambda: "round 2: training" in network.log("south"), "south's training")
    network.kill("south")
    # Its worker notices that its SuperNode is gone.
    place = network.folder / "sites" / "south"
    wait_for(lambda: not processes("flower.worker", place), "the end of south's worker")
    wait_for(lambda: sites.rounds() >= 3, "round 3")
    sites.start("south")
    assert network.finish(run) == "finished:completed", network.run_log(run)

    rows = sites.rows()
    assert [row["round"] for row in rows] == list(range(9))
    failed = [row["round"] for row in rows[1:] if row["failed"]]
    assert failed[:2] == [2, 3]
    assert all(list(rows[round]["failures"]) == ["south"] for round in failed)
    assert "40 s" in rows[2]["failures"]["south"]
    assert rows[-1]["clients"] == 4  # it is back
    assert sites.site_ledger("south") == entries(sites.folder / "run")
    weights = json.loads(header(sites.folder / "run/ledger/0002.safetensors")["participants"])
    assert {p["client"] for p in weights} == {"north", "east", "west"}
    assert sum(p["weight"] for p in weights) == pytest.approx(1)


def header(path):
    """The metadata of a safetensors file."""
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_a_killed_server_goes_on_to_the_same_ledger(sites):
    sites = sites(training={"steps": 15}, federation={"rounds": 4})
    network = sites.network
    run_hedgerow("run", sites.experiment, "--out", sites.folder / "local")
    for name in SITES:
        sites.start(name)
    run = sites.submit()
    wait_for(lambda: "round 2: training" in network.log("west"), "west's training")
    kill_server(network)  # within a round
    assert network.finish(run).startswith("finished:failed")
    run = sites.submit()
    wait_for(lambda: sites.rounds() >= 2, "round 2")
    kill_server(network)  # between rounds, or within the next
    network.finish(run)
    run = sites.submit()
    assert network.finish(run) == "finished:completed", network.run_log(run)
    assert [row["round"] for row in sites.rows()] == [0, 1, 2, 3, 4]
    assert entries(sites.folder / "run") == entries(sites.folder / "local")
    assert all(sites.site_ledger(name) == entries(sites.folder / "local") for name in SITES)


def kill_server(network):
    """SIGKILL the ServerApp."""
    (server,) = processes("flwr-serverapp", network.folder)
    server.send_signal(signal.SIGKILL)


def test_strangers_and_other_bases_stay_out_and_the_run_goes_on(sites, tmp_path):
    sites = sites(federation={"rounds": 2, "deadline": 60, "min_clients": 2})
    network = sites.network
    # east has another checkpoint, south is no registered node, west trusts another authority.
    other = tmp_path / "other-base"
    shutil.copytree(sites.shared / "models/stories260k", other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    weights[name][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    sites.start("north")
    sites.start("east", model=str(other))
    network.key("stranger")
    sites.start("stranger", folder=str(tmp_path / "stranger-site"))
    network.start_node("west", ca=network.certificate("impostor"), data="none.json")
    # Registered as south, it says that it is north.
    sites.start("south", name="north", folder=str(tmp_path / "liar-site"))
    run = sites.submit()
    status = network.finish(run)
    log = network.run_log(run)
    assert status.startswith("finished:failed")  # one site is too few
    assert "1 of the 2 clients that a round needs" in log
    refusal = r"it has another base model: its fingerprint is \w+, .* stories260k has \w+"
    assert re.search(refusal, log)
    assert re.search(r"refused: .*/other-base: its fingerprint", network.log("east"))
    assert str(other) not in log  # a site's paths stay with it
    assert "registered as south, but says it is north" in log
    assert "certificate" in network.log("west").lower()
    assert not (network.folder / "sites/west").exists()
    assert not (tmp_path / "stranger-site").exists()
    # With its own base, east may join, and the same run begins.
    network.stop("east")
    sites.start("east")
    run = sites.submit()
    assert network.finish(run) == "finished:completed", network.run_log(run)
    assert sites.rows()[-1]["participants"] == ["north", "east"]


EVIL = """
import sys
from pathlib import Path

if Path(sys.argv[0]).name == "flwr-clientapp":
    from hedgerow.engines.flower import messages, worker

    honest = worker.ask

    def ask(place, request):
        reply = honest(place, request)
        if reply.update is None:
            return reply
        data = reply.update.read_bytes()
        round = len(request.request.records) + request.request.first
        evil = place / "evil.safetensors"
        evil.write_bytes({1: b"garbage", 2: data.replace(b"lora_A", b"lora_C")}.get(
            round, data[: len(data) // 2]))
        files = [messages.info(evil)]
        announced = reply.reply.model_copy(update={"files": files})
        return worker.WorkerReply(reply=announced, update=evil)

    worker.ask = ask
"""


def test_garbage_is_rejected_named_and_the_run_ends_well(sites, tmp_path):
    sites = sites(federation={"rounds": 3, "deadline": 60, "min_clients": 2})
    network = sites.network
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/sitecustomize.py").write_text(EVIL)
    for name in SITES[:3]:
        sites.start(name)
    network.python_path = tmp_path / "evil"
    sites.start("west")
    run = sites.submit()
    assert network.finish(run) == "finished:completed", network.run_log(run)
    rows = sites.rows()
    assert [row["participants"] for row in rows[1:]] == [SITES[:3]] * 3
    assert all(list(row["failures"]) == ["west"] for row in rows[1:])
    assert all(row["failures"]["west"] for row in rows[1:])
    assert "west failed" in network.run_log(run)
