"""The round loop with fleets that are late, out of order, or not there."""

import math
import random
from dataclasses import replace

import pytest
from support.experiments import dolly
from support.runs import rows_of
from support.runs import run_with as run

from hedgerow.engines import local
from hedgerow.errors import RunFailed, UserError
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult, Unwatched
from hedgerow.runs.scoring import ClientScores, over_clients, plausible
from hedgerow.wire import Update


class Shuffled(local.LocalFleet):
    """Its clients answer in another order every time."""

    draw = random.Random(0)

    def train(self, round, parent, clients, clock):
        answers = list(super().train(round, parent, clients, clock))
        self.draw.shuffle(answers)
        yield from answers


class Flaky(local.LocalFleet):
    """Three of ten clients do not answer, other ones in every round."""

    draw = random.Random(0)

    def train(self, round, parent, clients, clock):
        lost = self.draw.sample(list(clients), -(-3 * len(clients) // 10))
        present = [client for client in clients if client not in lost]
        yield from (ClientResult(client, failure="gone", absent=True) for client in lost)
        yield from super().train(round, parent, present, clock)


@pytest.mark.parametrize("method", ["flora", "fedavg", "ferret"])
def test_a_ledger_does_not_depend_on_who_is_faster(experiment, tmp_path, method):
    changes = [f"method.name={method}", "federation.rounds=3"]
    changes += ["method.compression=40"] if method == "ferret" else []
    loaded = load(experiment(), changes)
    run(local.LocalFleet, loaded, tmp_path / "one")
    run(Shuffled, loaded, tmp_path / "other")
    for path in (tmp_path / "one/ledger").iterdir():
        assert path.read_bytes() == (tmp_path / "other/ledger" / path.name).read_bytes()


def test_a_run_that_has_begun_meanwhile_is_not_written_over(experiment, tmp_path):
    """Between the check that a folder is free and its lock, another process may come first."""
    path, out = experiment(), tmp_path / "run"
    run(local.LocalFleet, load(path), out)
    files = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="exists already"):
        run(local.LocalFleet, load(path, ["federation.seed=1"]), out)
    assert files == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_who_answers_at_the_second_try_is_in_the_round(experiment, tmp_path):
    class Late(local.LocalFleet):
        asked: list[list[str]] = []  # noqa: RUF012

        def train(self, round, parent, clients, clock):
            self.asked.append([client.name for client in clients])
            if len(self.asked) == 1:
                yield ClientResult(clients[0], failure="gone", absent=True)
                clients = clients[1:]
            yield from super().train(round, parent, clients, clock)

    loaded = load(experiment(), ["federation.min_clients=3", "federation.backoff=0"])
    rows = run(Late, loaded, tmp_path / "late")
    assert Late.asked[:2] == [["client-000", "client-001", "client-002"], ["client-000"]]
    assert [row["failed"] for row in rows] == [0, 0, 0]
    run(local.LocalFleet, loaded, tmp_path / "whole")
    for path in (tmp_path / "whole/ledger").iterdir():
        assert path.read_bytes() == (tmp_path / "late/ledger" / path.name).read_bytes()


@pytest.mark.parametrize("lost", [{2}, {2, 3, 4}])
def test_what_a_client_sent_in_vain_is_owed_as_before(experiment, tmp_path, lost):
    """A round in which its update is lost is for a client as one that it was away in."""

    class Away(local.LocalFleet):
        def train(self, round, parent, clients, clock):
            if round in lost:
                first, *clients = clients
                yield ClientResult(first, failure="gone")
            yield from super().train(round, parent, clients, clock)

    class Losing(local.LocalFleet):
        def train(self, round, parent, clients, clock):
            for result in super().train(round, parent, clients, clock):
                is_lost = round in lost and result.client == clients[0]
                yield ClientResult(result.client, failure="gone") if is_lost else result

    changes = ["method={name: fedavg, up: top_k, error_feedback: true}"]
    changes += ["training.keep_optimizer=true", "federation.rounds=5", "federation.min_clients=2"]
    loaded = load(experiment(), changes)
    for fleet in (Away, Losing):
        run(fleet, loaded, tmp_path / fleet.__name__)
    for path in (tmp_path / "Away/ledger").iterdir():
        assert path.read_bytes() == (tmp_path / "Losing/ledger" / path.name).read_bytes()


@pytest.mark.parametrize("loss", [1e10, -1e10])
def test_a_training_loss_that_cannot_be_is_left_out_of_the_mean(experiment, tmp_path, loss):
    class Lying(local.LocalFleet):
        def train(self, round, parent, clients, clock):
            for result in super().train(round, parent, clients, clock):
                update = Update.from_bytes(result.update)
                if result.client.name == "client-001":
                    update = replace(update, train_loss=loss)
                yield ClientResult(result.client, update.to_bytes())

    class Listening(Unwatched):
        said: list[str] = []  # noqa: RUF012

        def say(self, sentence):
            self.said.append(sentence)

    loaded, out = load(experiment(), ["federation.rounds=1"]), tmp_path / "run"
    local.run(loaded, out, Listening(), fleet=Lying)
    row = rows_of(out)[1]
    losses = row["train_loss_by_client"]
    assert losses["client-001"] == loss
    honest = (5 * losses["client-000"] + 14 * losses["client-002"]) / 19
    assert row["train_loss"] == pytest.approx(honest)
    assert [each for each in Listening.said if "client-001 says that its training loss" in each]


def test_what_a_client_makes_up_is_left_out_of_means_whatever_their_scale():
    assert plausible({"a": 3.0, "b": -1e10}) == {"a": 3.0}
    assert plausible({"a": 0.0, "b": 0.0, "c": 13.0}).keys() == {"a", "b", "c"}
    assert plausible({"a": 5e5, "b": 4e5, "c": 9e9}).keys() == {"a", "b"}  # summed, not mean
    assert plausible({"a": 1e10}) == {"a": 1e10}
    assert plausible({"a": 1.0, "b": math.nan}).keys() == {"a", "b"}
    assert plausible({}) == {}


def test_a_mean_of_clients_scores_is_of_those_that_can_be():
    said = {"a": 2.0, "b": 4.0, "c": -1e10}
    found = {name: ClientScores(3, {"eval_loss": value}) for name, value in said.items()}
    row = over_clients(found, ["loss"])
    assert row["eval_loss_by_client"] == said
    assert row["eval_loss_over_clients"] == 3


def test_a_round_that_cannot_get_enough_says_so(experiment, tmp_path):
    loaded = load(experiment(), ["federation.min_clients=3", "federation.backoff=0"])
    with pytest.raises(RunFailed) as failure:
        run(Flaky, loaded, tmp_path / "run")
    words = "round 1 has 2 of the 3 usable updates that it needs from its 3 clients in 3 tries"
    assert words in str(failure.value)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("method", ["flora", "ferret"])
def test_thirty_percent_failing_cost_little(shared, tmp_path, method):
    ranks = {"ranks": [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]} if method == "flora" else {}
    path = dolly(
        shared,
        tmp_path / "dolly.yaml",
        {"name": method} | ranks,
        data={
            "clients": str(shared / "data/dolly/local_training_{}.json"),
            "test": str(shared / "data/dolly/global_test.json"),
        },
        training={"steps": 5},
        federation={"rounds": 20, "min_clients": 5},
        evaluation={"every": 20},
    )
    experiment = load(path)
    whole = run(local.LocalFleet, experiment, tmp_path / "whole")[-1]
    flaky = run(Flaky, experiment, tmp_path / "flaky")
    assert [row["failed"] for row in flaky[1:]] == [3] * 20
    ratio = flaky[-1]["eval_loss"] / whole["eval_loss"]
    print(f"{method}: loss {whole['eval_loss']:.4f}, with failures {flaky[-1]['eval_loss']:.4f}")
    assert abs(ratio - 1) < 0.03
