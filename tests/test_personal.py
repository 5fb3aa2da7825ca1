"""Clients with test rows of their own, and models of their own that live with them."""

import json
import shutil

import pytest
import torch
from support.runs import ledger_bytes, rows_of

import hedgerow as hr
from hedgerow.evaluation.metrics import Score
from hedgerow.experiment import load
from hedgerow.ledger import Ledger
from hedgerow.model import Model
from hedgerow.reporting.by_client import Table
from hedgerow.runs.preparation import prepare

CLIENTS = ["client-000", "client-001", "client-002"]
METHODS = ["fedsa_lora", "ditto", "fedit", "standalone"]
PERSONAL = ["fedsa_lora", "ditto"]


@pytest.fixture
def tested(experiment, tmp_path):
    """The experiment on three clients, each with a file of test rows."""

    def write(method, **sections):
        for index in range(3):
            rows = [
                {"instruction": f"Say {n}", "output": "abc"[index] * 3} for n in range(index + 2)
            ]
            (tmp_path / f"own_{index}.json").write_text(json.dumps(rows))
        data = {"client_test": "own_{}.json"} | sections.pop("data", {})
        return experiment(method={"name": method, "ranks": 2}, data=data, **sections)

    return write


@pytest.fixture
def run(tested, hedgerow, tmp_path):
    """Run a method's experiment, and return the run's directory."""

    def run(method, *changes, out="run", **sections):
        path = tested(method, **sections)
        result = hedgerow("run", path, *changes, "--out", tmp_path / out)
        assert result.code == 0, result.err
        return tmp_path / out

    return run


def loss(scores, client):
    return scores["eval_loss_by_client"][client]


@pytest.mark.parametrize("method", METHODS)
def test_each_client_is_scored_on_its_own_rows_with_the_model_that_it_has(run, hedgerow, method):
    path = run(method)
    rows = rows_of(path)
    for row in rows:
        losses = row["eval_loss_by_client"]
        assert list(losses) == CLIENTS
        assert row["eval_loss_over_clients"] == pytest.approx(sum(losses.values()) / 3)
        assert row["test_rows_by_client"] == dict(zip(CLIENTS, [2, 3, 4], strict=True))
    assert rows[-1]["eval_loss_over_clients"] < rows[0]["eval_loss_over_clients"]
    scores = json.loads(hedgerow("evaluate", path, "--json").out)
    for key in ("eval_loss", "eval_loss_by_client", "eval_loss_over_clients"):
        assert scores[key] == rows[-1][key]
    own_rows = path.parent / "own_1.json"
    client = [] if method == "fedit" else ["--client", CLIENTS[1]]
    result = hedgerow("evaluate", path, *client, "--data", own_rows, "--json")
    assert "eval_loss_by_client" not in result.out
    assert json.loads(result.out)["eval_loss"] == pytest.approx(loss(rows[-1], CLIENTS[1]))


@pytest.mark.parametrize("method", PERSONAL)
def test_a_client_s_own_model_is_exported_as_it_is_scored(run, hedgerow, method, tmp_path):
    path = run(method)
    expected = {name: loss(rows_of(path)[-1], name) for name in CLIENTS}
    for index, name in enumerate(CLIENTS[:2]):
        data = ["--data", tmp_path / f"own_{index}.json", "data.prompt=plain", "data.max_length=64"]
        for to in ("adapter", "merged"):
            out = tmp_path / f"{name}-{to}"
            assert hedgerow("export", path, out, "--to", to, "--client", name).code == 0
            scores = json.loads(hedgerow("evaluate", out, *data, "--json").out)
            assert scores["eval_loss"] == pytest.approx(expected[name], abs=1e-5)
    one, other = (hr.open_run(path).model(client=name) for name in CLIENTS[:2])
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_what_a_client_keeps_is_not_in_the_ledger(run):
    ledger = Ledger.open(run("fedsa_lora") / "ledger")
    assert all(".lora_A." in name for entry in ledger.entries() for name in entry.tensors)


def test_ditto_s_global_model_is_fedit_s(run):
    """What clients keep changes nothing of what they send."""
    entries = [
        [dict(entry.tensors) for entry in Ledger.open(run(name, out=name) / "ledger").entries()]
        for name in ("ditto", "fedit")
    ]
    for own, other in zip(*entries, strict=True):
        assert all(torch.equal(own[name], other[name]) for name in other)


