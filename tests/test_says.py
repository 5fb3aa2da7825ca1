"""What clients say beside their updates (`federation.says`), in every place where it could be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from support.runs import ledger_bytes, rows_of

from hedgerow.errors import ClientFailed, Diverged, UserError
from hedgerow.experiment import load
from hedgerow.ledger import Ledger
from hedgerow.settings import SaysSettings
from hedgerow.training import first_order

SIZES = [5, 9, 14]
"""Numbers of the three clients' examples."""
AS_SAID = {"exact": SIZES, "rounded": [8, 16, 16], "withheld": [1, 1, 1]}


@given(st.integers(1, 2**60), st.integers(1, 2**60))
def test_a_rounded_number_is_a_power_of_two_within_a_factor_of_two(one, other):
    rounded = SaysSettings(examples="rounded")
    said = rounded.count(one)
    assert said & (said - 1) == 0
    assert one <= said < 2 * one
    assert (one <= other) <= (said <= rounded.count(other))
    assert SaysSettings(examples="exact").count(one) == one
    assert SaysSettings(examples="withheld").count(one) == 1


def test_a_failure_is_said_in_full_or_by_its_kind():
    error = Diverged("its loss was nan at step 7")
    assert SaysSettings(failures="full").sentence(error) == str(error)
    assert SaysSettings(failures="kind").sentence(error) == "its training diverged"
    assert SaysSettings(failures="kind").sentence(ClientFailed("3")) == "its own log says why"


# --- in one process -------------------------------------------------------------------------------


@pytest.fixture
def run(hedgerow, experiment, tmp_path):
    """Run the tiny experiment with changes; returns its directory."""

    def run(name, *changes):
        result = hedgerow("run", experiment(), *changes, "--out", tmp_path / name)
        assert result.code == 0, result.err
        return tmp_path / name

    return run


def entries(directory):
    return list(Ledger.open(directory / "ledger").entries())


@pytest.mark.parametrize("method", ["flora", "fedavg", "scaffold"])
def test_without_losses_there_are_none_and_the_model_is_the_same(run, hedgerow, method):
    changes = [f"method.name={method}", "federation.keep_updates=true"]
    plain = run("plain", *changes)
    silent = run("silent", *changes, "federation.says.losses=false")
    for one, other in zip(entries(plain), entries(silent), strict=True):
        assert "train_loss" in one.metrics
        assert "train_loss" not in other.metrics
        assert one.participants == other.participants
        assert all((one.tensors[n] == other.tensors[n]).all() for n in one.tensors)
    for before, row in zip(rows_of(plain), rows_of(silent), strict=True):
        assert row["train_loss"] is None
        assert "train_loss_by_client" not in row
        assert row["eval_loss"] == before["eval_loss"]
        for sent in row.get("sent_by_client", {}).values():
            assert "train_loss" not in sent["said"]
    updates = list((silent / "updates").rglob("*.safetensors"))
    assert len(updates) == 6
    for path in updates:
        with safe_open(path, "pt") as file:
            assert "train_loss" not in file.metadata()
    assert hedgerow("ledger", "show", silent).code == 0
    # And it goes on, as others do.
    resumed = [silent.parent / "experiment.yaml", *changes, "federation.rounds=3"]
    again = hedgerow("run", *resumed, "--out", silent, "--resume")
    assert (again.code, "says.losses=false, not true" in again.err) == (2, True)
    resumed.append("federation.says.losses=false")
    assert hedgerow("run", *resumed, "--out", silent, "--resume").code == 0
    assert len(entries(silent)) == 3


@pytest.mark.parametrize("examples", AS_SAID)
@pytest.mark.parametrize("method", ["flora", "fedavg"])
def test_clients_weigh_by_what_they_say(run, method, examples):
    changes = [f"method.name={method}", "federation.keep_updates=true"]
    directory = run("said", *changes, f"federation.says.examples={examples}")
    said = AS_SAID[examples]
    for entry in entries(directory):
        assert [p.num_examples for p in entry.participants] == said
        shares = [number / sum(said) for number in said]
        assert [p.weight for p in entry.participants] == pytest.approx(shares)
    for index, number in enumerate(said):
        path = directory / f"updates/round-0001/client-{index:03d}.safetensors"
        with safe_open(path, "pt") as file:
            assert file.metadata()["num_examples"] == str(number)
    if examples == "withheld":
        key = "scaling" if method == "flora" else "weights"
        uniform = run("uniform", *changes, f"method.{key}=uniform")
        for one, other in zip(entries(directory), entries(uniform), strict=True):
            for name in one.tensors:
                assert one.tensors[name].allclose(other.tensors[name], atol=1e-6)


