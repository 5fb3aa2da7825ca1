"""Example-level privacy: what one row can change, the noise on it, and what is said of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, rdp
from scipy import stats
from support.configurations import METHOD_OPTIONS, method_of
from support.runs import ledger_bytes, rows_of

import hedgerow as hr
from hedgerow.data import collate
from hedgerow.errors import ClientFailed, InvalidMessage, UserError
from hedgerow.experiment import load
from hedgerow.ledger import Ledger
from hedgerow.methods import METHODS
from hedgerow.methods.base import Client, ClientRound
from hedgerow.privacy.accounting import least_noise
from hedgerow.privacy.example_level import ExampleLevel, GaussianSteps
from hedgerow.privacy.noise import NoiseKey
from hedgerow.runs.preparation import prepare
from hedgerow.seeds import Seeds
from hedgerow.settings import PrivacySettings, TrainingSettings
from hedgerow.testing.doubles import Forgetful, no_past
from hedgerow.training import first_order
from hedgerow.training.job import Job
from hedgerow.training.loss import batch_loss
from hedgerow.training.objectives.supervised import Supervised
from hedgerow.wire import Update

CLIP = 0.05
PRIVACY = {"level": "example", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3, "seed": 5}
"""Of runs through the command line."""


@dataclass(frozen=True)
class Recorder(GaussianSteps):
    """Keeps each step's sum before and after noise; leaves an example out."""

    without: int | None = None
    before: list[dict[str, torch.Tensor]] = field(default_factory=list)
    after: list[dict[str, torch.Tensor]] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)

    def sampled(self, num_examples, step):
        chosen = list(super().sampled(num_examples, step))
        self.seen.append([index for index, _ in chosen])
        yield from (each for each in chosen if each[0] != self.without)

    def add_noise(self, sums, step):
        self.before.append({name: each.clone() for name, each in sums.items()})
        super().add_noise(sums, step)
        self.after.append({name: each.clone() for name, each in sums.items()})


def recorder(*, rate=1.0, noise=1.0, clip=CLIP, expected=14, count=1, key=0, **more):
    return Recorder(clip, noise, rate, expected, count, NoiseKey.of_seed(key), ("c", 1), **more)


@pytest.fixture
def prepared(experiment):
    """The tiny model, and clients of 5, 9 and 14 examples."""
    return prepare(load(experiment()))


def trained(prepared, private, method="fedavg", **settings):
    """What a method's client makes of its first round, with a copy of what trained."""
    method = METHODS[method_of(method)["name"]].model_validate(method_of(method))
    training = TrainingSettings(**{"steps": private.count, "batch_size": 4} | settings)
    client, seeds = Client(2, "client-002", 14), Seeds(0)
    client_round = ClientRound(client, 1, seeds, training, Forgetful(), no_past)
    model = prepared.model
    parameters = method.start(model, client_round)
    job = Job(
        network=model.network,
        data=prepared.shards["client-002"],
        settings=training,
        learning_rate=0.01,
        pad_id=2,
        order=seeds.numpy("order"),
        dropout_seed=3,
        start=model.snapshot,
        private=replace(private, trainings=method.trainings),
    )
    method.train(job, client_round, parameters)
    learnt = {name: p.detach().clone() for name, p in parameters.items()}
    model.release()
    return learnt


def distance(one, other):
    return float(torch.cat([(one[name] - other[name]).flatten() for name in one]).norm())


def size(sums):
    return float(torch.cat([each.flatten() for each in sums.values()]).norm())


# --- what one example can change ------------------------------------------------------------------

STEPS = [
    name
    for name in METHOD_OPTIONS
    if METHODS[method_of(name)["name"]].model_validate(method_of(name)).learns_by_steps
]


def test_there_are_methods_of_every_kind():
    names = {name.split()[0] for name in STEPS}
    assert names >= {"flora", "ferret", "fedavg", "fedit", "scaffold", "ditto", "flora_adalora"}
    assert not names & {"fedkseed", "fedzo"}


