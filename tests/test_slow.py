"""What takes minutes: kills at random instants, memory with many clients, real data."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.runs import rows_of

pytestmark = pytest.mark.slow

DOLLY = {
    "model": {"path": "models/stories260k"},
    "data": {
        "clients": "data/dolly/local_training_{}.json",
        "test": "data/dolly/global_test.json",
        "fields": {"instruction": "instruction", "input": "context", "output": "response"},
        "prompt": "alpaca",
        "max_length": 256,
    },
    "method": {"name": "flora", "ranks": [64, 32, 16, 16, 8, 8, 4, 4, 4, 4], "alpha": "2r"},
    "training": {"steps": 10, "batch_size": 8, "learning_rate": 1.0e-3},
    "federation": {"rounds": 3, "clients_per_round": 10},
}


def command(path: Path, run: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "hedgerow", "run", str(path), "--out", str(run), *options]


def test_a_run_killed_at_ten_instants_ends_with_the_same_bytes(experiment, tmp_path):
    path = experiment(federation={"rounds": 60, "clients_per_round": 2}, training={"steps": 5})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    subprocess.run(command(path, whole), check=True, capture_output=True)
    seconds = time.monotonic() - began
    draw = random.Random(0)
    kills = 0
    while kills < 10:
        process = subprocess.Popen(
            command(path, killed, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            process.wait(draw.uniform(0.1, 1.0) * seconds * 0.6)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        if process.returncode == 0:  # it got to the end: once more from the start
            shutil.rmtree(killed)
            continue
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        kills += 1
    subprocess.run(command(path, killed, "--resume"), check=True, capture_output=True)
    names = sorted(file.name for file in (whole / "ledger").iterdir())
    assert names == sorted(file.name for file in (killed / "ledger").iterdir())
    for name in names:
        assert (whole / "ledger" / name).read_bytes() == (killed / "ledger" / name).read_bytes()
    keys = ("round", "eval_loss", "train_loss", "bytes_up", "bytes_down", "clients")
    assert [[row[k] for k in keys] for row in rows_of(whole)] == [
        [row[k] for k in keys] for row in rows_of(killed)
    ]


def peak_memory(arguments: list[str]) -> int:
    """The largest resident set of a command, in KiB."""
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True,"
        " stdout=subprocess.DEVNULL);"
        " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True
    )
    return int(out.stdout)


@pytest.mark.shared
@pytest.mark.parametrize("method", ["flora", "fedit", "fedavg"])
def test_a_hundred_clients_need_no_more_memory_than_ten(shared, tmp_path, method):
    rows = json.loads((shared / "data/dolly/local_training_1.json").read_text())[:40]
    peaks = {}
    for count in (10, 100):
        folder = tmp_path / str(count)
        folder.mkdir()
        for client in range(count):
            (folder / f"client_{client}.json").write_text(json.dumps(rows))
        content = DOLLY | {
            "model": {"path": str(shared / "models/stories260k")},
            "method": {"name": method} | ({} if method == "fedavg" else {"ranks": 16}),
            "training": {"steps": 5, "batch_size": 8},
            "federation": {"rounds": 1},
        }
        content["data"] = DOLLY["data"] | {
            "clients": "client_{}.json",
            "test": str(shared / "data/dolly/global_test.json"),
        }
        (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
        peaks[count] = peak_memory(command(folder / "experiment.yaml", folder / "run"))
    print(method, peaks, peaks[100] / peaks[10])
    assert peaks[100] <= 1.1 * peaks[10]


@pytest.mark.shared
def test_dolly_on_a_real_llama(shared, tmp_path):
    """The design's experiment: the loss falls, rows are complete, overhead is small."""
    content = json.loads(json.dumps(DOLLY))
    content["model"]["path"] = str(shared / content["model"]["path"])
    for key in ("clients", "test"):
        content["data"][key] = str(shared / content["data"][key])
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    subprocess.run(command(path, tmp_path / "run"), check=True, capture_output=True)
    rows = rows_of(tmp_path / "run")
    losses = [row["eval_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    for row in rows[1:]:
        assert row["aggregation_error"] < 1e-6
        parts = row["train_seconds"] + row["evaluate_seconds"]
        assert row["seconds"] - parts < 0.05 * row["seconds"], row
