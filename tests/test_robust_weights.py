"""Robust weights: rules on inner products, and what every method makes of weights it is given."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.configurations import METHOD_OPTIONS, method_of
from support.runs import ledger_bytes, rows_of

from hedgerow import lowrank
from hedgerow.engines import local
from hedgerow.engines.local import LocalFleet
from hedgerow.errors import RunFailed
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult, Unwatched
from hedgerow.federation.robust import inner_products, middle
from hedgerow.ledger import Ledger
from hedgerow.lowrank import Factors
from hedgerow.methods import METHODS
from hedgerow.methods.base import ServerRound
from hedgerow.methods.continued import ContinuedAdapter
from hedgerow.methods.robust_weights import RULES, bounded_shares, trust
from hedgerow.model import Model
from hedgerow.settings import ModelSettings
from hedgerow.testing.case import Case
from hedgerow.testing.doubles import Forgetful
from hedgerow.wire import Update

# --- the rules ------------------------------------------------------------------------------------


def crowd(seed, honest=8, hostile=2, size=50):
    """Vectors around one, and others that point away from it and are ten times as long."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=size)
    near = centre + 0.5 * rng.normal(size=(honest, size))
    far = -10 * (centre + 0.5 * rng.normal(size=(hostile, size)))
    return np.concatenate([near, far]), centre


def uniform(count):
    return np.full(count, 1 / count)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_the_few_do_not_turn_the_sum(rule, seed):
    """Two of ten, turned and ten times as long: without a rule they decide."""
    vectors, centre = crowd(seed)
    found = RULES[rule](vectors @ vectors.T, uniform(10))

    def error(weights):
        return np.linalg.norm(weights @ vectors - centre) / np.linalg.norm(centre)

    assert error(uniform(10)) > 2
    assert error(np.array(found.weights)) < 0.6
    assert found.notes.keys() >= {8, 9}
    assert len(found.notes) == {"krum": 9, "multi_krum": 3}.get(rule, 2)


@pytest.mark.parametrize("seed", range(3))
def test_a_trusted_client_leaves_out_who_points_away(seed):
    """Even where most are hostile."""
    vectors, centre = crowd(seed, honest=3, hostile=7)
    found = trust(vectors @ vectors.T, 1)
    weights = np.array(found.weights)
    assert found.notes.keys() == set(range(3, 10))
    assert (weights[3:] == 0).all()
    assert np.linalg.norm(weights @ vectors - centre) < 0.6 * np.linalg.norm(centre)
    longer = vectors * np.where(np.arange(10) == 0, 100, 1)[:, None]
    shortened = np.array(trust(longer @ longer.T, 1).weights)[0] * np.linalg.norm(longer[0])
    assert shortened <= np.linalg.norm(vectors[1]) / 2


