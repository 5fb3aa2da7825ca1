"""A tiny random Llama, three clients' files, and the command line as a function."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
from support.experiments import SHARED, write_experiment

# Tiny models only lose by threads, which spin while they wait; and sums of two threads have other
# bits than sums of one. Libraries read this once, when they are imported, and the processes that
# tests start inherit it.
for _library in ("OMP", "MKL", "OPENBLAS", "NUMBA", "RAYON"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Ray has its workers wait for whatever else wants a core: beside two busy processes for ever.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """None beside this one where each file or test is named; or else what xdist makes of it."""
    named = ("::" in argument or Path(argument).is_file() for argument in config.args)
    return 0 if all(named) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs ../shared where it is not there."""
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="../shared is not here"))


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Nobody pulls the plug: what was written is there for whoever reads it next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and a real model beside the repository."""
    return SHARED


class Output(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def hedgerow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Output]:
    """Run a command line in this process."""
    # In here as below, since the process that only hands out tests needs no torch.
    from hedgerow import cli

    monkeypatch.setattr(cli, "look_seldom", lambda: None)  # this process goes on with other tests

    def run(*arguments: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["hedgerow", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])  # to which the working directory is added
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Output(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers that reads bytes."""
    from support.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def chatty(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """A folder with the tiny model, whose tokenizer has this chat template, and these tokens."""
    from support.models import byte_tokenizer

    def make(template: str, *tokens: str) -> Path:
        folder = tmp_path / "chatty"
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def days(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let one of two days begin, 0 or 1: in zones between which it is always another."""

    def begin(day: int) -> None:
        monkeypatch.setenv("TZ", ["Etc/GMT+12", "Etc/GMT-14"][day])
        time.tzset()

    yield begin
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def experiment(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Write an experiment file on three clients of different sizes; keywords change sections."""
    return functools.partial(write_experiment, tmp_path, tiny_model)
