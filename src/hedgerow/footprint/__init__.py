"""Memory of an experiment before it runs: what a client, a site and the server will hold, by part.

Of the base model only its config.json is read. A client's round is gone through with tensors that
have no values (`hollow`, `client`), and what a method does beside it, its parts declare
(`Method.update_holds`, `Method.aggregate_holds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hedgerow import quantized
from hedgerow.data.sources import client_files
from hedgerow.errors import UserError, reason_of
from hedgerow.footprint import client as clients
from hedgerow.footprint.hollow import Held
from hedgerow.loading import skeleton
from hedgerow.methods.base import Client, Expected, Holds, Method
from hedgerow.methods.lora import LoraOptions
from hedgerow.model import Model
from hedgerow.training.optimizers import optimizer_of

if TYPE_CHECKING:
    from hedgerow.experiment import Experiment

UPDATE, ENTRY = "update", "ledger entry"
AS_FILE = "update as a file"
OWED, CODING = "owed of earlier rounds", "update in the making"
SUMS, AGGREGATING = "sums of updates", "an update in the reading"
FLOWER = "Flower's message"

_COPIES = 2
"""Copies of a message that Flower's client or server app holds; see `bench/README.md`."""


@dataclass(frozen=True)
class Role:
    """What one participant holds at its peak."""

    stage: str
    """When that is."""
    parts: Mapping[str, int]
    """Bytes by part."""

    @property
    def peak(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Footprint:
    """Memory of an experiment by role, and what it writes and sends.

    Roles hold this beside the interpreter and its libraries. Where there is a GPU, `HOST` says
    which of the parts are in host memory nevertheless.
    """

    client: Role
    """A client's training, in a process of its own."""
    site: Role
    """A client behind Flower's SuperNode: the same, and the message that goes or comes."""
    server: Role
    """A server of Flower's, which has no model."""
    scoring: Role
    """Whoever scores the model on test rows."""
    update: int
    """Bytes that a client sends in a round."""
    entry: int
    """Bytes that everybody gets in a round, by which the ledger grows."""
    bytes_up: int
    """Bytes that the server gets in a round, of all its clients: `bytes_up` in metrics.jsonl, but
    for the files' headers."""
    bytes_down: int
    """Bytes that the clients of a round get of it together: `bytes_down` in metrics.jsonl, but for
    the files' headers. Entries that a client has missed, which it gets first, come on top."""
    kept: int
    """Bytes that a client keeps on disk for its next round."""
    clients: int
    """Number of clients of a round."""
    notes: Sequence[str] = ()
    """Sentences on what is not counted."""

    @property
    def roles(self) -> dict[str, Role]:
        """All roles, by their names."""
        return {name: getattr(self, name) for name in ("client", "site", "server", "scoring")}


HOST = frozenset({clients.SNAPSHOT, clients.KEPT, UPDATE, AS_FILE, OWED, FLOWER})
"""Parts that are in host memory also where a GPU trains."""


def footprint_of(experiment: Experiment) -> Footprint:
    """Work out what an experiment's participants will hold.

    Batches are taken to be the largest that there can be, `training.batch_size` texts of
    `data.max_length` tokens that are all learnt; so the figures are upper bounds for data whose
    texts are shorter.

    Raises:
        UserError: there is no such model, its config.json does not fit, or its architecture or the
            method looks at numbers that are not there before it runs.
    """
    method = experiment.method
    if experiment.privacy is not None and experiment.privacy.level == "example":
        raise UserError(
            "explain --memory does not know the memory of privacy.level example, whose gradients "
            "are made example by example: leave `privacy` out to see the rest"
        )
    if experiment.training.trainer is not None:
        raise UserError(
            "explain --memory does not know what another library's trainer holds: leave "
            "training.trainer out to see what hedgerow's own loop would"
        )
    # `auto` is not the CPU of this machine: where the experiment will run may be a GPU.
    at = "cpu" if experiment.model.device == "cpu" else "cuda"
    optimizer_of(experiment.training).check(torch.device(at))
    network = _network(experiment)
    asked, notes = _clients(experiment)
    try:
        model: Any = Model(network, None, experiment.model.path)
        with Held():
            method.check(model, len(asked), experiment.training)
            expected = experiment.expected(method.trained_shapes(model))
        beside = clients.hold_beside(network, expected.shapes, _rank_beside(experiment, asked))
        scoring = clients.scoring(experiment, network, beside)
        stages = clients.stages(experiment, network, asked[0], beside)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"explain --memory cannot work out {experiment.model.path} with {method.name} and "
            f"{experiment.training.optimizer}: one of them looks at numbers that are not there "
            f"before a run ({reason_of(error)})"
        ) from None
    update = method.update_holds(asked[0], expected)
    entry = method.aggregate_holds(asked, expected)
    sending = asked if method.communicates else []
    client = _client(stages, update)
    message = {FLOWER: _COPIES * max(update.message, entry.message)}
    server = Role(
        "aggregating",
        clients.positive({SUMS: entry.sums, AGGREGATING: entry.work, ENTRY: entry.message}),
    )
    return Footprint(
        client=client,
        site=Role(client.stage, {**client.parts, **message}),
        server=Role(server.stage, {**server.parts, **message}),
        scoring=Role("scoring", scoring),
        update=update.message,
        entry=entry.message,
        bytes_up=_sent(method, sending, expected),
        bytes_down=entry.message * len(sending),
        kept=stages.trained.get(clients.KEPT, 0) + update.sums,
        clients=len(asked),
        notes=[*notes, *_left_out(experiment)],
    )


