"""Clients' own models and test rows on Flower: both stay at their sites, which send scores."""

import json
import shutil
from pathlib import Path

import pytest
from flwr.app import ConfigRecord
from support.runs import rows_of
from test_flower_site import (  # noqa: F401
    CLIENTS,
    _no_waiting,
    identity,
    ledger,
    make,
)

from hedgerow.engines.flower.messages import Action, Parcel, Reply
from hedgerow.engines.flower.server import _main
from hedgerow.errors import UserError
from hedgerow.experiment import load

METHODS = {
    "fedsa_lora": ["method={name: fedsa_lora, ranks: 2}"],
    "ditto": ["method={name: ditto, ranks: 2}"],
    "flora": [],
}


@pytest.fixture
def tested(make, tmp_path):  # noqa: F811
    """An app whose sites have test rows of their own, each in a file that it alone names."""

    def tested(*changes):
        for index in range(3):
            rows = [
                {"instruction": f"Say {n}", "output": "abc"[index] * 3} for n in range(index + 2)
            ]
            (tmp_path / f"own_{index}.json").write_text(json.dumps(rows))
        made = make("data.client_test=own_{}.json", *changes)
        for index, node in enumerate(made.nodes):
            node.config["test"] = str(tmp_path / f"own_{index}.json")
        return made

    return tested


@pytest.mark.parametrize("name", METHODS)
def test_sites_score_as_one_process_does(tested, hedgerow, tmp_path, name):
    changes = [*METHODS[name], "federation.rounds=3", "federation.clients_per_round=2"]
    made = tested(*changes)
    local = tmp_path / "local"
    given = ["data.client_test=own_{}.json", "data.test=null", *changes, "--out", local]
    assert hedgerow("run", made.path, *given).code == 0
    rows = made.run()
    assert ledger(made.out) == ledger(local)
    expected = rows_of(local)
    for row, other in zip(rows, expected, strict=True):
        assert list(row["eval_loss_by_client"]) == CLIENTS
        for key in row.keys() - {key for key in row if key.endswith("seconds")}:
            assert row[key] == other[key], key
    # Nothing of a client's own is at the coordinator.
    assert not (made.out / "clients").exists()
    assert "own_" not in (made.out / "experiment.yaml").read_text()


@pytest.mark.parametrize("name", ["fedsa_lora", "ditto"])
def test_a_client_s_own_model_is_looked_at_at_its_site(tested, hedgerow, tmp_path, name):
    made = tested(*METHODS[name], "federation.rounds=2")
    rows = made.run()
    base = f"model.path={made.nodes[0].config['model']}"
    named = ["--to", "merged", "--client", CLIENTS[1]]
    result = hedgerow("export", made.out, tmp_path / "out", base, *named)
    assert (result.code, "lies where it trains" in result.err) == (2, True)
    for node, client in zip(made.nodes, CLIENTS, strict=True):
        (site,) = Path(node.config["folder"]).glob("*/experiment.yaml")
        named = ["--client", client]
        scores = json.loads(hedgerow("evaluate", site.parent, *named, "--json").out)
        assert scores["eval_loss_by_client"] == {client: rows[-1]["eval_loss_by_client"][client]}
        out = tmp_path / client
        assert hedgerow("export", site.parent, out, "--to", "adapter", *named).code == 0


def test_a_share_of_a_site_s_rows_is_held_out_there(make, hedgerow, tmp_path):  # noqa: F811
    changes = [*METHODS["ditto"], "data.client_test=0.3", "federation.rounds=2"]
    made = make(*changes)
    local = tmp_path / "local"
    assert hedgerow("run", made.path, "data.test=null", *changes, "--out", local).code == 0
    rows = made.run()
    assert ledger(made.out) == ledger(local)
    expected = [row["eval_loss_by_client"] for row in rows_of(local)]
    assert [row["eval_loss_by_client"] for row in rows] == expected


def test_a_site_without_test_rows_has_no_score(tested, capsys):
    made = tested(*METHODS["ditto"], "federation.rounds=1")
    del made.nodes[0].config["test"]
    row = made.run()[-1]
    assert list(row["eval_loss_by_client"]) == CLIENTS[1:]
    assert 'the node config has no test="…"' in capsys.readouterr().err


