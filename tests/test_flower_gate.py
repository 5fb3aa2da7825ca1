"""Who can do what on a real network: the proxy of docs/deploy.md, and keys under names."""

import json
import os
import re
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.network import Network, free_port, wait_for
from support.runs import rows_of, run_hedgerow

from hedgerow import demo
from hedgerow.bundled import MODEL

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def network(tmp_path):
    with Network(tmp_path / "network") as network:
        yield network


@pytest.fixture
def app(tmp_path):
    """An app of the demo for two clients, of one round."""
    experiment = demo.prepare(tmp_path / "demo-run")
    changes = [
        "data.clients={ash: ash.json, birch: birch.json}",
        "method.ranks=[4, 4]",
        "training.epochs=null",
        "training.steps=2",
        "federation.rounds=1",
        "federation.min_clients=1",
        "federation.deadline=60",
    ]
    run_hedgerow("flower", "init", experiment, tmp_path / "app", *changes)
    return tmp_path / "app"


def start(network, folder, key, **node):
    data = str(folder / f"demo-run/data/{node.get('name', key)}.json")
    network.start_node(key, data=data, model=str(MODEL), **node)


def test_another_key_under_a_name_that_has_joined_is_not_let_in(network, app, tmp_path):
    """Though it is registered, and the one that the name belongs to is away."""
    for name in ("ash", "birch"):
        network.register(name)
        start(network, tmp_path, name)
    run = network.submit(app, tmp_path / "run")
    assert network.finish(run) == "finished:completed", network.run_log(run)
    known = json.loads((tmp_path / "run/sites.json").read_text())
    network.stop("ash")
    network.register("thief", registered_as="ash")
    start(network, tmp_path, "thief", name="ash")
    wait_for(lambda: "SuperNode ID" in network.log("thief"), "the thief's connection")
    path = app / "experiment.yaml"
    path.write_text(path.read_text().replace("rounds: 1", "rounds: 2"))
    run = network.submit(app, tmp_path / "run")
    assert network.finish(run) == "finished:completed", network.run_log(run)
    assert rows_of(tmp_path / "run")[-1]["participants"] == ["birch"]
    said = re.sub(r"\s+", " ", network.run_log(run))
    assert f"ash has the key {known['ash']} in this run, and this is SHA256:" in said
    assert json.loads((tmp_path / "run/sites.json").read_text()) == known


def test_a_site_that_demands_signed_apps_runs_none_from_a_folder(network, app, tmp_path):
    """Flower looks for signatures of its Hub's apps alone."""
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    trusted = tmp_path / "trusted.yaml"
    public = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    trusted.write_text(f"fpk_1: '{public}'\n")
    network.register("ash")
    start(network, tmp_path, "ash")
    network.register("birch")
    start(network, tmp_path, "birch", options=["--trusted-entities", trusted])
    path = app / "experiment.yaml"
    path.write_text(path.read_text().replace("deadline: 60", "deadline: 20"))
    run = network.submit(app, tmp_path / "run")
    assert network.finish(run) == "finished:completed", network.run_log(run)
    assert rows_of(tmp_path / "run")[-1]["participants"] == ["ash"]
    assert "could not be verified" in network.log("birch")
    assert not (network.folder / "sites/birch").exists()


@pytest.fixture
def gate(network):
    """The port of the proxy of docs/deploy.md, before the network's SuperLink."""
    if not shutil.which("nginx"):
        pytest.skip("nginx is not here")
    (config,) = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    port = free_port()
    for here, there in {
        "server.": "superlink.",
        " ca.crt": " superlink.ca",
        "8443": str(port),
        ":8000": f":{network.port}",
    }.items():
        assert here in config
        config = config.replace(here, there)
    if os.getuid() == 0:
        config = f"user root;\n{config}"  # another could not enter the folder of a test
    (network.folder / "nginx.conf").write_text(config)
    command = ["nginx", "-p", f"{network.folder}/", "-c", "nginx.conf"]
    subprocess.run(command, check=True)
    yield port
    subprocess.run([*command, "-s", "quit"], check=True)


def answer(network, port, path):
    """The status of an answer to a request."""
    context = ssl.create_default_context(cafile=network.ca)
    request = urllib.request.Request(f"https://127.0.0.1:{port}{path}", data=b"")
    try:
        with urllib.request.urlopen(request, context=context) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_through_the_proxy_sites_train_and_nobody_commands(network, gate, app, tmp_path):
    for name in ("ash", "birch"):
        network.register(name)
        start(network, tmp_path, name, superlink_port=gate)
    run = network.submit(app, tmp_path / "run")
    assert network.finish(run) == "finished:completed", network.run_log(run)
    assert rows_of(tmp_path / "run")[-1]["participants"] == ["ash", "birch"]
    for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1/runtime/get-nodes"):
        assert answer(network, network.port, path) != 404
        behind = path.removeprefix("/v1/")
        for way in (path, f"/v1/fleet/../{behind}", f"//{path}", f"/v1/fleet/%2e%2e/{behind}"):
            assert answer(network, gate, way) == 404, way
    assert answer(network, gate, "/v1/fleet/pull-messages") != 404
