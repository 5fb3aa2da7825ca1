"""Optimisers with their options: named, built, kept from round to round, and one's own."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from support.runs import ledger_bytes, rows_of

from hedgerow.errors import UserError
from hedgerow.experiment import load
from hedgerow.plugins import Registry
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.training import first_order
from hedgerow.training.job import Job
from hedgerow.training.optimizers import OPTIMIZERS, Optimizer, optimizer_of


def built(parameters=None, /, **training) -> torch.optim.Optimizer:
    """The optimiser of these settings, on a matrix unless it is given parameters."""
    parameters = parameters or {"w": torch.nn.Parameter(torch.ones(3, 2))}
    return first_order.make_optimizer(parameters, TrainingSettings(**training), 0.1)


def stepped(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Take steps on gradients that depend on the parameters alone."""
    for _ in range(count):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = (parameter.detach() * 3 + 0.1).sin()
        optimizer.step()
        optimizer.zero_grad()


# --- names and options --------------------------------------------------------------------------


def test_a_plain_name_has_torch_s_defaults_and_no_decay():
    [group] = built().param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)
    [group] = built(optimizer="sgd", momentum=0.9, weight_decay=0.1).param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0.1, False)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adamw", "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.2, "amsgrad": True},
        {"name": "sgd", "momentum": 0.5, "nesterov": True, "weight_decay": 0.2},
        {"name": "sgd", "momentum": 0.5, "dampening": 0.25},
    ],
)
def test_torch_is_given_every_option(options):
    [group] = built(optimizer=options).param_groups
    assert {key: group[key] for key in options if key != "name"} == {
        key: value for key, value in options.items() if key != "name"
    }
    assert group["lr"] == 0.1


def test_a_plain_name_stays_one_and_a_mapping_is_completed(experiment):
    path = experiment(training={"optimizer": "sgd", "momentum": 0.9})
    training = load(path).training
    assert (training.optimizer, training.momentum, training.weight_decay) == ("sgd", 0.9, 0)
    path = experiment(training={"optimizer": {"name": "adamw", "betas": [0.9, 0.99]}})
    assert load(path, ["training.weight_decay=0.1"]).training.optimizer == {
        "name": "adamw",
        "betas": [0.9, 0.99],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "amsgrad": False,
    }


@pytest.mark.parametrize("options", ["sgd", {"name": "sgd", "momentum": 0.5}, {"name": "adamw"}])
def test_a_resolved_experiment_means_the_same_again(experiment, options, tmp_path):
    resolved = load(experiment(training={"optimizer": options, "weight_decay": 0.1}))
    (tmp_path / "again.yaml").write_text(resolved.dump())
    assert load(tmp_path / "again.yaml") == resolved


@pytest.mark.parametrize(
    ("optimizer", "overrides", "is_"),
    [
        (
            "adamw",
            ["training.optimizer.betas=[0.9, 0.99]"],
            {"name": "adamw", "betas": [0.9, 0.99]},
        ),
        (None, ["training.optimizer.eps=1e-6"], {"name": "adamw", "eps": 1e-6}),
        ("adamw", ["training.optimizer=sgd"], "sgd"),
        ("adamw", ["training.optimizer.name=sgd"], {"name": "sgd", "momentum": 0.0}),
        (
            {"name": "adamw", "betas": [0.5, 0.5], "weight_decay": 0.1},
            ["training.optimizer.name=sgd"],
            {"name": "sgd", "weight_decay": 0.1},
        ),
        (
            {"name": "sgd", "momentum": 0.5},
            ["training.optimizer.nesterov=true"],
            {"nesterov": True},
        ),
    ],
)
def test_overrides_reach_the_options(experiment, optimizer, overrides, is_):
    path = experiment(training={} if optimizer is None else {"optimizer": optimizer})
    found = load(path, overrides).training.optimizer
    assert found == is_ if isinstance(is_, str) else is_.items() <= found.items()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "training.optimizer=adamv",
            ["`training.optimizer`: there is no 'adamv'", "did you mean `adamw`", "sgd"],
        ),
        ("training.optimizer={name: sgdd}", ["`training.optimizer.name`", "`sgd`"]),
        ("training.optimizer={betas: [0.9, 0.99]}", ["`training.optimizer` needs a name"]),
        ("training.optimizer=3", ["`training.optimizer`", "not 3"]),
        (
            "training.optimizer.beta=[0.9, 0.99]",
            ["`training.optimizer.beta` is not a known key", "did you mean `betas`", "amsgrad"],
        ),
        ("training.optimizer.betas=[0.9, 1]", ["`training.optimizer.betas.1`", "below 1"]),
        (
            "training.optimizer={name: sgd, betas: [0, 0]}",
            ["`training.optimizer.betas`", "momentum"],
        ),
        ("training.optimizer={name: sgd, nesterov: true}", ["`training.optimizer`: `nesterov`"]),
        ("training.momentum=0.9", ["`training.momentum`: the optimizer adamw has none"]),
        (
            "training={optimizer: {name: sgd, momentum: 0.5}, momentum: 0.9}",
            ["`training.momentum` is 0.9", "`training.optimizer.momentum` is 0.5", "one of them"],
        ),
        ("training.optimizer=nowhere:Own", ["optimizer nowhere:Own", "no module nowhere"]),
        ("training.optimizer=json:JSONDecoder", ["json:JSONDecoder", "is no subclass"]),
    ],
)
def test_a_mistake_is_one_sentence(hedgerow, experiment, tmp_path, override, words):
    path = experiment()
    for command in (
        ["run", path, override, "--out", tmp_path / "run"],
        ["compare", path, override, "--methods", "flora", "--out", tmp_path / "run"],
    ):
        result = hedgerow(*command)
        assert result.code == 2, result.err
        [line] = [line for line in result.err.splitlines() if line.startswith("hedgerow: ")]
        for word in words:
            assert word in line
        assert not list((tmp_path / "run").glob("*"))


