"""Clients that are drawn in secret at `privacy.level: client`: who, what it costs, who can tell."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
import safetensors
import torch
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.configurations import METHOD_OPTIONS, method_of
from support.runs import ledger_bytes, rows_of
from support.runs import run_with as run

import hedgerow as hr
from hedgerow import demo
from hedgerow.engines import local
from hedgerow.errors import InvalidMessage, RunFailed
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult
from hedgerow.ledger import Ledger
from hedgerow.methods import METHODS
from hedgerow.methods.base import Expected, ServerRound, check_fits
from hedgerow.model import Model
from hedgerow.privacy.client_level import ClientLevel, GaussianMean, PoissonSampling
from hedgerow.privacy.noise import NoiseKey
from hedgerow.runs import RunModels
from hedgerow.settings import ModelSettings, PrivacySettings, TrainingSettings
from hedgerow.testing.case import Case
from hedgerow.testing.doubles import Forgetful
from hedgerow.wire import SAMPLING_RATE, Entry, Update

CLIP, NOISE, DELTA = 0.5, 1.0, 1e-3
NAMES = ["client-000", "client-001", "client-002"]


def privacy_of(seed=5, **changes):
    content = {"level": "client", "clip": CLIP, "noise_multiplier": NOISE, "delta": DELTA}
    return f"privacy={json.dumps(content | {'seed': seed} | changes)}"


def _method(configuration):
    options = method_of(configuration)
    return METHODS[options["name"]].model_validate(options)


def _can_be_sampled(method):
    counts = method.clients_remember and not method.clients_may_forget
    return method.linear and not method.pools_data and not counts


SAMPLED = [name for name in METHOD_OPTIONS if _can_be_sampled(_method(name))]


def sampled_account(noise, rate, count, delta):
    account = rdp.RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    account.compose(event, count)
    return account.get_epsilon(delta)


def level(folder, *, expected=2, clients=8, rounds=3, known=(), **privacy):
    content = {"level": "client", "clip": 1.0, "noise_multiplier": NOISE, "delta": 1e-5}
    return ClientLevel.of(
        PrivacySettings(**content | {"seed": 0} | privacy),
        rounds=rounds,
        clients=[f"c{index}" for index in range(clients)],
        folder=folder,
        known=known,
        drawn=expected,
    )


# --- the draw -------------------------------------------------------------------------------------


def test_each_takes_part_with_one_probability_independently_of_the_others():
    names, expected, rounds = [f"c{index}" for index in range(12)], 3, 6000
    there = np.zeros((rounds, len(names)))
    for round in range(rounds):  # of many keys, rounds and parents
        sampling = PoissonSampling(names, expected, NoiseKey.of_seed(round % 7))
        drawn = sampling.drawn(round, f"{round:064x}")
        assert drawn == [name for name in names if name in drawn]
        there[round, [names.index(name) for name in drawn]] = 1
    rate, tolerance = expected / len(names), 5 / math.sqrt(rounds)
    assert np.abs(there.mean(axis=0) - rate).max() < tolerance * math.sqrt(rate * (1 - rate))
    correlations = np.corrcoef(there.T) - np.eye(len(names))
    assert np.abs(correlations).max() < tolerance
    counts = np.bincount(there.sum(axis=1).astype(int), minlength=len(names) + 1)
    binomial = stats.binom.pmf(range(len(names) + 1), len(names), rate) * rounds
    likely = binomial > 5
    chance = stats.chisquare(
        [*counts[likely], counts[~likely].sum()], [*binomial[likely], binomial[~likely].sum()]
    )
    assert chance.pvalue > 1e-4
    one_after_another = np.corrcoef(there[:-1, 0], there[1:, 0])[0, 1]
    assert abs(one_after_another) < tolerance


def test_a_round_from_the_same_entry_has_the_same_sample_and_others_have_others():
    names = [f"c{index}" for index in range(64)]
    sampling = PoissonSampling(names, 32, NoiseKey.of_seed(0))
    drawn = sampling.drawn(3, "ab")
    assert drawn == sampling.drawn(3, "ab")
    assert drawn != sampling.drawn(4, "ab")
    assert drawn != sampling.drawn(3, "ac")
    assert drawn != replace(sampling, key=NoiseKey.of_seed(1)).drawn(3, "ab")


# --- the account ----------------------------------------------------------------------------------


@given(
    clients=st.integers(2, 200),
    share=st.floats(0, 0.999),
    noise=st.floats(0.4, 10),
    rounds=st.integers(1, 4),
)
@settings(max_examples=15, deadline=None)
def test_the_account_is_that_of_the_library(
    tmp_path_factory, clients: int, share: float, noise: float, rounds: int
):
    """Of sampled mechanisms, one for each round, whoever was drawn."""
    expected = max(1, int(share * clients))
    folder = tmp_path_factory.mktemp("level")
    privacy = level(folder, expected=expected, clients=clients, noise_multiplier=noise, delta=1e-6)
    assert privacy.sampling is not None
    found = 0.0
    for round in range(1, rounds + 1):
        found = privacy.account_for(round, f"{round}", "entry", privacy.sampling.names)
    assert found == sampled_account(noise, expected / clients, rounds, 1e-6)


def test_fewer_clients_need_less_noise(tmp_path):
    def noise(expected, **privacy):
        made = level(
            tmp_path,
            **{"expected": expected, "noise_multiplier": None, "epsilon": 2.0, "rounds": 50}
            | privacy,
        )
        return made.release.noise_multiplier

    found = [noise(expected) for expected in range(1, 8)]
    assert found == sorted(found)
    assert found[0] < found[-1] / 2
    assert sampled_account(found[0], 1 / 8, 50, 1e-5) == pytest.approx(2.0, rel=0.01)
    assert noise(1, accountant="pld", rounds=5) < noise(1, rounds=5)


def test_the_rounds_of_a_budget_are_those_of_samples(tmp_path):
    """Twenty rounds of a quarter of the clients, where fewer of most of them would be within it."""
    level(tmp_path, epsilon=12.0, rounds=20)
    with pytest.raises(hr.UserError, match=r"privacy\.epsilon 12 is spent after [0-9] of the 20"):
        level(tmp_path, epsilon=12.0, rounds=20, expected=7)


def test_a_round_is_released_once_from_an_entry(tmp_path):
    """Its bytes once more are the same release; others would tell by being others."""
    privacy = level(tmp_path)
    names = privacy.sampling.names
    once = privacy.account_for(1, "a", "entry", names)
    assert once == sampled_account(NOISE, 2 / 8, 1, 1e-5)
    again = level(tmp_path, known=[(1, "a")])
    assert again.account_for(1, "a", "entry", names) == once
    with pytest.raises(RunFailed, match="round 1 was made again and came to other bits"):
        again.account_for(1, "a", "another", names)
    # From another entry, as after a rollback, it has a sample of its own.
    assert again.account_for(1, "b", "another", names) == sampled_account(NOISE, 2 / 8, 2, 1e-5)


def test_a_round_made_again_beyond_the_budget_is_not_released(tmp_path):
    budget = sampled_account(NOISE, 2 / 8, 2, 1e-5) * 1.001
    privacy = level(tmp_path, epsilon=budget, rounds=2)
    names = privacy.sampling.names
    privacy.account_for(1, "a", "entry", names)
    assert privacy.account_for(1, "b", "entry", names) <= budget
    with pytest.raises(RunFailed, match="round 1 was made again with other noise"):
        privacy.account_for(1, "c", "entry", names)


def test_noise_of_another_parent_is_another():
    """Also that of the same sum, as of nobody's."""

    def noise(parent):
        mean = GaussianMean(1.0, 1.0, 2, 3, NoiseKey.of_seed(0), parent)
        return mean.of_nobody({"w": (1000,)})["w"]

    assert noise("a").equal(noise("a"))
    assert abs(float(torch.corrcoef(torch.stack([noise("a"), noise("b")]))[0, 1])) < 0.2


