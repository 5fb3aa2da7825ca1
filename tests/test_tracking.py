"""Trackers, read back by their own readers: every row once, whatever happens; and the run first.

TensorBoard is always there; the others are tested where they are installed.
"""

import json
import math
import os
import subprocess
import sys
import time

import accelerate.tracking
import pytest
from support.runs import ledger_bytes, rows_of, tensorboard_of

from hedgerow import tracking
from hedgerow.errors import UserError
from hedgerow.experiment import load
from hedgerow.settings import TRACKERS

INSTALLED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in map(str, accelerate.tracking.get_available_trackers()),
            reason=f"{name} is not installed",
        ),
    )
    for name in TRACKERS
]


def mlflow_of(run, project):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string=f"name = '{project}'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (run.name, "FINISHED")
    assert found.data.params["training/learning_rate"] == "0.01"
    histories = {
        name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics
    }
    return {name: [(m.step, m.value) for m in history] for name, history in histories.items()}


def wandb_of(run, project):
    """All offline parts of a run, in the order in which `wandb sync` takes them."""
    told, ids = {}, set()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for record in map(json.loads, output.splitlines()):
            if record["type"] == "run":
                ids.add(record["run"]["run_id"])
                assert record["run"]["project"] == project
                assert record["run"]["display_name"] == run.name
            if record["type"] == "history":
                items = record["history"]["item"]
                step = items["_step"]
                for name in items.keys() - {"_step", "_runtime", "_timestamp"}:
                    told.setdefault(name, []).append((step, items[name]))
    assert len(ids) == 1
    return told


def trackio_of(run, project):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = trackio.Api().runs(project)
    assert found.name == run.name
    assert found.config["training/learning_rate"] == 0.01
    told = {}
    for log in SQLiteStorage.get_logs(project, run.name):
        for name in log.keys() - {"step", "timestamp"}:
            told.setdefault(name, []).append((log["step"], log[name]))
    return told


READERS = {
    "tensorboard": lambda run, project: tensorboard_of(run),
    "mlflow": mlflow_of,
    "wandb": wandb_of,
    "trackio": trackio_of,
}


def of_metrics(run):
    """What a tracker should have been told, from metrics.jsonl."""
    told, up, down = {}, 0, 0
    for row in rows_of(run):
        up, down = up + row["bytes_up"], down + row["bytes_down"]
        values = {**row, "bytes_up_total": up, "bytes_down_total": down}
        for key, scores in row.items():
            if key.endswith(("_by", "_by_client")):
                values |= {f"{key}/{category}": score for category, score in scores.items()}
        for name, value in values.items():
            if isinstance(value, int | float) and name != "round":
                told.setdefault(name, []).append((row["round"], value))
    return told


def assert_equal(told, expected):
    """TensorBoard keeps 32 bits of a number."""
    assert told.keys() == expected.keys()
    for name in expected:
        assert told[name] == [(step, pytest.approx(v, rel=1e-6)) for step, v in expected[name]], (
            name
        )


@pytest.mark.parametrize("name", INSTALLED)
def test_a_tracker_has_every_row_once_though_the_run_was_stopped(
    hedgerow, experiment, tmp_path, monkeypatch, name
):
    """The stop comes between a row and its tracker; the ledger is that of a run without one."""
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    path, run = experiment(evaluation={"by": "instruction"}), tmp_path / "runs" / "tracked"
    project = tmp_path.name[:100]
    tracked = [path, f"tracking.to={name}", f"tracking.project={project}", "--out", run]
    tell = tracking.Trackers._tell

    def stopped(trackers, row):
        if row["round"] == 1:
            raise SystemExit(9)
        tell(trackers, row)

    with monkeypatch.context() as patch:
        patch.setattr(tracking.Trackers, "_tell", stopped)
        assert hedgerow("run", *tracked).code == 9
    assert [row["round"] for row in rows_of(run)] == [0, 1]
    assert hedgerow("run", *tracked, "--resume").code == 0
    result = hedgerow("run", *tracked, "--resume", "federation.rounds=3")
    assert result.code == 0
    assert "failed" not in result.out
    told = READERS[name](run, project)
    assert [step for step, _ in told["eval_loss"]] == [0, 1, 2, 3]
    expected = of_metrics(run)
    assert "eval_loss_by/Say b0" in expected
    assert_equal(told, {key.replace("Say b", "Say_b"): value for key, value in expected.items()})

    alone = [path, "federation.rounds=3", "--out", tmp_path / "alone"]
    assert hedgerow("run", *alone).code == 0
    assert ledger_bytes(run) == ledger_bytes(tmp_path / "alone")
    for folder in (run, tmp_path / "alone"):
        out = folder.with_suffix(".hedgerow")
        assert hedgerow("export", folder, out, "--to", "ledger").code == 0
    packed = run.with_suffix(".hedgerow").read_bytes()
    assert packed == (tmp_path / "alone.hedgerow").read_bytes()