def test_ditto_s_own_models_are_drawn_to_the_global_one(run, tmp_path):
    """The larger λ is, the nearer they are to where the round began; without it, they go freely."""

    def distance(proximal):
        path = run("ditto", f"method.proximal={proximal}", out=f"run-{proximal}")
        models = [hr.open_run(path).model(client=c) for c in (None, CLIENTS[0])]
        pairs = zip(*(model.parameters() for model in models), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    free, held = distance(0), distance(100)
    assert held < free


def test_a_resumed_run_has_the_same_bytes_and_scores(run, hedgerow, tmp_path):
    for method in PERSONAL:
        whole = run(method, "federation.rounds=3", out=f"{method}-whole")
        part = run(method, "federation.rounds=2", out=f"{method}-part")
        # As after a kill between what clients have saved and the entry.
        for name in CLIENTS:
            folder = whole / "clients" / name
            shutil.copy(folder / "0003.safetensors", part / "clients" / name)
        path = tmp_path / "experiment.yaml"
        result = hedgerow("run", path, "federation.rounds=3", "--out", part, "--resume")
        assert result.code == 0, result.err
        assert [r.sha256 for r in Ledger.open(part / "ledger").records] == [
            r.sha256 for r in Ledger.open(whole / "ledger").records
        ]
        assert rows_of(part)[-1]["eval_loss_by_client"] == rows_of(whole)[-1]["eval_loss_by_client"]
        shutil.rmtree(part / "clients" / CLIENTS[0])
        result = hedgerow("run", path, "federation.rounds=4", "--out", part, "--resume")
        assert (result.code, "lacks the tensors" in result.err) == (2, True)


@pytest.mark.parametrize("method", PERSONAL)
def test_models_that_are_not_here_are_missed_in_a_sentence(run, hedgerow, method, tmp_path):
    path = run(method, "federation.rounds=4")
    early = hedgerow("evaluate", path, "--client", CLIENTS[0], "--round", 1)
    assert early.code == 2
    assert "of the last two rounds" in early.err
    packed = tmp_path / "packed.hedgerow"
    assert hedgerow("export", path, packed, "--to", "ledger").code == 0
    shutil.rmtree(path / "clients")
    here = f"model.path={load(path / 'experiment.yaml').model.path}"
    for place in (path, packed):
        result = hedgerow(
            "export", place, tmp_path / "out", here, "--to", "merged", "--client", CLIENTS[0]
        )
        assert (result.code, "lies where it trains" in result.err) == (2, True)
        assert not (tmp_path / "out").exists()
    result = hedgerow("evaluate", path, "--client", "nobody")
    assert (result.code, "only client-000" in result.err) == (2, True)


def test_without_a_global_model_a_client_is_named(run, hedgerow, tmp_path):
    path = run("fedsa_lora")
    result = hedgerow("export", path, tmp_path / "out", "--to", "adapter")
    assert (result.code, "name one with --client (client-000" in result.err) == (2, True)
    ditto = run("ditto", out="ditto")
    assert hedgerow("export", ditto, tmp_path / "out", "--to", "adapter").code == 0


def test_a_client_that_has_not_trained_yet_has_the_global_model(run, hedgerow):
    """Ditto's has; FedSA-LoRA's is the base, since its B is zero."""
    for method in PERSONAL:
        path = run(method, "federation.clients_per_round=1", "federation.rounds=1", out=method)
        before, after = rows_of(path)
        (trained,) = after["participants"]
        for name in set(CLIENTS) - {trained}:
            expected = loss(before, name)
            if method == "fedsa_lora":
                assert loss(after, name) == expected
            else:
                assert loss(after, name) != expected
        assert loss(after, trained) != loss(before, trained)
        # Who is scored gets the entry.
        assert after["bytes_down"] == 3 * Ledger.open(path / "ledger").records[0].bytes


def test_moments_and_error_feedback_lie_beside_what_is_kept(run):
    up = {"name": "top_k", "k": 8, "tile": 64}
    for method in PERSONAL:
        options = {"name": method, "ranks": 2, "up": up, "error_feedback": True}
        path = run(
            "fedit",
            f"method={json.dumps(options)}",
            "training.keep_optimizer=true",
            "federation.rounds=3",
            out=method,
        )
        rows = rows_of(path)
        assert rows[-1]["eval_loss_over_clients"] < rows[0]["eval_loss_over_clients"]


SHARE = {"client_test": 0.4}


def test_a_share_of_each_client_s_rows_is_held_out(tested, tmp_path):
    whole = prepare(load(tested("fedit", data={"client_test": None})))
    held = prepare(load(tested("fedit", data=SHARE)))
    for name in CLIENTS:
        assert len(held.shards[name]) + len(held.tests[name]) == len(whole.shards[name])
        rows = [
            tuple(examples[i].tokens.tolist())
            for examples in (held.shards[name], held.tests[name].examples)
            for i in range(len(examples))
        ]
        every = [tuple(whole.shards[name][i].tokens.tolist()) for i in range(len(rows))]
        assert sorted(rows) == sorted(every)
    again = prepare(load(tested("fedit", data=SHARE)))
    assert again.tests[CLIENTS[0]].digest() == held.tests[CLIENTS[0]].digest()
    other = prepare(load(tested("fedit", data=SHARE, federation={"seed": 1})))
    assert other.tests[CLIENTS[2]].digest() != held.tests[CLIENTS[2]].digest()


def test_one_row_is_left_to_learn_from(tested, tmp_path):
    path = tested("fedit", data={"client_test": 0.99})
    (tmp_path / "client_0.json").write_text('[{"instruction": "a", "output": "b"}]')
    prepared = prepare(load(path))
    assert [len(prepared.shards[name]) for name in CLIENTS] == [1, 1, 1]
    assert list(prepared.tests) == CLIENTS[1:]
    assert any("client-000 has no test rows" in note for note in prepared.notes)


def test_a_source_that_is_divided_has_a_share_of_each_part(tested, tmp_path):
    rows = [{"instruction": f"{n}", "output": "x", "kind": "ab"[n % 2]} for n in range(20)]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    changes = [
        "data.clients=null",
        "data.source=all.json",
        "data.partition={kind: column, column: kind}",
        "data.client_test=0.2",
    ]
    prepared = prepare(load(tested("fedit"), changes))
    assert {name: len(test) for name, test in prepared.tests.items()} == {"a": 2, "b": 2}


def test_rows_that_cannot_be_scored_are_said(tested, tmp_path):
    path = tested("fedit")
    (tmp_path / "own_1.json").write_text(json.dumps([{"instruction": "x" * 99, "output": "y"}]))
    prepared = prepare(load(path))
    assert list(prepared.tests) == [CLIENTS[0], CLIENTS[2]]
    assert any("client-001 has no score" in note for note in prepared.notes)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("own.json", "has no {}"),
        ("{client-009: own_0.json}", "there is no client 'client-009', did you mean"),
        ("[{name: client-000, file: own_0.json}, {name: client-000, file: a}]", "stands twice"),
        ("1.5", "must be below 1"),
        ("0", "must be above 0"),
        ("gone_{}.json", "does not exist"),
    ],
)
def test_mistakes(tested, hedgerow, tmp_path, value, says):
    result = hedgerow(
        "run", tested("fedit"), f"data.client_test={value}", "--out", tmp_path / "run"
    )
    assert result.code == 2
    assert says in result.err
    assert not (tmp_path / "run").exists()


