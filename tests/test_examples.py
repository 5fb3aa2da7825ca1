"""The examples, as their readers run them: from another folder, with nothing but hedgerow."""

from __future__ import annotations

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import safetensors.torch
import torch
from support.runs import entries, ledger_bytes, rows_of

import hedgerow
from hedgerow.engines.flower import app as flower_app
from hedgerow.errors import UserError

EXAMPLES = Path(__file__).parents[1] / "examples"
NAME = "own_method:FedProx"
PROMPT = ["data.prompt=plain", "data.max_length=64"]
SOURCES = str(Path(hedgerow.__file__).parents[1])


@pytest.fixture
def here(experiment, tmp_path, monkeypatch):
    """A folder with the example and an experiment, where the user is."""
    shutil.copy(EXAMPLES / "own_method.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_method", raising=False)  # another test's copy
    experiment(training={"steps": 2, "learning_rate": 0.01}, method={"name": "flora", "ranks": 2})
    return tmp_path


def command(*arguments):
    """Run `hedgerow` as its console script does: the working directory is not in sys.path."""
    script = "import sys; from hedgerow.cli import main; sys.argv[0] = 'hedgerow'; main()"
    environment = os.environ | {"PYTHONPATH": SOURCES, "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in result.stderr
    return result


def python(*arguments):
    """Run Python in the working directory."""
    environment = os.environ | {"PYTHONPATH": SOURCES}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def tensors(entry):
    return safetensors.torch.load(entry)


def test_the_example_is_short_and_keeps_its_promises(here):
    source = (here / "own_method.py").read_text()
    assert len(source.splitlines()) < 60
    (line,) = (line.strip() for line in source.splitlines() if "python -c" in line)
    code = line.removeprefix('python -c "').removesuffix('"')
    assert "check_method(FedProx())" in code
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    wrong = python("-c", code.replace("FedProx()", "FedProx(mu='much')"))
    assert wrong.returncode == 1


def test_a_run_of_the_users_own_method_is_as_any(here, hedgerow):
    own, out = [f"method.name={NAME}", "method.mu=0.5"], ["--out", "run"]
    result = command("run", "experiment.yaml", *own, "federation.rounds=1", *out)
    assert result.returncode == 0, result.stderr
    more = ["federation.rounds=3", *out, "--resume"]
    assert hedgerow("run", "experiment.yaml", *own, *more).code == 0
    assert hedgerow("run", "experiment.yaml", *own, "--out", "whole", more[0]).code == 0
    assert ledger_bytes(here / "run") == ledger_bytes(here / "whole")
    other = hedgerow("run", "experiment.yaml", own[0], "method.mu=0.25", *more)
    assert (other.code, "method.mu=0.5, not 0.25" in other.err) == (2, True)
    loss = rows_of(here / "run")[-1]["eval_loss"]
    assert f"{loss:.4g}" in hedgerow("evaluate", "run").out
    assert NAME in hedgerow("ledger", "show", "run").out
    exported = hedgerow("export", "run", "merged", "--to", "merged")
    assert exported.code == 0, exported.err
    card = (here / "merged" / "README.md").read_text()
    assert f"fine-tuned by {NAME}" in card
    assert "FedProx, arXiv 1812.06127" in card
    assert f"{loss:.4g}" in hedgerow("evaluate", "merged", "data.test=test.json", *PROMPT).out
    refused = hedgerow("export", "run", "adapter", "--to", "adapter")
    assert (refused.code, f"{NAME} trains all parameters" in refused.err) == (2, True)


def test_what_the_method_does_is_what_its_paper_says(here, hedgerow):
    for name, method in {
        "fedavg": ["method.name=fedavg"],
        "none": [f"method.name={NAME}", "method.mu=0"],
        "some": [f"method.name={NAME}", "method.mu=50"],
    }.items():
        # Without the method's hook, such steps are taken within the backward pass.
        plain = ["training.optimizer=sgd", "training.max_grad_norm=null", "training.steps=4"]
        result = hedgerow("run", "experiment.yaml", *plain, *method, "--out", name)
        assert result.code == 0, result.err
    runs = {name: entries(here / name) for name in ("fedavg", "none", "some")}
    for name, entry in runs["fedavg"].items():
        same = tensors(runs["none"][name])
        assert all(torch.equal(same[key], tensor) for key, tensor in tensors(entry).items())
    losses = ("train_loss", "eval_loss")
    rows = {
        name: [{k: row.get(k) for k in losses} for row in rows_of(here / name)] for name in runs
    }
    assert rows["none"] == rows["fedavg"]
    assert rows["some"] != rows["fedavg"]
    first = {name: tensors(run["0001.safetensors"]) for name, run in runs.items()}
    sizes = {
        name: float(torch.cat([tensor.flatten() for tensor in change.values()]).norm())
        for name, change in first.items()
    }
    assert sizes["some"] < 0.6 * sizes["fedavg"]


def test_a_comparison_sets_it_beside_hedgerows_own(here, hedgerow):
    methods = ["--methods", f"flora,{NAME} mu=0.1", "--out", "comparison"]
    result = command("compare", "experiment.yaml", *methods)
    assert result.returncode == 0, result.stderr
    assert f"{NAME} mu=0.1" in result.stdout
    with (here / "comparison" / "comparison.csv").open() as file:
        named = [row["method"] for row in csv.DictReader(file)]
    assert named == ["flora", f"{NAME} mu=0.1"]
    folders = sorted(folder.name for folder in (here / "comparison" / "runs").iterdir())
    assert all(":" not in folder for folder in folders)
    again = hedgerow("compare", "experiment.yaml", *methods)
    assert again.code == 0, again.err
    assert "[1/" not in again.out  # nothing was missing
    page = hedgerow("report", "comparison", "--out", "page.html")
    assert page.code == 0, page.err
    assert NAME in (here / "page.html").read_text()


def test_what_lies_beside_the_user_shadows_nothing(here):
    (here / "yaml.py").write_text("raise SystemExit('shadowed')\n")
    result = command("run", "experiment.yaml", "method.name=own_method:FedAwry", "--out", "run")
    assert result.returncode == 2
    assert "method own_method:FedAwry: own_method has no FedAwry" in result.stderr


def test_a_site_that_lacks_the_method_says_so_in_a_sentence(here, hedgerow, monkeypatch):
    made = hedgerow("flower", "init", "experiment.yaml", "app", f"method.name={NAME}")
    assert made.code == 0, made.err
    assert flower_app.App.load(here / "app").experiment.method.name == NAME
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(here)])
    del sys.modules["own_method"]
    with pytest.raises(UserError) as refused:
        flower_app.App.load(here / "app")
    assert "there is no module own_method in this environment: install" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_own_metric_is_measured_and_reported(here):
    shutil.copy(EXAMPLES / "own_metric.py", here)
    metric = 'evaluation.metrics=["loss", "own_metric:LengthRatio"]'
    changes = ["federation.rounds=1", metric, "evaluation.max_new_tokens=8"]
    result = command("run", "experiment.yaml", *changes, "--out", "run")
    assert result.returncode == 0, result.stderr
    assert "length ratio" in result.stdout
    assert rows_of(here / "run")[-1]["length_ratio"] >= 0
    again = command("evaluate", "run", "--metrics", "own_metric:LengthRatio", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["length_ratio"] == rows_of(here / "run")[-1]["length_ratio"]
    report = command("report", "run", "--out", "page.html", "--answers", 0)
    assert report.returncode == 0, report.stderr
    assert "length ratio" in (here / "page.html").read_text()


@pytest.mark.slow
def test_in_memory_runs_and_goes_on(tmp_path, monkeypatch):
    shutil.copy(EXAMPLES / "in_memory.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    first = python("in_memory.py", "out")
    assert first.returncode == 0, first.stderr
    assert "north's own data" in first.stdout
    ledger = ledger_bytes(tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 3
    second = python("in_memory.py", "out")
    assert second.returncode == 0, second.stderr
    assert ledger_bytes(tmp_path / "out") == ledger


@pytest.mark.slow
def test_the_notebook_goes_from_import_to_answers(tmp_path, monkeypatch):
    """Every cell runs, in another folder: it ends with a chart and the tuned model's answers."""
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    notebook = nbformat.read(EXAMPLES / "first_run.ipynb", as_version=4)
    assert len(notebook.cells) < 10
    assert all(not cell.get("outputs") for cell in notebook.cells)  # results stay out of git
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("round 4" in data["text/plain"] for data in shown)  # progress
    assert any("image/svg+xml" in data for data in shown)
    answers = ast.literal_eval(shown[-1]["text/plain"])
    assert len(answers["tuned"]) == 2
    assert answers["tuned"] != answers["base"]
    losses = [row["eval_loss"] for row in rows_of(tmp_path / "first-run")]
    assert losses[-1] < losses[0] / 2