def test_by_default_a_run_is_what_it_was(run):
    plain = run("plain")
    changes = "{losses: true, examples: exact, failures: full}"
    assert ledger_bytes(plain) == ledger_bytes(run("said", f"federation.says={changes}"))


def test_a_mean_score_over_clients_tells_no_more_of_their_test_rows(run):
    changes = ["method.name=ditto", "method.ranks=2", "data.client_test=0.3"]
    exact, rounded = (
        rows_of(run(how, *changes, f"federation.says.examples={how}"))
        for how in ("exact", "rounded")
    )
    assert exact[0]["test_rows_by_client"] == {
        f"client-{i:03d}": n for i, n in enumerate([2, 3, 4])
    }
    assert list(rounded[0]["test_rows_by_client"].values()) == [2, 4, 4]


@pytest.fixture
def diverging(monkeypatch):
    """Have the client of nine examples diverge."""
    trained = first_order.continue_training

    def fails_for_nine_examples(job, parameters, state, **options):
        if len(job.data) == 9:
            raise Diverged("its loss was nan at step 1")
        return trained(job, parameters, state, **options)

    monkeypatch.setattr(first_order, "continue_training", fails_for_nine_examples)


def test_a_failure_by_its_kind_is_in_full_on_the_screen_alone(
    diverging, hedgerow, experiment, tmp_path
):
    out = tmp_path / "run"
    change = "federation.says.failures=kind"
    result = hedgerow("run", experiment(), change, "federation.rounds=1", "--out", out)
    assert result.code == 0, result.err
    assert rows_of(out)[1]["failures"] == {"client-001": "its training diverged"}
    assert "client-001: round 1: its loss was nan at step 1" in result.out
    assert "nan" not in (out / "metrics.jsonl").read_text()


# --- with privacy ---------------------------------------------------------------------------------

LEVEL = "privacy={{level: {}, clip: 0.5, noise_multiplier: 1.0, delta: 1.0e-3, seed: 1}}"


def test_counts_are_withheld_where_they_count_for_nothing(run):
    private = [LEVEL.format("client"), "method.name=fedavg"]
    kept = [*private, "federation.keep_updates=true"]
    default = run("default", *kept)
    exact = run("exact", *private, "federation.says.examples=exact")
    assert ledger_bytes(default) == ledger_bytes(exact)  # to others nothing was said of them
    for path in (default / "updates").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["num_examples"] == "1"


@pytest.mark.parametrize("examples", ["rounded", "withheld"])
def test_an_account_goes_by_the_number_that_is_not_said(run, examples):
    private = [LEVEL.format("example"), "method.name=fedavg", "federation.keep_updates=true"]
    exact = run("exact", *private)
    blurred = run("blurred", *private, f"federation.says.examples={examples}")
    for one, other in zip(rows_of(exact), rows_of(blurred), strict=True):
        assert one.get("epsilon") == other.get("epsilon")
    for path in (exact / "updates").rglob("*.safetensors"):
        with safe_open(path, "pt") as first:
            other = blurred / path.relative_to(exact)
            with safe_open(other, "pt") as second:
                assert first.metadata()["epsilon"] == second.metadata()["epsilon"]
                for name in first.keys():  # noqa: SIM118
                    same = (first.get_tensor(name) == second.get_tensor(name)).all()
                    assert same or "round-0001" not in str(path)


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "losses under privacy": (
        [LEVEL.format("example"), "federation.says.losses=true"],
        "federation.says.losses: a training loss would leave a client without noise",
    ),
    "losses that weights need": (
        ["method={name: flora, scaling: adaptive}", "federation.says.losses=false"],
        "federation.says.losses: updates of flora with these options state losses",
    ),
    "weights by size of nobody": (
        ["federation={weights: size, says: {examples: withheld}}"],
        "federation.says.examples: weights by size need numbers of examples",
    ),
    "steps that tell": (
        ["method=fedzo", "training={epochs: 1}", "federation.says.examples=rounded"],
        "federation.says.examples: with training.epochs, an update of fedzo tells",
    ),
    "another word": (["federation.says.examples=roughly"], "must be exact, rounded or withheld"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_withheld_is_one_sentence(hedgerow, experiment, tmp_path, name):
    changes, says = MISTAKES[name]
    result = hedgerow("run", experiment(), *changes, "--out", tmp_path / "run")
    assert (result.code, says in result.err) == (2, True), result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_the_sentences_advise_is_accepted(experiment):
    path = experiment()
    load(path, ["method=fedzo", "federation.says.examples=rounded"])
    load(path, ["federation={weights: uniform, says: {examples: withheld}}"])
    load(path, ["method={name: flora, scaling: uniform}", "federation.says.losses=false"])
    with pytest.raises(UserError, match="scaling"):
        load(path, ["method={name: flora, scaling: adaptive}", "federation.says.losses=false"])