KINDS = ["flora", "flora_adalora", "fed_sb", "ffa_lora", "ferret", "ferret over lora", "scaffold"]


@pytest.mark.parametrize("method", [*KINDS, "fedavg", "fedprox", "ditto"])
@pytest.mark.parametrize("clip", [CLIP, 1e3])
def test_one_example_changes_the_sum_by_at_most_the_clip(prepared, method, clip):
    """The same examples in the first step, but for one."""
    whole, less = recorder(clip=clip), recorder(clip=clip, without=3)
    trained(prepared, whole, method)
    trained(prepared, less, method)
    found = distance(whole.before[0], less.before[0])
    assert 0 < found <= clip * (1 + 1e-5)
    if clip == CLIP and method != "flora_adalora":  # longer gradients, which are cut to it
        assert found > 0.99 * clip


def test_dropout_of_an_example_does_not_depend_on_the_others(prepared):
    """Or one example's absence would change all other gradients."""
    options = {"name": "flora", "ranks": 4, "dropout": 0.5}
    method = METHODS["flora"].model_validate(options)
    client_round = ClientRound(
        Client(2, "c", 14), 1, Seeds(0), TrainingSettings(steps=1), Forgetful(), no_past
    )
    model, sums = prepared.model, []
    for private in (recorder(), recorder(without=0)):
        parameters = method.start(model, client_round)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.fill_(0.05)
        data = prepared.shards["client-002"]
        order = Seeds(0).numpy("order")
        training = TrainingSettings(steps=1)
        job = Job(model.network, data, training, 0.01, 2, order, 3, private=private)
        method.train(job, client_round, parameters)
        model.release()
        sums.append(private.before[0])
    assert 0 < distance(*sums) <= CLIP * (1 + 1e-5)


@pytest.mark.parametrize("method", ["fedavg", "flora"])
def test_gradients_of_examples_are_exact(prepared, method):
    """Beside torch.func's, of all weights (with tied embeddings and norms) and of factors."""
    model = prepared.model
    kind = METHODS[method_of(method)["name"]].model_validate(method_of(method))
    training = TrainingSettings(steps=1)
    client_round = ClientRound(
        Client(2, "client-002", 14), 1, Seeds(0), training, Forgetful(), no_past
    )
    parameters = dict(kind.start(model, client_round))
    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.05 * noise)
    data = prepared.shards["client-002"]
    live = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in live.items()}
    batches = [collate([data[index]], 2) for index in range(len(data))]

    def loss(values, batch):
        def network(**inputs):
            return torch.func.functional_call(model.network, values, kwargs=inputs)

        logits = network(input_ids=batch["input_ids"], use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:])

    each = [torch.func.grad(loss)(live, batch) for batch in batches]
    norms = [math.sqrt(sum(g.square().sum().item() for g in one.values())) for one in each]
    clip = float(np.median(norms))  # half of them are longer
    expected = {
        name: sum(
            one[names[id(p)]] * min(1, clip / norm) for one, norm in zip(each, norms, strict=True)
        )
        for name, p in parameters.items()
    }
    private = recorder(clip=clip)
    order = Seeds(0).numpy("order")
    job = Job(model.network, data, training, 0.01, 2, order, 3, private=private)
    next(iter(first_order.gradients(job, parameters)))
    model.release()
    assert distance(private.before[0], expected) < 1e-5 * size(expected)


def test_an_example_whose_gradient_is_not_finite_counts_as_zero(prepared, monkeypatch):
    calls = []

    def loss(objective, network, batch):
        found, _ = batch_loss(network, batch)
        calls.append(1)
        return found * torch.inf if len(calls) == 2 else found

    monkeypatch.setattr(Supervised, "total", loss)
    private = recorder()
    trained(prepared, private)
    whole = recorder(without=1)
    monkeypatch.undo()
    trained(prepared, whole)
    assert distance(private.before[0], whole.before[0]) < 1e-6


