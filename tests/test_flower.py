"""The Flower engine on a real network: processes on loopback, with TLS and node authentication."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import rows_of
from flower_network import Network

SITES = ["north", "east", "south", "west"]
RANKS = [16, 8, 4, 2]


def dolly(shared, path, method, **sections):
    """An experiment on four of Dolly's clients; the model is where each site says."""
    content = {
        "model": {"path": str(shared / "models/stories260k")},
        "data": {
            "clients": {
                name: str(shared / f"data/dolly/local_training_{index}.json")
                for index, name in enumerate(SITES)
            },
            "fields": {"input": "context", "output": "response"},
            "prompt": "alpaca-short",
            "max_length": 256,
        },
        "method": method,
        "training": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3},
        "federation": {"rounds": 3},
    }
    for name, section in sections.items():
        content[name] = content[name] | section
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def hedgerow(*arguments):
    """The command line in a process of its own, with as many threads as the sites have."""
    result = subprocess.run(
        [sys.executable, "-m", "hedgerow", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result


def entries(run):
    """The bytes of a run's entries, by name."""
    return {path.name: path.read_bytes() for path in (run / "ledger").glob("*.safetensors")}


@pytest.fixture(scope="module")
def network(tmp_path_factory, shared):
    """Four sites with Dolly's data and a copy of the model each."""
    with Network(tmp_path_factory.mktemp("network")) as network:
        for index, name in enumerate(SITES):
            network.register(name)
            network.start_node(
                name,
                data=str(shared / f"data/dolly/local_training_{index}.json"),
                model=str(shared / "models/stories260k"),
            )
        yield network


@pytest.mark.shared
@pytest.mark.parametrize(
    "method",
    [{"name": "flora", "ranks": RANKS}, {"name": "ferret"}],
    ids=["flora", "ferret"],
)
def test_the_network_s_ledger_is_the_local_one_s(network, shared, tmp_path, method):
    path = dolly(shared, tmp_path / "dolly.yaml", method)
    hedgerow("run", path, "--out", tmp_path / "local")
    hedgerow("flower", "init", path, tmp_path / "app")
    text = "".join(file.read_text() for file in (tmp_path / "app").iterdir())
    assert str(shared) not in text  # nobody's paths travel

    run = network.submit(tmp_path / "app", tmp_path / "remote")
    assert network.finish(run) == "finished:completed", network.run_log(run)
    local = entries(tmp_path / "local")
    assert len(local) == 3
    assert entries(tmp_path / "remote") == local
    rows = rows_of(tmp_path / "remote")
    for row, expected in zip(rows, rows_of(tmp_path / "local"), strict=True):
        for key in ("round", "train_loss", "bytes_up", "bytes_down", "clients", "failed"):
            assert row[key] == expected[key], key
    # Every site ends with the whole ledger, and can export it.
    name = json.loads((tmp_path / "remote/flower.json").read_text())["run"]
    for site in SITES:
        assert entries(network.folder / "sites" / site / name) == local
    hedgerow("ledger", "verify", network.folder / "sites" / "north" / name)