# --- what an entry is made of ---------------------------------------------------------------------


class Recorder(GaussianMean):
    """Keeps the sums as they are before noise; counts the updates of some alone."""

    of: slice = slice(None)

    def weight(self, change):
        place, weight = self.count, super().weight(change)
        return weight if place in range(100)[self.of] else 0.0

    def add_noise(self, sums, *use):
        self.before = {name: each.add_(0.0).clone() for name, each in sums.items()}  # no -0.0
        super().add_noise(sums, *use)


@pytest.fixture(scope="module")
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model), device="cpu"))


@pytest.fixture(scope="module", params=SAMPLED)
def case(request, model, tmp_path_factory):
    return Case(_method(request.param), model, tmp_path_factory.mktemp("case"))


def round_of(case, *, noise=0.0, clip=1e6, of=slice(None), kind=Recorder, denominator=2):
    mean = kind(clip, noise, denominator, case.round, NoiseKey.of_seed(0))
    mean.of = of
    return mean, ServerRound(
        case.round, case.clients, None, case.expected, Forgetful(), private=mean
    )


def same(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    for name, each in one.tensors.items():
        assert each.dtype == other.tensors[name].dtype
        assert torch.equal(each, other.tensors[name]), name


def test_an_entry_does_not_tell_how_many_took_part(case):
    """One update alone, and with two more that count for nothing, make the same entry."""
    updates, method = [Update.from_bytes(data) for data in case.updates], case.method.made_private()
    _, alone = round_of(case)
    _, among = round_of(case, of=slice(1))
    same(method.aggregate(updates[:1], alone), method.aggregate(updates, among))


class SameNoise(Recorder):
    """Adds noise that does not follow from what the sum is for."""

    def add_noise(self, sums, *use):
        for name, each in sums.items():
            generator = torch.Generator().manual_seed(len(name))
            each.add_(torch.randn(each.shape, generator=generator))


def test_a_round_of_nobody_is_one_of_updates_that_count_for_nothing(case):
    """Rounded in the same way, too, of which the lowest bits of an entry might tell."""
    thirds = {"kind": SameNoise, "denominator": 3}
    updates, method = [Update.from_bytes(data) for data in case.updates], case.method.made_private()
    mean, nobody = round_of(case, **thirds)
    noise = mean.of_nobody(method.changed(case.round, case.expected))
    made = method.aggregate_sum(noise, mean.denominator, [], nobody)
    _, nothing = round_of(case, of=slice(0), **thirds)
    same(made, method.aggregate(updates, nothing))
    assert made.weights == []


def test_a_round_of_nobody_has_all_the_noise(case):
    z, clip = 2.5, 0.5
    mean, _ = round_of(case, noise=z, clip=clip)
    found = mean.of_nobody(case.method.changed(case.round, case.expected))
    noise = torch.cat([each.flatten() for each in found.values()]).double() / (z * clip)
    assert not any(each.any() for each in mean.before.values())
    assert abs(noise.var() - 1) < 6 * math.sqrt(2 / len(noise))
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-4


def test_the_count_of_short_updates_is_over_the_number_that_was_expected():
    """b = 1/2 + Σ (bit - 1/2) / n, whoever was drawn (Andrew et al., algorithm 1)."""

    def clip_after(*lengths):
        mean = GaussianMean(1.0, 1e-9, 4, 1, NoiseKey.of_seed(0), quantile=0.5)
        mean.__class__ = Exact
        for length in lengths:
            mean.weight([torch.tensor([length])])
        return mean.next_clip

    class Exact(GaussianMean):
        _of_bits = 0.0

    assert clip_after() == 1.0
    assert clip_after(0.5) == pytest.approx(math.exp(-0.2 * (0.5 / 4)))
    assert clip_after(0.5, 2.0) == 1.0
    assert clip_after(2.0, 2.0, 2.0) == pytest.approx(math.exp(0.2 * (1.5 / 4)))


# --- whole runs -----------------------------------------------------------------------------------


def drawn_in(seed, count, round, parent):
    return PoissonSampling(NAMES, count, NoiseKey.of_seed(seed)).drawn(round, parent)


def headers(run):
    """What entries say, but for hashes and noise, with kinds of tensors and sizes of files."""
    found = []
    for path in sorted((run / "ledger").glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            said = file.metadata()
            kinds = {n: (t := file.get_tensor(n)).dtype and (t.dtype, t.shape) for n in file.keys()}  # noqa: SIM118
        metrics = json.loads(said.pop("metrics"))
        assert metrics.keys() == {"epsilon", SAMPLING_RATE}
        said.pop("parent")
        found.append((said, metrics, kinds, path.stat().st_size))
    return found


SEEDS = (0, 1, 2, 3)
METHODS_OF_RUNS = {
    "fedavg": "fedavg",
    "ferret": '{"name": "ferret", "coordinates": "random", "compression": 50}',
    "different ranks": '{"name": "zero_padding", "ranks": [4, 2, 1]}',
    "own factors": '{"name": "fedsa_lora", "ranks": 2}',
}


@pytest.mark.parametrize("method", METHODS_OF_RUNS)
def test_entries_do_not_tell_who_was_drawn(experiment, tmp_path, method):
    """Of runs with other samples, some of nobody at all, everything but noise is equal."""
    path = experiment(federation={"rounds": 3, "clients_per_round": 1})
    found, samples = [], set()
    for seed in SEEDS:
        out = tmp_path / f"{seed}"
        changes = [f"method={METHODS_OF_RUNS[method]}", privacy_of(seed)]
        rows = run(local.LocalFleet, load(path, changes), out)[1:]
        ledger = Ledger.open(out / "ledger")
        for row, entry in zip(rows, ledger.entries(), strict=True):
            assert row["participants"] == drawn_in(seed, 1, entry.round, entry.parent)
            assert row["clients"] == len(row["participants"])
            assert [p.client for p in entry.participants] == NAMES
            assert {(p.num_examples, p.weight) for p in entry.participants} == {(1, 1 / 3)}
            assert row["epsilon"] == sampled_account(NOISE, 1 / 3, entry.round, DELTA)
        samples |= {tuple(row["participants"]) for row in rows}
        found.append(headers(out))
        log = json.loads((out / "privacy.json").read_text())
        assert all(line["clients"] == NAMES for line in log)
    assert () in samples
    assert len(samples) >= 3
    assert all(each == found[0] for each in found)


class Watched(GaussianMean):
    """Tells of the sums before noise."""

    sums: list[dict[str, torch.Tensor]] = []  # noqa: RUF012

    def add_noise(self, sums, *use):
        self.sums.append({name: each.clone() for name, each in sums.items()})
        super().add_noise(sums, *use)


@pytest.mark.parametrize("method", ["fedavg", "ferret"])
def test_neighbours_differ_by_the_clip_where_the_client_is_drawn(
    experiment, tmp_path, monkeypatch, method
):
    """Of whole rounds with the same key, one of which has zeros in the place of an update."""

    class Silent(local.LocalFleet):
        def train(self, round, parent, clients, clock):
            for result in super().train(round, parent, clients, clock):
                update = Update.from_bytes(result.update)
                if update.client == NAMES[2]:
                    tensors = {
                        name: each * 0 if each.is_floating_point() else each
                        for name, each in update.tensors.items()
                    }
                    update = replace(update, tensors=tensors)
                yield replace(result, update=update.to_bytes())

    monkeypatch.setattr("hedgerow.privacy.client_level.GaussianMean", Watched)
    path = experiment(federation={"rounds": 1, "clients_per_round": 2})
    of_drawn = {True: set(), False: set()}
    for seed in range(6):
        # So small a clip that every update is cut.
        changes = [f"method={METHODS_OF_RUNS[method]}", privacy_of(seed, clip=1e-3)]
        loaded = load(path, changes)
        Watched.sums.clear()
        (_, row) = run(local.LocalFleet, loaded, tmp_path / f"{seed}")
        run(Silent, loaded, tmp_path / f"{seed}-neighbour")
        whole, without = Watched.sums
        assert whole.keys() == without.keys()
        parts = [(whole[name] - without[name]).flatten().double() for name in whole]
        of_drawn[NAMES[2] in row["participants"]].add(float(torch.cat(parts).norm()))
    assert of_drawn[False] == {0.0}
    assert of_drawn[True]
    assert all(each == pytest.approx(1e-3, rel=1e-4) for each in of_drawn[True])


@pytest.mark.parametrize(
    "method",
    ["{name: ferret, compression: 50, error_feedback: true}", "{name: fedsa_lora, ranks: 2}"],
)
def test_a_run_goes_on_with_the_same_samples_and_bytes(hedgerow, experiment, tmp_path, method):
    path = experiment(federation={"rounds": 5, "clients_per_round": 2})
    arguments = [path, f"method={method}", privacy_of(3, quantile=0.5), "training.momentum=0.5"]
    arguments += ["training.optimizer=sgd", "training.keep_optimizer=true"]
    assert hedgerow("run", *arguments, "--out", tmp_path / "whole").code == 0
    part = ["--out", tmp_path / "part"]
    for rounds in (1, 3, 5):
        more = [f"federation.rounds={rounds}", *part, *(["--resume"] if rounds > 1 else [])]
        result = hedgerow("run", *arguments, *more)
        assert result.code == 0, result.err
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "part")
    rows = [rows_of(tmp_path / name) for name in ("whole", "part")]
    for key in ("participants", "failures", "bytes_down", "epsilon", "clip"):
        assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]]
    # A round that is taken back and made again has the same sample and bits: the same release.
    log = json.loads((tmp_path / "part" / "privacy.json").read_text())
    assert hedgerow("ledger", "rollback", tmp_path / "part", "--round", "4").code == 0
    assert hedgerow("run", *arguments, *part, "--resume").code == 0
    assert json.loads((tmp_path / "part" / "privacy.json").read_text()) == log
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "part")