def test_a_round_that_was_told_but_not_noted_is_shown_once(
    hedgerow, experiment, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    tracked = [experiment(), "tracking.to=tensorboard", "--out", run]
    note = tracking.Trackers._write

    def stopped(trackers):
        if trackers._marks["tensorboard"].round == 1:
            raise SystemExit(9)
        note(trackers)

    with monkeypatch.context() as patch:
        patch.setattr(tracking.Trackers, "_write", stopped)
        assert hedgerow("run", *tracked).code == 9
    assert json.loads((run / "tracking.json").read_text())["tensorboard"]["round"] == 0
    assert [step for step, _ in tensorboard_of(run)["eval_loss"]] == [0, 1]
    # Files of one process and second are told apart by a count, by which 9 comes after 10.
    time.sleep(1.1)
    assert hedgerow("run", *tracked, "--resume").code == 0
    assert_equal(tensorboard_of(run), of_metrics(run))


def test_a_resumed_run_may_be_tracked_from_then_on_or_elsewhere(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    resumed = [experiment(), "--out", run, "--resume"]
    assert hedgerow("run", experiment(), "federation.rounds=1", "--out", run).code == 0
    assert not (run / "tracking.json").exists()
    assert hedgerow("run", *resumed, "tracking.to=tensorboard").code == 0
    assert_equal(tensorboard_of(run), of_metrics(run))
    other = ["tracking.to=tensorboard", "tracking.project=other", "tracking.name=another"]
    assert hedgerow("run", *resumed, *other).code == 0
    assert_equal(tensorboard_of(run), of_metrics(run))
    mark = json.loads((run / "tracking.json").read_text())["tensorboard"]
    assert (mark["project"], mark["name"], mark["round"]) == ("other", "another", 2)


@pytest.mark.parametrize("when", ["start", "log", "finish"])
def test_a_tracker_that_breaks_does_not_stop_the_run(
    hedgerow, experiment, tmp_path, monkeypatch, when
):
    class Broken(accelerate.tracking.TensorBoardTracker):
        def start(self):
            super().start()
            self.may_break("start")

        def log(self, values, step=None, **options):
            self.may_break("log" if step else "")
            super().log(values, step, **options)

        def finish(self):
            super().finish()
            self.may_break("finish")

        def may_break(self, now):
            if now == when:
                raise OSError("no room\nfor this\x1b[2J")

    path, run = experiment(federation={"rounds": 3}), tmp_path / "run"
    tracked = [path, "tracking.to=tensorboard", "--out", run]
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "TensorBoardTracker", Broken)
        result = hedgerow("run", *tracked)
    assert result.code == 0, result.err
    assert result.out.count("tensorboard failed, and the run goes on without it: no room\n") == 1
    assert [row["round"] for row in rows_of(run)] == [0, 1, 2, 3]
    assert hedgerow("run", path, "--out", tmp_path / "alone").code == 0
    assert ledger_bytes(run) == ledger_bytes(tmp_path / "alone")
    # There is nothing left to train; but what the tracker has missed it is told now.
    assert hedgerow("run", *tracked, "--resume").code == 0
    assert_equal(tensorboard_of(run), of_metrics(run))


def test_each_run_of_a_comparison_is_tracked(hedgerow, experiment, tmp_path):
    out = tmp_path / "out"
    grid = ["--methods", "flora,fedavg", "--out", out]
    assert hedgerow("compare", experiment(), "tracking.to=tensorboard", *grid).code == 0
    for folder in ("flora,seed=0", "fedavg,seed=0"):
        assert_equal(tensorboard_of(out / "runs" / folder), of_metrics(out / "runs" / folder))


@pytest.mark.parametrize(
    "command",
    [["run"], ["run", "--engine", "flower"], ["compare", "--methods", "flora,fedavg"]],
    ids=" ".join,
)
def test_a_tracker_that_is_not_installed_is_one_sentence(
    hedgerow, experiment, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    verb, *options = command
    arguments = [experiment(), "tracking.to=tensorboard", *options, "--out", tmp_path / "out"]
    result = hedgerow(verb, *arguments)
    assert result.code == 2
    assert "tracking.to needs tensorboard, which is not installed: pip install" in result.err
    assert "'hedgerow[tensorboard]'" in result.err
    assert not (tmp_path / "out").exists()


def test_the_runs_of_a_comparison_cannot_share_a_name(hedgerow, experiment, tmp_path):
    grid = ["tracking.name=all", "--methods", "flora,fedavg", "--out", tmp_path / "out"]
    result = hedgerow("compare", experiment(), *grid)
    assert result.code == 2
    assert "tracking.name: leave it out" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "tracking.to=tensorbord",
            "`tracking.to`: there is no 'tensorbord', did you mean `tensorboard`? "
            "(known: tensorboard, wandb, mlflow, trackio)",
        ),
        ("tracking.to=[mlflow, wandbb]", "there is no 'wandbb', did you mean `wandb`?"),
        ("tracking.to=[mlflow, mlflow]", "`tracking.to`: 'mlflow' stands twice"),
        ("tracking.to=3", "`tracking.to`: must be a tracker or a list of them"),
        ("tracking.project=a'b", "`tracking.project`: must be up to 128 letters"),
        ("tracking.proj=a", "`tracking.proj` is not a known key, did you mean `project`"),
    ],
)
def test_a_mistake_is_named(experiment, override, says):
    with pytest.raises(UserError) as caught:
        load(experiment(), [override])
    assert says in str(caught.value)
    assert str(caught.value).count("not '") == 0


