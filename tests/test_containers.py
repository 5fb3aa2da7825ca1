"""The files of deploy/: what a container engine and systemd would run, tried without them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.network import BIN, free_port, wait_for

import hedgerow
from hedgerow import demo

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SERVICES = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
OURS = {name: each for name, each in SERVICES.items() if name != "proxy"}
SITES = ("ash", "birch")
README = (DEPLOY / "README.md").read_text()
WALK = (ROOT / "docs/deploy.md").read_text()


def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what follows them, in their order."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def commands_of_unit(path: Path) -> list[str]:
    """What a unit starts, word by word."""
    text = path.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    return shlex.split(line)


COMMANDS = {
    **{f"compose.yaml {name}": each["command"] for name, each in OURS.items()},
    **{path.name: commands_of_unit(path) for path in UNITS if path.stem != "hedgerow-proxy"},
}


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `--help` says of each program that is started."""
    programs = {Path(command[0]).name for command in COMMANDS.values()}
    started = {
        program: subprocess.Popen([BIN / program, "--help"], stdout=subprocess.PIPE, text=True)
        for program in programs
    }
    return {program: process.communicate()[0] for program, process in started.items()}


@pytest.mark.parametrize("where", COMMANDS)
def test_options_that_are_given_exist(where, helps):
    program, *arguments = COMMANDS[where]
    known = helps[Path(program).name]
    options = [each.partition("=")[0] for each in arguments if each.startswith("--")]
    assert options
    for option in options:
        assert re.search(rf"{option}\b(?!-)", known), option
        assert f"{option} This argument is deprecated" not in " ".join(known.split())


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_named_and_read_only(name):
    service = SERVICES[name]
    for volume in service["volumes"]:
        target = volume["target"]
        if volume["type"] == "volume":
            assert target == "/tmp"
            continue
        assert volume["bind"] == {"create_host_path": False}
        assert volume.get("read_only", False) == (target != "/state"), target
        source = volume["source"]
        variable = re.match(r"\$\{(\w+):-(.*)\}$", source)
        for word in variable.groups() if variable else [source.removeprefix("./")]:
            named = word.removeprefix("../")
            assert named in README or named in WALK, named


@pytest.mark.parametrize("name", SERVICES)
def test_nobody_is_root_and_nothing_secret_is_said(name):
    service = SERVICES[name]
    assert service["user"].startswith("${HEDGEROW_USER:?")
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"environment", "env_file", "privileged", "ports"} & service.keys()
    assert re.search(r":\d[\w.-]*$", service["image"])  # a version


def test_only_the_proxy_reaches_what_can_run_code():
    command = SERVICES["coordinator"]["command"]
    assert "--host=127.0.0.1" in command
    assert SERVICES["proxy"]["network_mode"] == "service:coordinator"
    addresses = [
        each.partition("=")[2]
        for service in OURS.values()
        for each in service["command"]
        if each.startswith("--health-server-address")
    ]
    assert addresses == ["127.0.0.1:9090"] * 3
    (block,) = re.findall(r"```nginx\n(.*?)```", WALK, re.DOTALL)
    assert (DEPLOY / "nginx.conf").read_text() == block


def test_images_are_of_this_version():
    assert {each["image"] for each in OURS.values()} == {f"hedgerow:{hedgerow.__version__}"}


def test_the_image_has_no_root_no_key_and_versions_that_are_pinned():
    found = steps()
    assert [rest for name, rest in found if name == "USER"] == ["10001:10001"]
    bases = [rest.split()[0] for name, rest in found if name == "FROM"]
    assert all(re.search(r":\d+\.\d+-", base) for base in bases)
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert all("--constraint constraints.txt" in each for each in installs)
    assert "\ntorch==" in (ROOT / "constraints.txt").read_text()
    health = shlex.split(dict(found)["HEALTHCHECK"].partition("CMD ")[2].strip("[]"))
    assert health[1].rstrip(",") == "/opt/hedgerow/health.py"
    # What is not let through is not in the engine's hands: all but what is copied.
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split("\n")
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied())


def copied() -> list[str]:
    """Files and folders of the repository that are in the image, or are used to make it."""
    given = [rest.split() for name, rest in steps() if name == "COPY"]
    return [each for words in given if not words[0].startswith("--") for each in words[:-1]]


