"""The walk-through of docs/deploy.md, command by command, as it is written."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support.network import BIN, wait_for

from hedgerow import demo

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")),
        reason="openssl or ssh-keygen is not here",
    ),
]


def blocks():
    """The shell blocks of the walk-through, in their order."""
    text = (ROOT / "docs/deploy.md").read_text()
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


class Shell:
    """A person at a terminal: each command goes on where the last one left the variables."""

    def __init__(self, folder):
        self.folder, self.state = folder, folder / "state.sh"
        self.state.write_text("")
        self.background = []

    def run(self, commands):
        """Run commands to their end; returns what they print."""
        # Variables that are set without `export` last too (-a), as they would in a terminal.
        script = f"set -ea\n. {self.state}\n{commands}\nexport -p > {self.state}\n"
        result = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, capture_output=True, text=True
        )
        assert result.returncode == 0, commands + result.stdout + result.stderr
        return result.stdout

    def start(self, command):
        """Start a command in a terminal of its own; returns the file with its output."""
        log = self.folder / f"terminal-{len(self.background)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f". {self.state}\nexec {command}"],
                cwd=self.folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.background.append(process)
        return log

    def close(self):
        """End what was started."""
        for process in self.background:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def test_the_walk_through_works_as_written(tmp_path):
    # What a fresh clone has after `make demo`, which another test runs.
    (tmp_path / ".venv").symlink_to(BIN.parent)
    (tmp_path / "src").symlink_to(ROOT / "src")
    demo.prepare(tmp_path / "demo-run")
    shell = Shell(tmp_path)
    waits = {
        "flower-superlink": "Uvicorn running",
        "flower-supernode": "SuperNode ID",
    }
    try:
        for block in blocks():
            program = block.split()[0]
            if program in waits:
                log = shell.start(block.strip())
                wait_for(lambda log=log, p=program: waits[p] in log.read_text(), block)
                continue
            if block.startswith("hedgerow ledger verify"):  # when flwr list says so
                wait_for(
                    lambda: "finished" in status(shell)["status"], "the end of the run", every=3
                )
                run = status(shell)
                log = shell.run(f"flwr log {run['run-id']} here --show")
                assert run["status"] == "finished:completed", log
            shell.run(block.replace("make demo", ": make demo"))
    finally:
        shell.close()
    assert (tmp_path / "deploy/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "deploy/merged/model.safetensors").is_file()
    ours = {path.name: path.read_bytes() for path in (tmp_path / "deploy/run/ledger").iterdir()}
    (site,) = (tmp_path / "deploy/ash").glob("*/ledger")
    theirs = {path.name: path.read_bytes() for path in site.glob("0*")}
    assert theirs == {name: ours[name] for name in theirs}
    assert len(theirs) == 3


def status(shell):
    """What Flower says of the run."""
    return json.loads(shell.run("flwr list here --format json"))["runs"][0]