def test_other_metrics_are_scored_too(run):
    path = run("ditto", "evaluation.metrics=[loss, exact_match]", "federation.rounds=1")
    row = rows_of(path)[-1]
    assert list(row["exact_match_by_client"]) == CLIENTS
    assert "perplexity_by_client" not in row


def test_rows_in_memory(tmp_path, tiny_model):
    rows = [{"instruction": f"{n}", "output": "x"} for n in range(6)]
    run = hr.run(
        model=str(tiny_model),
        clients={"north": rows, "south": rows[:3]},
        data={
            "prompt": "plain",
            "max_length": 64,
            "client_test": {"north": rows[:2], "south": rows[3:]},
        },
        method=hr.methods.Ditto(ranks=2),
        training={"steps": 1},
        rounds=1,
        out=tmp_path / "run",
    )
    row = run.metrics.iloc[-1]
    assert row["test_rows_by_client"] == {"north": 2, "south": 3}
    assert run.model(client="north") is not None
    assert run.evaluate(rows, client="north")["rows"] == 6


def test_the_report_shows_each_client(run, hedgerow, tmp_path):
    paths = [run(method, out=method) for method in ("fedsa_lora", "ditto", "standalone")]
    page = tmp_path / "page.html"
    result = hedgerow("report", *paths, "--out", page)
    assert result.code == 0, result.err
    assert "not shown" not in result.out
    assert "loss on the client's own test rows" in page.read_text().replace("&#39;", "'")


def test_the_base_stays_as_it_was(tested):
    experiment = load(tested("ditto"))
    model = Model.load(experiment.model)
    before = model.fingerprint()
    prepare(experiment, model)
    assert model.fingerprint() == before


