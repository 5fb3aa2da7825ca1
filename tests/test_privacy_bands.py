"""Noise that is correlated from round to round (`privacy.bands`): its mathematics, and runs."""

from __future__ import annotations

import itertools
import json
import math
import stat
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configurations import METHOD_OPTIONS, method_of
from support.runs import rows_of

from hedgerow.engines import local
from hedgerow.errors import InvalidMessage, RunFailed, UserError
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult, Unwatched
from hedgerow.ledger import Ledger
from hedgerow.methods import METHODS
from hedgerow.methods.abilities import correlates_noise, hides_clients
from hedgerow.methods.base import check_fixed_weights
from hedgerow.model import Model
from hedgerow.privacy.bands import BandedNoise, Turns, coefficients, column_norm
from hedgerow.privacy.client_level import ClientLevel, GaussianMean
from hedgerow.privacy.noise import NoiseKey
from hedgerow.seeds import Seeds
from hedgerow.settings import ModelSettings, PrivacySettings
from hedgerow.testing.case import Case
from hedgerow.wire import Participant


def matrix(rounds, bands):
    """C, of so many rounds."""
    found = np.zeros((rounds, rounds))
    for j, c in enumerate(coefficients(min(bands, rounds))):
        found += c * np.eye(rounds, k=-j)
    return found


class Kept:
    """Memory of noise that is not on disk."""

    def __init__(self):
        self.rounds = {}

    def __call__(self, round):
        kept = self

        class InRound:
            def check(self, since):
                assert since in kept.rounds

            def load(self):
                return kept.rounds[round - 1]

            def save(self, tensors):
                kept.rounds[round] = tensors

        return InRound()


# --- the mathematics ------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", range(1, 21))
def test_the_square_of_the_matrix_is_that_of_prefix_sums(rounds):
    """To the last bit, where there are as many bands as rounds."""
    c = [Fraction(each) for each in coefficients(rounds)]
    for t in range(rounds):
        assert sum(c[j] * c[t - j] for j in range(t + 1)) == 1


def test_bands_beyond_are_zero():
    assert coefficients(1) == [1.0]
    assert coefficients(4) == [1.0, 0.5, 0.375, 0.3125]
    assert column_norm(1) == 1
    assert column_norm(2) == math.sqrt(1.25)


def patterns(rounds, bands):
    """All sets of rounds of which no two are fewer than `bands` apart."""
    for count in range(1, rounds + 1):
        for chosen in itertools.combinations(range(rounds), count):
            if all(b - a >= bands for a, b in itertools.pairwise(chosen)):
                yield chosen


