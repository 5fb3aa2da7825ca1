"""The examples, as their readers run them: from another folder, with nothing but hedgerow."""

from __future__ import annotations

import ast
import contextlib
import csv
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbclient
import nbformat
import psutil
import pytest
import safetensors.torch
import torch
from IPython.core.inputtransformer2 import TransformerManager
from support.network import wait_for
from support.runs import entries, ledger_bytes, rows_of

import hedgerow as hr
from hedgerow.engines.flower import app as flower_app
from hedgerow.errors import UserError

EXAMPLES = Path(__file__).parents[1] / "examples"
NAME = "own_method:FedProx"
PROMPT = ["data.prompt=plain", "data.max_length=64"]
SOURCES = str(Path(hr.__file__).parents[1])


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
    assert (result.returncode, result.stderr) == (0, "")
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


# --- notebooks ------------------------------------------------------------------------------------

NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def read(name):
    return nbformat.read(EXAMPLES / name, as_version=4)


def execute(notebook, folder, monkeypatch):
    """Run every cell in another folder."""
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()


def code_of(notebook):
    """The syntax trees of a notebook's cells, and of the modules that they write."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        first, _, rest = cell.source.partition("\n")
        if first.startswith("%%writefile") and first.endswith(".py"):
            yield ast.parse(rest)
        yield ast.parse(TransformerManager().transform_cell(cell.source))


def named(node):
    """What an expression as `hr.methods.FLoRA` names of hedgerow; None for any other."""
    if isinstance(node, ast.Name):
        return hr if node.id == "hr" else None
    if isinstance(node, ast.Attribute) and (owner := named(node.value)) is not None:
        return getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_names_what_is_there(name):
    """Without running it: cells are Python, and hedgerow has what they import, call and give."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # results stay out of git
    found = 0
    for node in (node for tree in code_of(notebook) for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hedgerow":
            for alias in node.names:
                found += 1
                assert hasattr(importlib.import_module(node.module), alias.name), alias.name
        if isinstance(node, ast.Call) and (called := named(node.func)) is not None:
            found += 1
            given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            assert given <= set(inspect.signature(called).parameters), ast.unparse(node.func)
    assert found
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            links = re.findall(r"\]\(([^)]+)\)", cell.source)
            assert all("://" in link or (EXAMPLES / link).exists() for link in links), links


HOLDS = {
    "comparing_methods.ipynb": """
        table = tried.table.set_index(["method", "training.learning_rate"])
        for method, of_method in table.groupby("method"):
            losses = of_method["eval_loss"]
            assert last_loss(chosen[method.split()[0]]) == losses.min()
            assert losses.max() > 1.1 * losses.min()
            assert of_method["bytes_up"].max() < 1.01 * of_method["bytes_up"].min()
        up = {name: run.metrics["bytes_up"].sum() for name, run in chosen.items()}
        assert up["fedavg"] > up["flora"] > up["ferret"]
        asked = [{row["input"] + row["instruction"] for row in rows} for rows in (validation, test)]
        assert len(asked[0] | asked[1]) == len(asked[0]) + len(asked[1])
        page = open("page.html").read()
        assert all(f">{title}<" in page for title in ("Loss", "Answers", "Experiment"))
        """,
    "own_method.ipynb": """
        losses = run.metrics["eval_loss"]
        assert losses.iloc[-1] < losses.iloc[0] / 2
        up = compared.table.set_index("method")["bytes_up"]
        attention = sum(count for name, count in size.items() if "self_attn" in name) / total
        assert abs(up["part_avg:PartAvg"] / up["fedavg"] - attention) < 0.01
        assert not compared.failures
        """,
    "private_tuning.ipynb": """
        assert epsilon(1.0, sampling["cedar"]) > epsilon(1.0, sampling["birch"])
        assert losses["base model"] > losses["ε = 1"] > losses["ε = 20"] > losses["no privacy"]
        account = run.metrics["epsilon"].iloc[1:]
        assert account.is_monotonic_increasing and 0.99 * budget < account.iloc[-1] <= budget
        by_hand = max(
            epsilon(least_noise(budget, delta, rounds * steps, q), q) for q in sampling.values()
        )
        assert abs(by_hand - account.iloc[-1]) < 1e-6
        for said in left["said"]:
            assert {"num_examples", "epsilon"} <= set(said) and "train_loss" not in said
        """,
    "three_sites.ipynb": """
        assert "finished:completed" in now
        assert len(ledger("local")) == 2
        for each in [Path("coordinator/run"), *copies.values()]:
            assert ledger(each) == ledger("local")
        assert all(process.poll() is not None for process in running.values())
        """,
}
"""What the texts of a notebook say of its results, in Python that runs after its last cell."""

needs_tools = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")),
    reason="openssl or ssh-keygen is not here",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=needs_tools if "sites" in each else []) for each in HOLDS],
)
def test_a_notebook_runs_and_is_right(name, tmp_path, monkeypatch):
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(textwrap.dedent(HOLDS[name])))
    execute(notebook, tmp_path, monkeypatch)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@pytest.mark.slow
@needs_tools
def test_programs_end_with_a_notebook_that_fails(tmp_path, monkeypatch):
    notebook = read("three_sites.ipynb")
    starts = next(i for i, cell in enumerate(notebook.cells) if "flower-superlink" in cell.source)
    seen = "import psutil\nprint(psutil.Process(running['superlink'].pid).children()[0].cmdline())"
    notebook.cells[starts + 1 :] = map(nbformat.v4.new_code_cell, [seen, "1 / 0"])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        execute(notebook, tmp_path, monkeypatch)
    assert "flower-superlink" in notebook.cells[-2].outputs[0].text  # it had begun
    wait_for(lambda: not started_in(tmp_path), "the end of what the notebook started", 60)


def started_in(folder):
    """The processes whose working directory is in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
    return found


@pytest.mark.slow
def test_the_first_notebook_goes_from_import_to_answers(tmp_path, monkeypatch):
    """It ends with a chart and the tuned model's answers."""
    notebook = read("first_run.ipynb")
    assert len(notebook.cells) < 10
    execute(notebook, tmp_path, monkeypatch)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("round 4" in data["text/plain"] for data in shown)  # progress
    assert any("image/svg+xml" in data for data in shown)
    answers = ast.literal_eval(shown[-1]["text/plain"])
    assert len(answers["tuned"]) == 2
    assert answers["tuned"] != answers["base"]
    losses = [row["eval_loss"] for row in rows_of(tmp_path / "first-run")]
    assert losses[-1] < losses[0] / 2