def test_a_comparison_shows_which_clients_gain(tested, hedgerow, tmp_path):
    out = tmp_path / "compared"
    methods = "standalone ranks=2,fedit ranks=2,fedsa_lora ranks=2,ditto ranks=2"
    result = hedgerow("compare", tested("fedit"), "--methods", methods, "--seeds", 2, "--out", out)
    assert result.code == 0, result.err
    numbers = json.loads((out / "clients.json").read_text())
    assert len(numbers) == 4 * 3
    losses = {(row["method"], row["client"]): row["eval_loss"] for row in numbers}
    rows = [rows_of(out / "runs" / f"ditto-ranks=2,seed={seed}")[-1] for seed in (0, 1)]
    mean = sum(row["eval_loss_by_client"][CLIENTS[0]] for row in rows) / 2
    assert losses["ditto ranks=2", CLIENTS[0]] == pytest.approx(mean)
    lines = (out / "clients.md").read_text().splitlines()
    header, table = lines[2], {line.split("|")[1].strip(): line for line in lines[4:]}
    assert [name.strip() for name in header.split("|")[2:-1]] == methods.split(",")
    for client in CLIENTS:
        cells = [cell.strip() for cell in table[client].split("|")[2:-1]]
        for method, cell in zip(methods.split(","), cells, strict=True):
            own, alone = losses[method, client], losses["standalone ranks=2", client]
            best = min(loss for (_, name), loss in losses.items() if name == client)
            assert ("+" in cell, "*" in cell) == (own < alone, own == best)
    gains = table["clients that gain"].split("|")[2:-1]
    expected = [
        str(sum(losses[m, c] < losses["standalone ranks=2", c] for c in CLIENTS))
        for m in methods.split(",")[1:]
    ]
    assert [cell.strip() for cell in gains] == ["", *expected]
    assert "mean of clients" in result.out
    page = tmp_path / "page.html"
    assert hedgerow("report", out, "--out", page, "--answers", 0).code == 0
    assert "clients that gain" in page.read_text()


def test_a_score_of_which_more_is_better_is_marked_so():
    score = Score("right", label="right", direction="higher")
    table = Table(score, {"alone": {"a": 1.0}, "together": {"a": 2.0}}, "alone")
    assert table.shown["together"].tolist() == ["2 + *", "2 + *", "1"]


def test_means_are_of_the_clients_that_every_method_scored():
    values = {"alone": {"a": 1.0, "b": 2.0, "c": 9.0}, "together": {"a": 1.0, "b": 4.0}}
    table = Table(Score("right", label="right", direction="higher"), values, "alone")
    mean = table.shown[table.shown["client"] == "mean of the 2 clients that all methods scored"]
    assert mean[["alone", "together"]].values.tolist() == [["1.5", "2.5 + *"]]


def test_a_run_that_goes_on_says_that_clients_own_test_rows_are_others(run, hedgerow, tmp_path):
    path = run("fedit")
    goes_on = [tmp_path / "experiment.yaml", "--out", path, "--resume"]
    (tmp_path / "own_1.json").write_text('[{"instruction": "Say", "output": "another"}]')
    said = hedgerow("run", *goes_on, "federation.rounds=3")
    assert said.code == 0, said.err
    said = " ".join(said.out.split())
    assert "the clients' own test rows are others than before: scores of rounds from 3" in said
    again = hedgerow("run", *goes_on, "federation.rounds=4")
    assert "test rows" not in again.out
    without = hedgerow("run", *goes_on, "federation.rounds=5", "data.client_test=null")
    assert "clients are not scored on rows of their own" in " ".join(without.out.split())


def test_a_comparison_is_scored_on_one_set_of_clients_own_rows(tested, hedgerow, tmp_path):
    compare = ["compare", tested("fedit"), "--out", tmp_path / "compared", "federation.rounds=1"]
    assert hedgerow(*compare, "--methods", "fedit").code == 0
    (tmp_path / "own_1.json").write_text('[{"instruction": "Say", "output": "another"}]')
    result = hedgerow(*compare, "--methods", "fedit,ditto")
    assert result.code == 1
    said = " ".join((result.out + result.err).split())
    assert "data.client_test: the runs of this comparison were scored on other test data" in said


# --- metrics of answers, less often than others --------------------------------------------------


@pytest.mark.parametrize("method", ["fedit", "standalone"])
def test_answers_are_scored_in_rounds_of_their_own(tested, hedgerow, tmp_path, method):
    every = ["evaluation.metrics=[rouge_l, loss]", "federation.rounds=3"]
    path = tested(method)
    for name, more in {"all": [], "some": ["evaluation.answers_every=2"]}.items():
        assert hedgerow("run", path, *every, *more, "--out", tmp_path / name).code == 0
    for whole, row in zip(rows_of(tmp_path / "all"), rows_of(tmp_path / "some"), strict=True):
        scores = {key: value for key, value in whole.items() if "loss" in key or "rouge" in key}
        if row["round"] == 1:
            scores = {key: value for key, value in scores.items() if "rouge" not in key}
        assert {
            key: value for key, value in row.items() if "loss" in key or "rouge" in key
        } == scores
    assert ledger_bytes(tmp_path / "all") == ledger_bytes(tmp_path / "some")