@pytest.mark.parametrize("trusted", [[0.0, 0.0], [1.0, 0.0]])
def test_updates_of_zeros_have_weights(trusted):
    vectors = np.array([trusted, [0.0, 0.0], [1.0, 1.0]])
    found = trust(vectors @ vectors.T, 0)
    assert np.isfinite(found.weights).all()
    assert found.weights[0] > 0
    assert found.weights[1] == 0


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 1000), count=st.integers(5, 12))
@settings(max_examples=25)
def test_weights_do_not_depend_on_the_order(rule, seed, count):
    rng = np.random.default_rng(seed)
    vectors, order = rng.normal(size=(count, 5)), rng.permutation(count)
    shares = rng.random(count) + 0.1
    shares /= shares.sum()
    straight = np.array(RULES[rule](vectors @ vectors.T, shares).weights)
    mixed = vectors[order]
    turned = np.array(RULES[rule](mixed @ mixed.T, shares[order]).weights)
    np.testing.assert_allclose(turned, straight[order], atol=1e-6)
    assert straight.min() >= 0
    assert 0 < straight.sum() <= 1 + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_krum_takes_what_the_paper_takes(seed):
    vectors, _ = crowd(seed, honest=6, hostile=3)
    number, hostile = 9, 3
    scores = []
    for i, one in enumerate(vectors):
        squares = sorted(
            float(((one - other) ** 2).sum()) for j, other in enumerate(vectors) if j != i
        )
        scores.append(sum(squares[: number - hostile - 2]))
    weights = RULES["krum"](vectors @ vectors.T, uniform(9)).weights
    assert weights == [float(i == int(np.argmin(scores))) for i in range(number)]
    chosen = np.argsort(scores)[: number - hostile]
    several = RULES["multi_krum"](vectors @ vectors.T, uniform(9)).weights
    assert set(np.flatnonzero(several)) == set(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_the_geometric_median_has_the_least_sum_of_distances(seed):
    rng = np.random.default_rng(seed)
    vectors, shares = rng.normal(size=(7, 4)), rng.random(7)
    shares /= shares.sum()
    middle = np.array(RULES["geometric_median"](vectors @ vectors.T, shares).weights) @ vectors

    def total(point):
        return float(shares @ np.linalg.norm(vectors - point, axis=1))

    for step in 1e-2 * rng.normal(size=(50, 4)):
        assert total(middle) <= total(middle + step) + 1e-7


def test_lengths_are_bounded_by_the_median():
    vectors = np.diag([1.0, 2.0, 3.0, 4.0, 50.0])
    found = RULES["norm_bound"](vectors @ vectors.T, uniform(5))
    np.testing.assert_allclose(found.weights, [0.2, 0.2, 0.2, 0.15, 0.2 * 3 / 50])
    assert list(found.notes) == [4]
    assert "16.7 times as long as the median" in found.notes[4]
    assert RULES["norm_bound"](np.zeros((3, 3)), uniform(3)).weights == pytest.approx([1 / 3] * 3)


@given(shares=st.lists(st.floats(0.01, 1e6), min_size=1, max_size=20), largest=st.floats(0.01, 1))
def test_shares_are_bounded_and_nothing_is_lost(shares, largest):
    found = bounded_shares(shares, largest)
    assert sum(found) == pytest.approx(1)
    assert max(found) <= max(largest, 1 / len(shares)) * (1 + 1e-9)
    # Who claims more does not get less.
    pairs = sorted(zip(shares, found, strict=True))
    assert all(b <= d * (1 + 1e-9) for (_, b), (_, d) in itertools.pairwise(pairs))


def test_a_claim_of_a_million_is_a_third():
    assert bounded_shares([10, 30, 10**6], 1 / 3) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert bounded_shares([10, 30, 10**6], 0.5) == pytest.approx([0.125, 0.375, 0.5])


@given(ranks=st.lists(st.integers(1, 9), min_size=1, max_size=6), rows=st.integers(1, 20))
@settings(max_examples=30)
def test_inner_products_are_those_of_the_matrices(ranks, rows):
    generator = torch.Generator().manual_seed(len(ranks))
    pairs = [
        Factors(torch.randn(r, 7, generator=generator), torch.randn(5, r, generator=generator))
        for r in ranks
    ]
    dense = torch.stack([pair.product().double().reshape(-1) for pair in pairs])
    found = lowrank.inner_products(pairs, rows=rows)
    torch.testing.assert_close(found, dense @ dense.T, rtol=1e-4, atol=1e-4)


# --- every method that may be weighed -------------------------------------------------------------


def _method(configuration):
    options = method_of(configuration)
    return METHODS[options["name"]].model_validate(options)


WEIGHABLE = [
    name for name in METHOD_OPTIONS if _method(name).weighable and not _method(name).pools_data
]


@pytest.fixture(scope="module")
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model), device="cpu"))


@pytest.fixture(scope="module", params=WEIGHABLE)
def case(request, model, tmp_path_factory):
    return Case(_method(request.param), model, tmp_path_factory.mktemp("case"))


def server_round(case, given=None):
    memory = Forgetful()
    return ServerRound(case.round, case.clients, None, case.expected, memory, given_weights=given)


