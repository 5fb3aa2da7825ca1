"""Learning rates over a client's steps of a round."""

from __future__ import annotations

import pytest
import torch
from support.runs import ledger_bytes, rows_of
from transformers import get_scheduler

from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.training import first_order
from hedgerow.training.job import Job


def job(steps: int, **training) -> Job:
    settings = TrainingSettings(steps=steps, **training)
    return Job(None, [], settings, 0.1, 0, Seeds(0).numpy("order"), 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("steps", [3, 10])
def test_paces_are_those_of_transformers(schedule, warmup, steps):
    ours = job(steps, local_schedule=schedule, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, warmup, steps)
    own = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    pace = first_order.paced(own, ours)
    for step in range(steps):
        pace(step)
        assert own.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


FALLING = "training.local_schedule=linear"


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=fedavg", "training.optimizer=sgd"],
        ["method=fedkseed"],
        ["method={name: flora_adalora, ranks: [4, 2, 1], initial: 1}"],
        ["method={name: ferret, compression: 64}"],
    ],
    ids=["sgd", "zeroth order", "adalora", "kept moments"],
)
def test_every_learner_has_them(overrides, hedgerow, experiment, tmp_path):
    """With as many steps to warm up in as there are, and one step, nothing is learnt."""
    path, none = experiment(federation={"rounds": 1}), "training.warmup_steps=1"
    for name, *more in (
        ["plain"],
        ["falling", FALLING],
        ["still", "training.steps=1", none],
    ):
        done = hedgerow("run", path, *overrides, *more, "--out", tmp_path / name)
        assert done.code == 0, done.err
    assert ledger_bytes(tmp_path / "plain") != ledger_bytes(tmp_path / "falling")
    before, after = rows_of(tmp_path / "still")
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)


def test_steps_in_the_backward_pass_are_as_long_as_the_optimizer_s(hedgerow, experiment, tmp_path):
    path = experiment(federation={"rounds": 1}, training={"steps": 4})
    plain = ["method=fedavg", "training.optimizer=sgd", FALLING, "training.warmup_steps=2"]
    ways = {"immediate": "null", "whole": "1e9"}
    for name, norm in ways.items():
        more = [f"training.max_grad_norm={norm}"]
        done = hedgerow("run", path, *plain, *more, "--out", tmp_path / name)
        assert done.code == 0, done.err
    first, second = (rows_of(tmp_path / name)[-1]["eval_loss"] for name in ways)
    assert first == pytest.approx(second, rel=1e-6)


def test_a_constant_rate_has_the_bytes_of_before(hedgerow, experiment, tmp_path):
    path = experiment(federation={"rounds": 1})
    for name, *more in (["before"], ["said", "training.local_schedule=constant"]):
        assert hedgerow("run", path, *more, "--out", tmp_path / name).code == 0
    assert ledger_bytes(tmp_path / "before") == ledger_bytes(tmp_path / "said")