# --- noise and samples ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["flora", "fedavg"])
def test_the_noise_is_that_of_the_promise_whoever_is_sampled(prepared, method):
    """N(0, (z·C)²) on each coordinate of each sum; what parameters follow is it over q·n."""
    private = recorder(noise=2.5, rate=0.3, expected=4, count=3)
    trained(prepared, private, method)
    found = [
        (after[name] - before[name]).flatten()
        for before, after in zip(private.before, private.after, strict=True)
        for name in before
    ]
    noise = (torch.cat(found).double() / (2.5 * CLIP)).numpy()
    assert abs(noise.var() - 1) < 6 * math.sqrt(2 / len(noise))
    assert stats.kstest(noise, "norm").pvalue > 1e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_is_along_the_noisy_sum_over_the_expected_number(prepared, optimizer):
    """Also without any example, and with plain SGD, which else steps in the backward pass."""
    for rate in (0.0, 1.0):
        private = recorder(rate=rate, expected=4)
        changes = {"optimizer": optimizer, "max_grad_norm": None}
        before = {n: p.detach().clone() for n, p in prepared.model.network.named_parameters()}
        learnt = trained(prepared, private, **changes)
        assert private.seen == [[] if rate == 0 else list(range(14))]
        if rate == 0:
            assert size(private.before[0]) == 0
        for name, noisy in private.after[0].items():
            if optimizer == "sgd":
                step = before[name] - 0.01 * noisy / 4
                torch.testing.assert_close(learnt[name], step, rtol=0, atol=1e-7)
            else:
                assert not torch.equal(learnt[name], before[name])


def test_samples_are_poisson_and_secret():
    """Each example in each step with probability q, independently, as the key alone knows."""
    private = recorder(rate=0.2, count=400)
    drawn = np.zeros((400, 50))
    for step in range(400):
        for index, _ in private.sampled(50, step):
            drawn[step, index] = 1
    assert abs(drawn.mean() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / drawn.size)
    sizes = drawn.sum(axis=1)
    assert abs(sizes.var() / (50 * 0.2 * 0.8) - 1) < 6 * math.sqrt(2 / 400)
    correlations = np.corrcoef(drawn.T)[np.triu_indices(50, 1)]
    assert abs(correlations.mean()) < 5 / math.sqrt(400 * len(correlations))
    for other in (recorder(rate=0.2, key=1), replace(private, use=("c", 2)), private.again()):
        assert list(other.sampled(50, 0)) != list(private.sampled(50, 0))


def test_epochs_are_as_many_steps_as_draw_each_example_so_often():
    settings = TrainingSettings(epochs=2, batch_size=4, gradient_accumulation=2)
    assert settings.sample_size(100) == 8
    assert settings.sampled_steps(100) == 25
    assert settings.sampled_steps(101) == 26
    assert settings.sampled_steps(5) == 2
    assert TrainingSettings(batch_size=4).sampled_steps(100) == 10


# --- accounts -------------------------------------------------------------------------------------


def level(folder, *, known=(), examples=100, rounds=3, trainings=1, **settings):
    return ExampleLevel.of(
        PrivacySettings(**PRIVACY | settings),
        TrainingSettings(steps=5, batch_size=4),
        rounds=rounds,
        trainings=trainings,
        client="north",
        num_examples=examples,
        key_file=folder / "privacy.key",
        log_file=folder / "privacy.json",
        known=known,
    )


def by_hand(steps, rate, noise=1.0, delta=1e-3):
    account = rdp.RdpAccountant()
    account.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    return account.get_epsilon(delta)


def test_a_client_pays_for_its_own_steps_at_its_own_rate(tmp_path):
    privacy = level(tmp_path)
    assert privacy.epsilon() == 0
    steps = privacy.begin(1, "a")
    assert (steps.count, steps.sampling_rate, steps.expected) == (5, 0.04, 4)
    assert privacy.epsilon() == pytest.approx(by_hand(5, 0.04))
    privacy.begin(3, "b")
    assert privacy.epsilon() == pytest.approx(by_hand(10, 0.04))
    twice = level(tmp_path / "twice", trainings=2)
    assert twice.begin(1, "a").count == 5
    assert twice.epsilon() == pytest.approx(by_hand(10, 0.04))


