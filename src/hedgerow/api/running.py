"""`hr.run` and `hr.open_run`: from an experiment to a run that can be looked into."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hedgerow.api.draft import Draft, PathLike, SectionLike, draft, memory_model
from hedgerow.errors import UserError
from hedgerow.experiment import Experiment
from hedgerow.names import MEMORY
from hedgerow.optional import check_installed
from hedgerow.workers import Workers

if TYPE_CHECKING:
    from hedgerow.api.runs import Run
    from hedgerow.federation.fleet import Watcher
    from hedgerow.methods import Method
    from hedgerow.model import Model

Engine = Literal["local", "flower"]


def run(
    experiment: PathLike | Experiment | Mapping[str, Any] | None = None,
    *overrides: str,
    out: PathLike,
    resume: bool = False,
    engine: Engine = "local",
    workers: int | str = 1,
    smoke: bool = False,
    progress: bool | None = None,
    model: Any = None,
    tokenizer: Any = None,
    clients: Any = None,
    test: Any = None,
    method: str | Mapping[str, Any] | Method | None = None,
    data: SectionLike | None = None,
    training: SectionLike | None = None,
    federation: SectionLike | None = None,
    privacy: SectionLike | None = None,
    audit: SectionLike | None = None,
    evaluation: SectionLike | None = None,
    tracking: SectionLike | None = None,
    rounds: int | None = None,
) -> Run:
    """Run an experiment: from a file, from what is handed over here, or from both.

    Args:
        experiment: an experiment file, an `Experiment`, or a mapping of sections. What is handed
            over beside it counts before what it says.
        overrides: `key.path=value`, as on the command line; they count before all else.
        out: directory of the run, which must not be there yet.
        resume: go on with the run in `out`, if one was begun. A run from memory goes on with the
            same objects: data and base model are compared by their digests.
        engine: where clients train: `local`, in this process, or `flower`, Flower's simulation
            runtime, which takes files only.
        workers: number of clients that train side by side, each in one thread of a process of its
            own that shares this one's memory; `auto`: as many as there are free processors. The
            same run in one thread has the same bytes, and so it is to be resumed with it, or in
            one thread. On Linux, of models on the CPU.
        smoke: of a file: the variant of itself that takes seconds.
        progress: whether to show what happens. None, the default, shows it in a terminal and in a
            notebook.
        model: folder, name on the Hub, mapping of the section's keys, or a transformers model,
            which is given back as it was.
        tokenizer: tokenizer of a model in memory.
        clients: pattern of files (`train_{}.json`), or a mapping from each client's name to a file
            or rows: a `datasets.Dataset`, a `pandas.DataFrame` or a list of dictionaries. One
            source for all is `data={"source": rows, "partition": {"kind": "iid", "clients": 8}}`.
        test: file or rows to evaluate on.
        method: name, mapping with a name and options, or a method such as
            `hr.methods.FLoRA(ranks=[8, 4])`.
        data: further keys of the section `data`.
        training: keys of the section `training`, as `{"steps": 5}`.
        federation: keys of the section `federation`.
        privacy: keys of the section `privacy`, as `{"level": "client", "clip": 0.5, …}`; by
            default nothing is promised.
        audit: keys of the section `audit`, as `{"client": "north"}`, which plants canaries in a
            client's data; by default there are none.
        evaluation: keys of the section `evaluation`.
        tracking: keys of the section `tracking`.
        rounds: number of rounds, `federation.rounds`.

    Returns:
        The run, complete.

    Raises:
        UserError: something is wrong with what was handed over; nothing has been written.
        RunFailed: the run could not go on; what it wrote is valid.
        KeyboardInterrupt: it was interrupted; called again with `resume=True`, it goes on.

    Example:
        >>> run = hr.run("experiment.yaml", "training.steps=5", out="runs/a")  # doctest: +SKIP
        >>> run.metrics["eval_loss"].iloc[-1]  # doctest: +SKIP
    """
    sections = {
        "data": data,
        "training": training,
        "federation": federation,
        "privacy": privacy,
        "audit": audit,
        "evaluation": evaluation,
        "tracking": tracking,
    }
    drafted = draft(
        experiment,
        where="hr.run",
        smoke=smoke,
        model=model,
        tokenizer=tokenizer,
        clients=clients,
        test=test,
        method=method,
        sections=sections,
        rounds=rounds,
    )
    loaded = drafted.load(overrides)
    drafted.check_model(loaded)
    try:
        _train(
            drafted,
            loaded,
            Path(out),
            resume=resume,
            engine=engine,
            progress=progress,
            workers=workers,
        )
    except KeyboardInterrupt as stop:
        stop.add_note(f"what is written in {out} is valid: resume=True goes on with it")
        raise
    return _opened(Path(out), drafted)


def open_run(
    path: PathLike, *overrides: str, model: Any = None, tokenizer: Any = None, test: Any = None
) -> Run:
    """Open a run, finished or interrupted, from its directory or its packed ledger.

    Args:
        path: the directory, or the file.
        overrides: `key.path=value`, on top of the run's experiment, as `model.path=FOLDER`.
        model: transformers model that the run began from, where that was in memory; or a folder
            that holds it.
        tokenizer: tokenizer of a model in memory.
        test: rows to evaluate on, where those were in memory.

    Raises:
        UserError: there is no run.
    """
    from hedgerow.api.base import BaseInMemory
    from hedgerow.api.runs import Run
    from hedgerow.data.in_memory import as_records

    if isinstance(model, str | os.PathLike):
        overrides, model = (*overrides, f"model.path={json.dumps(os.fspath(model))}"), None
    if model is not None:
        memory_model(model, tokenizer)
    elif tokenizer is not None:
        raise UserError("hr.open_run: tokenizer= belongs to a model in memory: give model= as well")
    base = None if model is None else BaseInMemory(model, tokenizer)
    rows = None if test is None else as_records(test, "the test data")
    return Run(Path(path), overrides=overrides, base=base, test=rows)


def _opened(out: Path, drafted: Draft) -> Run:
    from hedgerow.api.base import BaseInMemory
    from hedgerow.api.runs import Run

    network = drafted.network
    base = None if network is None else BaseInMemory(network, drafted.tokenizer)
    return Run(out, base=base, test=drafted.held.test)


def _train(
    drafted: Draft,
    experiment: Experiment,
    out: Path,
    *,
    resume: bool,
    engine: Engine,
    progress: bool | None,
    workers: int | str,
) -> None:
    side_by_side = Workers.of(workers)
    with watcher(progress, metrics=experiment.evaluation.metrics) as watching:
        if engine == "flower":
            _check_files_only(experiment)
            if workers not in (1, "1"):
                raise UserError(
                    "workers: Flower's simulation has clients train side by side of its own: leave "
                    "it out, or take engine=local"
                )
            check_installed("the engine flower", "flwr")
            from hedgerow.engines.flower import simulation

            simulation.run(experiment, out, watching, resume=resume)
        elif engine == "local":
            from hedgerow.api.base import BaseInMemory
            from hedgerow.engines import local

            def train(model: Model | None) -> None:
                local.run(
                    experiment,
                    out,
                    watching,
                    resume=resume,
                    model=model,
                    held=drafted.held,
                    workers=side_by_side,
                )

            if drafted.network is None:
                train(None)
                return
            with BaseInMemory(drafted.network, drafted.tokenizer).lent() as lender:
                train(lender.lend(experiment.model))
        else:
            raise UserError(f"engine={engine!r}: give local or flower")


def watcher(
    progress: bool | None, title: str = "round", metrics: Sequence[str] = ()
) -> AbstractContextManager[Watcher]:
    """Whoever shows a run's progress: bars and lines, or nobody.

    Args:
        progress: None shows it in a terminal and in a notebook.
        title: what a round is called.
        metrics: names of the metrics whose scores are shown after each round.
    """
    from hedgerow import console
    from hedgerow.federation.fleet import Unwatched

    if console.is_watched() if progress is None else progress:
        return console.ProgressWatcher(title, metrics=list(metrics))
    return nullcontext(Unwatched())


def _check_files_only(experiment: Experiment) -> None:
    clients = experiment.data.clients
    files = list(clients.values()) if isinstance(clients, dict) else []
    if MEMORY in (experiment.model.path, experiment.data.source, experiment.data.test, *files):
        raise UserError(
            "engine='flower': clients are other processes, which do not see models and data in "
            "this one's memory: give folders and files, or engine='local'"
        )