def weighed(case, weights):
    updates = [Update.from_bytes(data) for data in case.updates]
    given = {u.client: w for u, w in zip(updates, weights, strict=True)}
    made = case.method.made_weighed().aggregate(updates, server_round(case, given))
    assert made.weights == list(weights)
    return made


def test_there_are_methods_of_every_family():
    names = {name.split()[0] for name in WEIGHABLE}
    assert names >= {"flora", "flexlora", "fedit", "ferret", "fedavg", "ffa_lora", "fed_sb"}
    assert not names & {"standalone", "centralized", "fedkseed"}


def test_weights_by_size_make_what_the_method_makes(case):
    """Those it would take itself, given by somebody else."""
    updates = [Update.from_bytes(data) for data in case.updates]
    plain = case.method.aggregate(updates, server_round(case))
    total = sum(update.num_examples for update in updates)
    shares = [update.num_examples / total for update in updates]
    weights = shares if plain.weights is None else list(plain.weights)
    given = weighed(case, weights)
    assert given.tensors.keys() == plain.tensors.keys()
    for name, each in plain.tensors.items():
        if each.is_floating_point():  # the rest are codes, of which a rounding makes others
            torch.testing.assert_close(given.tensors[name], each, rtol=2e-4, atol=1e-6)


def test_a_weight_of_zero_is_as_if_nobody_had_sent_it(case):
    """Half weights, and a client that shouts: with no weight it changes nothing."""
    quiet = weighed(case, [0.0, 0.5, 0.5])
    updates = [Update.from_bytes(data) for data in case.updates]
    loud = {
        name: each * 50 if each.is_floating_point() else each
        for name, each in updates[0].tensors.items()
    }
    shouting = replace(updates[0], tensors=loud)
    given = {u.client: w for u, w in zip(updates, [0.0, 0.5, 0.5], strict=True)}
    made = case.method.made_weighed().aggregate([shouting, *updates[1:]], server_round(case, given))
    if case.method.name in ("flora", "fedex_lora", "flora_adalora"):
        # The stack has its rows, times zero.
        return
    for name, each in quiet.tensors.items():
        if not each.is_floating_point():
            continue
        torch.testing.assert_close(made.tensors[name], each, rtol=2e-3, atol=1e-5)


def test_updates_are_compared_as_they_count(case):
    """An update's length is that of its change, and twice the change is twice as long."""
    updates = [Update.from_bytes(data) for data in case.updates]
    products = inner_products(case.method, updates, server_round(case))
    assert products.shape == (3, 3)
    np.testing.assert_allclose(products, products.T, rtol=1e-6)
    assert np.linalg.eigvalsh(products).min() > -1e-6 * np.trace(products)
    assert np.diag(products).min() > 0


# --- through the command line ---------------------------------------------------------------------

RULE = "federation.weights={}"


@pytest.fixture
def hostile(monkeypatch):
    """The first client of three turns its update, and sends it ten times as long."""
    trained = LocalFleet._trained

    def turned(self, client_round, *given):
        update = trained(self, client_round, *given)
        if client_round.client.index:
            return update
        worse = {n: -10 * each if ".lora_B." in n else each for n, each in update.tensors.items()}
        return replace(update, tensors=worse)

    monkeypatch.setattr(LocalFleet, "_trained", turned)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "multi_krum"])
