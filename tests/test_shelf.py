"""What runs of a comparison have in common is made once, and is what each would make alone."""

from __future__ import annotations

from collections import Counter

import pytest
import yaml
from support.runs import ledger_bytes, rows_of

from hedgerow.data import ClientData
from hedgerow.data.tokens import Spool
from hedgerow.experiment import load
from hedgerow.ledger import Base
from hedgerow.model import Model
from hedgerow.runs import scoring
from hedgerow.runs.shelf import Shelf
from hedgerow.seeds import Seeds

NINE = (
    "flora,fedit ranks=2,zero_padding,ffa_lora ranks=2,fedavg,ferret compression=40,fedkseed,"
    "fed_sb ranks=2,centralized"
)


@pytest.fixture
def counted(monkeypatch):
    """How often clients' rows are tokenised, and weights hashed."""
    count = Counter()
    tokenize, of = Spool.tokenize, Base.of

    def tokenizes(self, name, *arguments, **options):
        count[name] += 1
        return tokenize(self, name, *arguments, **options)

    def hashes(model):
        count["base"] += 1
        return of(model)

    monkeypatch.setattr(Spool, "tokenize", tokenizes)
    monkeypatch.setattr(Base, "of", hashes)
    return count


def test_nine_methods_tokenise_once(hedgerow, experiment, tmp_path, counted):
    path = experiment(federation={"rounds": 1})
    given = ["--seeds", "2"]
    done = hedgerow("compare", path, *given, "--methods", NINE, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    clients = ["client-000", "client-001", "client-002"]
    test = str(tmp_path / "test.json")
    assert counted == dict.fromkeys([*clients, test, "base"], 1)
    for name, seed in (("fedavg", 1), ("ferret-compression=40", 0)):
        method, _, option = name.partition("-")
        chosen = yaml.safe_dump({"name": method, **dict([option.split("=")] if option else [])})
        alone = [f"method={chosen}", "federation.rounds=1"]
        own = tmp_path / "alone" / name
        done = hedgerow("run", path, *alone, f"federation.seed={seed}", "--out", own)
        assert done.code == 0, done.err
        assert ledger_bytes(own) == ledger_bytes(tmp_path / "out" / "runs" / f"{name},seed={seed}")


def test_runs_of_a_comparison_score_their_base_once(hedgerow, experiment, tmp_path, monkeypatch):
    rounds, evaluate = [], scoring.evaluate

    def evaluates(model, *arguments):
        rounds.append(model.network)
        return evaluate(model, *arguments)

    monkeypatch.setattr(scoring, "evaluate", evaluates)
    path, out = experiment(federation={"rounds": 1}), tmp_path / "out"
    # Standalone's three clients, too, have nothing else before they train.
    methods = "fedavg,ferret,flora evaluation.every=7,standalone"
    grid = ["--methods", methods, "--seeds", "2", "--out", out]
    assert hedgerow("compare", path, *grid).code == 0
    assert len(rounds) == 1 + 3 * 2 + 3 * 2
    found = [rows_of(run)[0] for run in sorted((out / "runs").iterdir())]
    assert len(found) == 8
    base = found[0]["eval_loss"]
    assert base is not None
    for row in found:
        assert row["eval_loss"] == pytest.approx(base, rel=1e-15)  # standalone's is a mean
        for own in row.get("by_client", {}).values():
            assert own["eval_loss"] == base
    assert sum("by_client" in row for row in found) == 2


def examples(shelf, path, model, *overrides, held=None):
    """A client's digest, and what has it."""
    found = shelf.examples(load(path, ["data.test=null", *overrides]), model, held)
    shards, _ = found.tokenized
    return found, shards["client-001"].digest()


def test_other_data_are_other_examples(experiment, tiny_model):
    path = experiment()
    model, shelf = Model.load(load(path, []).model), Shelf()
    first, digest = examples(shelf, path, model)
    assert examples(shelf, path, model, "method.name=fedavg")[0] is first
    assert examples(shelf, path, model, "federation.seed=1")[0] is first
    assert examples(shelf, path, model, "data.max_length=12")[1] != digest
    assert examples(shelf, path, model, "data.loss_on=all")[1] != digest
    again = Model.load(load(path, []).model)
    assert examples(shelf, path, again)[0] is not first  # which may have other tokens


def test_what_chance_divides_is_divided_by_each_seed(experiment, tmp_path):
    path = experiment()
    model, shelf = Model.load(load(path, []).model), Shelf()
    share = "data.client_test=0.4"
    first, digest = examples(shelf, path, model, share)
    other, _ = examples(shelf, path, model, share, "federation.seed=1")
    assert other is not first
    alone = ClientData(load(path, [share]).data, model.tokenizer, Seeds(0))
    assert alone.tokenize("client-001").digest() == digest
