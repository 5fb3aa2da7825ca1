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
@pytest.mark.parametrize("steps", [4, 10])
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
def test_every_learner_has_them(overrides, hedgerow, experiment, tmp_path, monkeypatch):
    """At no pace nothing is learnt."""
    path = experiment(federation={"rounds": 1})
    paces = {"whole": Job.pace, "none": lambda self, step: 0.0}
    for name, pace in paces.items():
        monkeypatch.setattr(Job, "pace", pace)
        done = hedgerow("run", path, *overrides, FALLING, "--out", tmp_path / name)
        assert done.code == 0, done.err
    learnt, still = (rows_of(tmp_path / name) for name in paces)
    assert learnt[1]["eval_loss"] != pytest.approx(learnt[0]["eval_loss"], abs=1e-4)
    assert still[1]["eval_loss"] == pytest.approx(still[0]["eval_loss"], abs=1e-6)


def test_a_warm_up_that_does_not_end_is_refused(hedgerow, experiment, tmp_path):
    out = ["--out", tmp_path / "run"]
    done = hedgerow("run", experiment(), "training.steps=5", "training.warmup_steps=5", *out)
    assert done.code == 2
    assert "`warmup_steps` must be below the number of steps, 5" in done.err
    assert not (tmp_path / "run").exists()


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
