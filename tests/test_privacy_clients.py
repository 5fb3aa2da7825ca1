"""Client-level privacy: what one client can change, the noise on it, and what is said of it."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace

import pytest
import torch
from dp_accounting import GaussianDpEvent, rdp
from scipy import stats
from support.configurations import METHOD_OPTIONS, method_of
from support.runs import ledger_bytes, rows_of

import hedgerow as hr
from hedgerow.errors import RunFailed
from hedgerow.ledger import Ledger
from hedgerow.methods import METHODS
from hedgerow.methods.base import ServerRound, check_fixed_weights
from hedgerow.model import Model
from hedgerow.privacy.client_level import RATE, ClientLevel, GaussianMean
from hedgerow.privacy.noise import NoiseKey
from hedgerow.settings import ModelSettings, PrivacySettings
from hedgerow.testing.case import Case
from hedgerow.testing.doubles import Forgetful
from hedgerow.wire import Participant, Update

CLIP, ASKED = 0.05, 4
PRIVACY = '{"level": "client", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3, "seed": 5}'


def _method(configuration):
    options = method_of(configuration)
    return METHODS[options["name"]].model_validate(options)


LINEAR = [name for name in METHOD_OPTIONS if _method(name).linear and not _method(name).pools_data]


@pytest.fixture(scope="module")
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model), device="cpu"))


@pytest.fixture(scope="module", params=LINEAR)
def case(request, model, tmp_path_factory):
    return Case(_method(request.param), model, tmp_path_factory.mktemp("case"))


class Recorder(GaussianMean):
    """Keeps the sums as they are before noise, and after."""

    def add_noise(self, sums, *use):
        self.before = {name: each.clone() for name, each in sums.items()}
        super().add_noise(sums, *use)
        self.after = sums = {name: each.clone() for name, each in sums.items()}


def aggregated(case, updates, *, noise=0.0, clip=CLIP, round=None, key=0):
    """What the server makes of updates, and its mean with the sums that it saw."""
    round = round or case.round
    mean = Recorder(clip, noise, ASKED, round, NoiseKey.of_seed(key))
    server_round = ServerRound(
        case.round, case.clients, None, case.expected, Forgetful(), private=mean
    )
    return case.method.made_private().aggregate(updates, server_round), mean


def difference(one, other):
    names = one.keys() | other.keys()
    parts = [one.get(name, 0) - other.get(name, torch.tensor(0.0)) for name in names]
    return float(torch.cat([torch.as_tensor(part).flatten() for part in parts]).norm())


def test_there_are_methods_of_every_kind():
    names = {name.split()[0] for name in LINEAR}
    assert names >= {"fedavg", "ferret", "fedit", "ffa_lora", "fed_sb", "zero_padding"}
    assert not names & {"flora", "flexlora", "fedex_lora", "standalone", "fedkseed", "fedzo"}


def test_one_client_changes_the_sum_by_at_most_the_clip(case):
    """Whatever it sends: what it trained, a hundred times that, and nothing at all."""
    updates = [Update.from_bytes(data) for data in case.updates]
    _, whole = aggregated(case, updates)
    _, without = aggregated(case, updates[1:])
    assert difference(whole.before, without.before) <= CLIP * (1 + 1e-5)
    loud = {
        name: each * 100 if each.is_floating_point() else each
        for name, each in updates[0].tensors.items()
    }
    _, shouted = aggregated(case, [replace(updates[0], tensors=loud), *updates[1:]])
    assert difference(shouted.before, without.before) <= CLIP * (1 + 1e-5)
    assert shouted.clipped >= 1
    assert shouted.clipped_share == shouted.clipped / 3


def test_a_short_update_counts_as_it_is(case):
    updates = [Update.from_bytes(data) for data in case.updates]
    _, mean = aggregated(case, updates, clip=1e6)
    assert mean.clipped == 0
    assert difference(mean.before, {}) > 0


def test_weights_are_one_over_those_who_were_asked(case):
    updates = [Update.from_bytes(data) for data in case.updates]
    made, _ = aggregated(case, updates)
    assert made.weights == [1 / ASKED] * 3
    people = [Participant(f"client-{i}", 1, weight) for i, weight in enumerate(made.weights)]
    check_fixed_weights(people)


def test_the_noise_is_that_of_the_promise(case):
    """Of each coordinate, after every codec on the way up: N(0, (z·C)²) on the sum."""
    updates = [Update.from_bytes(data) for data in case.updates]
    z = 2.5
    _, mean = aggregated(case, updates, noise=z)
    noise = torch.cat([(mean.after[n] - mean.before[n]).flatten() for n in mean.before])
    found = (noise.double() / (z * CLIP)).numpy()
    assert len(found) >= 16
    assert abs(found.var() - 1) < 6 * math.sqrt(2 / len(found))
    assert stats.kstest(found, "norm").pvalue > 1e-4


def test_the_same_sums_have_the_same_noise_and_others_have_another(case):
    updates = [Update.from_bytes(data) for data in case.updates]
    first, _ = aggregated(case, updates, noise=1.0)
    again, _ = aggregated(case, updates, noise=1.0)
    assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)
    _, mean = aggregated(case, updates, noise=1.0)
    for other in ({"round": 3}, {"key": 1}):
        _, others = aggregated(case, updates, noise=1.0, **other)
        assert difference(mean.after, others.after) > 0.1 * CLIP
    # As after a rollback: the difference of two releases has noise, too.
    _, fewer = aggregated(case, updates[1:], noise=1.0)
    noise = [{n: m.after[n] - m.before[n] for n in m.before} for m in (mean, fewer)]
    assert difference(*noise) > 0.1 * CLIP


def test_without_bounds_and_noise_the_mean_is_the_methods_own(case):
    if case.method.server is not None or case.method.name == "scaffold":
        pytest.skip("steps otherwise")
    method = case.method
    if "weights" in type(method).model_fields:
        method = method.model_copy(update={"weights": "uniform"})
    updates = [Update.from_bytes(data) for data in case.updates]
    plain = method.aggregate(
        updates, ServerRound(case.round, case.clients, None, case.expected, Forgetful())
    )
    mean = GaussianMean(1e6, 0.0, 3, case.round, NoiseKey.of_seed(0))
    server_round = ServerRound(
        case.round, case.clients, None, case.expected, Forgetful(), private=mean
    )
    private = case.method.made_private().aggregate(updates, server_round)
    for name, each in plain.tensors.items():
        if each.is_floating_point():
            torch.testing.assert_close(private.tensors[name], each, rtol=1e-4, atol=1e-6)


def adaptive(clip=1.0, z=1.0, asked=40, quantile=0.5, key=0, round=1):
    return GaussianMean(clip, z, asked, round, NoiseKey.of_seed(key), quantile=quantile)


def test_the_clip_follows_a_quantile_of_the_lengths():
    """Of clients with lengths 1 … 40, from a clip that is far too small."""
    clip = 0.1
    for round in range(1, 80):
        mean = adaptive(clip, z=0.2, quantile=0.75, round=round)
        for length in range(1, 41):
            mean.weight([torch.tensor([float(length)])])
        clip = mean.next_clip
    assert 25 < clip < 36


@pytest.mark.parametrize("z", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("asked", [3, 40, 1000])
def test_sum_and_count_together_are_worth_the_noise(z, asked):
    """Two Gaussian mechanisms, as dp-accounting puts them together, cost what one with z does."""
    draws = []
    for key in range(1500):
        mean = adaptive(z=z, asked=asked, key=key)
        draws.append(asked / RATE * -math.log(mean.next_clip))
    sums = {"x": torch.zeros(4000)}
    adaptive(z=z, asked=asked).add_noise(sums)
    of_sum, of_bits = float(sums["x"].std()), float(torch.tensor(draws).std())
    together, alone = rdp.RdpAccountant(), rdp.RdpAccountant()
    together.compose(GaussianDpEvent(of_sum))
    together.compose(GaussianDpEvent(of_bits / 0.5))  # one client changes the sum of bits by 1/2
    alone.compose(GaussianDpEvent(z))
    assert together.get_epsilon(1e-5) == pytest.approx(alone.get_epsilon(1e-5), rel=0.06)


# --- through the command line ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "fedavg",
        '{"name": "fed_sb", "ranks": 4}',
        '{"name": "ferret", "coordinates": "random", "compression": 50}',
    ],
)
def test_a_private_run_says_what_it_spent_and_goes_on_with_the_same_bytes(
    hedgerow, experiment, tmp_path, method
):
    path = experiment(federation={"rounds": 3})
    arguments = [path, f"method={method}", f"privacy={PRIVACY}"]
    assert hedgerow("run", *arguments, "--out", tmp_path / "whole").code == 0
    part = ["--out", tmp_path / "part"]
    assert hedgerow("run", *arguments, "federation.rounds=1", *part).code == 0
    assert hedgerow("run", *arguments, *part, "--resume").code == 0
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "part")
    rows = rows_of(tmp_path / "whole")
    for row in rows[1:]:
        account = rdp.RdpAccountant()
        account.compose(GaussianDpEvent(1.0), row["round"])
        assert row["epsilon"] == account.get_epsilon(1e-3)
        assert 0 <= row["clipped"] <= 1
        assert row["bytes_up"] > 0
        assert row["train_loss"] is None
        assert "train_loss_by_client" not in row
    shown = hedgerow("ledger", "show", tmp_path / "whole")
    assert shown.code == 0, shown.err


def test_an_entry_says_the_clip_of_the_next_round(hedgerow, experiment, tmp_path):
    """And goes on with it after a stop, with the same bytes."""
    privacy = json.dumps({**json.loads(PRIVACY), "quantile": 0.5})
    arguments = [experiment(federation={"rounds": 3}), "method=fedavg", f"privacy={privacy}"]
    assert hedgerow("run", *arguments, "--out", tmp_path / "whole").code == 0
    part = ["--out", tmp_path / "part"]
    assert hedgerow("run", *arguments, "federation.rounds=1", *part).code == 0
    assert hedgerow("run", *arguments, *part, "--resume").code == 0
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "part")
    rows = rows_of(tmp_path / "whole")[1:]
    assert len({row["clip"] for row in rows}) == 3
    account = rdp.RdpAccountant()
    account.compose(GaussianDpEvent(1.0), 3)
    assert rows[-1]["epsilon"] == account.get_epsilon(1e-3)


def test_an_entry_says_nothing_else_of_a_clients_data(hedgerow, experiment, tmp_path):
    out = tmp_path / "run"
    assert (
        hedgerow("run", experiment(), "method=fedit", f"privacy={PRIVACY}", "--out", out).code == 0
    )
    for entry in Ledger.open(out / "ledger").entries():
        assert entry.metrics.keys() == {"epsilon"}
        assert {p.num_examples for p in entry.participants} == {1}
        assert len({p.weight for p in entry.participants}) == 1


def test_noise_has_a_key_that_stays_in_the_runs_directory(hedgerow, experiment, tmp_path):
    privacy = json.dumps({**json.loads(PRIVACY), "seed": None})
    path = experiment(federation={"rounds": 1})
    for name in ("one", "other"):
        out = ["--out", tmp_path / name]
        assert (
            hedgerow(
                "run", path, 'method={"name": "fed_sb", "ranks": 4}', f"privacy={privacy}", *out
            ).code
            == 0
        )
    keys = [tmp_path / name / "privacy.key" for name in ("one", "other")]
    assert keys[0].read_bytes() != keys[1].read_bytes()
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600
    assert ledger_bytes(tmp_path / "one") != ledger_bytes(tmp_path / "other")


REFUSED = {
    "flora": (
        "method=flora",
        {},
        "an entry of flora with these options is made from more than the sum of its clients'",
    ),
    "a stack of sketches": (
        'method={"name": "ferret", "paper": true}',
        {},
        "an entry of ferret with these options is made from more than the sum",
    ),
    "weights by size": (
        'method={"name": "fedavg", "weights": "size"}',
        {},
        "method.weights size: under privacy.level client all clients weigh the same",
    ),
    "no noise and no budget": (
        "method=fedavg",
        {"noise_multiplier": None},
        "give `epsilon`, the budget, or `noise_multiplier`, or both",
    ),
    "a budget that is spent too early": (
        "method=fedavg",
        {"epsilon": 4.0},
        "privacy.epsilon 4 is spent after 1 of the 9 rounds with noise_multiplier 1",
    ),
    "delta of a whole client": (
        "method=fedavg",
        {"delta": 0.5},
        "privacy.delta 0.5 is not below 1/3, one over the number of clients",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_promised_is_refused(hedgerow, experiment, tmp_path, mistake):
    method, changes, sentence = REFUSED[mistake]
    privacy = json.dumps({**json.loads(PRIVACY), **changes})
    path = experiment(federation={"rounds": 9})
    out = tmp_path / "run"
    result = hedgerow("run", path, method, f"privacy={privacy}", "--out", out)
    assert result.code == 2
    assert sentence in result.err
    assert not out.exists()


def test_a_budget_chooses_the_noise_and_holds_for_the_rounds_it_was_made_for(
    hedgerow, experiment, tmp_path
):
    privacy = json.dumps({**json.loads(PRIVACY), "noise_multiplier": None, "epsilon": 6.0})
    path, out = experiment(federation={"rounds": 2}), tmp_path / "run"
    arguments = [path, 'method={"name": "fed_sb", "ranks": 4}', f"privacy={privacy}", "--out", out]
    assert hedgerow("run", *arguments).code == 0
    assert 5.9 < rows_of(out)[-1]["epsilon"] <= 6
    more = hedgerow("run", *arguments, "federation.rounds=3", "--resume")
    assert more.code == 2
    assert "privacy.rounds=2, not 3" in more.err


def test_an_entry_that_the_budget_does_not_bear_is_not_counted_as_released(tmp_path):
    """So that the run goes on where its rounds come to the bits that they had."""
    settings = PrivacySettings(level="client", clip=1.0, epsilon=4.0, delta=1e-3)
    privacy = ClientLevel.of(settings, rounds=1, clients=list("abc"), folder=tmp_path, known=[])
    spent = privacy.account_for(1, "a", "entry", ["north"])
    assert 3.9 < spent <= 4
    with pytest.raises(RunFailed, match="round 1 was made again with other noise"):
        privacy.account_for(1, "b", "another", ["north", "south"])
    assert privacy.account_for(1, "b", "another", ["south"]) == spent
    again = ClientLevel.of(
        settings, rounds=1, clients=list("abc"), folder=tmp_path, known=[(1, "a")]
    )
    assert again.account_for(1, "a", "entry", ["north"]) == spent


def test_the_keys_are_given_one_by_one_or_from_python(hedgerow, experiment, tmp_path):
    path, one, other = experiment(federation={"rounds": 1}), tmp_path / "one", tmp_path / "other"
    keys = [f"privacy.{key}={value}" for key, value in json.loads(PRIVACY).items()]
    result = hedgerow("run", path, "method=fedavg", *keys, "--out", one)
    assert result.code == 0, result.err
    # A resolved experiment says `privacy: null`, which keys may be put below, too.
    plain = tmp_path / "plain"
    assert hedgerow("run", path, "method=fedavg", "--out", plain).code == 0
    keys = ["method.weights=uniform", *keys]
    again = hedgerow("run", plain / "experiment.yaml", *keys, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    hr.run(path, method="fedavg", privacy=json.loads(PRIVACY), out=other, progress=False)
    assert ledger_bytes(one) == ledger_bytes(other) == ledger_bytes(tmp_path / "again")