@given(
    rounds=st.integers(1, 9),
    bands=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
    same=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_a_client_changes_is_bounded_however_often_it_takes_part(rounds, bands, seed, same):
    """By √k·‖c‖: all patterns, with updates of length 1 or less, in any or in one direction."""
    C, rng = matrix(rounds, bands), np.random.default_rng(seed)
    for chosen in patterns(rounds, bands):
        for _ in range(3):
            x = np.zeros((rounds, 3))
            direction = rng.standard_normal((1 if same else len(chosen), 3))
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            signs = rng.choice([-1, 1], (len(chosen), 1))
            x[list(chosen)] = signs * direction * rng.choice([1.0, rng.uniform()])
            change = np.linalg.norm(C @ x)
            assert change <= math.sqrt(len(chosen)) * column_norm(bands) * (1 + 1e-12)


@pytest.mark.parametrize("bands", [2, 3, 5])
def test_the_bound_is_reached_and_needs_the_rounds_between(bands):
    C = matrix(4 * bands, bands)
    whole = C[:, [0, bands]].sum(axis=1)
    assert np.linalg.norm(whole) == pytest.approx(math.sqrt(2) * column_norm(bands))
    closer = C[:, [0, bands - 1]].sum(axis=1)
    assert np.linalg.norm(closer) > 1.01 * math.sqrt(2) * column_norm(bands)


SAMPLES, CLIP, Z = 40_000, 0.5, 3.0


def added(rounds, bands, key=0, shape=(SAMPLES,)):
    """The noise that each round adds to a sum of zeros."""
    kept, found = Kept(), []
    for round in range(1, rounds + 1):
        noise = BandedNoise(bands, round, kept)
        mean = GaussianMean(CLIP, Z, 3, round, NoiseKey.of_seed(key), bands=noise)
        sums = {"a": torch.zeros(shape), "b": torch.zeros(shape)}
        mean.add_noise(sums)
        found.append(torch.cat([sums["a"].flatten(), sums["b"].flatten()]).double().numpy())
    return np.stack(found)


@pytest.mark.parametrize("bands", [2, 3, 6])
def test_the_noise_has_the_covariance_of_the_mechanism(bands):
    """σ²·C⁻¹·C⁻ᵀ, of coordinates that are independent of each other."""
    rounds = 6
    noise = added(rounds, bands)
    inverse = np.linalg.inv(matrix(rounds, bands))
    expected = (Z * CLIP) ** 2 * inverse @ inverse.T
    found = noise @ noise.T / noise.shape[1]
    assert np.abs(found - expected).max() < 6 * expected.max() * math.sqrt(2 / noise.shape[1])
    assert abs(expected[1, 0]) > 0.3 * expected[0, 0]  # which independent noise would not have
    # Of different coordinates, as of one with the next: none.
    assert np.abs(noise[:, 1:] @ noise[:, :-1].T).max() / noise.shape[1] < 0.06 * expected.max()


def test_the_matrix_times_the_noise_is_independent_noise_as_without_bands():
    """With the same key: to the rounding of single precision, which does not add up."""
    rounds, bands = 12, 4
    found = matrix(rounds, bands) @ added(rounds, bands, shape=(50,))
    for round in range(1, rounds + 1):
        sums = {"a": torch.zeros(50), "b": torch.zeros(50)}
        GaussianMean(CLIP, Z, 3, round, NoiseKey.of_seed(0)).add_noise(sums)
        alone = torch.cat(list(sums.values())).double().numpy()
        assert np.abs(found[round - 1] - alone).max() < 1e-5 * CLIP * Z


def test_the_documentation_says_how_much_less_noise_the_final_model_has():
    """Of 64 rounds and 16 groups, for the same ε and the same turns."""
    rounds, bands = 64, 16
    summed = np.linalg.inv(matrix(rounds, bands)).sum(axis=0)  # the weight of each z in the sum
    correlated = column_norm(bands) * np.linalg.norm(summed)
    ratio = correlated / math.sqrt(rounds)
    assert ratio == pytest.approx(0.367, abs=5e-4)
    # And of all clients in every round: √b times as often, and b times as many in a round.
    all_of_them = math.sqrt(rounds) * math.sqrt(bands) / bands
    assert correlated / all_of_them == pytest.approx(1.47, abs=5e-3)
    noise = added(rounds, bands, shape=(2000,)).sum(axis=0)
    assert noise.std() / (Z * CLIP) * column_norm(bands) / math.sqrt(rounds) == pytest.approx(
        ratio, rel=0.06
    )


def test_a_method_that_sums_something_else_is_found_out():
    kept = Kept()
    list(BandedNoise(3, 1, kept).of([("A", torch.ones(2, dtype=torch.float64))]))
    for other in ({"B": torch.ones(2)}, {"A": torch.ones(3)}):
        with pytest.raises(RunFailed, match=r"round 2 sums . of shape .* `keeps_coordinates`"):
            list(BandedNoise(3, 2, kept).of((n, t.double()) for n, t in other.items()))


@given(clients=st.integers(2, 40), bands=st.integers(2, 12), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_nobody_takes_part_twice_within_the_bands_and_all_do(clients, bands, seed):
    bands = min(bands, clients)
    names = [f"client-{index}" for index in range(clients)]
    turns = Turns.of(names, bands, Seeds(seed), Kept())
    rounds = {n: [t for t in range(1, 4 * bands + 1) if turns.has(n, t)] for n in names}
    for mine in rounds.values():
        assert len(mine) == 4
        assert all(b - a == bands for a, b in itertools.pairwise(mine))
    sizes = [sum(t in mine for mine in rounds.values()) for t in range(1, bands + 1)]
    assert max(sizes) - min(sizes) <= 1
    assert turns.mean_size == sum(sizes) / bands


@pytest.mark.parametrize(
    ("clients", "weight"), [(1, 1.0), (3, 2 / 5), (3, 1 / 3), (2, 0.75), (1, 0.01)]
)
def test_a_group_may_be_larger_than_the_mean_by_less_than_one(clients, weight):
    check_fixed_weights([Participant(f"c{index}", 1, weight) for index in range(clients)])


@pytest.mark.parametrize(("clients", "weight"), [(1, 1.01), (2, 1.0), (3, 0.5), (3, 0.0)])
def test_weights_that_no_group_has_are_refused(clients, weight):
    with pytest.raises(InvalidMessage, match="weights must be above 0"):
        check_fixed_weights([Participant(f"c{index}", 1, weight) for index in range(clients)])


def test_turns_are_those_of_the_seed():
    names = [f"client-{index}" for index in range(12)]
    first, again, other = (Turns.of(names, 4, Seeds(s), Kept()).groups for s in (1, 1, 2))
    assert first == again != other


# --- the account ----------------------------------------------------------------------------------


def level(folder, rounds=6, bands=3, known=(), **changes):
    options = {"level": "client", "clip": 1.0, "noise_multiplier": 2.0, "delta": 1e-3, **changes}
    turns = Turns.of(list("abcdef"), bands, Seeds(0), Kept())
    asked = PrivacySettings.model_validate({**options, "bands": bands})
    return ClientLevel.of(asked, rounds, list("abcdef"), folder, known, turns=turns)


def in_turn(privacy, round):
    return [name for name in "abcdef" if privacy.turns.has(name, round)]


def of_library(multiplier, count):
    account = rdp.RdpAccountant()
    account.compose(GaussianDpEvent(multiplier), count)
    return account.get_epsilon(1e-3)


def test_a_round_costs_those_who_take_part_in_it(tmp_path):
    privacy = level(tmp_path)
    for round in range(1, 7):
        spent = privacy.account_for(round, f"p{round}", f"e{round}", in_turn(privacy, round))
        assert spent == of_library(2.0 / column_norm(3), math.ceil(round / 3))


@pytest.mark.parametrize("rounds", [1, 6, 7])
def test_a_budget_is_kept_by_the_client_that_takes_part_most_often(tmp_path, rounds):
    privacy = level(tmp_path, rounds, noise_multiplier=None, epsilon=3.0)
    for round in range(1, rounds + 1):
        spent = privacy.account_for(round, f"p{round}", f"e{round}", in_turn(privacy, round))
    assert 2.97 < spent <= 3


def test_a_budget_that_is_spent_too_early_is_refused_in_rounds(tmp_path):
    budget = of_library(2.0 / column_norm(3), 2) + 1e-6
    level(tmp_path, 6, epsilon=budget)
    with pytest.raises(UserError, match="spent after 6 of the 7 rounds with noise_multiplier 2"):
        level(tmp_path, 7, epsilon=budget)


def test_a_round_with_other_bits_is_not_released(tmp_path):
    privacy = level(tmp_path)
    names = in_turn(privacy, 1)
    spent = privacy.account_for(1, "p", "e", names)
    with pytest.raises(RunFailed, match="round 1 was made again and came to other bits"):
        privacy.account_for(1, "p", "other", names[:1])
    again = level(tmp_path, known=[(1, "p")])
    assert again.account_for(1, "p", "e", names) == spent
    assert sum(again.log.by_round(names[0]).values()) == 1


def test_who_took_part_within_the_bands_is_not_released_again(tmp_path):
    privacy = level(tmp_path)
    privacy.account_for(1, "p1", "e1", ["a", "b"])
    for round in (2, 3):
        with pytest.raises(RunFailed, match=r"b took part in round 1, fewer than privacy\.bands 3"):
            privacy.account_for(round, f"p{round}", f"e{round}", ["b", "c"])
    privacy.account_for(4, "p4", "e4", ["b", "c"])


# --- methods --------------------------------------------------------------------------------------


def _method(configuration):
    options = method_of(configuration)
    return METHODS[options["name"]].model_validate(options)


LINEAR = [name for name in METHOD_OPTIONS if hides_clients(_method(name))]


@pytest.fixture(scope="module")
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model), device="cpu"))