def _sent(method: Method, asked: Sequence[Client], expected: Expected) -> int:
    """Bytes of all clients' updates, of which those of one rank are equally long."""
    alike: dict[int, list[Client]] = {}
    for client in asked:
        rank = method.rank(client) if isinstance(method, LoraOptions) else 0
        alike.setdefault(rank, []).append(client)
    return sum(
        len(those) * method.update_holds(those[0], expected).message for those in alike.values()
    )


def _client(stages: clients.Stages, update: Holds) -> Role:
    """The stage of a client's round in which it holds most."""
    making = {UPDATE: update.message, OWED: update.sums, CODING: update.work}
    sending = {UPDATE: update.message, AS_FILE: update.message}
    roles = [
        Role("training", stages.training),
        Role("making its update", clients.positive({**stages.trained, **making})),
        Role("sending its update", clients.positive({**stages.released, **sending})),
    ]
    return max(roles, key=lambda role: role.peak)


def _network(experiment: Experiment) -> Any:
    """The base without values, as a client has it: what it takes follows from its tensors.

    Whatever else a client's network has, as layers that make their activations again, belongs here:
    all parts are counted by going through its round.
    """
    settings = experiment.model
    network = skeleton(settings).to(getattr(torch, settings.dtype))
    if settings.quantization is not None:
        quantized.quantize_hollow(network, settings.quantization, settings.dtype)
    return network


def _rank_beside(experiment: Experiment, asked: Sequence[Client]) -> int:
    """Largest rank, at the end of the run, of what is kept beside a quantized weight."""
    method = experiment.method
    if not method.merges or not isinstance(method, LoraOptions):
        return 0
    # What a round merges is the sum of its clients' adapters, less the one that they go on from.
    summed = sum(method.rank(client) for client in asked) + method.largest_rank
    rank = experiment.federation.rounds * summed
    return min(rank, experiment.model.merged_rank or rank)


def _clients(experiment: Experiment) -> tuple[list[Client], list[str]]:
    """Clients of a round, those of the largest ranks first; and what had to be guessed."""
    data, method, federation = experiment.data, experiment.method, experiment.federation
    count, notes = None, []
    if data.clients is not None:
        count = len(client_files(data.clients))
    elif data.partition is not None:
        count = data.partition.clients
    ranks = method.ranks if isinstance(method, LoraOptions) else 1
    if count is None and not isinstance(ranks, int):
        count = len(ranks)
    if count is None:
        count = federation.clients_per_round or federation.min_clients
        notes.append(f"how many clients there are, the data will say: {count} are counted")
    if method.pools_data:
        count = 1
    num_examples = experiment.training.batch_size
    everybody = [Client(index, f"client-{index:03d}", num_examples) for index in range(count)]
    if not isinstance(ranks, int):
        everybody = everybody[: len(ranks)]
        everybody.sort(key=lambda client: -ranks[client.index])
    return everybody[: federation.clients_per_round or count], notes


def _left_out(experiment: Experiment) -> list[str]:
    """What the settings ask for and nothing here counts."""
    federation, found = experiment.federation, []
    if experiment.method.is_weighed:
        found.append("federation.weights: the tables that its rule compares updates by")
    if federation.secure is not None:
        found.append("federation.secure: codes and masks of updates")
    found.append(
        "what a GPU's kernels work in; there PyTorch's optimisers also step all tensors at once, "
        "and hold about one more copy of what trains"
    )
    return [f"not counted: {each}" for each in found]


__all__ = ["HOST", "Footprint", "Role", "footprint_of"]
