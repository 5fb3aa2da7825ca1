"""The recipes of CONTRIBUTING.md: each block is put where it says that it belongs, and is used."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import yaml
from support.runs import ledger_bytes, rows_of

import hedgerow as package
from hedgerow.data import sources
from hedgerow.errors import UserError
from hedgerow.evaluation.metrics import METRICS
from hedgerow.methods import METHODS
from hedgerow.methods.parts.codec import CODECS
from hedgerow.methods.parts.server_optimizers import SERVER_OPTIMIZERS
from hedgerow.testing import check_method
from hedgerow.training.objectives import OBJECTIVES
from hedgerow.training.optimizers import OPTIMIZERS
from hedgerow.training.trainers import TRAINERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = {
    code.partition("\n")[0].removeprefix("# "): code
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
}
FILES = {
    where.removeprefix("src/hedgerow/"): code for where, code in BLOCKS.items() if " " not in where
}
REGISTRIES = [METHODS, CODECS, SERVER_OPTIMIZERS, METRICS, OBJECTIVES, OPTIMIZERS, TRAINERS]


@pytest.fixture
def house(tmp_path, monkeypatch):
    """The package, in whose folders the recipes' files seem to lie."""
    for where, code in FILES.items():
        path = tmp_path / "house" / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        package = importlib.import_module("hedgerow." + ".".join(Path(where).parts[:-1]))
        if str(path.parent) not in package.__path__:
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
    for registry in REGISTRIES:  # which have looked already
        vars(registry).pop("_own", None)
    yield
    for where in FILES:
        name = Path(where).with_suffix("")
        sys.modules.pop(".".join(("hedgerow", *name.parts)), None)
    for registry in REGISTRIES:
        vars(registry).pop("_own", None)


@pytest.fixture
def run(house, hedgerow, experiment, tmp_path):
    """Run an experiment with changes; returns the losses before and after."""

    def made(name, *overrides, rounds=2, resumed=False):
        given = [*overrides, f"federation.rounds={rounds}", "--out", tmp_path / name]
        done = hedgerow("run", experiment(), *given, *["--resume"] * resumed)
        assert done.code == 0, done.err
        rows = rows_of(tmp_path / name)
        return rows[0]["eval_loss"], rows[-1]["eval_loss"]

    return made


def goes_on(run, tmp_path, *overrides):
    """Check that a run learns, and has the same bytes when it was interrupted."""
    before, after = run("whole", *overrides)
    assert after < before
    run("parts", *overrides, rounds=1)
    run("parts", *overrides, resumed=True)
    assert ledger_bytes(tmp_path / "parts") == ledger_bytes(tmp_path / "whole")


def test_every_block_is_tried_below():
    assert set(FILES) == {
        "methods/fedavgm.py",
        "methods/parts/half.py",
        "methods/parts/lion.py",
        "evaluation/metrics/first_word.py",
        "training/objectives/focal.py",
        "training/optimizers/adagrad.py",
        "training/trainers/descent.py",
    }
    assert len(BLOCKS) == len(FILES) + 2
    for where in FILES:
        assert not (ROOT / "src/hedgerow" / where).exists(), "it is there now: take another example"