@pytest.mark.parametrize("configuration", LINEAR)
def test_methods_that_allow_it_sum_the_same_tensors_in_every_round(configuration, model, tmp_path):
    method = _method(configuration)
    expected = Case(method, model, tmp_path).expected
    shapes = [dict(method.changed(round, expected)) for round in (1, 2, 3)]
    same = shapes[0] == shapes[1] == shapes[2]
    if hasattr(method, "parts"):
        headers = [method._common(round, expected) for round in (1, 2)]
        bases = [method.parts.through.basis(header) for header in headers]
        assert method.keeps_coordinates == (same and bases[0] == bases[1])
    else:
        assert method.keeps_coordinates == (same and not method.refactors)


def test_most_methods_allow_it():
    able = {name.split()[0] for name in LINEAR if correlates_noise(_method(name))}
    assert able >= {"fedavg", "fedadam", "fedit", "ffa_lora", "fed_sb", "ferret", "scaffold"}
    assert not able & {"rolora", "fedsvd"}
    assert not correlates_noise(METHODS["ferret"](coordinates="random"))
    assert not correlates_noise(METHODS["flora"]())


# --- runs -----------------------------------------------------------------------------------------

PRIVACY = {
    "level": "client",
    "clip": 0.5,
    "noise_multiplier": 1.0,
    "delta": 1e-3,
    "seed": 5,
    "bands": 2,
}
SMALL = '{"name": "fed_sb", "ranks": 4}'


