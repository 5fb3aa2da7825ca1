"""The Flower engine on a real network: processes on loopback, with TLS and node authentication."""

import json

import pytest
from support.experiments import SITES, dolly
from support.network import Network
from support.runs import entries, rows_of, run_hedgerow, tensorboard_of

RANKS = [16, 8, 4, 2]


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
    [
        pytest.param({"name": "flora", "ranks": RANKS}, id="flora"),
        pytest.param(
            {"name": "flora", "ranks": RANKS, "upload_bits": 8, "compress": {"rank": 24}},
            id="flora, 8 bits and a carried cut",
            marks=pytest.mark.slow,
        ),
        pytest.param({"name": "ferret", "server": "nesterov"}, id="ferret", marks=pytest.mark.slow),
        pytest.param(
            {
                **{"name": "fedavg", "up": "top_k", "error_feedback": 0.9, "server": "adam"},
                **{"down": "bits", "broadcast_feedback": True, "weights": "uniform"},
            },
            id="fedavg in codecs",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_network_s_ledger_is_the_local_one_s(network, shared, hedgerow, tmp_path, method):
    path = dolly(shared, tmp_path / "dolly.yaml", method)
    assert hedgerow("run", path, "--out", tmp_path / "local").code == 0
    assert hedgerow("flower", "init", path, tmp_path / "app").code == 0
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
    assert hedgerow("ledger", "verify", network.folder / "sites" / "north" / name).code == 0


@pytest.mark.slow
def test_the_simulation_s_ledger_is_the_local_one_s(experiment, hedgerow, tmp_path):
    """One divided source, on Ray's actors; the second half after a stop, and tracked."""
    rows = [{"instruction": f"Say {i}", "output": f"{i % 3}" * 3} for i in range(40)]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    source = [
        "data.clients=null",
        f"data.source={tmp_path / 'all.json'}",
        "data.partition={kind: iid, clients: 3}",
    ]
    path = experiment(federation={"rounds": 4, "clients_per_round": 2}, method={"name": "ferret"})
    path.write_text(path.read_text().replace("ranks:\n  - 4\n  - 2\n  - 1\n", "compression: 40\n"))
    first = [path, *source, "federation.rounds=2"]
    assert hedgerow("run", path, *source, "--out", tmp_path / "local").code == 0
    run_hedgerow("run", *first, "--engine", "flower", "--out", tmp_path / "flower")
    tracked = ["tracking.to=tensorboard", "--engine", "flower"]
    more = [*tracked, "--resume", "--out", tmp_path / "flower"]
    run_hedgerow("run", path, *source, *more)
    assert len(entries(tmp_path / "local")) == 4
    assert entries(tmp_path / "flower") == entries(tmp_path / "local")
    keys = ("round", "eval_loss", "train_loss", "bytes_up", "bytes_down", "participants")
    assert [[row[key] for key in keys] for row in rows_of(tmp_path / "flower")] == [
        [row[key] for key in keys] for row in rows_of(tmp_path / "local")
    ]
    told = tensorboard_of(tmp_path / "flower")["eval_loss"]
    losses = [row["eval_loss"] for row in rows_of(tmp_path / "flower")]
    assert told == [(round, pytest.approx(loss)) for round, loss in enumerate(losses)]


@pytest.mark.slow
def test_a_private_simulation_s_ledger_is_the_local_one_s(experiment, hedgerow, tmp_path):
    """The server's noise is the same wherever clients train, and no site refuses its weights."""
    federation = {"rounds": 2, "clients_per_round": 2}
    path = experiment(federation=federation, method={"name": "fedavg"})
    path.write_text(path.read_text().replace("ranks:\n  - 4\n  - 2\n  - 1\n", "up: bits\n"))
    privacy = "privacy={level: client, clip: 0.1, epsilon: 8, delta: 1e-3, seed: 3}"
    assert hedgerow("run", path, privacy, "--out", tmp_path / "local").code == 0
    run_hedgerow("run", path, privacy, "--engine", "flower", "--out", tmp_path / "flower")
    assert len(entries(tmp_path / "local")) == 2
    assert entries(tmp_path / "flower") == entries(tmp_path / "local")
    local, flower = rows_of(tmp_path / "local"), rows_of(tmp_path / "flower")
    for rows in (local, flower):
        assert [row.get("epsilon") is not None for row in rows] == [False, True, True]
    assert [row["participants"] for row in local] == [row["participants"] for row in flower]
    assert {row["client_sampling_rate"] for row in flower[1:]} == {2 / 3}


@pytest.mark.slow
def test_a_simulation_has_secure_sums(experiment, hedgerow, tmp_path):
    """Whatever the number of cores, each client's messages meet the keys that it has made."""
    path = experiment(federation={"rounds": 2, "secure": True}, method={"name": "fedavg"})
    path.write_text(path.read_text().replace("ranks:\n  - 4\n  - 2\n  - 1\n", "up: bits\n"))
    assert hedgerow("run", path, "--out", tmp_path / "local").code == 0
    run_hedgerow("run", path, "--engine", "flower", "--out", tmp_path / "flower")
    assert entries(tmp_path / "flower") == entries(tmp_path / "local")


def test_secure_sums_are_not_simulated_on_a_cluster(experiment, hedgerow, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    out, secure = tmp_path / "run", ["method=fedavg", "federation.secure=true"]
    result = hedgerow("run", experiment(), *secure, "--engine", "flower", "--out", out)
    assert result.code == 2
    assert "leave RAY_ADDRESS out" in result.err
    assert not out.exists()


def test_a_mistake_in_a_simulation_is_one_sentence(experiment, hedgerow, tmp_path):
    out = tmp_path / "run"
    path = experiment()
    result = hedgerow("run", path, "method.name=standalone", "--engine", "flower", "--out", out)
    assert result.code == 2
    assert "run it with --engine local" in result.err
    assert not out.exists()