def test_a_run_says_who_was_weighed_otherwise_and_goes_on(
    hedgerow, experiment, tmp_path, hostile, rule
):
    path = experiment(federation={"rounds": 2})
    arguments = [path, RULE.format(rule)]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert hedgerow("run", *arguments, "--out", whole).code == 0
    row = rows_of(whole)[1]
    assert "client-000" in row["weighed_otherwise"]
    entry = Ledger.open(whole / "ledger").read(1)
    assert entry.participants[0].weight < 0.1
    assert not (whole / "weighed").exists()
    assert hedgerow("run", *arguments, "federation.rounds=1", "--out", part).code == 0
    assert hedgerow("run", *arguments, "--out", part, "--resume").code == 0
    assert ledger_bytes(whole) == ledger_bytes(part)
    assert hedgerow("ledger", "verify", whole).code == 0


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "trust, federation.trusted=client-002"])
@pytest.mark.parametrize("method", ["fedit", "fedavg", "ferret"])
def test_the_middle_of_coordinates_is_what_it_is(
    hedgerow, experiment, tmp_path, method, rule, monkeypatch
):
    """The first client of three sends its update a thousand times as long, and is borne."""
    weights, *trusted = rule.split(", ")
    options = {"fedit": "{name: fedit, ranks: 2}", "ferret": "{name: ferret, compression: 40}"}
    path = experiment(federation={"rounds": 1})
    arguments = [path, f"method={options.get(method, method)}", f"federation.weights={weights}"]
    trained = LocalFleet._trained

    def loud(self, client_round, *given):
        update = trained(self, client_round, *given)
        if client_round.client.index:
            return update
        scaled = {
            name: 1000 * each if each.is_floating_point() and ".lora_A." not in name else each
            for name, each in update.tensors.items()
        }
        return replace(update, tensors=scaled)

    losses = {}
    for name, patched in (("quiet", trained), ("loud", loud)):
        monkeypatch.setattr(LocalFleet, "_trained", patched)
        out = tmp_path / name
        result = hedgerow("run", *arguments, *trusted, "--out", out)
        assert result.code == 0, result.err
        losses[name] = rows_of(out)[-1]["eval_loss"]
        assert hedgerow("ledger", "verify", out).code == 0
    assert losses["loud"] == pytest.approx(losses["quiet"], abs=0.5)


VECTORS = st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3)