def asked(path, method=SMALL, **changes):
    return [path, f"method={method}", f"privacy={json.dumps(PRIVACY | changes)}"]


def files(folder):
    """All that a run has left, but for the lock and for times."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    left = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: data for name, data in left.items() if name not in (".lock", "metrics.jsonl")}


@pytest.mark.parametrize(
    "method", ["fedavg", SMALL, '{"name": "fedit", "ranks": 2, "server": "adam"}']
)
def test_a_run_takes_turns_says_what_it_spent_and_goes_on_with_the_same_bytes(
    hedgerow, experiment, tmp_path, method
):
    arguments = asked(experiment(federation={"rounds": 5}), method)
    for name in ("whole", "again"):
        result = hedgerow("run", *arguments, "--out", tmp_path / name)
        assert result.code == 0, result.err
    assert files(tmp_path / "whole") == files(tmp_path / "again")
    part = ["--out", tmp_path / "part"]
    assert hedgerow("run", *arguments, "federation.rounds=1", *part).code == 0
    assert hedgerow("run", *arguments, "federation.rounds=3", *part, "--resume").code == 0
    assert hedgerow("run", *arguments, *part, "--resume").code == 0
    assert files(tmp_path / "whole") == files(tmp_path / "part")
    rows = rows_of(tmp_path / "whole")[1:]
    taken = defaultdict(list)
    for row in rows:
        most = math.ceil(row["round"] / 2)
        assert row["epsilon"] == of_library(1.0 / column_norm(2), most)
        for name in row["participants"]:
            taken[name].append(row["round"])
    assert sorted(map(len, taken.values())) in ([2, 2, 3], [2, 3, 3])
    assert all(b - a == 2 for mine in taken.values() for a, b in itertools.pairwise(mine))
    for entry in Ledger.open(tmp_path / "whole/ledger").entries():
        assert {p.weight for p in entry.participants} == {2 / 3}  # 1/D, D = 3 clients / 2 groups
    assert hedgerow("ledger", "verify", tmp_path / "whole").code == 0
    folder = tmp_path / "whole/noise"
    assert sorted(path.name for path in folder.iterdir()) == [
        "0004.safetensors",
        "0005.safetensors",
    ]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_everybody_gets_has_the_noise_of_the_mechanism(hedgerow, experiment, tmp_path):
    """Of a run in which noise is all that counts: C times its entries is independent noise."""
    rounds, z, clip = 6, 1000.0, 1e-3
    arguments = asked(
        experiment(federation={"rounds": rounds}),
        "fedavg",
        clip=clip,
        noise_multiplier=z,
        bands=3,
    )
    assert hedgerow("run", *arguments, "--out", tmp_path / "run").code == 0
    denominator = 1.0  # three clients, three groups
    entries = Ledger.open(tmp_path / "run/ledger").entries()
    values = [
        torch.cat([t.double().flatten() for _, t in sorted(e.tensors.items())]) for e in entries
    ]
    released = torch.stack(values).numpy() * denominator / (z * clip)
    count = released.shape[1]
    assert count > 3000
    found = matrix(rounds, 3) @ released
    covariance = found @ found.T / count
    assert np.abs(covariance - np.eye(rounds)).max() < 6 * math.sqrt(2 / count)
    inverse = np.linalg.inv(matrix(rounds, 3))
    of_sum = released.sum(axis=0)
    expected = np.linalg.norm(inverse.sum(axis=0))
    assert of_sum.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
    assert expected < 0.8 * math.sqrt(rounds)


def test_a_budget_chooses_the_noise(hedgerow, experiment, tmp_path):
    out = tmp_path / "run"
    arguments = asked(experiment(federation={"rounds": 4}), noise_multiplier=None, epsilon=6.0)
    assert hedgerow("run", *arguments, "--out", out).code == 0
    assert 5.9 < rows_of(out)[-1]["epsilon"] <= 6


def entries_of(out):
    """The tensors of a run's entries."""
    return [dict(entry.tensors) for entry in Ledger.open(out / "ledger").entries()]