def test_a_round_that_is_made_again_counts_once_and_another_counts(tmp_path):
    """Even where the process was killed, and the ledger went back to an earlier round."""
    first = level(tmp_path)
    steps = first.begin(1, "a")
    again = level(tmp_path)
    assert again.begin(1, "a").use == steps.use
    assert again.epsilon() == first.epsilon()
    again.begin(2, "b")
    other = level(tmp_path, known=[(1, "a")])
    assert other.begin(2, "c").use != other.begin(2, "b").use
    assert other.epsilon() == pytest.approx(by_hand(15, 0.04))


def test_what_is_said_once_more_costs_nothing_and_anything_else_does(tmp_path):
    """As on another processor, whose sums have other bits and so other noise."""
    privacy = level(tmp_path, epsilon=2.5)
    for _ in range(2):
        privacy.begin(1, "a")
        privacy.account_for(1, "a", "update")
    assert privacy.log.by_round("north").total() == 1
    again = level(tmp_path, epsilon=2.5, known=[(1, "a")])
    again.begin(1, "a")
    again.account_for(1, "a", "another update")
    again.account_for(1, "a", "update")
    assert again.log.by_round("north").total() == 2
    with pytest.raises(ClientFailed, match=r"its privacy budget is spent: after 2 rounds"):
        again.account_for(1, "a", "a third")
    assert level(tmp_path, epsilon=2.5).log.by_round("north").total() == 2


def test_releases_of_one_round_have_the_same_samples_and_cost_more_than_two_rounds(tmp_path):
    """Each step's two sums are one mechanism with half the variance, amplified by sampling once."""
    privacy = level(tmp_path)
    samples = [list(privacy.begin(1, "a").sampled(100, step)) for step in range(5)]
    assert [list(privacy.begin(1, "a").sampled(100, step)) for step in range(5)] == samples
    for sha256 in ("update", "another update"):
        privacy.account_for(1, "a", sha256)
    expected = by_hand(5, 0.04, noise=1 / math.sqrt(2))
    assert privacy.epsilon() == pytest.approx(expected)
    assert expected > 2 * by_hand(10, 0.04)
    privacy.begin(2, "b")
    account = rdp.RdpAccountant()
    for steps, noise in ((5, 1 / math.sqrt(2)), (5, 1.0)):
        account.compose(PoissonSampledDpEvent(0.04, GaussianDpEvent(noise)), steps)
    assert privacy.epsilon() == pytest.approx(account.get_epsilon(1e-3))


@pytest.mark.parametrize("damage", [None, b"[[1", b"[1]", b'[["x", 3]]', b"[]"])
def test_an_account_is_not_rolled_back_by_accident(tmp_path, damage):
    level(tmp_path).begin(1, "a")
    file = tmp_path / "privacy.json"
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(UserError, match="restore it from a copy"):
        level(tmp_path, known=[(1, "a")])


def test_a_key_that_is_lost_is_not_made_anew(tmp_path):
    level(tmp_path, seed=None).begin(1, "a")
    (tmp_path / "privacy.key").unlink()
    with pytest.raises(UserError, match=r"privacy\.key is missing, .* restore it from a copy"):
        level(tmp_path, seed=None)


def test_the_noise_of_a_budget_is_for_the_clients_own_steps(tmp_path):
    privacy = level(tmp_path, noise_multiplier=None, epsilon=2.0)
    noise = least_noise(2.0, 1e-3, 15, 0.04)
    for round in (1, 2, 3):
        assert privacy.begin(round, str(round)).noise_multiplier == noise
    assert 1.98 < privacy.epsilon() <= 2
    with pytest.raises(ClientFailed, match=r"its privacy budget is spent: after 3 rounds"):
        privacy.begin(3, "again")
    other = level(tmp_path / "large", examples=900, noise_multiplier=None, epsilon=2.0)
    assert other.release.noise_multiplier < noise


# --- updates --------------------------------------------------------------------------------------