def test_rows_that_are_gone_say_who_was_drawn(hedgerow, experiment, tmp_path):
    path, out = experiment(federation={"rounds": 4, "clients_per_round": 2}), tmp_path / "run"
    arguments = [path, "method=fedavg", privacy_of(seed=None), "--out", out]
    assert hedgerow("run", *arguments).code == 0
    before, ledger = rows_of(out), ledger_bytes(out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:3]))
    result = hedgerow("run", *arguments, "--resume")
    assert result.code == 0, result.err
    assert "who took part of those that were drawn" in result.out
    after = rows_of(out)
    assert after[:3] == before[:3]
    for old, new in zip(before[3:], after[3:], strict=True):
        assert new["participants"] == []
        assert list(new["failures"]) == old["participants"]
        assert all("not known" in sentence for sentence in new["failures"].values())
        assert new["bytes_down"] == old["bytes_down"]
    assert ledger_bytes(out) == ledger
    audited = hr.open_run(out).audit()
    for left in audited["left"]:
        rounds = [row["round"] for row in before[1:] if left["client"] in row["participants"]]
        assert left["rounds"] == sum(round < 3 for round in rounds)
        assert left["failures"] == 0
        assert (left["bytes"] is None) == any(round >= 3 for round in rounds)
    # Without the key nobody knows.
    (out / "privacy.key").unlink()
    assert hedgerow("run", *arguments, "--resume").code == 0
    (out / "metrics.jsonl").write_text("".join(lines[:3]))
    missing = hedgerow("run", *arguments, "--resume")
    assert missing.code == 2
    assert "privacy.key is missing" in missing.err