class Stopped(Exception):
    """The process is killed."""


def stops(monkeypatch, round):
    """Stop a run where its round is accounted for, and no entry is written yet."""
    append = Ledger.append

    def stopping(self, entry, *rest):
        if entry.round == round:
            raise Stopped
        return append(self, entry, *rest)

    monkeypatch.setattr(Ledger, "append", stopping)


class Whole(local.LocalFleet):
    """All clients answer."""


class Without(local.LocalFleet):
    """The first client of each round is away."""

    def train(self, round, parent, clients, clock):
        yield ClientResult(clients[0], failure="gone", absent=False)
        yield from super().train(round, parent, clients[1:], clock)


def run(fleet, experiment, out):
    """A run from its beginning, or from where it is."""
    local.run(experiment, out, Unwatched(), resume=out.exists(), fleet=fleet)


def test_a_run_that_was_killed_goes_on_with_the_same_bytes_and_with_no_others(
    experiment, tmp_path, monkeypatch
):
    path = experiment(federation={"rounds": 5})
    loaded = load(path, asked(path)[1:])
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(Whole, loaded, whole)
    assert len(rows_of(whole)[3]["participants"]) == 2
    with monkeypatch.context() as context:
        stops(context, 3)
        with pytest.raises(Stopped):
            run(Whole, loaded, part)
    assert len(rows_of(part)) == 3  # of round 0, 1 and 2
    log = (part / "privacy.json").read_bytes()
    with pytest.raises(RunFailed, match="round 3 was made again and came to other bits"):
        run(Without, loaded, part)
    assert (part / "privacy.json").read_bytes() == log
    assert len(Ledger.open(part / "ledger")) == 2
    run(Whole, loaded, part)
    assert files(part) == files(whole)


class Alone(local.LocalFleet):
    """One client has joined."""

    def gather(self):
        return super().gather()[:1]


def test_groups_do_not_depend_on_who_has_joined(experiment, tmp_path):
    """So that a group of which nobody is there has no round, and nobody comes in its place."""
    path = experiment(federation={"rounds": 4})
    loaded, out = load(path, asked(path, bands=3)[1:]), tmp_path / "run"
    turns = Turns.of([f"client-00{index}" for index in range(3)], 3, Seeds(0), Kept())
    failing = 2 if turns.has("client-000", 1) else 1
    with pytest.raises(RunFailed, match=f"round {failing} has no usable update from its 0 clients"):
        run(Alone, loaded, out)
    assert len(Ledger.open(out / "ledger")) == failing - 1


