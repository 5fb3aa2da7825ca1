"""Trackers that people have already (TensorBoard, W&B, MLflow, trackio), told each round's numbers.

All of them are spoken to through accelerate's classes. The run comes first: whatever a tracker
does wrong is said once, and the run goes on without it; metrics.jsonl has every row, so that a
resumed run tells each tracker what it has missed. Nothing needs a network. TensorBoard's and W&B's
files are in the run's directory; MLflow's database and trackio's hold many runs, so they lie beside
it, where its neighbours find them. The trackers' own environment variables may name other places.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import (
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
    get_available_trackers,
)
from accelerate.utils import patch_environment
from pydantic import BaseModel, ConfigDict, TypeAdapter

from hedgerow.errors import UserError, readable
from hedgerow.experiment import Experiment, without_folders
from hedgerow.federation.fleet import Watcher
from hedgerow.files import replacing
from hedgerow.optional import not_installed
from hedgerow.runs.changes import flat
from hedgerow.runs.directory import RunDirectory
from hedgerow.settings import TrackingSettings

FILE = "tracking.json"
"""The file of a run directory that says how far each tracker has been told of it."""

_LONGEST = 500
"""Of a setting, in characters: what every MLflow server takes."""


def check(settings: TrackingSettings) -> None:
    """Raise a `UserError` where a tracker's package is not installed."""
    available = {str(name) for name in get_available_trackers()}
    for name in settings.to:
        if name not in available:
            raise not_installed("tracking.to", name)


@contextmanager
def tracked(experiment: Experiment, directory: RunDirectory, watcher: Watcher) -> Iterator[Watcher]:
    """Whoever is to watch a run so that its trackers are told too.

    Args:
        watcher: is told everything, and what a tracker does wrong.

    Raises:
        UserError: what the run's directory says of its trackers is damaged.
    """
    if not experiment.tracking.to:
        yield watcher
        return
    folder = directory.path.absolute()
    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # mlflow's own keep a run waiting for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_TRACKING_URI": _mlflow_store(folder),
        "TRACKIO_DIR": str(folder.parent / "trackio"),
        "WANDB_FINISH_TIMEOUT": "60",  # wandb's own waits until the network is there
        "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.1",  # wandb loses 15 s when it is killed
    }
    unset = {name: value for name, value in defaults.items() if name not in os.environ}
    with patch_environment(**unset):
        trackers = Trackers(experiment, directory, watcher)
        try:
            trackers.start()
            yield trackers
        except BaseException:
            trackers.finish(failed=True)
            raise
        trackers.finish(failed=False)


class Mark(BaseModel):
    """How far a tracker has been told of a run, and what it calls the run."""

    model_config = ConfigDict(extra="forbid")

    project: str
    name: str
    id: str = ""
    round: int = -1


_Marks = TypeAdapter(dict[str, Mark])
_Say = Callable[[str], None]
_TOLD_ONCE = {"mlflow", "tensorboard"}
"""Take an experiment's settings as a step of its own, and never again; the others at each start."""
_LOG_OPTIONS = {"wandb": {"commit": True}}
"""Without this W&B keeps a round back until the next is told."""


class Trackers:
    """A watcher that tells trackers each row, and another watcher everything."""

    def __init__(self, experiment: Experiment, directory: RunDirectory, watcher: Watcher) -> None:
        self._watcher = watcher
        self._file = directory.path / FILE
        self._marks = self._read()
        self._trackers: dict[str, Any] = {}
        self._totals = {"bytes_up": 0, "bytes_down": 0}
        self._experiment, self._directory = experiment, directory

    def start(self) -> None:
        """Open a run in each tracker, or go on with it, and tell what it has missed."""
        settings, folder = self._experiment.tracking, self._directory.path.absolute()
        for name in settings.to:
            mark = self._marks.get(name)
            if mark is None or mark.project != settings.project:
                mark = Mark(project=settings.project, name=folder.name)
            mark.name = settings.name or mark.name
            mark.round = min(mark.round, len(self._directory.ledger))  # where it was rolled back
            self._attempt(name, self._start, name, mark, folder)
        self._write()
        for row in self._directory.rows():
            self._tell(row)

    def say(self, sentence: str) -> None:
        """Hand it on."""
        self._watcher.say(sentence)

    def round_begins(self, round: int, rounds: int, clients: int) -> None:
        """Hand it on."""
        self._watcher.round_begins(round, rounds, clients)

    def client_finished(self, client: str, failure: str | None) -> None:
        """Hand it on."""
        self._watcher.client_finished(client, failure)

    def tries_again(self, clients: Sequence[str], seconds: float) -> None:
        """Hand it on."""
        self._watcher.tries_again(clients, seconds)

    def evaluated(self, done: int, total: int) -> None:
        """Hand it on."""
        self._watcher.evaluated(done, total)

    def round_ends(self, row: dict[str, Any]) -> None:
        """Hand it on, and tell the trackers."""
        self._watcher.round_ends(row)
        self._tell(row)

    def finish(self, *, failed: bool) -> None:
        """The run has come to its end, or has broken off."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, _finish, name, tracker, failed)

    def _start(self, name: str, mark: Mark, folder: Path) -> None:
        PartialState()  # accelerate's loggers insist on it
        config = hyper_parameters(self._experiment)
        tracker = _STARTS[name](mark, config, folder, self._watcher.say)
        self._trackers[name], self._marks[name] = tracker, mark
        if mark.round < 0 and name in _TOLD_ONCE:
            tracker.store_init_configuration(config)

    def _tell(self, row: Mapping[str, Any]) -> None:
        """Tell the trackers a row that they do not have yet."""
        values = numbers(row)
        for key in self._totals:
            self._totals[key] += row[key]
            values[f"{key}_total"] = self._totals[key]
        round, told = row["round"], False
        for name, tracker in list(self._trackers.items()):
            mark = self._marks[name]
            log = partial(tracker.log, values, round, **_LOG_OPTIONS.get(name, {}))
            if round > mark.round and self._attempt(name, log):
                mark.round, told = round, True
        if told:
            self._write()

    def _attempt(self, name: str, action: Callable[..., None], *arguments: Any) -> bool:
        """Whether a tracker did what it was asked to; if not, it is let go."""
        try:
            action(*arguments)
        except Exception as error:  # whatever such a library may raise
            reason = readable(str(error).strip().partition("\n")[0]) or type(error).__name__
            self._watcher.say(f"{name} failed, and the run goes on without it: {reason}")
            if tracker := self._trackers.pop(name, None):
                # One that is left open would be in the way of the next run's.
                with suppress(Exception):
                    _finish(name, tracker, failed=True)
            return False
        return True

    def _read(self) -> dict[str, Mark]:
        try:
            return _Marks.validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            raise UserError(
                f"{self._file} is damaged: restore it from a copy, or remove it, and the run "
                "begins anew in its trackers"
            ) from None

    def _write(self) -> None:
        with replacing(self._file) as file:
            file.write(_Marks.dump_json(self._marks, indent=1))


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a row of metrics, and in its scores by category as `eval_loss_by/history`.

    What is not finite is null in metrics.jsonl, and left out here.
    """
    found: dict[str, float] = {}
    for key, value in row.items():
        parts = {key: value}
        if isinstance(value, dict):
            parts = {f"{key}/{_plain(category)}": score for category, score in value.items()}
        found |= {name: number for name, number in parts.items() if _is_number(number)}
    del found["round"]
    return found