def test_a_stored_run_is_evaluated_with_its_optimizer(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    path = experiment(training={"optimizer": {"name": "sgd", "momentum": 0.5}})
    result = hedgerow("run", path, "federation.rounds=1", "--out", run)
    assert result.code == 0, result.err
    stored = yaml.safe_load((run / "experiment.yaml").read_text())["training"]
    assert (stored["optimizer"]["momentum"], stored["momentum"]) == (0.5, 0.5)
    assert hedgerow("evaluate", run).code == 0
    result = hedgerow("evaluate", run, "training.optimizer=rmsprap")
    assert result.code == 2
    assert "`training.optimizer`" in result.err


def test_naming_optimizers_needs_no_torch():
    code = "import sys; from hedgerow.training.optimizers import OPTIMIZERS; list(OPTIMIZERS); "
    code += "assert 'adamw' in OPTIMIZERS; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- one's own ----------------------------------------------------------------------------------

OWN = """
    from hedgerow.lazy import torch
    from hedgerow.training.optimizers import Optimizer

    class Signs(Optimizer):
        {name}
        share: float = 1.0

        def build(self, parameters, learning_rate):
            class Steps(torch.optim.Optimizer):
                @torch.no_grad()
                def step(self):
                    for parameter in self.param_groups[0]["params"]:
                        kept = self.state[parameter]
                        kept["count"] = kept.get("count", 0) + 1
                        kept["last"] = None
                        scale = learning_rate / kept["count"]
                        parameter.add_(parameter.grad.sign(), alpha=-scale)
            return Steps(list(parameters.values()), {{}})
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a module with an optimiser into a folder on the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(module: str, name: str = "") -> Path:
        (folder / f"{module}.py").write_text(textwrap.dedent(OWN.format(name=name)))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return folder

    return write


def test_an_own_optimizer_in_a_module_on_the_path(own, hedgerow, experiment, tmp_path):
    """Its count of steps, a number, goes on from round to round, and so in a resumed run."""
    own("own_signs")
    path = experiment(training={"optimizer": {"name": "own_signs:Signs", "share": 0.5}})
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert hedgerow("run", path, "--out", whole).code == 0
    assert hedgerow("run", path, "federation.rounds=1", "--out", part).code == 0
    assert hedgerow("run", path, "--out", part, "--resume").code == 0
    assert ledger_bytes(whole) == ledger_bytes(part)
    result = hedgerow("run", path, "training.optimizer.shares=1", "--out", tmp_path / "other")
    assert result.code == 2
    assert "`training.optimizer.shares` is not a known key, did you mean `share`" in result.err


def test_an_installed_optimizer(own, monkeypatch):
    folder = own("installed_signs", 'name: str = "signs"')
    (folder / "signs-1.dist-info").mkdir()
    (folder / "signs-1.dist-info" / "METADATA").write_text("Name: signs\nVersion: 1\n")
    (folder / "signs-1.dist-info" / "entry_points.txt").write_text(
        "[hedgerow.optimizers]\nsigns = installed_signs:Signs\n"
    )
    fresh = Registry("optimizer", Optimizer, "hedgerow.training.optimizers", see="")
    monkeypatch.setattr("hedgerow.training.optimizers.OPTIMIZERS", fresh)
    assert "signs" in list(fresh)
    settings = TrainingSettings(optimizer={"name": "signs", "share": 0.5})
    assert optimizer_of(settings).share == 0.5
    with pytest.raises(UserError, match=r"known: .*signs"):
        optimizer_of(TrainingSettings(optimizer="sings"))


# --- what is kept -------------------------------------------------------------------------------


def kept_and_restored(training, *, before, after=None):
    """Parameters after three steps and three more by an optimiser that goes on; and its state."""
    settings = TrainingSettings(**training)
    first = first_order.make_optimizer(before, settings, 0.1)
    stepped(first, 3)
    # What is kept goes through a file.
    state = {key: value.clone() for key, value in first_order._state(first, before).items()}
    after = after or {n: torch.nn.Parameter(p.detach().clone()) for n, p in before.items()}
    second = first_order.make_optimizer(after, settings, 0.1)
    first_order._restore(second, after, state)
    return first, second, after, state


def shapes(*each):
    """Parameters of these shapes with different entries."""
    return {
        f"p{i}": torch.nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))
        for i, shape in enumerate(each)
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_kept_makes_the_same_steps(name):
    before = shapes((4, 3), (5,), (2, 2, 2))
    first, second, after, state = kept_and_restored({"optimizer": name}, before=before)
    assert all(first_order.is_writable(tensor) for tensor in state.values())
    stepped(first, 3)
    stepped(second, 3)
    for parameter in before:
        assert torch.equal(before[parameter], after[parameter])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_of_another_shape_or_name_begins_anew(name):
    before = shapes((1, 3), (4, 2), (5,))
    after = shapes((4, 3), (1, 2), (6,)) | {"other": torch.nn.Parameter(torch.ones(2, 2))}
    _, second, _, _ = kept_and_restored({"optimizer": name}, before=before, after=after)
    assert not any(second.state[parameter] for parameter in after.values())
    stepped(second, 1)


def test_numbers_are_kept_as_what_they_are_and_what_is_odd_is_not():
    parameters = shapes((2, 2), (2,))
    optimizer = built(parameters)
    p0, p1 = parameters.values()
    plain = {"t": 3, "ratio": 0.1, "warm": True, "none": None, "scale": torch.tensor(2.0)}
    optimizer.state[p0] = plain | {"factor": torch.ones(5, 1)}
    optimizer.state[p1] = {"t": 3, "history": [1, 2]}
    state = first_order._state(optimizer, parameters)
    assert {key.partition("/")[0] for key in state} == {"p0"}
    other = built(parameters)
    first_order._restore(other, parameters, state)
    restored = other.state[p0]
    assert torch.equal(restored.pop("factor"), torch.ones(5, 1))
    assert restored == plain
    assert [type(value) for value in restored.values()] == [type(v) for v in plain.values()]
    assert not other.state[p1]


def test_what_earlier_versions_kept_is_still_used():
    parameters = shapes((2, 2))
    moments = {"p0/step": torch.tensor(3.0), "p0/exp_avg": torch.ones(2, 2)}
    optimizer = built(parameters)
    first_order._restore(optimizer, parameters, moments)
    assert optimizer.state[parameters["p0"]]["step"] == 3


def test_a_step_in_the_backward_pass_is_the_optimizer_s_own_offer():
    def offered(**training):
        settings = TrainingSettings(**{"max_grad_norm": None} | training)
        job = Job(None, [], settings, 0.1, 0, Seeds(0).numpy("order"), 1)
        return first_order._steps_immediately(job)

    assert offered(optimizer="sgd")
    assert offered(optimizer={"name": "sgd", "weight_decay": 0.1})
    assert not offered(optimizer={"name": "sgd", "momentum": 0.5})
    assert not offered(optimizer="sgd", max_grad_norm=1.0)
    assert not offered(optimizer="sgd", gradient_accumulation=2)
    assert not offered(optimizer="adamw")


# --- muon and adafactor -------------------------------------------------------------------------


def test_a_step_of_muon_is_torch_s():
    ours, theirs = shapes((4, 3)), shapes((4, 3))
    stepped(built(ours, optimizer="muon"), 3)
    stepped(torch.optim.Muon(theirs.values(), lr=0.1, weight_decay=0), 3)
    assert torch.equal(ours["p0"], theirs["p0"])


def test_what_is_no_hidden_matrix_is_stepped_by_adamw():
    ours, theirs = shapes((4, 3), (3,), (4, 3)), shapes((4, 3), (3,), (4, 3))
    names = ["layers.0.weight", "norm.weight", "embed_tokens.weight"]
    options = {"name": "muon", "momentum": 0.5, "adamw_scale": 0.5, "adamw_betas": (0.5, 0.5)}
    optimizer = built(dict(zip(names, ours.values(), strict=True)), optimizer=options)
    stepped(optimizer, 3)
    matrix, *rest = theirs.values()
    stepped(torch.optim.Muon([matrix], lr=0.1, weight_decay=0, momentum=0.5), 3)
    stepped(torch.optim.AdamW(rest, lr=0.05, weight_decay=0, betas=(0.5, 0.5)), 3)
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
    assert all(parameter.grad is None for parameter in ours.values())
    assert optimizer.step(lambda: 7) == 7
    only_rest = built(dict(zip(names[1:], rest, strict=True)), optimizer="muon")
    assert isinstance(only_rest, torch.optim.AdamW)


def test_both_optimizers_of_muon_go_on_from_a_stored_state():
    ours, theirs = shapes((4, 3), (3,)), shapes((4, 3), (3,))
    stepped(first := built(ours, optimizer="muon"), 2)
    second = built(theirs, optimizer="muon")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    for group in (*first.param_groups, *second.param_groups):
        group["lr"] = 0.01
    stepped(first, 2)
    stepped(second, 2)
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def test_a_step_of_adafactor_is_torch_s():
    ours, theirs = shapes((4, 3), (3,)), shapes((4, 3), (3,))
    options = {"name": "adafactor", "beta2_decay": -0.5, "eps": (1e-6, 1e-2), "d": 2.0}
    stepped(built(ours, optimizer=options, weight_decay=0.1), 3)
    del options["name"]
    stepped(torch.optim.Adafactor(theirs.values(), lr=0.1, weight_decay=0.1, **options), 3)
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def test_averages_in_8_bits_take_a_quarter_and_step_nearly_as_adamw_s():
    torch.manual_seed(0)
    start = torch.randn(64, 96)
    found, sizes = [], []
    for name in ("adamw", "adamw_8bit"):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = built({"w": parameter}, optimizer={"name": name, "weight_decay": 0.1})
        stepped(optimizer, 5)
        found.append(parameter.detach())
        state = optimizer.state[parameter].values()
        moments = [v for v in state if isinstance(v, torch.Tensor) and v.shape == parameter.shape]
        assert len(moments) == 2
        sizes.append(sum(v.nbytes for v in moments))
    assert sizes[1] == sizes[0] / 4
    assert (found[1] - found[0]).norm() < 0.1 * (found[0] - start).norm()


def test_pages_need_a_gpu_and_bitsandbytes_is_asked_for(hedgerow, experiment, monkeypatch):
    paged = ["training.optimizer=paged_adamw_8bit", "model.device=cpu"]
    out = experiment().parent / "run"
    result = hedgerow("run", experiment(), *paged, "--out", out)
    assert (result.code, out.exists()) == (2, False)
    assert "training.optimizer paged_adamw_8bit" in result.err
    assert "take adamw_8bit" in result.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = hedgerow("run", experiment(), "training.optimizer=adamw_8bit", "--out", out)
    assert (result.code, out.exists()) == (2, False)
    assert "pip install 'hedgerow[quantized]'" in result.err


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        ({"name": "flora", "restart": "own", "ranks": [4, 2, 1]}, 0.02),
        ({"name": "flora", "restart": "shared", "ranks": [4, 2, 1]}, 0.02),
        ({"name": "flora_adalora", "ranks": [4, 2, 1], "initial": 6}, 0.02),
        ({"name": "fedavg"}, 0.003),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize(
    "optimizer", ["muon", "adafactor", {"name": "adamw_8bit", "min_8bit_size": 0}]
)
def test_a_run_learns_and_goes_on_with_the_same_bytes(
    hedgerow, experiment, tmp_path, optimizer, method, rate
):
    path = experiment(training={"optimizer": optimizer, "learning_rate": rate, "steps": 4})
    content = yaml.safe_load(path.read_text()) | {"method": method}
    path.write_text(yaml.safe_dump(content))
    whole, part = tmp_path / "whole", tmp_path / "part"
    for rounds, out in ((3, whole), (1, part), (3, part)):
        result = hedgerow("run", path, f"federation.rounds={rounds}", "--out", out, "--resume")
        assert result.code == 0, result.err
    assert ledger_bytes(whole) == ledger_bytes(part)
    losses = [row["eval_loss"] for row in rows_of(whole)]
    assert losses[-1] < losses[0]


def test_muon_s_own_momentum_holds_unless_training_has_another(experiment):
    path = experiment(training={"optimizer": "muon"})
    assert load(path).training.momentum == 0.95
    assert load(path, ["training.momentum=0.5"]).training.momentum == 0.5
    [group] = built(optimizer="muon", momentum=0.5).param_groups
    assert group["momentum"] == 0.5


def test_an_optimizer_that_is_none_is_refused(monkeypatch):
    from hedgerow.errors import UserError
    from hedgerow.training import first_order
    from hedgerow.training.optimizers.adamw import AdamW

    monkeypatch.setattr(AdamW, "build", lambda *_: None)
    with pytest.raises(UserError, match="not NoneType"):
        first_order.make_optimizer({}, TrainingSettings(), 0.1)