def test_damaged_notes_are_one_sentence(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    tracked = [experiment(), "tracking.to=tensorboard", "--out", run]
    assert hedgerow("run", *tracked).code == 0
    for content in ("{", '{"tensorboard": {"project": "p", "name": "n", "round": "x"}}', "[]"):
        (run / "tracking.json").write_text(content)
        result = hedgerow("run", *tracked, "--resume")
        assert result.code == 2
        assert "tracking.json is damaged: restore it from a copy, or remove it" in result.err


def test_what_is_told_of_a_row():
    row = {
        "round": 3,
        "eval_loss": 2.5,
        "train_loss": None,
        "eval_perplexity": math.inf,
        "clients": 4,
        "participants": ["a", "b"],
        "failures": {"c": "away"},
        "accuracy_by": {"Math & more": 50.0, "../x": 1, "": 2.0, "Chimie organique é": math.nan},
        "by_client": {"a": {"eval_loss": 1.0}},
    }
    assert tracking.numbers(row) == {
        "eval_loss": 2.5,
        "clients": 4,
        "accuracy_by/Math_more": 50.0,
        "accuracy_by/_x": 1,
        "accuracy_by/_": 2.0,
    }


def test_what_is_told_of_an_experiment(experiment, tmp_path):
    changes = ["tracking.to=wandb", "method.targets=[" + "layer, " * 100 + "]"]
    told = tracking.hyper_parameters(load(experiment(), changes))
    assert told["training/learning_rate"] == 0.01
    assert told["method/ranks"] == "[4, 2, 1]"
    assert told["method/rslora"] is False
    assert len(told["method/targets"]) == 500
    assert "federation/deadline" not in told  # it is not set
    assert not any(key.startswith("tracking") for key in told)
    # Where the data lie is nobody's business but the owner's.
    assert not any(str(tmp_path) in str(value) for value in told.values())


GUARD = """
import ipaddress, sys

def refuse(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and not ipaddress.ip_address(address[0]).is_loopback:
            raise OSError(f"no network: {address}")
    elif event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", "127.0.0.1"):
        raise OSError(f"no network: {arguments[0]}")

sys.addaudithook(refuse)
from hedgerow.cli import main
main()
"""


@pytest.mark.parametrize("name", INSTALLED)
def test_a_run_is_tracked_without_a_network(experiment, tmp_path, name):
    out = tmp_path / "runs" / "offline"
    arguments = ["run", str(experiment()), f"tracking.to={name}", "--out", str(out)]
    unset = ("MLFLOW_", "WANDB_", "TRACKIO_", "HF_TOKEN")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
    result = subprocess.run(
        [sys.executable, "-c", GUARD, *arguments],
        capture_output=True,
        text=True,
        env=environment | {"HOME": str(tmp_path)},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "no network" not in result.stdout + result.stderr
    assert "failed" not in result.stdout
    assert json.loads((out / "tracking.json").read_text())[name]["round"] == 2
    places = {
        "tensorboard": out / "tensorboard",
        "wandb": out / "wandb",
        "mlflow": out.parent / "mlflow.db",
        "trackio": out.parent / "trackio",
    }
    assert places[name].exists()
    assert not {"mlruns", "mlflow.db", "wandb"} & {path.name for path in tmp_path.iterdir()}