def test_a_run_is_rolled_back_as_far_as_noise_is_kept(hedgerow, experiment, tmp_path):
    out = tmp_path / "run"
    arguments = [*asked(experiment(federation={"rounds": 6}), bands=3), "--out", out]
    assert hedgerow("run", *arguments).code == 0
    before, made = files(out), entries_of(out)

    def taken_back(round):
        assert hedgerow("ledger", "rollback", out, "--round", round).code == 0
        assert "noise/0006.safetensors" not in files(out)
        result = hedgerow("run", *arguments, "--resume")
        assert result.code == 0, result.err

    taken_back(5)
    assert files(out) == before
    refused = hedgerow("ledger", "rollback", out, "--round", 3)
    assert refused.code == 2
    assert "--round 3: what the server kept of round 2 is not there any more" in refused.err
    assert files(out) == before
    # From the beginning: rounds are the same, and not released again, but say what was spent.
    taken_back(0)
    spent = of_library(1.0 / column_norm(3), 2)
    assert [row["epsilon"] for row in rows_of(out)[1:]] == [spent] * 6
    assert files(out)["privacy.json"] == before["privacy.json"]
    again = entries_of(out)
    for one, other in zip(made, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_does_not_go_on_without_its_noise(hedgerow, experiment, tmp_path):
    out = tmp_path / "run"
    arguments = [*asked(experiment(federation={"rounds": 4}), bands=3), "--out", out]
    assert hedgerow("run", *arguments, "federation.rounds=3").code == 0
    (out / "noise/0002.safetensors").unlink()
    result = hedgerow("run", *arguments, "--resume")
    assert result.code == 2
    assert "lacks the tensors that were saved in round 2" in result.err


REFUSED = {
    "one band": (SMALL, {"bands": 1}, [], "privacy.bands"),
    "of examples": (SMALL, {"level": "example"}, [], "`bands` counts with `level: client` alone"),
    "a clip that changes": (SMALL, {"quantile": 0.5}, [], "`quantile` changes it: leave one of"),
    "clients that are drawn": (
        SMALL,
        {},
        ["federation.clients_per_round=2"],
        "federation.clients_per_round: with privacy.bands clients take part in turns, one of 2",
    ),
    "more groups than clients": (
        SMALL,
        {"bands": 4},
        [],
        "privacy.bands: 3 clients cannot take part in 4 groups, one after another",
    ),
    "more clients than a group": (
        SMALL,
        {},
        ["federation.min_clients=2"],
        "federation.min_clients: 2 is above the 1 clients with examples of the smallest of the 2",
    ),
    "turns of factors": (
        '{"name": "rolora", "ranks": 2}',
        {},
        [],
        "privacy.bands: rounds of rolora with these options sum its clients' updates on other",
    ),
    "new factors": ('{"name": "fedsvd", "ranks": 2}', {}, [], "privacy.bands: rounds of fedsvd"),
    "new bases": (
        '{"name": "ferret", "coordinates": "random", "compression": 50}',
        {},
        [],
        "take one of diloco, ditto, fed_sb, fedadam, fedavg, fedit, fedprox, fedsa_lora, ferret",
    ),
    "more than a sum": ("flora", {}, [], "privacy.level client: an entry of flora"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_is_refused(hedgerow, experiment, tmp_path, mistake):
    method, changes, more, sentence = REFUSED[mistake]
    out = tmp_path / "run"
    arguments = asked(experiment(federation={"rounds": 4}), method, **changes)
    result = hedgerow("run", *arguments, *more, "--out", out)
    assert result.code == 2
    assert sentence in " ".join(result.err.split())
    assert not out.exists()


def test_a_group_without_examples_is_refused(hedgerow, experiment, tmp_path):
    """Groups are of all clients that are named, so that they are the same on networks."""
    path = experiment(federation={"rounds": 4})
    (tmp_path / "client_1.json").write_text("[]")
    out = ["--out", tmp_path / "run"]
    result = hedgerow("run", *asked(path, bands=3), *out)
    assert result.code == 2
    assert "federation.min_clients: 1 is above the 0 clients with examples" in result.err
    assert not (tmp_path / "run").exists()


def test_another_number_of_bands_is_another_run(hedgerow, experiment, tmp_path):
    path, out = experiment(federation={"rounds": 2}), ["--out", tmp_path / "run"]
    assert hedgerow("run", *asked(path), "federation.rounds=1", *out).code == 0
    result = hedgerow("run", *asked(path, bands=3), *out, "--resume")
    assert result.code == 2
    assert "privacy.bands=2, not 3" in result.err