def test_an_update_says_its_epsilon_and_no_loss_and_nothing_else():
    update = Update("flora", 1, "c", "p", 3, None, {"x": torch.zeros(1)}, {"r": "4"}, epsilon=2.5)
    read = Update.from_bytes(update.to_bytes())
    assert (read.train_loss, read.epsilon, read.about) == (None, 2.5, {"r": "4"})
    asked = ("flora", 1, "p", "c", 3)
    read.check(*asked, says_loss=False, says_epsilon=True)
    with pytest.raises(InvalidMessage, match="metadata must not have epsilon"):
        read.check(*asked, says_loss=False)
    with pytest.raises(InvalidMessage, match="metadata must have train_loss in this run"):
        read.check(*asked)
    replace(read, train_loss=1.0, epsilon=None).check(*asked)
    with pytest.raises(InvalidMessage, match="metadata must not have train_loss"):
        replace(read, train_loss=1.0).check(*asked, says_loss=False, says_epsilon=True)


# --- through the command line ---------------------------------------------------------------------


def arguments(experiment, *changes, **privacy):
    return [experiment, *changes, f"privacy={json.dumps(PRIVACY | privacy)}"]


@pytest.mark.parametrize(
    "method",
    [
        '{"name": "flora", "ranks": [4, 2, 1]}',
        '{"name": "ferret", "compression": 64, "error_feedback": true}',
    ],
)
def test_a_private_run_says_what_it_spent_and_goes_on_with_the_same_bytes(
    hedgerow, experiment, tmp_path, monkeypatch, method
):
    """Also where it was killed when all had trained, and nothing of it was written."""
    path = experiment(federation={"rounds": 3, "keep_updates": True})
    given = arguments(path, f"method={method}")
    assert hedgerow("run", *given, "--out", tmp_path / "whole").code == 0
    part = ["--out", tmp_path / "part"]
    assert hedgerow("run", *given, "federation.rounds=1", *part).code == 0
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(Ledger, "append", killed)
        assert hedgerow("run", *given, *part, "--resume").code != 0
    assert hedgerow("run", *given, *part, "--resume").code == 0
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "part")
    for run in ("whole", "part"):
        for row in rows_of(tmp_path / run)[1:]:
            # The client of 5 examples has the highest rate.
            assert row["epsilon"] == pytest.approx(by_hand(2 * row["round"], 4 / 5))
            assert row["train_loss"] is None
            assert "train_loss_by_client" not in row
    updates = sorted((tmp_path / "whole" / "updates" / "round-0002").iterdir())
    said = [Update.read(file).epsilon for file in updates]
    assert said == pytest.approx([by_hand(4, 4 / n) for n in (5, 9, 14)])
    assert not list((tmp_path / "whole").glob("privacy.key"))  # there is a seed instead
    for command in ("show", "verify"):
        shown = hedgerow("ledger", command, tmp_path / "whole")
        assert shown.code == 0, shown.err


def test_noise_has_a_key_that_stays_in_the_runs_directory(hedgerow, experiment, tmp_path):
    path = experiment(federation={"rounds": 1})
    for name in ("one", "other"):
        out = ["--out", tmp_path / name]
        assert hedgerow("run", *arguments(path, seed=None), *out).code == 0
    keys = [tmp_path / name / "privacy.key" for name in ("one", "other")]
    assert keys[0].read_bytes() != keys[1].read_bytes()
    assert ledger_bytes(tmp_path / "one") != ledger_bytes(tmp_path / "other")


def test_a_client_whose_budget_is_spent_stops_and_the_others_go_on(hedgerow, experiment, tmp_path):
    epsilon = (by_hand(2, 4 / 5) + by_hand(4, 4 / 5)) / 2
    out = tmp_path / "run"
    result = hedgerow("run", *arguments(experiment(), epsilon=epsilon), "--out", out)
    assert result.code == 0, result.err
    rows = rows_of(out)
    assert rows[1]["failures"] == {}
    assert rows[2]["failures"].keys() == {"client-000"}
    assert rows[2]["failures"]["client-000"] == "its privacy budget is spent"
    assert "round 2: its privacy budget is spent: after 1 rounds, with epsilon" in result.out
    assert rows[2]["epsilon"] == rows[1]["epsilon"]  # its own, which is still the largest


