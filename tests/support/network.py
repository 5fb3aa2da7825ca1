"""A real Flower network on loopback, with TLS and node authentication, process by process."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

BIN = Path(sys.executable).parent


PATIENCE = 600.0
"""Seconds to wait for what takes a few on an idle machine."""
_locks: list[TextIO] = []


def free_port() -> int:
    """A port of this machine that nobody listens on, and that no other test is given meanwhile."""
    places = Path(tempfile.gettempdir()) / f"hedgerow-test-ports-{os.getuid()}"
    places.mkdir(exist_ok=True)
    # Below those that the system gives to connections, which may take one at any time.
    for port in random.SystemRandom().sample(range(20_000, 30_000), 1000):
        lock = (places / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _locks.append(lock)  # until this process ends
        return port
    raise AssertionError("no port is free")


def wait_for(
    condition: Callable[[], Any], what: str, seconds: float = PATIENCE, every: float = 0.2
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
            "MALLOC_MMAP_THRESHOLD_": "1048576",  # as docs/deploy.md has it
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
            "--ssl-ca-certfile",
            self.ca,
            "--ssl-certfile",
            folder / "superlink.crt",
            "--ssl-keyfile",
            folder / "superlink.key",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
        )
        wait_for(lambda: "Uvicorn running" in self.log("superlink"), "the SuperLink's start")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        # The SuperLink last: SuperNodes say good-bye to it.
        nodes = [name for name in self.processes if name != "superlink"]
        for name in nodes:
            os.killpg(self.processes[name].pid, signal.SIGTERM)
        for name in [*nodes, "superlink"]:
            self.stop(name)

    # --- certificates and keys ------------------------------------------------------------------

    def certificate(self, name: str) -> Path:
        """Make an authority, and by it a server's certificate for loopback; returns the former."""
        authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"{name} authority")])
        server = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        keys = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        basic = x509.BasicConstraints(ca=True, path_length=0)
        address = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        parts = [("ca", authority, keys[0], basic, True), ("crt", server, keys[1], address, False)]
        for suffix, subject, key, extension, critical in parts:
            now = datetime.datetime.now(datetime.UTC)
            certificate = (
                x509.CertificateBuilder()
                .subject_name(subject)
                .issuer_name(authority)
                .public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(hours=1))
                .not_valid_after(now + datetime.timedelta(days=1))
                .add_extension(extension, critical)
                .sign(keys[0], hashes.SHA256())
            )
            path = self.folder / f"{name}.{suffix}"
            path.write_bytes(certificate.public_bytes(Encoding.PEM))
        self._write_key(self.folder / f"{name}.key", keys[1], PrivateFormat.PKCS8)
        return self.folder / f"{name}.ca"

    def _write_key(self, path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> None:
        path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))

    def register(self, name: str, registered_as: str | None = None) -> None:
        """Make a SuperNode's key, and tell the SuperLink of it."""
        key = self.key(name)
        self.flwr("supernode", "register", f"{key}.pub", "--name", registered_as or name)

    def key(self, name: str) -> Path:
        """A SuperNode's private key; the public one is beside it."""
        path = self.folder / f"{name}.node"
        if not path.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            self._write_key(path, key, PrivateFormat.OpenSSH)
            public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            path.with_name(f"{path.name}.pub").write_bytes(public)
        return path

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
        self,
        key: str,
        /,
        *,
        ca: Path | None = None,
        superlink_port: int = 0,
        options: Sequence[object] = (),
        **node: str,
    ) -> None:
        """Start the SuperNode that has this key, with these options; its node config is `node`."""
        superlink = f"127.0.0.1:{superlink_port or self.port}"
        node = {"name": key, "folder": str(self.folder / "sites" / key)} | node
        self.start(
            key,
            "flower-supernode",
            "--root-certificates",
            ca or self.ca,
            "--superlink",
            superlink,
            "--auth-supernode-private-key",
            self.key(key),
            "--port",
            free_port(),
            "--node-config",
            " ".join(f'{name}="{value}"' for name, value in node.items()),
            *options,
        )

    def kill(self, name: str) -> None:
        """SIGKILL a process, and nothing else: what it has started has to notice."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self, name: str) -> None:
        """End a process and all of its session."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
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

    def finish(self, run: str, seconds: float = 2 * PATIENCE) -> str:
        """Wait for a run's end; returns its status."""

        def status() -> str | None:
            now = self.status(run)
            return now if now.startswith("finished") else None

        # Flower's command line takes a second of a core.
        return str(wait_for(status, f"the end of run {run}", seconds, every=3))

    def run_log(self, run: str) -> str:
        """What the ServerApp of a run has printed."""
        return self.flwr("log", run, "here", "--show")
