"""Comparisons through the command line: the grid, its table, going on, and cells that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from support.runs import rows_of

from hedgerow.comparison import Cell, Outcome, plan
from hedgerow.evaluation.metrics import scores_of
from hedgerow.experiment import Experiment, load, split_at
from hedgerow.reporting import tables
from hedgerow.reporting.tables import default_target, summarise
from hedgerow.settings import EvaluationSettings

METHODS = "flora,flora restart=zero,ferret over=lora ranks=2 budget=400,fedavg,standalone"


def ledgers(folder):
    """The bytes of all entries, by run."""
    files = sorted(folder.glob("runs/*/ledger/*.safetensors"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_comparison_is_its_runs_and_a_table(hedgerow, experiment, tmp_path):
    """Each cell has the bytes of a run of its own, though all of them share one model."""
    out = tmp_path / "out"
    arguments = ["--methods", METHODS, "--seeds", "2", "--out", out]
    result = hedgerow("compare", experiment(), *arguments)
    assert result.code == 0, result.err
    runs = sorted(path.name for path in (out / "runs").iterdir())
    assert len(runs) == 10
    assert "ferret-over=lora-ranks=2-budget=400,seed=1" in runs
    alone = {"fedavg,seed=1": ["method.name=fedavg"], "flora,seed=1": []}
    for folder, changes in alone.items():
        own = tmp_path / "alone" / folder
        hedgerow("run", experiment(), *changes, "federation.seed=1", "--out", own)
        entry = "ledger/0002.safetensors"
        assert (own / entry).read_bytes() == (out / "runs" / folder / entry).read_bytes()

    table = json.loads((out / "comparison.json").read_text())
    assert [row["method"] for row in table] == METHODS.split(",")
    assert all(row["seeds"] == 2 and row["failed"] == 0 for row in table)
    flora = table[0]
    losses = [rows_of(out / "runs" / f"flora,seed={seed}")[-1]["eval_loss"] for seed in (0, 1)]
    assert flora["eval_loss"] == pytest.approx(sum(losses) / 2)
    assert flora["eval_loss_spread"] == pytest.approx(abs(losses[0] - losses[1]))
    assert all(row["rounds_to_target"] is None or row["rounds_to_target"] <= 2 for row in table)
    assert table[4]["bytes_up"] == 0
    csv = pd.read_csv(out / "comparison.csv")
    assert csv["eval_loss"].tolist() == pytest.approx([row["eval_loss"] for row in table])
    assert (out / "comparison.md").read_text().count("\n") == 7
    tex = (out / "comparison.tex").read_text()
    assert r"\begin{tabular}" in tex
    assert "flora restart=zero" in result.out
    assert "fedavg, seed 1, round 2 · " in result.out


def test_a_mistake_that_all_runs_share_is_one_sentence(hedgerow, experiment, tmp_path):
    out = tmp_path / "out"
    grid = ["--methods", "flora,fedavg", "--seeds", "2", "--out", out]
    result = hedgerow("compare", experiment(), f"model.path={tmp_path / 'nowhere'}", *grid)
    assert result.code == 2
    assert result.err.count("does not exist: give a model folder in Hugging Face format") == 1
    assert "or demo, the tiny model" in result.err
    assert not out.exists()


def test_a_comparison_does_only_what_is_missing(hedgerow, experiment, tmp_path):
    out = tmp_path / "out"
    grid = ["--methods", "flora,zero_padding", "--out", out]
    assert hedgerow("compare", experiment(), *grid).code == 0
    times = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/*") if path.is_file()}
    before = ledgers(out)
    more = [*grid, "--sweep", "training.learning_rate=0.01,0.02"]
    assert hedgerow("compare", experiment(), *grid).code == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert hedgerow("compare", experiment(), *more).code == 0
    assert before.items() < ledgers(out).items()
    table = json.loads((out / "comparison.json").read_text())
    assert [row["training.learning_rate"] for row in table] == ["0.01", "0.02"] * 2
    # The same cells of another experiment are refused, and nothing changes.
    after = ledgers(out)
    result = hedgerow("compare", experiment(), "training.steps=5", *grid)
    assert result.code == 2
    assert "training.steps" in result.err
    assert ledgers(out) == after


def test_a_comparison_that_is_killed_goes_on(hedgerow, experiment, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    path = experiment(federation={"rounds": 3})
    grid = ["--methods", "flora,fedavg", "--seeds", "2"]
    assert hedgerow("compare", path, *grid, "--out", whole).code == 0
    command = [sys.executable, "-m", "hedgerow", "compare", str(path), *grid, "--out", str(killed)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 600
    while len(ledgers(killed)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "comparison.json").exists()
    assert hedgerow("compare", path, *grid, "--out", killed).code == 0
    assert ledgers(killed) == ledgers(whole)

    def results(folder):
        table = json.loads((folder / "comparison.json").read_text())
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in table]

    assert results(killed) == results(whole)


def test_a_cell_that_fails_does_not_stop_the_others(hedgerow, experiment, tmp_path):
    out = tmp_path / "out"
    result = hedgerow(
        "compare", experiment(), "--methods", "fedit,flora,zero_padding", "--out", out
    )
    assert result.code == 1
    assert "1 of 3 runs failed" in result.err
    assert "fedit, seed 0: method.ranks: fedit averages adapters of one rank" in result.out
    table = json.loads((out / "comparison.json").read_text())
    assert [row["failed"] for row in table] == [1, 0, 0]
    assert table[0]["eval_loss"] is None
    mended = ["--methods", "fedit ranks=2,flora,zero_padding", "--out", out]
    assert hedgerow("compare", experiment(), *mended).code == 0


def test_a_cell_that_breaks_off_leaves_the_next_one_the_model_as_it_was(
    hedgerow, experiment, tmp_path
):
    """This one names a layer that cannot be adapted, beside one that can."""
    out = tmp_path / "out"
    methods = "flora targets=[q_proj,input_layernorm],flora,fedavg"
    result = hedgerow("compare", experiment(), "--methods", methods, "--out", out)
    assert result.code == 1
    assert "1 of 3 runs failed" in result.err
    assert "input_layernorm is not a linear layer (LlamaRMSNorm)" in result.out
    hedgerow("run", experiment(), "method.name=fedavg", "--out", tmp_path / "alone")
    entry = "ledger/0002.safetensors"
    alone, shared = (tmp_path / "alone" / entry, out / "runs" / "fedavg,seed=0" / entry)
    assert alone.read_bytes() == shared.read_bytes()


def test_a_comparison_of_which_all_fails_says_why(hedgerow, experiment, tmp_path):
    result = hedgerow("compare", experiment(), "--methods", "fedit", "--out", tmp_path / "out")
    assert result.code == 2
    assert "fedit averages adapters of one rank" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "flora,flroa"], "flroa"),
        (["--methods", "flora rank=3"], "method.rank"),
        (["--methods", "flora,flora"], "are the same"),
        (["--methods", "flora,flora restart=warm"], "flora restart=warm, seed 0 are the same"),
        (["--methods", "flora name=fedavg"], "give one name"),
        (["--methods", ","], "--methods: name at least one method"),
        (["--methods", "flora", "--sweep", "training.steps=,"], "give a key and its values"),
        (["--methods", "flora", "--sweep", "federation.seed=1,2"], "give --seeds instead"),
        (
            ["--methods", "flora", "--sweep", "training.steps=1", "--sweep", "training.steps=2"],
            "name all of its values at once",
        ),
        (["--methods", "flora", "--sweep", "training.learning_rate"], "give a key and its values"),
        (["--methods", "flora", "--sweep", "training.rate=1,2"], "training.rate"),
        (["--methods", "flora", "--seeds", "1000000000"], "make 1,000,000,000 runs"),
        (["--methods", "flora", "--sweep", "training.steps=!!int a,2"], "is no int, as its tag"),
    ],
)
def test_a_grid_that_cannot_be_is_one_sentence(hedgerow, experiment, tmp_path, arguments, sentence):
    result = hedgerow("compare", experiment(), *arguments, "--out", tmp_path / "out")
    assert result.code == 2
    assert sentence in result.err
    assert not (tmp_path / "out").exists()


def test_values_with_brackets_are_one_value():
    assert split_at("flora ranks=[4, 2],fedit", ",") == ["flora ranks=[4, 2]", "fedit"]
    assert split_at("flora compress={rank: 3, bits: 8}", " ") == [
        "flora",
        "compress={rank: 3, bits: 8}",
    ]


def outcome(method, losses, failure=None):
    rows = [
        {"round": r, "eval_loss": loss, "bytes_up": 10, "bytes_down": 20, "seconds": None}
        for r, loss in enumerate(losses)
    ]
    experiment = Experiment.model_construct(evaluation=EvaluationSettings())
    return Outcome(Cell(method, {}, 0, experiment, Path()), rows, failure)


def test_the_target_is_a_loss_that_all_who_learn_have_reached():
    assert default_target([]) is None
    outcomes = [
        outcome("good", [5.0, 4.5, 4.0]),
        outcome("slow", [5.0, 4.9, 4.8]),
        outcome("worse", [5.0, 6.0, 7.0]),
        outcome("broken", [5.0, 4.9], "why"),
        outcome("blind", [5.0, None, None]),
    ]
    assert default_target(outcomes) == 4.8
    table = {row["method"]: row for row in summarise(outcomes)}
    assert (table["good"]["rounds_to_target"], table["good"]["bytes_to_target"]) == (1, 60)
    assert (table["slow"]["rounds_to_target"], table["slow"]["bytes_to_target"]) == (2, 90)
    assert table["worse"]["rounds_to_target"] is None
    assert (table["broken"]["failed"], table["broken"]["eval_loss"]) == (1, None)
    assert table["blind"]["eval_loss"] is None
    assert summarise(outcomes, 4.0)[1]["rounds_to_target"] is None


def test_long_and_odd_options_have_folders_of_their_own(experiment, tmp_path):
    targets = [f"layers.{i}.self_attn.q_proj" for i in range(40)]
    methods = [f"flora targets={json.dumps(targets)}", "flora targets=[q]", "flora targets=(q)"]
    cells = plan(partial(load, experiment()), [], methods, {}, 1, tmp_path)
    folders = [cell.folder.name for cell in cells]
    assert len(set(folders)) == 3
    assert max(map(len, folders)) < 200


def test_scores_of_runs_that_have_diverged_are_said():
    row = {"method": "flora", "seeds": 2, "failed": 0, "bytes_up": 1, "bytes_down": 1, "seconds": 1}
    table = [row | {"eval_loss": 2.0}, row | {"eval_loss": None}]
    table += [row | {"eval_loss": None, "seeds": 0, "failed": 2}]
    scores = scores_of(["loss"])
    shown = tables.shown(table, [], {"eval_loss": scores["eval_loss"]})
    assert shown["loss"].tolist() == ["2", "nan", "-"]
