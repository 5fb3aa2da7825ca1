"""Local steps by other libraries' trainers."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import textwrap

import numpy as np
import pytest
import torch
import yaml
from support.runs import ledger_bytes, rows_of

from hedgerow.errors import UserError
from hedgerow.settings import TrainingSettings
from hedgerow.training import first_order
from hedgerow.training.objectives.supervised import Supervised
from hedgerow.training.trainers import trl

NAMES = ["transformers", "trl"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


METHODS = [
    "{name: flora, ranks: [4, 2, 1]}",
    "{name: fedit, ranks: 2}",
    "fedavg",
    "{name: ferret, compression: 64}",
    "{name: fed_sb, ranks: 2}",
]
QUICK = [("transformers", METHODS[0]), ("trl", METHODS[3])]


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
    ("name", "method"),
    [
        (name, method) if (name, method) in QUICK else slow(name, method)
        for name in NAMES
        for method in METHODS
    ],
)
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


@pytest.fixture
def pairs(hedgerow, experiment, tmp_path):
    """Runs DPO on nine pairs of one client; returns the rows of its rounds."""
    rows = [{"prompt": f"Say {i}", "chosen": f"{i}" * 3, "rejected": "no"} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {
        **{"clients": {"one": str(tmp_path / "pairs.jsonl")}, "prompt": "plain"},
        **{"test": str(tmp_path / "pairs.jsonl"), "max_length": 64},
    }
    path = tmp_path / "experiment.yaml"
    content = yaml.safe_load(experiment(federation={"rounds": 2}).read_text())
    path.write_text(yaml.safe_dump(content | {"data": data, "method": {"name": "fedavg"}}))

    def run(out, *changes):
        metrics = ["training.objective=dpo", "evaluation.metrics=[loss, reward_accuracy]"]
        done = hedgerow("run", path, *metrics, *changes, "--out", tmp_path / out)
        assert done.code == 0, done.err
        return rows_of(tmp_path / out)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_preferences_are_learnt(pairs, name):
    assert pairs("run", f"training.trainer={name}")[-1]["reward_accuracy"] > 60


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "objective",
    [
        "{name: dpo, beta: 0.5, reference: round}",
        "{name: dpo, loss: robust, label_smoothing: 0.1}",
        slow("{name: dpo, loss: ipo}"),
    ],
)
def test_a_step_on_all_pairs_is_hedgerow_s(pairs, name, objective):
    """In the second round the model has left the reference, or is it anew."""
    one = [f"training.objective={objective}", "training.steps=1", "training.batch_size=9"]
    one += ["training.optimizer=sgd", "training.learning_rate=0.5"]
    ours, theirs = pairs("ours", *one), pairs("theirs", *one, f"training.trainer={name}")
    for row, other in zip(ours[1:], theirs[1:], strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=1e-5)
        assert other["eval_loss"] == pytest.approx(row["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_global_randomness_is_given_back(run, name):
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    run("run", f"training.trainer={name}", "federation.rounds=1")
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


TRL = "training.trainer={{name: trl, arguments: {}}}"


@pytest.mark.parametrize(
    "arguments",
    ["{packing: true}", slow("{padding_free: true}"), slow("{neftune_noise_alpha: 5}")],
)
def test_arguments_are_handed_on(run, tmp_path, arguments):
    run("plain", TRL.format("{}"), "federation.rounds=1")
    rows = run("other", TRL.format(arguments), "federation.rounds=1")
    assert ledger_bytes(tmp_path / "plain") != ledger_bytes(tmp_path / "other")
    assert rows[1]["eval_loss"] < rows[0]["eval_loss"]


def test_what_the_library_refuses_while_training_is_a_sentence(hedgerow, experiment, tmp_path):
    if importlib.util.find_spec("liger_kernel") is not None:
        pytest.skip("Liger's kernels are here")
    liger = TRL.format("{use_liger_kernel: true}")
    done = hedgerow("run", experiment(), liger, "--out", tmp_path / "run")
    assert done.code == 2
    assert "`training.trainer.arguments`: the trainer does not take them" in done.err


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_the_network_are_given_back(hedgerow, experiment, tmp_path, name, monkeypatch):
    seen = []
    train = first_order.continue_training

    def watched(job, *given, **more):
        configs = (job.network.config, job.network.generation_config)
        before = [dict(vars(each)) for each in configs]
        kept = set(vars(job.network))
        found = train(job, *given, **more)
        seen.append((before, [dict(vars(each)) for each in configs], kept, set(vars(job.network))))
        return found

    monkeypatch.setattr(first_order, "continue_training", watched)
    path = experiment(federation={"rounds": 1})
    done = hedgerow("run", path, f"training.trainer={name}", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    for before, after, kept, own in seen:
        assert (before, kept) == (after, own)


@pytest.mark.parametrize("name", ["transformers", slow("trl")])
def test_clients_side_by_side_have_the_same_bytes(hedgerow, experiment, tmp_path, name):
    path = experiment(federation={"rounds": 2})
    for out, *more in (["one"], ["two", "--workers", "2"]):
        given = [f"training.trainer={name}", *more, "--out", tmp_path / out]
        assert hedgerow("run", path, *given).code == 0
    assert ledger_bytes(tmp_path / "one") == ledger_bytes(tmp_path / "two")


def test_one_that_loads_data_in_processes_has_them_beside_others(hedgerow, experiment, tmp_path):
    loads = "{name: transformers, arguments: {dataloader_num_workers: 1}}"
    given = [f"training.trainer={loads}", "federation.rounds=1", "--workers", "2"]
    done = hedgerow("run", experiment(), *given, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert rows_of(tmp_path / "run")[1]["failures"] == {}


def test_it_is_explained_and_its_options_are_overrides(run, hedgerow, tmp_path):
    said = hedgerow("explain", "training.trainer").out
    assert "transformers" in said
    assert "SFTConfig" in said
    more = ["training.trainer=transformers", "training.trainer.arguments.adam_beta1=0.5"]
    run("run", *more, "federation.rounds=1", "method=fedavg")
    path = tmp_path / "run" / "experiment.yaml"
    assert yaml.safe_load(path.read_text())["training"]["keep_optimizer"] is False
    out = ["--out", tmp_path / "again"]
    assert hedgerow("run", path, "training.trainer=null", *out).code == 0
    again = yaml.safe_load((tmp_path / "again" / "experiment.yaml").read_text())
    assert again["training"]["keep_optimizer"] is True


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformers", "nf4"),
        slow("transformers", "int8"),
        slow("trl", "nf4"),
        slow("trl", "int8"),
    ],
)
def test_bases_may_be_quantized(run, name, kind):
    rows = run("run", f"training.trainer={name}", f"model.quantization={kind}")
    assert rows[-1]["train_loss"] < rows[1]["train_loss"]


def test_schedules_are_the_trainer_s(run, tmp_path):
    one = ["training.trainer=transformers", "federation.rounds=1", "method=fedavg"]
    run("constant", *one)
    run("falling", *one, "training.local_schedule=cosine", "training.warmup_steps=1")
    assert ledger_bytes(tmp_path / "constant") != ledger_bytes(tmp_path / "falling")


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


def test_an_objective_that_is_made_of_another_is_not_trained_with_the_other_s_loss(monkeypatch):
    class Focal(Supervised):
        name: str = "focal"

    monkeypatch.setattr(trl, "objective_of", lambda training: Focal())
    with pytest.raises(UserError, match="supervised and dpo, not focal"):
        trl.TRL().check(TrainingSettings(), torch.device("cpu"))


PRIVATE = "privacy={level: example, clip: 1, noise_multiplier: 1, delta: 1e-3}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.trainer=tlr"], "there is no 'tlr', did you mean `trl`?"),
        (["training.trainer={arguments: {}}"], "`training.trainer` needs a name"),
        (["training.trainer=trl", "method=fedkseed"], "take local steps of its own"),
        (["training.trainer=trl", "method={name: fedprox, mu: 0.1}"], "or take one of"),
        (
            ["training.trainer=trl", "method=fedavg", PRIVATE],
            "gradients of hedgerow's own steps",
        ),
        (["training.trainer=trl", "training.objective=kto"], "the objectives supervised and dpo"),
        (
            ["training.trainer=trl", "training.objective={name: dpo, label_smoothing: 0.1}"],
            "sigmoid loss knows no label_smoothing",
        ),
        (
            [TRL.format("{beta: 1}"), "training.objective=dpo"],
            "arguments.beta`: leave it out: the loss is what training.objective says",
        ),
        *(
            ([TRL.format(f"{{{argument}: {value}}}"), "training.objective=dpo"], argument)
            for argument, value in (
                ("ld_alpha", 0.5),
                ("max_length", 9),
                ("sync_ref_model", "true"),
                ("f_divergence_type", "js_divergence"),
                ("loss_weights", "[2]"),
                ("use_weighting", "true"),
            )
        ),
        (["training.trainer=trl", "training.keep_optimizer=true"], "an optimiser of its own"),
        (
            ["training.trainer={name: trl, arguments: {learning_rate: 1}}"],
            "`training.trainer.arguments.learning_rate`: give training.learning_rate",
        ),
        (
            ["training.trainer={name: transformers, arguments: {deepspeed: ds.json}}"],
            "`training.trainer.arguments.deepspeed`: it divides work among processes",
        ),
        (
            ["training.trainer={name: transformers, arguments: {output_dir: x}}"],
            "leave it out, since a run keeps its own",
        ),
        (
            ["training.trainer={name: trl, arguments: {packed: true}}"],
            "`training.trainer.arguments`: the trainer does not take them: ",
        ),
    ],
)
def test_mistakes_are_one_sentence(hedgerow, experiment, tmp_path, overrides, message):
    done = hedgerow("run", experiment(), *overrides, "--out", tmp_path / "run")
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()
