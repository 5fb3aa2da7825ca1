"""A training script as a site of a federation: `federate` its transformers Trainer.

    from hedgerow.client import federate

    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows)
    run = federate(trainer, superlink="fleet.example:8443", name="north")

The federation says what is trained and how updates are added up (`method`), how many steps or
epochs a round has, and their learning rate; the script, all else: batches, optimiser, precision,
packing, the loss. Several GPUs go through accelerate's launcher: `accelerate launch script.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hedgerow.api.base import BaseInMemory
from hedgerow.api.draft import PathLike, memory_model
from hedgerow.api.running import open_run
from hedgerow.client.processes import Processes
from hedgerow.client.trainer import ScriptTrainer, check_script
from hedgerow.errors import UserError
from hedgerow.files import expanded
from hedgerow.names import MEMORY, NAME
from hedgerow.optional import check_installed
from hedgerow.settings import ModelSettings

if TYPE_CHECKING:
    from hedgerow.api.runs import Run

__all__ = ["federate"]


def federate(
    trainer: Any,
    *,
    superlink: str,
    name: str,
    root_certificates: PathLike | None = None,
    private_key: PathLike | None = None,
    insecure: bool = False,
    num_examples: int | None = None,
    folder: PathLike | None = None,
) -> Run:
    """Train as a client of a federation, by a trainer of one's own, until the run is over.

    It starts a SuperNode of Flower's and is what that hands its messages to. It waits for a run to
    begin, for as long as it takes, and is over when the run's last entry has come. The model's
    weights, gradients and modes are given back as they were; what the federation has made of it is
    in the run that is returned.

    Args:
        trainer: transformers' Trainer or one of its kind, as TRL's SFTTrainer; its model is the
            federation's base, without an adapter, since the federation's method attaches one.
        superlink: address of the federation's SuperLink, as "fleet.example:8443".
        name: the client's name in the experiment.
        root_certificates: file of the certificate authority that the SuperLink's is from; None
            is the system's.
        private_key: file of the key that the SuperLink knows this site by; None where it asks for
            none.
        insecure: whether to connect without TLS, as on one machine.
        num_examples: number of examples, by which the client's update is weighed; None is the
            length of the trainer's `train_dataset`, which counts packed rows where those are
            packed.
        folder: for what stays between rounds; None is ~/.hedgerow/NAME.

    Returns:
        The site's run: `model()`, `export_adapter` and `export_merged` have what was made.

    Raises:
        UserError: something is wrong with the trainer or with what is given beside it, or the
            federation asks for what it cannot do.
        RunFailed: the SuperNode, or one of several processes, ended before the run was over.
        KeyboardInterrupt: it was interrupted; called again, it goes on.
    """
    check_installed("a client of a federation", "flwr")
    from hedgerow.engines.flower import script
    from hedgerow.engines.flower.node import place_of
    from hedgerow.engines.flower.site import Script

    if not NAME.fullmatch(name):
        raise UserError(f"name={name!r}: give letters, digits, `.`, `_` and `-`")
    if insecure and root_certificates is not None:
        raise UserError("insecure: root_certificates are for TLS: leave one of them out")
    count = check_script(trainer, num_examples)
    network, tokenizer = trainer.model, trainer.processing_class
    memory_model(network, tokenizer)
    options = ["--superlink", superlink]
    if insecure:
        options.append("--insecure")
    for key, option, file in (
        ("root_certificates", "--root-certificates", root_certificates),
        ("private_key", "--auth-supernode-private-key", private_key),
    ):
        if file is None:
            continue
        path = Path(expanded(str(file))).absolute()
        if not path.is_file():
            raise UserError(f"{key}: {path} is no file")
        options += [option, str(path)]
    place = place_of({"name": name, "folder": folder and expanded(str(folder))})
    if set(str(place)) & set('"\\\n'):
        raise UserError(f"folder: {place} has a quote or a backslash, which Flower cannot be given")
    own = ScriptTrainer.of(trainer)
    settings = ModelSettings(path=MEMORY)
    processes = Processes(trainer.accelerator, name, place)
    with BaseInMemory(network, tokenizer).lent() as lender, processes:
        site = Script(
            trainer=own,
            num_examples=count,
            base=lambda: lender.lend(settings),
            before=processes.join_in if processes.is_main else None,
        )
        if processes.is_main:
            run = script.serve(name, place, script.host(name, place, site), options)
            processes.end(run)
        else:
            run = processes.follow(site)
    return open_run(run, model=network, tokenizer=tokenizer)
