"""The whole experiment on Flower's simulation runtime: one machine, or a Ray cluster.

Every client is a virtual SuperNode; Ray's actors train for them, each with one model in memory.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from hedgerow import tracking
from hedgerow.engines.flower.app import App, check_method
from hedgerow.engines.flower.messages import Action, Parcel, Request, pack
from hedgerow.engines.flower.server import serve
from hedgerow.engines.flower.site import Site
from hedgerow.errors import UserError
from hedgerow.experiment import Experiment
from hedgerow.federation.fleet import Watcher
from hedgerow.files import passing_folder
from hedgerow.runs.directory import RunDirectory
from hedgerow.runs.preparation import Prepared, prepare, with_date_of

_sites: dict[Path, Site] = {}
"""What this actor's process has in memory, by the folder of the simulation."""


def run(
    experiment: Experiment,
    out: Path,
    watcher: Watcher,
    *,
    resume: bool = False,
) -> None:
    """Run an experiment on Flower's simulation runtime; the arguments are the local engine's.

    With RAY_ADDRESS in the environment it runs on that cluster, whose machines must all see the
    experiment's files and `out`.

    Raises:
        UserError: something in the experiment or in `out` is wrong; nothing has been written.
        RunFailed: the run cannot go on; what it wrote so far is valid.
    """
    check_method(experiment)
    tracking.check(experiment.tracking)
    if "RAY_ADDRESS" in os.environ and _is_masked(experiment):
        raise UserError(
            "federation.secure: a client's keys are in one process, and a cluster has several: "
            "leave RAY_ADDRESS out, or set federation.secure={masks: false}"
        )
    if resume:
        RunDirectory.check_resumable(out, experiment)  # before everything is loaded
        experiment = with_date_of(experiment, out)
    else:
        RunDirectory.check_free(out)
    prepared = prepare(experiment)
    experiment = prepared.experiment
    for note in prepared.notes:
        watcher.say(note)
    names = [client.name for client in prepared.clients]
    app = App(
        experiment=experiment,
        base=prepared.base,
        trained=prepared.trained,
        clients=prepared.names,
    )
    logging.getLogger("flwr").setLevel(logging.ERROR)
    temporary = Path(tempfile.gettempdir())
    with passing_folder(temporary, "hedgerow-sites-", mode=0o700) as folder:
        server, client = ServerApp(), ClientApp()

        def main(grid: Grid, context: Context) -> None:
            data = prepared.digests()
            serve(grid, app, out, watcher, prepared.model, prepared.test, data, awaited=names)

        server.main()(main)

        def handle(message: Message, context: Context) -> Message:
            index = int(context.node_config["partition-id"])
            return _handle(app, folder, out.absolute(), names[index], message)

        for action in Action:
            action.register(client, handle)
        run_simulation(server, client, len(names), backend_config=_resources(prepared))


def _handle(app: App, folder: Path, out: Path, name: str, message: Message) -> Message:
    """In an actor: what a site does with a message."""
    if folder not in _sites:
        # Every actor has a copy of the ledger, as every site has.
        own = folder / f"{socket.gethostname()}-{os.getpid()}"
        _sites[folder] = Site(app, own, memory=out / "clients")
    site = _sites[folder]
    parcel = Parcel(message.content, Request)
    with tempfile.TemporaryDirectory(prefix="hedgerow-inbox-") as inbox:
        reply, update = site.handle(name, parcel.words, parcel.save_all(Path(inbox)))
    return Message(pack(reply, [] if update is None else [update]), reply_to=message)


def _is_masked(experiment: Experiment) -> bool:
    secure = experiment.federation.secure
    return secure is not None and secure.masks


def _resources(prepared: Prepared) -> BackendConfig:
    """How many actors there are: as many as have a core each, and memory for a model each.

    One alone where sums are masked: a client's keys are in the process that made them, and Flower
    hands each message of a client to whichever actor is free.
    """
    cores = os.cpu_count() or 1
    weights = sum(p.nbytes for p in prepared.model.network.parameters())
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Weights, gradients and a snapshot or the optimiser's moments.
    actors = max(1, min(cores, len(prepared.clients), memory // (4 * weights)))
    if _is_masked(prepared.experiment):
        actors = 1
    gpus = 1.0 if prepared.model.device.type == "cuda" else 0.0
    init = {"log_to_driver": False, "logging_level": "error"}
    if "RAY_ADDRESS" not in os.environ:
        init |= {"num_cpus": cores, "num_gpus": torch.cuda.device_count() if gpus else 0}
    return {"init_args": init, "client_resources": {"num_cpus": cores // actors, "num_gpus": gpus}}
