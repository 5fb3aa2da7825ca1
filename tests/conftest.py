"""A tiny random Llama, three clients' files, and the command line as a function."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.experiments import SHARED, write_experiment
from support.models import tiny_llama

from hedgerow import cli

# Tiny models only lose by threads, which spin while they wait; and sums of two threads have other
# bits than sums of one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs ../shared where it is not there."""
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="../shared is not here"))


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

    def run(*arguments: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["hedgerow", *map(str, arguments)])
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
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def experiment(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Write an experiment file on three clients of different sizes; keywords change sections."""
    return functools.partial(write_experiment, tmp_path, tiny_model)