def test_rows_name_no_strangers(hedgerow, experiment, tmp_path):
    path, out = experiment(federation={"clients_per_round": 2}), tmp_path / "run"
    arguments = [path, "method=fedavg", privacy_of(), "--out", out]
    assert hedgerow("run", *arguments).code == 0
    rows = rows_of(out)
    rows[1]["participants"] = ["client-009"]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = hedgerow("run", *arguments, "federation.rounds=3", "--resume")
    assert result.code == 2
    assert "its row of round 1 names other participants" in result.err


def test_memories_are_asked_for_as_the_rows_say(hedgerow, experiment, tmp_path):
    path, out = experiment(federation={"rounds": 3, "clients_per_round": 2}), tmp_path / "run"
    arguments = [path, "method={name: fedsa_lora, ranks: 2}", privacy_of(3), "--out", out]
    assert hedgerow("run", *arguments).code == 0
    there = {name: row["round"] for row in rows_of(out) for name in row["participants"]}
    client, last = max(there.items(), key=lambda item: item[1])
    models = RunModels(load(path, arguments[1:3]).method, Ledger.open(out / "ledger"), 3)
    for name in NAMES:
        kept = models._kept(name)
        assert bool(kept) == (name in there)
        if name in there:
            assert kept.metadata["round"] == str(there[name])
    shutil.rmtree(out / "clients" / client)
    result = hedgerow("run", *arguments, "federation.rounds=4", "--resume")
    assert result.code == 2
    assert f"lacks the tensors that were saved in round {last}" in result.err