def _plain(category: str) -> str:
    """A category in characters that all trackers take as a part of a name."""
    return re.sub(r"[^\w-]+", "_", category) or "_"


def hyper_parameters(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values, by `training/steps` and the like; without what is not set."""
    content = without_folders(experiment).model_dump(mode="json", exclude={"tracking"})
    values = {"/".join(key): value for key, value in flat(content).items() if value is not None}
    return {
        key: value if _is_number(value) or isinstance(value, bool) else _short(value)
        for key, value in values.items()
    }


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tensorboard(mark: Mark, config: dict[str, Any], folder: Path, say: _Say) -> Any:
    # What a killed run has written of later rounds than it has noted is not shown.
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=mark.round + 1)
    tracker.start()
    return tracker


def _wandb(mark: Mark, config: dict[str, Any], folder: Path, say: _Say) -> Any:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "online" and not _reaches_wandb():
        mode = "offline"
        say(
            "wandb: there is no login, or no way there: the run is kept locally, for `wandb sync` "
            f"(in {os.environ.get('WANDB_DIR', folder)}/wandb)"
        )
    mark.id = mark.id or secrets.token_hex(8)
    tracker = WandBTracker(
        mark.project,
        name=mark.name,
        id=mark.id,
        config=config,
        allow_val_change=True,
        resume="allow",
        reinit="finish_previous",
        mode=mode,
        dir=os.environ.get("WANDB_DIR", folder),
    )
    tracker.start()
    if tracker.run.url:
        say(f"wandb: {tracker.run.url}")
    return tracker


def _reaches_wandb() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except Exception:  # whatever is in the way, the run can be kept locally
        return False


def _mlflow(mark: Mark, config: dict[str, Any], folder: Path, say: _Say) -> Any:
    is_local = os.environ["MLFLOW_TRACKING_URI"] == _mlflow_store(folder)
    tracker = MLflowTracker(
        mark.project,
        # Of what the user may add to the experiment; mlflow's own is in the working directory.
        logging_dir=str(folder.parent / "mlruns") if is_local else None,
        run_id=mark.id or None,
        run_name=mark.name,
    )
    tracker.start()
    mark.id = tracker.active_run.info.run_id
    return tracker


def _mlflow_store(folder: Path) -> str:
    return f"sqlite:///{folder.parent / 'mlflow.db'}"


def _trackio(mark: Mark, config: dict[str, Any], folder: Path, say: _Say) -> Any:
    resume = "allow" if mark.id else "never"
    tracker = TrackioTracker(mark.project, name=mark.name, config=config, resume=resume)
    with redirect_stdout(io.StringIO()):  # it prints whatever it does
        tracker.start()
    if tracker.run.id != mark.id:  # it knows runs by name, and has none of this one
        mark.id, mark.round = tracker.run.id, -1
    return tracker


_STARTS: dict[str, Callable[[Mark, dict[str, Any], Path, _Say], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _finish(name: str, tracker: Any, failed: bool) -> None:
    """Close a tracker's run; where it failed, accelerate's `finish` would say otherwise."""
    if failed and name == "wandb":
        tracker.run.finish(exit_code=1)
    elif failed and name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED")
    elif name == "trackio":
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()  # accelerate's leaves it to be finished once more at the process's end
    else:
        tracker.finish()
