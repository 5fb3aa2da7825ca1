"""FedKSeed and FedZO: steps that are a seed and a number."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.runs import rows_of
from torch import nn

from hedgerow import runs
from hedgerow.errors import Diverged, InvalidMessage
from hedgerow.experiment import load
from hedgerow.methods.base import Client, Expected
from hedgerow.seeds import Seeds
from hedgerow.training import zeroth_order
from hedgerow.training.objectives.supervised import Supervised
from hedgerow.wire import Update


@pytest.fixture
def run(experiment, hedgerow, tmp_path):
    """Run a zeroth-order method; returns the run's directory."""

    def start(name, rounds=2, training=None, **options):
        path = experiment(
            training={"learning_rate": 1e-3, "steps": 3, **(training or {})},
            federation={"rounds": rounds, "keep_updates": True},
        )
        method = json.dumps({"name": name, **options})
        done = hedgerow("run", path, f"method={method}", "--out", tmp_path / name)
        assert done.code == 0, done.err
        return tmp_path / name

    return start


class OneStep:
    """A job of one step on one batch."""

    network = None
    learning_rate = 0.1
    objective = Supervised()

    def steps(self):
        yield [{}], 1

    def pace(self, step):
        return 1.0


def test_a_direction_is_normal_and_of_the_seed_and_the_weight_alone():
    weight = torch.zeros(300, 400)
    first, again = (torch.cat(list(zeroth_order.direction(weight, 7, 2))) for _ in range(2))
    other = torch.cat(list(zeroth_order.direction(weight, 7, 3)))
    assert torch.equal(first, again)
    assert first.mean().abs() < 4 / len(first) ** 0.5
    assert first.var() == pytest.approx(1, rel=0.02)
    assert abs(float(first @ other)) < 4 * len(first) ** 0.5


def test_a_weight_larger_than_a_piece_is_moved_piece_by_piece(monkeypatch):
    monkeypatch.setattr(zeroth_order, "PIECE", 1000)
    weight = torch.zeros(50, 50)
    zeroth_order.move([weight], 7, 2.0)
    parts = list(zeroth_order.direction(weight, 7, 0))
    assert [len(part) for part in parts] == [1000, 1000, 500]
    assert torch.equal(weight.flatten(), 2 * torch.cat(parts))
    assert abs(float(parts[0] @ parts[1])) < 4 * 1000**0.5
    zeroth_order.move([weight], 7, -2.0)
    assert torch.equal(weight, torch.zeros(50, 50))


def test_a_step_follows_the_slope_along_its_direction():
    """On ½‖w - a‖², the two-sided difference is exact, so one step is known in closed form."""
    target, weight = torch.randn(40), nn.Parameter(torch.zeros(40))

    def half_square(objective, network, batch):
        return (weight - target).square().sum() / 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervised, "total", half_square)
        _, steps = zeroth_order.train(OneStep(), [weight], lambda step: [5, 6], 1e-2)
    z = [torch.cat(list(zeroth_order.direction(weight, seed, 0))) for seed in (5, 6)]
    expected = [0.1 * float(target @ direction) / 2 for direction in z]
    assert steps.seeds == [5, 6]
    assert steps.coordinates == pytest.approx(expected, rel=1e-3)
    moved = steps.coordinates[0] * z[0] + steps.coordinates[1] * z[1]
    assert torch.allclose(weight, moved, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "numbers"),
    [("fedkseed", {"candidates": 4}, None), ("fedzo", {"directions_per_step": 2}, 6)],
)
def test_a_round_is_the_mean_of_where_clients_went(run, name, options, numbers):
    """Entry 1 by hand: Σ p_k c_k along the seeds that the kept updates name."""
    directory = run(name, **options)
    shares = {"client-000": 5 / 28, "client-001": 9 / 28, "client-002": 14 / 28}
    summed = {}
    for client, share in shares.items():
        update = load_file(directory / f"updates/round-0001/{client}.safetensors")
        if numbers:
            assert len(update["seeds"]) == numbers
        for seed, c in zip(
            *(update[key].tolist() for key in ("seeds", "coordinates")), strict=True
        ):
            summed[seed] = summed.get(seed, 0) + share * c
    if name == "fedkseed":
        assert len(summed) <= 4
    entry = load_file(directory / "ledger/0001.safetensors")
    assert dict(zip(entry["seeds"].tolist(), entry["coordinates"].tolist(), strict=True)) == (
        pytest.approx(summed, rel=1e-5)
    )
    with runs.opened(directory, []) as (settings, ledger):
        base, after = (runs.model_at(settings, ledger, round) for round in (0, 1))
    expected = [p.detach().clone() for p in base.network.parameters()]
    for seed, coordinate in summed.items():
        zeroth_order.move(expected, seed, coordinate)
    for weight, known in zip(after.network.parameters(), expected, strict=True):
        assert torch.allclose(weight, known, atol=1e-5)


@pytest.mark.parametrize("name", ["fedkseed", "fedzo"])
def test_a_replay_has_the_same_bits_and_entries_are_small(run, name):
    directory = run(name, rounds=3)
    with runs.opened(directory, []) as (settings, ledger):
        first, second = (runs.model_at(settings, ledger, 3) for _ in range(2))
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(row["bytes_up"] < 3000 for row in rows_of(directory))


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("seeds"),
        lambda t: t.update(seeds=t["seeds"][:-1]),
        lambda t: t.update(seeds=-t["seeds"]),
        lambda t: t.update(seeds=t["seeds"] * 0),
        lambda t: t.update(seeds=t["seeds"].int()),
        lambda t: t.update(seeds=t["seeds"] + 1),
        lambda t: t.update(coordinates=t["coordinates"] + 1e31),
        lambda t: t.update(seeds=t["seeds"][:0], coordinates=t["coordinates"][:0]),
    ],
)
def test_an_update_that_is_no_list_of_steps_is_refused(run, damage):
    directory = run("fedzo", rounds=1)
    update = Update.from_bytes(
        (directory / "updates/round-0001/client-000.safetensors").read_bytes()
    )
    settings, client = load(directory / "experiment.yaml"), Client(0, "client-000", 5)
    expected = Expected(Seeds(0), {}, settings.training)
    settings.method.check_update(client, update, expected)
    tensors = dict(update.tensors)
    damage(tensors)
    bad = Update(**{**vars(update), "tensors": tensors})
    with pytest.raises(InvalidMessage):
        settings.method.check_update(client, Update.from_bytes(bad.to_bytes()), expected)


def test_a_loss_that_is_no_number_is_a_failure(monkeypatch):
    monkeypatch.setattr(Supervised, "total", lambda *_: float("inf"))
    with pytest.raises(Diverged, match="at step 1"):
        zeroth_order.train(OneStep(), [nn.Parameter(torch.zeros(3))], lambda step: [5], 1e-3)


def test_bfloat16_weights_are_refused(experiment, hedgerow, tmp_path):
    done = hedgerow(
        "run", experiment(), "method=fedzo", "model.dtype=bfloat16", "--out", tmp_path / "run"
    )
    assert done.code == 2
    assert "give model.dtype=float32" in done.err