def test_who_is_drawn_and_fails_counts_as_zeros(experiment, tmp_path):
    """A round needs as many as it is to have, or as were drawn, where these are fewer."""

    class Failing(local.LocalFleet):
        def train(self, round, parent, clients, clock):
            lost = clients[0] if len(clients) > 1 else None
            if lost is not None:
                yield ClientResult(lost, failure="gone")
            yield from super().train(round, parent, [c for c in clients if c != lost], clock)

    class Empty(local.LocalFleet):
        def train(self, round, parent, clients, clock):
            for client in clients:
                yield ClientResult(client, failure="gone")

    path = experiment(federation={"rounds": 4, "clients_per_round": 2})
    loaded = load(path, ["method=fedavg", privacy_of(1)])
    rows = run(Failing, loaded, tmp_path / "failing")[1:]
    ledger = Ledger.open(tmp_path / "failing" / "ledger")
    assert sum(row["failed"] for row in rows) > 0
    for row, entry in zip(rows, ledger.entries(), strict=True):
        drawn = drawn_in(1, 2, entry.round, entry.parent)
        assert sorted([*row["participants"], *row["failures"]]) == drawn
        assert [p.client for p in entry.participants] == NAMES
    # Of so many rounds one has fewer than two, whatever the processor makes of the draws' seeds.
    many = ["federation.min_clients=2", "federation.rounds=24", "evaluation.every=24"]
    needy = load(path, ["method=fedavg", privacy_of(1), *many])
    whole = run(local.LocalFleet, needy, tmp_path / "needy")[1:]
    assert min(row["clients"] for row in whole) < 2
    with pytest.raises(RunFailed, match="usable updates that it needs"):
        run(Failing, needy, tmp_path / "too few")
    with pytest.raises(RunFailed, match="has no usable update"):
        run(Empty, loaded, tmp_path / "none")