def test_git_leaves_out_what_the_walk_through_makes():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no clone")
    secret = ["ash.key", "server.key", "ca.key", ".env", "run", "coordinator/superlink.db"]
    paths = [f"deploy/{name}" for name in secret]
    ignored = subprocess.run(
        ["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert ignored.stdout.split() == paths


def test_services_read_and_write_where_their_readme_says():
    services = README.partition("## With systemd")[2]
    for path in UNITS:
        words = " ".join(commands_of_unit(path))
        for place in re.findall(r"/etc/hedgerow/([\w.%]+)", words):
            assert f"`{place.replace('%i', 'ash')}`" in services or f"/{place}" in services, place
        state = re.findall(r"^StateDirectory=(.*)$", path.read_text(), re.M)
        assert all(f"/var/lib/{each}" in path.read_text() for each in state)
        assert path.stem.partition("@")[0] in services
    superlink = (DEPLOY / "systemd/hedgerow-superlink.service").read_text()
    assert "FLWR_HOME=/var/lib/hedgerow/superlink/flwr\n" in superlink
    assert "/var/lib/hedgerow/superlink/flwr/config.toml" in services
    assert services.count("flwr supernode register") == len(SITES)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_understands_the_units(tmp_path):
    for path in UNITS:
        text = path.read_text().replace("/opt/hedgerow/bin", str(BIN))
        # nginx need not be here.
        (tmp_path / path.name).write_text(text.replace("/usr/sbin/nginx", sys.executable))
    found = subprocess.run(
        ["systemd-analyze", "verify", *(tmp_path / path.name for path in UNITS)],
        capture_output=True,
        text=True,
    )
    assert (found.returncode, "hedgerow" in found.stderr) == (0, False), found.stderr


# --- what the image is made of -------------------------------------------------------------------


@pytest.mark.slow
def test_the_image_can_be_made_and_has_hedgerow(tmp_path):
    """Its steps, one after another, below a folder in the place of the root."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    folder = where = built = tmp_path
    for name, rest in steps():
        if name == "FROM":
            stage = rest.partition(" AS ")[2] or "image"
            folder = where = tmp_path / stage
            folder.mkdir()
        elif name == "WORKDIR":
            where = folder / rest.strip("/")
            where.mkdir(parents=True)
        elif name == "RUN":
            command = re.sub(r"(?<![\w.])/(opt|state)\b", rf"{folder}/\1", rest)
            done = subprocess.run(
                ["sh", "-c", command], cwd=where, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
        elif name == "COPY" and rest.startswith("--from="):
            # An environment's scripts have its own path in them: it is looked at where it is made.
            stage, source, target = rest.removeprefix("--from=").split()
            assert source == target
            built = tmp_path / stage / source.strip("/")
        elif name == "COPY":
            *sources, target = rest.split()
            place = folder / target.strip("/") if target.startswith("/") else where / target
            for source in sources:
                found = ROOT / source
                to = place / found.name if target == "./" else place
                if found.is_dir():
                    skipped = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(found, to, ignore=skipped)
                else:
                    shutil.copy(found, to)
    version = subprocess.run([built / "bin/hedgerow", "--version"], capture_output=True, text=True)
    assert version.stdout.strip() == hedgerow.__version__, version.stderr
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for name in ("torch", "flwr", "transformers"):
        code = f"from importlib.metadata import version; print(version({name!r}))"
        there = subprocess.run([built / "bin/python", "-c", code], capture_output=True, text=True)
        assert there.stdout.partition("+")[0].strip() == pinned[name]
    health = [built / "bin/python", built / "health.py", f"127.0.0.1:{free_port()}"]
    asked = subprocess.run(health, capture_output=True, text=True, env=environment)
    assert (asked.returncode, "UNAVAILABLE" in asked.stderr) == (1, True), asked.stderr


# --- the composition, process by process ---------------------------------------------------------


class Engine:
    """What `docker compose` does with compose.yaml, on this machine and without containers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.ports = {name: free_port() for name in OURS}
        self.own = {name: free_port() for name in SITES}
        self.started: list[subprocess.Popen[bytes]] = []

    def root(self, name: str) -> Path:
        """A folder that stands for a container's root, with what is mounted."""
        root = self.folder / "containers" / name
        for volume in SERVICES[name]["volumes"]:
            if volume["type"] == "bind":
                place = root / volume["target"].strip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                source = re.sub(r"\$\{\w+:-(.*)\}", r"\1", volume["source"])
                assert (self.folder / "deploy" / source).exists(), source
                if not place.is_symlink():
                    place.symlink_to((self.folder / "deploy" / source).resolve())
        return root

    def here(self, name: str, text: str) -> str:
        """A text of a container, with the paths and ports of this machine."""
        text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)
        text = text.replace("coordinator:8443", f"127.0.0.1:{self.port}")
        text = re.sub(r"\b8000\b", str(self.port), text)
        text = re.sub(r"\b9090\b", str(self.ports[name]), text)
        places = "federation|state|data|model|experiment"
        return re.sub(rf"(?<![\w./])/({places})\b", rf"{self.root(name)}/\1", text)

    def environment(self, name: str) -> dict[str, str]:
        own = {"FLWR_HOME": "/state/flwr", "FLWR_TELEMETRY_ENABLED": "0"}
        path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        return os.environ | path | {key: self.here(name, value) for key, value in own.items()}

    def run(self, *arguments: str) -> str:
        """`docker compose …`; returns what it prints."""
        if arguments[0] == "build":
            return ""
        if arguments == ("up", "--detach"):
            return self.up()
        exec_, name, *command = arguments
        assert exec_ == "exec"
        done = subprocess.run(
            [self.here(name, each) for each in command],
            cwd=self.root(name) / "state",
            env=self.environment(name),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, " ".join(command) + done.stdout + done.stderr
        return done.stdout

    def up(self) -> str:
        settings = self.folder / "deploy/coordinator/flwr/config.toml"
        settings.write_text(self.here("coordinator", settings.read_text()))
        for name in OURS:
            command = [self.here(name, each) for each in OURS[name]["command"]]
            if name in SITES:
                command.append(f"--port={self.own[name]}")
            script = f"while true; do {shlex.join(command)}; sleep 1; done"  # restart
            with (self.folder / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    ["bash", "-c", script],
                    cwd=self.root(name) / "state",
                    env=self.environment(name),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.started.append(process)
        wait_for(lambda: self.is_well("coordinator"), "the coordinator's health", every=1)
        return ""

    def is_well(self, name: str) -> bool:
        """Whether the image's health check would say so."""
        health = [sys.executable, DEPLOY / "health.py", f"127.0.0.1:{self.ports[name]}"]
        return subprocess.run(health, capture_output=True).returncode == 0

    def close(self) -> None:
        for process in self.started:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def shell_blocks(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")),
    reason="openssl or ssh-keygen is not here",
)
def test_the_composition_runs_as_its_readme_says(tmp_path):
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("*.key*", ".env"))
    (tmp_path / "src").symlink_to(ROOT / "src")
    demo.prepare(tmp_path / "demo-run")
    bash(certificates_and_keys(), tmp_path)
    first, after, *_ = shell_blocks(README)
    before, engine_s = first.split("cd deploy\n")
    bash(before, tmp_path)
    engine = Engine(tmp_path)
    try:
        for line in engine_s.replace("\\\n", " ").splitlines():
            engine.run(*compose(line))
        wait_for(lambda: "finished" in status(engine)["status"], "the end of the run", every=3)
        log = engine.run("exec", "coordinator", "flwr", "log", status(engine)["run-id"], "here")
        assert status(engine)["status"] == "finished:completed", log
        assert all(map(engine.is_well, OURS))
        printed = [engine.run(*compose(line)) for line in after.splitlines()]
    finally:
        engine.close()
    heads = [re.findall(r"head (\w{64})", each)[-1] for each in printed[1:]]
    assert heads[0] == heads[1]


def certificates_and_keys() -> str:
    """Sections 2 and 4 of the walk-through, for a coordinator with a name."""
    found = shell_blocks(WALK)
    (make,) = (each for each in found if each.startswith("COORDINATOR="))
    (keys,) = (each for each in found if each.startswith("ssh-keygen"))
    return re.sub(r"^NAME=\S+", "NAME=DNS:coordinator", make, flags=re.M) + keys


def compose(line: str) -> list[str]:
    docker, command, *arguments = shlex.split(line)
    assert (docker, command) == ("docker", "compose")
    return arguments


def bash(commands: str, folder: Path) -> None:
    done = subprocess.run(["bash", "-ec", commands], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def status(engine: Engine) -> dict[str, str]:
    """What Flower says of the run."""
    listed = engine.run("exec", "coordinator", "flwr", "list", "here", "--format", "json")
    return json.loads(listed)["runs"][0]