REFUSED = {
    "zeroth-order steps": ("method=fedkseed", {}, "clients of fedkseed with these options tell of"),
    "stated losses": (
        'method={"name": "flora", "scaling": "adaptive"}',
        {},
        "clients of flora with these options tell of their examples otherwise than by first-order",
    ),
    "delta of a whole client": (
        "method=flora",
        {"delta": 0.15},
        "privacy.delta 0.15 is not below 1/9, one over the number of examples of client-001",
    ),
    "scores of own rows": (
        "data.client_test=0.2",
        {},
        "`data.client_test`: clients' scores on rows of their own would leave them without noise",
    ),
    "next to no noise": ("method=flora", {"noise_multiplier": 0.001}, "privacy.noise_multiplier"),
    "an impossible budget": (
        "method=flora",
        {"noise_multiplier": None, "epsilon": 1e-6, "delta": 1e-9},
        "privacy.epsilon 1e-06 cannot be kept in 4 releases",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_promised_is_refused(hedgerow, experiment, tmp_path, mistake):
    change, privacy, sentence = REFUSED[mistake]
    out = tmp_path / "run"
    path = experiment(method={"ranks": 2})
    result = hedgerow("run", *arguments(path, change, **privacy), "--out", out)
    assert result.code == 2
    assert sentence in result.err
    assert not out.exists()


@pytest.fixture(params=["example", "client"])
def made_again(request, experiment, tmp_path, monkeypatch):
    """Level, and a function that makes a round again with other bits.

    As where a run goes on on another processor, after it was killed before its entry.
    """
    path, level = experiment(federation={"rounds": 1}), request.param
    privacy = {**PRIVACY, "level": level}
    options = {"method": "fedavg", "privacy": privacy, "out": tmp_path / "run", "progress": False}
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(Ledger, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            hr.run(path, **options)
    plain = NoiseKey.beside

    def beside(self, sums, *use):
        rounded = {name: each * (1 + 2**-20) for name, each in sums.items()}
        return plain(self, rounded, *use)

    monkeypatch.setattr(NoiseKey, "beside", beside)
    return level, lambda: hr.run(path, **options, resume=True)


def test_a_round_made_again_with_other_bits_counts_again_or_is_not_released(made_again):
    """An example's release is in its client's own noise; that of a client, by being another, would
    tell of it."""
    level, again = made_again
    if level == "client":
        with pytest.raises(hr.RunFailed, match="round 1 was made again and came to other bits"):
            again()
        return
    expected = by_hand(2, 4 / 5, noise=1 / math.sqrt(2))
    assert again().metrics["epsilon"].iloc[-1] == pytest.approx(expected)


class ReadsRows(METHODS["flora"]):
    """Looks at its rows, which FLoRA does not."""

    def train(self, job, client_round, parameters):
        job.data[0]
        return super().train(job, client_round, parameters)


class TrainsTwice(METHODS["flora"]):
    """Pays for one training of two."""

    def train(self, job, client_round, parameters):
        super().train(job, client_round, parameters)
        return super().train(job, client_round, parameters)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [(ReadsRows, "reads its clients' examples itself"), (TrainsTwice, "trains more than 1 times")],
)
def test_a_method_that_says_too_little_of_itself_is_stopped(experiment, tmp_path, method, sentence):
    with pytest.raises(UserError, match=sentence):
        hr.run(
            experiment(),
            method=method(ranks=2),
            privacy=PRIVACY,
            out=tmp_path / "run",
            progress=False,
        )


def test_a_method_that_trains_in_its_own_way_has_to_say_that_it_may_be_private():
    class Own(METHODS["fedavg"]):
        def train(self, job, client_round, parameters):
            raise NotImplementedError

    assert METHODS["fedavg"].model_validate({}).learns_by_steps
    assert not Own.model_validate({}).learns_by_steps