def test_where_all_may_take_part_the_ledger_is_as_it_was(hedgerow, experiment, tmp_path):
    path = experiment(federation={"rounds": 2})
    for name, more in {"all": [], "three": ["federation.clients_per_round=3"]}.items():
        arguments = [path, "method=fedavg", privacy_of(), *more, "--out", tmp_path / name]
        assert hedgerow("run", *arguments).code == 0
    assert ledger_bytes(tmp_path / "all") == ledger_bytes(tmp_path / "three")
    for entry in Ledger.open(tmp_path / "all" / "ledger").entries():
        assert entry.metrics.keys() == {"epsilon"}
        assert not entry.names_all


def test_clients_that_need_to_know_who_took_part_are_refused(hedgerow, experiment, tmp_path):
    path, out = experiment(federation={"clients_per_round": 2}), tmp_path / "run"
    result = hedgerow("run", path, "method=scaffold", privacy_of(), "--out", out)
    assert result.code == 2
    assert "nobody is told who was drawn for a round, which clients of scaffold" in result.err
    assert not out.exists()
    everybody = [path, "method=scaffold", privacy_of(), "federation.clients_per_round=3"]
    assert hedgerow("run", *everybody, "--out", out).code == 0


def test_an_entry_says_how_its_clients_were_drawn_as_the_experiment_does(
    experiment, tmp_path, model
):
    path, out = experiment(federation={"rounds": 1, "clients_per_round": 2}), tmp_path / "run"
    loaded = load(path, ["method=fedavg", privacy_of()])
    run(local.LocalFleet, loaded, out)
    ledger = Ledger.open(out / "ledger")
    entry, shapes = ledger.read(1), loaded.method.trained_shapes(model)
    expected = loaded.expected(ledger.trained)

    def check(entry: Entry, expected: Expected) -> None:
        check_fits(entry, loaded.method, shapes, 1, entry.parent, expected)

    check(entry, expected)
    for wrong in (None, 0.5, 1.0, 0.0):
        metrics = {"epsilon": entry.metrics["epsilon"]}
        metrics |= {} if wrong is None else {SAMPLING_RATE: wrong}
        with pytest.raises(InvalidMessage, match=r"client_sampling_rate must be 0\.66"):
            check(replace(entry, metrics=metrics), expected)
    with pytest.raises(InvalidMessage, match="client_sampling_rate must be None"):
        check(entry, Expected(expected.seeds, shapes, TrainingSettings()))


@pytest.mark.parametrize("method", ["fedavg", {"name": "ferret"}])
def test_the_demo_with_half_of_its_clients(tmp_path, hedgerow, method):
    path = demo.prepare(tmp_path / "demo")
    budget = {"level": "client", "clip": 0.2, "epsilon": 8.0, "delta": 1e-2}
    changes = {
        "federation": {"rounds": 3, "clients_per_round": 4},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        "evaluation": {"every": 3, "metrics": ["loss"], "batch_size": 64},
    }
    out = tmp_path / "run"
    made = hr.run(path, method=method, privacy=budget, out=out, progress=False, **changes)
    last = rows_of(out)[-1]
    assert 7.9 < last["epsilon"] <= 8
    assert last[SAMPLING_RATE] == 0.5
    assert math.isfinite(last["eval_loss"])
    assert made.audit(rows=2)["left"]
    shown = hedgerow("ledger", "show", out)
    assert shown.code == 0
    assert "of 8" in shown.out
