"""A real Flower network on loopback, with TLS and node authentication, process by process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(
    condition: Callable[[], Any], what: str, seconds: float = 120, every: float = 0.2
) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every)
    raise AssertionError(f"{what} did not happen within {seconds} s")


class Network:
    """A SuperLink, and the SuperNodes that are started on it; all end with `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.python_path: Path | None = None
        """Put before the path of the processes that are started from now on."""
        self._environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.4",
            "HF_HUB_OFFLINE": "1",
            # As many threads as in the run that ledgers are compared with.
            "OMP_NUM_THREADS": "1",
        }
        (folder / "flwr").mkdir(parents=True)
        self.ca = self.certificate("superlink")
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.ca}"\n'
        )
        self.start(
            "superlink",
            "flower-superlink",
            *("--ssl-ca-certfile", self.ca, "--ssl-certfile", folder / "superlink.crt"),
            *("--ssl-keyfile", folder / "superlink.key", "--enable-supernode-auth"),
            *("--disable-runtime-dependency-installation",),
            *("--host", "127.0.0.1", "--port", self.port),
        )
        wait_for(lambda: "Uvicorn running" in self.log("superlink"), "the SuperLink's start")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.stop(name)

    # --- certificates and keys ------------------------------------------------------------------

    def openssl(self, *arguments: object) -> None:
        """Run openssl."""
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    def certificate(self, name: str) -> Path:
        """Make an authority, and by it a server's certificate for loopback; returns the former."""
        folder, curve = self.folder, ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
        ca, key, request = (folder / f"{name}.{suffix}" for suffix in ("ca", "ca-key", "csr"))
        self.openssl(
            *("req", "-x509", *curve, "-nodes", "-days", 2, "-subj", "/CN=tests"),
            *("-keyout", key, "-out", ca),
        )
        self.openssl(
            *("req", *curve, "-nodes", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
            *("-keyout", folder / f"{name}.key", "-out", request),
        )
        self.openssl(
            *("x509", "-req", "-in", request, "-CA", ca, "-CAkey", key, "-CAcreateserial"),
            *("-days", 2, "-copy_extensions", "copy", "-out", folder / f"{name}.crt"),
        )
        return ca

    def register(self, name: str, registered_as: str | None = None) -> None:
        """Make a SuperNode's key, and tell the SuperLink of it."""
        key = self.key(name)
        self.flwr("supernode", "register", f"{key}.pub", "--name", registered_as or name)

    def key(self, name: str) -> Path:
        """A SuperNode's private key; the public one is beside it."""
        key = self.folder / f"{name}.node"
        if not key.exists():
            command = ["ssh-keygen", "-t", "ecdsa", "-b", "384", "-N", "", "-q", "-f", str(key)]
            subprocess.run(command, check=True)
        return key

    # --- processes ------------------------------------------------------------------------------

    def start(self, name: str, command: str, *arguments: object) -> None:
        """Start one of Flower's programs, whose output goes to a file."""
        environment = self._environment
        if self.python_path is not None:
            path = os.pathsep.join([str(self.python_path), environment.get("PYTHONPATH", "")])
            environment = environment | {"PYTHONPATH": path}
        with self.log_file(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [BIN / command, *map(str, arguments)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def start_node(
        self, key: str, /, *, ca: Path | None = None, superlink_port: int = 0, **node: str
    ) -> None:
        """Start the SuperNode that has this key; its node config is `node`."""
        superlink = f"127.0.0.1:{superlink_port or self.port}"
        node = {"name": key, "folder": str(self.folder / "sites" / key)} | node
        self.start(
            key,
            "flower-supernode",
            *("--root-certificates", ca or self.ca, "--superlink", superlink),
            *("--auth-supernode-private-key", self.key(key), "--port", free_port()),
            *("--node-config", " ".join(f'{name}="{value}"' for name, value in node.items())),
        )

    def kill(self, name: str) -> None:
        """SIGKILL a process, and nothing else: what it has started has to notice."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self, name: str) -> None:
        """End a process and all of its session."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log_file(self, name: str) -> Path:
        """Where a process's output goes."""
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        """A process's output so far."""
        return self.log_file(name).read_text(errors="replace")

    # --- runs -----------------------------------------------------------------------------------

    def flwr(self, *arguments: object) -> str:
        """Run Flower's command line; returns what it prints."""
        result = subprocess.run(
            [BIN / "flwr", *map(str, arguments)],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def submit(self, app: Path, out: Path, **config: str) -> str:
        """`flwr run` an app; returns the run's id."""
        settings = {"out": str(out)} | config
        values = " ".join(f'{key}="{value}"' for key, value in settings.items())
        output = self.flwr("run", app, "here", "--run-config", values, "--format", "json")
        return str(json.loads(output)["run-id"])

    def status(self, run: str) -> str:
        """A run's status, as `finished:completed`."""
        (found,) = json.loads(self.flwr("list", "here", "--run-id", run, "--format", "json"))[
            "runs"
        ]
        return str(found["status"])

    def finish(self, run: str, seconds: float = 240) -> str:
        """Wait for a run's end; returns its status."""

        def status() -> str | None:
            now = self.status(run)
            return now if now.startswith("finished") else None

        # Flower's command line takes a second of a core.
        return str(wait_for(status, f"the end of run {run}", seconds, every=3))

    def run_log(self, run: str) -> str:
        """What the ServerApp of a run has printed."""
        return self.flwr("log", run, "here", "--show")