def test_a_site_that_is_away_has_no_score_and_holds_up_nobody(tested, capsys):
    made = tested("federation.rounds=2")
    away = made.nodes[2]

    def before(message):
        away.up = message.metadata.message_type != Action.score

    made.grid.before = before
    rows = made.run()
    assert all(list(row["eval_loss_by_client"]) == CLIENTS[:2] for row in rows)
    assert "client-002 has no score on its own test rows" in " ".join(
        capsys.readouterr().out.split()
    )
    assert rows[-1]["participants"] == CLIENTS[:2]


def words(content):
    return json.loads(content.config_records["words"]["json"])


WRONG = {
    "another score": {"rows": 2, "values": {"eval_loss": 1.0, "mine": 2.0}},
    "not a number": {"rows": 2, "values": {"eval_loss": "1.0"}},
    "NaN": {"rows": 2, "values": {"eval_loss": float("nan")}},
    "infinity": {"rows": 2, "values": {"eval_loss": float("inf")}},
    "no rows": {"rows": 0, "values": {"eval_loss": 1.0}},
    "a fraction of a row": {"rows": 1.5, "values": {"eval_loss": 1.0}},
    "too many rows": {"rows": 2**63, "values": {"eval_loss": 1.0}},
    "no count": {"values": {"eval_loss": 1.0}},
    "rows of data": {"rows": 2, "values": {"eval_loss": 1.0}, "data": ["x"]},
    "a list": [1.0],
    "too many": {"rows": 2, "values": {f"score{n}": 1.0 for n in range(1000)}},
    "a long name": {"rows": 2, "values": {"x" * 100_000: 1.0}},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_scores_are_refused_with_their_sender_s_name(tested, wrong, capsys):
    made = tested("federation.rounds=1")

    def answer(content):
        said = words(content)
        if "scores" in said:
            content["words"] = ConfigRecord({"json": json.dumps(said | {"scores": wrong})})
        return content

    made.nodes[1].answer = answer
    rows = made.run()
    assert all(list(row["eval_loss_by_client"]) == [CLIENTS[0], CLIENTS[2]] for row in rows)
    said = " ".join(capsys.readouterr().out.split())
    assert "client-001 has no score on its own test rows" in said
    assert len(said) < 10_000


def test_scores_that_are_no_number_arrive_as_none(tested, monkeypatch):
    """As of a model that has diverged: they are left out on the way, and null in the row."""
    made = tested("federation.rounds=1")

    def answer(content):
        said = words(content)
        if "scores" in said:
            said["scores"]["values"] = {}
            content["words"] = ConfigRecord({"json": json.dumps(said)})
        Parcel(content, Reply)
        return content

    made.nodes[0].answer = answer
    row = made.run()[-1]
    assert row["eval_loss_by_client"][CLIENTS[0]] is None
    assert row["eval_loss_over_clients"] is None


def test_a_site_catches_up_before_it_scores(tested, hedgerow, tmp_path):
    """Its copy of the ledger is lost; without a global model its own part is what it has kept."""
    for name in ("flora", "fedsa_lora"):
        for folder in ("app", "sites", "run", "inbox"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        made = tested(*METHODS[name], "federation.rounds=2")
        lost = Path(made.nodes[0].config["folder"])

        def before(message, lost=lost):
            if message.metadata.message_type == Action.score:
                for folder in lost.glob("*/ledger"):
                    shutil.rmtree(folder)

        made.grid.before = before
        rows = made.run()
        assert all(list(row["eval_loss_by_client"]) == CLIENTS for row in rows)


def test_test_data_on_the_coordinator_need_a_global_model(make, tmp_path, monkeypatch, tiny_model):  # noqa: F811
    from types import SimpleNamespace

    make(*METHODS["fedsa_lora"])
    monkeypatch.syspath_prepend(tmp_path / "app")
    config = {"out": str(tmp_path / "out"), "model": str(tiny_model), "test": "test.json"}
    with pytest.raises(UserError, match="has no global model"):
        _main(None, SimpleNamespace(run_config=config))
    assert not (tmp_path / "out").exists()


def test_the_app_names_no_file_of_test_rows(tested, tmp_path):
    tested()
    data = load(tmp_path / "app" / "experiment.yaml").data
    assert isinstance(data.client_test, list)
    assert [Path(test.file).name for test in data.client_test] == [
        f"{c}-test.json" for c in CLIENTS
    ]