@given(st.lists(VECTORS, min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_middles_are_numpys(vectors):
    class Plain:
        def changes(self, update, server_round):
            return [("x", torch.tensor(update))]

    median = middle(Plain(), vectors, None, "median")["x"]
    np.testing.assert_allclose(median, np.median(np.float32(vectors), axis=0), atol=1e-6)
    trimmed = middle(Plain(), vectors, None, "trimmed_mean")["x"]
    cut = max(len(vectors) // 4, len(vectors) > 2)
    expected = stats.trim_mean(np.float64(vectors), cut / len(vectors), axis=0)
    np.testing.assert_allclose(trimmed, expected, atol=1e-5)


@pytest.mark.parametrize("up", ["null", "bits"])
def test_clients_are_compared_beside_one_copy_of_the_last_adapter(
    hedgerow, experiment, tmp_path, monkeypatch, up
):
    """Whatever their number; the other is the aggregate's."""
    calls, before = [], ContinuedAdapter.before

    def counted(self, server_round):
        calls.append(server_round.round)
        return before(self, server_round)

    monkeypatch.setattr(ContinuedAdapter, "before", counted)
    path = experiment(federation={"rounds": 1, "weights": "geometric_median"})
    method = f"method={{name: fedit, ranks: 2, up: {up}}}"
    result = hedgerow("run", path, method, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert calls == [1, 1]


def away_at_first(tries):
    """A fleet whose second client is away so many times, and the lists of whom it was asked for."""
    asked = []

    class Fleet(LocalFleet):
        def train(self, round, parent, clients, clock):
            asked.append([client.name for client in clients])
            for client in clients:
                if client.name == "client-001" and len(asked) <= tries:
                    yield ClientResult(client, failure="it is away", absent=True)
                else:
                    yield from super().train(round, parent, [client], clock)

    return Fleet, asked


TRUST = ["federation.weights=trust", "federation.trusted=client-001", "federation.backoff=0"]


def test_a_trusted_client_that_is_away_is_asked_again(experiment, tmp_path):
    loaded = load(experiment(federation={"rounds": 1}), TRUST)
    fleet, asked = away_at_first(2)
    local.run(loaded, tmp_path / "late", Unwatched(), fleet=fleet)
    assert asked == [["client-000", "client-001", "client-002"], ["client-001"], ["client-001"]]
    local.run(loaded, tmp_path / "whole", Unwatched())
    assert ledger_bytes(tmp_path / "late") == ledger_bytes(tmp_path / "whole")


def test_a_run_without_its_trusted_client_ends_after_all_tries(experiment, tmp_path):
    loaded = load(experiment(federation={"rounds": 1}), TRUST)
    fleet, asked = away_at_first(3)
    with pytest.raises(RunFailed, match="round 1 has no usable update of client-001, which the"):
        local.run(loaded, tmp_path / "run", Unwatched(), fleet=fleet)
    assert len(asked) == 3
    assert not (tmp_path / "run/weighed").exists()


def test_nobody_is_asked_where_the_trusted_client_has_not_joined(experiment, tmp_path):
    fleet, asked = away_at_first(0)

    class Without(fleet):
        def gather(self):
            return [client for client in super().gather() if client.name != "client-001"]

    loaded = load(experiment(federation={"rounds": 1}), TRUST)
    with pytest.raises(RunFailed, match="round 1 has no usable update of client-001, which the"):
        local.run(loaded, tmp_path / "run", Unwatched(), fleet=Without)
    assert asked == []


def test_a_share_is_bounded_without_a_rule(hedgerow, experiment, tmp_path):
    out = tmp_path / "run"
    path = experiment(federation={"rounds": 1})
    assert hedgerow("run", path, "federation.largest_share=0.34", "--out", out).code == 0
    weights = [p.weight for p in Ledger.open(out / "ledger").read(1).participants]
    assert max(weights) <= 0.34 * (1 + 1e-9)
    assert sum(weights) == pytest.approx(1)


REFUSED = {
    "no sums": (
        ["method.name=standalone", "federation.weights=krum"],
        "federation.weights: updates of standalone with these options cannot be compared or "
        "weighed: leave it out, or take one of",
    ),
    "privacy": (
        [
            "method=fedavg",
            "federation.weights=krum",
            "privacy={level: client, clip: 1, noise_multiplier: 1, delta: 1e-3}",
        ],
        "federation.weights krum: under privacy.level client all clients weigh the same",
    ),
    "no coordinates": (
        ["method.name=flora", "federation.weights=median"],
        "federation.weights median: updates of flora with these options have no coordinates in "
        "common: take another rule, or one of ",
    ),
    "nobody to trust": (["federation.weights=trust"], "give both"),
    "a stranger to trust": (
        ["federation.weights=trust", "federation.trusted=north"],
        "federation.trusted: there is no client 'north' (the clients: client-000, client-001,",
    ),
    "nobody to trust in some rounds": (
        [
            "federation.weights=trust",
            "federation.trusted=client-001",
            "federation.clients_per_round=2",
        ],
        "federation.clients_per_round: client-001, which others are weighed by, has to take part",
    ),
    "no claims to bound": (
        ["method=fedavg", "federation.weights=uniform", "federation.largest_share=0.5"],
        "federation.largest_share bounds what clients weigh by their numbers of examples",
    ),
    "no claims to bound by the method": (
        ["method.name=scaffold", "federation.largest_share=0.5"],
        "federation.largest_share bounds what clients weigh by their numbers of examples",
    ),
    "another rule": (["method.name=flora", "federation.weights=mode"], "federation.weights"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_weighed_is_refused(hedgerow, experiment, tmp_path, mistake):
    arguments, sentence = REFUSED[mistake]
    result = hedgerow("run", experiment(), *arguments, "--out", tmp_path / "run")
    assert result.code == 2
    assert sentence in result.err
    assert not (tmp_path / "run").exists()


def test_plain_weights_are_the_methods_own(hedgerow, experiment, tmp_path):
    path = experiment(federation={"rounds": 1}, method={"name": "fedit", "ranks": 2})
    own, other = tmp_path / "own", tmp_path / "other"
    assert hedgerow("run", path, "method.weights=uniform", "--out", own).code == 0
    assert hedgerow("run", path, "federation.weights=uniform", "--out", other).code == 0
    assert ledger_bytes(own) == ledger_bytes(other)
