"""Memory of a server: how much of the updates it keeps while they arrive."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import torch

from hedgerow.collector import is_passing_over
from hedgerow.methods.base import Client, ServerRound, float32_bytes
from hedgerow.testing.case import Case
from hedgerow.testing.doubles import Forgetful
from hedgerow.wire import Update

FEW, MANY, MOST = 4, 16, 256
"""Numbers of updates that have arrived: at the first what is alive is counted, and at one from the
second to the third, which is more than together take less than what is trained."""


def check_memory(case: Case) -> None:
    """Have a server aggregate many clients' updates, and count the tensors that are alive.

    Raises:
        AssertionError: they grow with the number of updates, and neither does what is broadcast,
            nor do all updates together take less than their sum.
    """
    if case.method.pools_data:
        return  # there is one participant
    update = max(map(len, case.updates))
    # So many that keeping them until all have arrived takes more than their sum.
    many_clients = min(MOST, max(MANY, 2 * float32_bytes(case.shapes) // update))
    gc.collect()
    by_others = is_passing_over()
    gc.freeze()  # whatever else this process holds need not be looked at each time
    try:
        _, _, sent_few = _aggregate(case, FEW)
        few, many, sent_many = _aggregate(case, many_clients)
    finally:
        if not by_others:
            gc.unfreeze()
    # What is being folded in, and a sum that has begun, are not counted as kept.
    allowed = 3 * update + max(0, sent_many - sent_few)
    assert many - few <= allowed, (
        f"the server keeps updates: with {many_clients} of them there are {many - few:,} bytes of "
        f"tensors more than with {FEW}, where an update has {update:,}; fold each in as it arrives"
    )


def _aggregate(case: Case, count: int) -> tuple[int, int, int]:
    """Aggregate so many updates.

    Returns:
        The bytes that were alive after `FEW`, and after all, and those of what is broadcast.
    """
    clients = [
        replace(client, name=f"{client.name}-{number}")
        for number in range(count)
        for client in [case.clients[number % len(case.clients)]]
    ]
    alive: list[int] = []

    def arriving() -> Iterator[Update]:
        for index, client in enumerate(clients):
            if index == FEW:
                alive.append(_bytes_alive())
            yield _update(case, index, client)
        alive.append(_bytes_alive())

    server_round = ServerRound(case.round, clients, None, case.expected, Forgetful())
    aggregate = case.method.aggregate(arriving(), server_round)
    sent = sum(tensor.nbytes for tensor in aggregate.tensors.values())
    return alive[0], alive[-1], sent


def _update(case: Case, index: int, client: Client) -> Update:
    return replace(Update.from_bytes(case.updates[index % len(case.updates)]), client=client.name)


def _bytes_alive() -> int:
    """Bytes of all tensors that were made since `gc.freeze` and that anything refers to."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