def test_what_is_named_is_there():
    named = set(re.findall(r"\[[^\]]*\]\((?!http)([^)#]+)", TEXT)) | set(
        re.findall(r"`((?:src|tests|docs|examples|methods)/[\w/.]+\.(?:py|md))`", TEXT)
    )
    assert len(named) > 20
    absent = {
        each
        for each in named
        if not (ROOT / each).exists() and not (ROOT / "src/hedgerow" / each).exists()
    }
    assert absent == set()
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests").glob("*.py"))
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+(?:-\w+)*)[` ]", TEXT)) & {"install", "test", "lint"}
    assert set(re.findall(r"`make ([\w-]+)`", TEXT)) <= targets


def test_the_method_keeps_its_promises(house):
    check_method(METHODS["fedavgm"]())


@pytest.mark.parametrize("options", [{"up": "half", "down": "half"}, {"server": "lion"}], ids=str)
def test_the_parts_keep_their_promises(house, options):
    check_method(METHODS["fedavg"](**options))


def test_half_precision_loses_what_it_says(house):
    import torch

    from hedgerow.methods.parts.values import Values

    whole = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    codec, shapes = CODECS["half"](), {"w": (10_000,)}
    coded = codec.encode(Values(shapes, lambda: iter([("w", whole)])), 0)
    decoded = dict(codec.decode(coded, shapes, 0))["w"]
    lost = float((decoded - whole).square().sum() / whole.square().sum())
    assert codec.error / 2 < lost < codec.error * 2
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(Values(shapes, lambda: iter([("w", whole * 1e6)])), 0)


def test_the_metric_is_measured(run, tmp_path):
    run("run", "evaluation.metrics=[loss, first_word]", "evaluation.max_new_tokens=4", rounds=1)
    assert rows_of(tmp_path / "run")[-1]["first_word"] >= 0
    metric = METRICS["first_word"]()
    assert metric.score(reference="yes it is", answer="yes") == 100
    assert metric.score(reference="yes", answer="") == 0


def test_the_objective_is_descended(run, tmp_path):
    goes_on(run, tmp_path, "training.objective=focal")
    run("plain", rounds=1)
    run("zero", "training.objective={name: focal, gamma: 0}", rounds=1)
    same = [rows_of(tmp_path / name)[-1]["train_loss"] for name in ("plain", "zero")]
    assert same[0] == pytest.approx(same[1], rel=1e-5)


@pytest.mark.parametrize("override", ["training.optimizer=adagrad", "training.trainer=descent"])
def test_who_takes_the_steps_learns(run, tmp_path, override):
    goes_on(run, tmp_path, override, "method=fedavg", "training.learning_rate=0.05")


def test_all_of_them_are_explained(house, hedgerow):
    keys = {
        "method.fedavgm.server": "Optimiser of the global steps",
        "method.up.half": "Rounding to 16 bits",
        "method.server.lion": "Share β₂",
        "training.objective.focal": "Exponent",
        "training.optimizer.adagrad": "Least root",
        "training.trainer.descent": "hedgerow's own loop",
    }
    for key, words in keys.items():
        said = hedgerow("explain", key)
        assert (said.code, words in said.out) == (0, True), (key, said.out, said.err)


def test_the_source_is_read(tmp_path):
    code = BLOCKS["beside `_read_parquet` in src/hedgerow/data/sources.py"]
    made = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), made)
    rows = [{"instruction": f"Say {i}", "output": None if i == 2 else str(i)} for i in range(5)]
    path = tmp_path / "a.arrow"
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=2)
    assert made["_read_arrow"](path, None) == (rows, {})
    assert made["_read_arrow"](path, 3) == (rows[:3], {})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"a\.arrow: is not a valid Arrow file"):
        made["_read_arrow"](path, None)
    assert ".arrow" not in sources.SUFFIXES, "it is there now: take another example"


def test_the_template_makes_what_it_says(run, tmp_path):
    code = BLOCKS["an entry of TEXTS in src/hedgerow/data/templates.py, and what it makes"]
    made = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), made)
    (tmp_path / "question.txt").write_text(made["TEXT"])
    run("run", "data.prompt=" + str(tmp_path / "question.txt"), rounds=1)


@pytest.mark.parametrize("where", BLOCKS)
def test_blocks_are_written_as_the_house_is(where, tmp_path):
    code = BLOCKS[where]
    assert max(map(len, code.splitlines())) <= 100
    if where.removeprefix("src/hedgerow/") in FILES:
        assert ast.get_docstring(ast.parse(code))
    path = tmp_path / "block.py"
    path.write_text(code)
    for command in (["check", "--ignore", "RUF100"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", path]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# --- what stands beside it ------------------------------------------------------------------------


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == package.__version__
    papers = {each["url"].rpartition("/")[2] for each in citation["references"]}
    assert papers == {"2409.05976", "2409.06277"}


@pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="outside the repository")
def test_forms_ask_for_what_helps():
    forms = {
        path.stem: yaml.safe_load(path.read_text())
        for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")
    }
    assert forms.keys() == {"bug", "feature", "wrong_number", "config"}
    assert "SECURITY.md" in forms["config"]["contact_links"][0]["about"]
    for name in ("bug", "wrong_number"):
        required = {
            each["id"]
            for each in forms[name]["body"]
            if each.get("validations") == {"required": True}
        }
        assert {"doctor", "experiment"} <= required
