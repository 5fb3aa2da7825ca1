"""Local steps by other libraries' trainers."""

from __future__ import annotations

import json
import random
import sys
import textwrap

import numpy as np
import pytest
import yaml
from support.runs import ledger_bytes, rows_of

NAMES = ["transformers", "trl"]


@pytest.fixture
def run(hedgerow, experiment, tmp_path):
    """Run an experiment; returns its rows."""

    def made(name, *overrides, **sections):
        path = experiment(**{"federation": {"rounds": 2}} | sections)
        done = hedgerow("run", path, *overrides, "--out", tmp_path / name)
        assert done.code == 0, done.err
        return rows_of(tmp_path / name)

    return made


@pytest.mark.parametrize(
    "method",
    [
        "{name: flora, ranks: [4, 2, 1]}",
        "{name: fedit, ranks: 2}",
        "fedavg",
        "{name: ferret, compression: 64}",
        "{name: fed_sb, ranks: 2}",
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_runs_learn_and_go_on_with_the_same_bytes(run, tmp_path, hedgerow, name, method):
    given = [f"training.trainer={name}", f"method={method}"]
    rows = run("whole", *given)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert rows[-1]["train_loss"] < rows[1]["train_loss"]
    if "flora" in method:
        assert rows[-1]["aggregation_error"] < 1e-6
    run("part", *given, "federation.rounds=1")
    path = tmp_path / "experiment.yaml"
    done = hedgerow("run", path, *given, "--out", tmp_path / "part", "--resume")
    assert done.code == 0, done.err
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "part")


@pytest.mark.parametrize("name", NAMES)
def test_one_step_on_all_examples_is_hedgerow_s(run, tmp_path, name):
    """In one batch there is no order, and all of them weigh the same."""
    one = ["training.steps=1", "training.batch_size=64", "federation.rounds=1"]
    method = "method={name: fedit, ranks: 2}"
    ours = run("ours", method, *one)[-1]
    theirs = run("theirs", method, *one, f"training.trainer={name}")[-1]
    assert theirs["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-5)
    assert theirs["eval_loss"] == pytest.approx(ours["eval_loss"], rel=1e-5)


def test_the_trainer_of_transformers_follows_every_objective(hedgerow, experiment, tmp_path):
    rows = [{"prompt": f"Say {i}", "chosen": f"{i}" * 3, "rejected": "no"} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {
        **{"clients": {"one": str(tmp_path / "pairs.jsonl")}, "prompt": "plain"},
        **{"test": str(tmp_path / "pairs.jsonl"), "max_length": 64},
    }
    path = tmp_path / "experiment.yaml"
    content = yaml.safe_load(experiment(federation={"rounds": 2}).read_text())
    path.write_text(yaml.safe_dump(content | {"data": data, "method": {"name": "fedavg"}}))
    metrics = ["training.objective=dpo", "evaluation.metrics=[loss, reward_accuracy]"]
    done = hedgerow("run", path, "training.trainer=transformers", *metrics, "--out", tmp_path / "r")
    assert done.code == 0, done.err
    assert rows_of(tmp_path / "r")[-1]["reward_accuracy"] > 60


@pytest.mark.parametrize("name", NAMES)
def test_global_randomness_is_given_back(run, name):
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    run("run", f"training.trainer={name}", "federation.rounds=1")
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_arguments_are_handed_on(run, tmp_path):
    trainer = "training.trainer={{name: trl, arguments: {}}}"
    run("plain", trainer.format("{}"), "federation.rounds=1")
    run("packed", trainer.format("{neftune_noise_alpha: 5}"), "federation.rounds=1")
    assert ledger_bytes(tmp_path / "plain") != ledger_bytes(tmp_path / "packed")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_bases_may_be_quantized(run, name, kind):
    rows = run("run", f"training.trainer={name}", f"model.quantization={kind}")
    assert rows[-1]["train_loss"] < rows[1]["train_loss"]


def test_schedules_are_the_trainer_s(run, tmp_path):
    """With as many steps to warm up in as there are, and one step, nothing is learnt."""
    still = ["training.steps=1", "training.warmup_steps=1", "federation.rounds=1"]
    rows = run("run", "training.trainer=transformers", *still, "method=fedavg")
    assert rows[-1]["eval_loss"] == pytest.approx(rows[0]["eval_loss"], abs=1e-6)


OWN = """
    import torch
    from hedgerow.training.trainers import Trainer

    class Plain(Trainer):
        rate: float = 0.01

        def train(self, job, parameters):
            total = tokens = 0
            for batches, count in job.steps():
                for batch in batches:
                    loss = job.objective.total(job.network, batch)
                    (loss / count).backward()
                    total += float(loss)
                tokens += count
                with torch.no_grad():
                    for parameter in parameters.values():
                        parameter -= self.rate * parameter.grad
                        parameter.grad = None
            return total / tokens
"""


def test_one_s_own(run, tmp_path, monkeypatch):
    (tmp_path / "own_trainer.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_trainer", raising=False)
    rows = run("run", 'training.trainer={name: "own_trainer:Plain", rate: 0.1}', "method=fedavg")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


PRIVATE = "privacy={level: example, clip: 1, noise_multiplier: 1, delta: 1e-3}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.trainer=tlr"], "there is no 'tlr', did you mean `trl`?"),
        (["training.trainer={arguments: {}}"], "`training.trainer` needs a name"),
        (["training.trainer=trl", "method=fedkseed"], "take local steps of its own"),
        (["training.trainer=trl", "method={name: fedprox, mu: 0.1}"], "or take one of"),
        (["training.trainer=trl", "method=fedavg", PRIVATE], "noise hides each step's gradients"),
        (["training.trainer=trl", "training.keep_optimizer=true"], "an optimiser of its own"),
        (
            ["training.trainer={name: trl, arguments: {learning_rate: 1}}"],
            "`training.trainer.arguments.learning_rate`: give training.learning_rate",
        ),
        (
            ["training.trainer={name: transformers, arguments: {output_dir: x}}"],
            "leave it out, since a run keeps its own",
        ),
        (
            ["training.trainer={name: trl, arguments: {packed: true}}"],
            "`training.trainer.arguments`: SFTConfig does not take them: ",
        ),
    ],
)
def test_mistakes_are_one_sentence(hedgerow, experiment, tmp_path, overrides, message):
    done = hedgerow("run", experiment(), *overrides, "--out", tmp_path / "run")
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()
