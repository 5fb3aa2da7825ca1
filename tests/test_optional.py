"""What only extras bring: one sentence where it is missing, and no need of it elsewhere."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.experiments import write_experiment

import hedgerow as hr
from hedgerow.experiment.reference import REGISTRIES
from hedgerow.methods.parts.server_optimizers import Momentum
from hedgerow.model import Model
from hedgerow.optional import LIBRARIES, check_installed
from hedgerow.training.objectives.supervised import Supervised
from hedgerow.training.optimizers.sgd import SGD
from hedgerow.training.trainers.transformers import Transformers

JUDGE = ["--endpoint", "http://localhost/v1", "--model", "gpt-4"]
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def uneven(kind):
    """Changes by which one source is divided, in a way that flwr-datasets knows."""
    division = f"{{kind: {kind}, clients: 2, column: output}}"
    return ["data.clients=null", "data.source=CLIENT", f"data.partition={division}"]


def private(level):
    return f"privacy={{level: {level}, clip: 1.0, noise_multiplier: 1.0, delta: 0.001}}"


def run(*changes):
    return ["run", "FILE", *changes, "--out", "OUT"]


def compare(*changes):
    return ["compare", "FILE", *changes, "--methods", "flora,fedavg", "--out", "OUT"]


CASES = {
    "report: altair": ("altair", "a report page", ["report", "FOLDER", "--out", "OUT"]),
    "report: vl-convert": ("vl_convert", "a report page", ["report", "FOLDER", "--out", "OUT"]),
    "flower: run": ("flwr", "the engine flower", run("--engine", "flower")),
    "flower: init": ("flwr", "hedgerow flower", ["flower", "init", "FILE", "OUT"]),
    "privacy: client": ("dp_accounting", "privacy", run("method=fedavg", private("client"))),
    "privacy: example": ("cryptography", "privacy", run(private("example"))),
    "privacy: secure": (
        "Crypto",
        "federation.secure",
        run("method=fedavg", "federation.secure=true"),
    ),
    "harness": ("lm_eval", "--harness", ["evaluate", "MODEL", "--harness", "mmlu"]),
    "judge": (
        "openai",
        "hedgerow mt-bench judge",
        ["mt-bench", "judge", "FILE", "--questions", "FILE", "--out", "OUT", *JUDGE],
    ),
    "metrics: run": (
        "sacrebleu",
        "evaluation.metrics: bleu",
        run("evaluation.metrics=[loss, bleu]"),
    ),
    "metrics: compare": (
        "rouge_score",
        "evaluation.metrics: rouge_l",
        compare("evaluation.metrics=[rouge_l]"),
    ),
    "metrics: evaluate": (
        "sacrebleu",
        "evaluation.metrics: bleu",
        ["evaluate", "MODEL", "--data", "TEST", "--metrics", "bleu"],
    ),
    "partition: run": (
        "flwr_datasets",
        "data.partition.kind: dirichlet",
        run(*uneven("dirichlet")),
    ),
    "partition: compare": (
        "flwr_datasets",
        "data.partition.kind: shard",
        compare(*uneven("shard")),
    ),
    "quantized: base": (
        "bitsandbytes",
        "model.quantization: nf4",
        run("model.quantization=nf4"),
    ),
    "quantized: optimizer": (
        "bitsandbytes",
        "training.optimizer: adamw_8bit",
        run("training.optimizer=adamw_8bit"),
    ),
    "quantized: optimizer, compare": (
        "bitsandbytes",
        "training.optimizer: paged_adamw_8bit",
        compare("training.optimizer=paged_adamw_8bit"),
    ),
    "quantized: explain": (
        "bitsandbytes",
        "model.quantization: int8",
        ["explain", "--memory", "FILE", "model.quantization=int8"],
    ),
    "trl: run": ("trl", "training.trainer: trl", run("training.trainer=trl")),
    "trl: compare": ("trl", "training.trainer: trl", compare("training.trainer=trl")),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_is_one_sentence_before_anything_is_done(
    case, hedgerow, experiment, tmp_path, tiny_model, monkeypatch
):
    module, use, arguments = CASES[case]
    package, extra = LIBRARIES[module]
    places = {
        "FILE": experiment(),
        "FOLDER": tmp_path,
        "MODEL": tiny_model,
        "OUT": tmp_path / "out",
        "CLIENT": tmp_path / "client_2.json",
        "TEST": tmp_path / "test.json",
    }
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(Model, "load")
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    result = hedgerow(*arguments)
    assert (result.code, result.err) == (
        2,
        f"hedgerow: {use} needs {package}, which is not installed: "
        f"pip install 'hedgerow[{extra}]'\n",
    )
    assert not places["OUT"].exists()


def test_a_chart_of_a_run_is_refused_before_it_is_drawn(
    hedgerow, experiment, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    assert hedgerow("run", experiment(), "federation.rounds=1", "--out", out).code == 0
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(hr.UserError, match=r"a chart needs vl-convert-python.*hedgerow\[report\]"):
        hr.open_run(out).chart()


def test_each_extra_brings_the_libraries_that_its_sentence_is_about():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    brought = {name: {Requirement(text).name for text in extras[name]} for name in extras}
    assert [
        module for module, (package, extra) in LIBRARIES.items() if package not in brought[extra]
    ] == []


def test_all_and_dev_bring_every_extra():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    own = {
        name: set().union(*(r.extras for r in map(Requirement, texts) if r.name == "hedgerow"))
        for name, texts in extras.items()
    }

    def reached(name):
        return {name}.union(*map(reached, own[name]))

    assert reached("all") == extras.keys() - {"dev", "docs"}
    # Tests of the other trackers are skipped where these are not installed.
    assert reached("dev") == extras.keys() - {"all", "trackers", "mlflow", "trackio", "wandb"}


def test_a_comparison_needs_nothing_that_is_optional(tmp_path, tiny_model):
    file = write_experiment(tmp_path, tiny_model)
    changes = ["federation.rounds=1", "data.clients=null", f"data.source={tmp_path}/client_2.json"]
    arguments = ["compare", file, *changes, "data.partition={kind: iid, clients: 3}"]
    arguments += ["--methods", "flora", "--out", tmp_path / "out"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[*LIBRARIES]}))
sys.argv = ["hedgerow", *{[str(argument) for argument in arguments]}]
from hedgerow.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())[0]["failed"] == 0


def test_what_is_installed_is_no_mistake():
    check_installed("a test", "sacrebleu", "altair")


class Learns(Supervised):
    """An objective that needs what nobody has."""

    libraries = ("nobody_has_this",)


class Descends(SGD):
    """An optimiser of this kind."""

    libraries = ("json", "nobody_has_this")


class Trains(Transformers):
    """A trainer of this kind."""

    libraries = ("nobody_has_this",)


class Goes(Momentum):
    """A part of a method of this kind."""

    libraries = ("nobody_has_this",)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("training.objective", Learns),
        ("training.optimizer", Descends),
        ("training.trainer", Trains),
        ("method.server", Goes),
    ],
)
def test_parts_of_others_say_in_the_same_way_what_they_need(
    key, kind, hedgerow, experiment, tmp_path, monkeypatch
):
    monkeypatch.delattr(Model, "load")
    name = f"{__name__}:{kind.__name__}"
    out = tmp_path / "out"
    changes = ["method=fedavg", f"{key}={{name: '{name}'}}"]
    result = hedgerow("run", experiment(), *changes, "--out", out)
    assert (result.code, result.err) == (
        2,
        f"hedgerow: {key}: {name} needs the module nobody_has_this, which is not installed: "
        "install it\n",
    )
    assert not out.exists()


def test_the_parts_that_are_here_need_only_what_an_extra_brings():
    kinds = [kind for registry in REGISTRIES.values() for kind in registry.values()]
    needed = {library for kind in kinds for library in kind.libraries}
    assert {"bitsandbytes", "sacrebleu", "trl"} <= needed <= LIBRARIES.keys()
