"""A method on a tiny model: real updates of a round, the entry made of them, and who gets them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.methods.base import (
    Client,
    ClientRound,
    Expected,
    Method,
    ServerRound,
    Trained,
    check_entry,
)
from hedgerow.methods.zeroth_order import ZerothOrderMethod
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.testing.doubles import Forgetful, no_past
from hedgerow.testing.files import overwrite
from hedgerow.wire import Entry, Participant, Update, header_limit, kinds

if TYPE_CHECKING:
    from torch import nn

    from hedgerow.model import Model

PARENT, SEEDS = "ab" * 32, Seeds(7)
SIZES = [5, 9, 14]
"""Numbers of examples of the three clients."""
TRAINING = TrainingSettings(steps=3)

Train = Callable[[Method, ClientRound, Mapping[str, "nn.Parameter"]], Trained]
"""Trains the parameters that a method's `start` has returned."""


def nudge(
    method: Method, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
) -> Trained:
    """Move the parameters at random, where nobody needs to have trained them."""
    generator = torch.Generator().manual_seed(client_round.client.index)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    steps: dict[int, float] = {}
    if isinstance(method, ZerothOrderMethod):
        directions = method.directions(client_round)
        steps = {seed: 0.01 * (step + 1) for step in range(3) for seed in directions(step)}
    return Trained(parameters, 1.5, steps)


class Case:
    """A method on the tiny model, with a real update of each client and the entry of them all."""

    def __init__(
        self, method: Method, model: Model, folder: Path, *, round: int = 2, train: Train = nudge
    ) -> None:
        """Have all clients train and the server aggregate.

        Args:
            method: any, whose options fit three clients.
            model: the base, which is as it was when this is done.
            folder: for files that arrive.
            round: of the updates and the entry; nobody has an earlier one.
            train: local training.

        Raises:
            AssertionError: a client does not give the model back as it was.
        """
        self.method, self.model, self.round = method, model, round
        self.path, self._train = folder / "file.safetensors", train
        self.weights = {n: p.detach().clone() for n, p in model.network.named_parameters()}
        self.clients = [Client(i, f"client-{i:03d}", n) for i, n in enumerate(SIZES)]
        if method.pools_data:
            self.clients = [Client(0, "pooled", sum(SIZES))]
        self.shapes = method.trained_shapes(model)
        # As the server has them, from ledger.json.
        self.expected = Expected(SEEDS, json.loads(json.dumps(self.shapes)), TRAINING)
        self.updates = [self._update(client) for client in self.clients]
        self.entry = self._entry(list(map(Update.from_bytes, self.updates)))

    def _update(self, client: Client) -> bytes:
        client_round = ClientRound(client, self.round, SEEDS, TRAINING, Forgetful(), no_past)
        trained = self._train(
            self.method, client_round, self.method.start(self.model, client_round)
        )
        payload = self.method.update(self.model, client_round, trained)
        update = Update(
            method=self.method.name,
            round=self.round,
            client=client.name,
            parent=PARENT,
            num_examples=client.num_examples,
            train_loss=trained.loss,
            tensors=payload.tensors,
            about=payload.about,
        )
        data = update.to_bytes()
        self.model.release()
        self._check_given_back(client)
        return data

    def _check_given_back(self, client: Client) -> None:
        now = dict(self.model.network.named_parameters())
        changed = sorted(
            name
            for name in now.keys() | self.weights.keys()
            if name not in now
            or name not in self.weights
            or not torch.equal(now[name], self.weights[name])
        )
        assert not changed, (
            f"the model is not given back as it was: after the training of {client.name} "
            f"{changed[0]} is another; what a method adds to it, `Model.release` must know of "
            "(`attach`, `unfreeze`, `remember`)"
        )

    def _entry(self, updates: list[Update]) -> bytes:
        server_round = ServerRound(self.round, self.clients, None, self.expected, Forgetful())
        aggregate = self.method.aggregate(updates, server_round)
        total = sum(update.num_examples for update in updates)
        metrics = {"train_loss": sum(u.num_examples / total * (u.train_loss or 0) for u in updates)}
        shares = [update.num_examples / total for update in updates]
        weights = shares if aggregate.weights is None else aggregate.weights
        entry = Entry(
            method=self.method.name,
            round=self.round,
            parent=PARENT,
            participants=[
                Participant(update.client, update.num_examples, weight)
                for update, weight in zip(updates, weights, strict=True)
            ],
            metrics=metrics | {"bytes_up": 1000} | aggregate.metrics,
            tensors=aggregate.tensors,
            options=self.method.entry_options(),
        )
        with self.path.open("wb") as file:
            entry.write(file)
        return self.path.read_bytes()

    def receive(self, data: bytes) -> Update:
        """What the server does with the first client's update, in memory and from a file."""
        client = self.clients[0]

        def fits(update: Update) -> None:
            update.check(self.method.name, self.round, PARENT, client.name, client.num_examples)
            self.method.check_update(client, update, self.expected)

        limit = header_limit(self.shapes)
        overwrite(self.path, data)
        try:
            update = Update.from_bytes(data, limit, fits)
        except InvalidMessage as error:
            assert_readable(error)
            try:
                Update.read(self.path, limit, fits)
            except InvalidMessage:
                raise error from None
            raise AssertionError(
                f"an update is refused in memory, and not in a file: {error}"
            ) from error
        again = Update.read(self.path, limit, fits)
        assert replace(again, tensors={}) == replace(update, tensors={})
        assert all(torch.equal(again.tensors[n], update.tensors[n]) for n in update.tensors)
        return update

    def arrive(self, data: bytes) -> Entry:
        """What a participant does with an entry before it applies it."""
        overwrite(self.path, data)
        try:
            entry = Entry.read(self.path, header_limit(self.shapes, len(self.clients)))
        except UserError as error:
            assert_readable(error)
            raise InvalidMessage(str(error)) from None
        try:
            check_entry(entry, self.method, self.shapes, self.round, PARENT, self.expected)
        except InvalidMessage as error:
            assert_readable(error)
            raise
        return entry

    def check_accepted_update(self, update: Update) -> None:
        """The server goes on with it, to an entry that all participants accept."""
        others = map(Update.from_bytes, self.updates[1:])
        self.check_accepted_entry(self.arrive(self._entry([update, *others])))

    def check_accepted_entry(self, entry: Entry) -> None:
        """It can be applied, and what it leaves is finite and of the old shapes."""
        assert all(tensor.isfinite().all() for tensor in entry.tensors.values()), _NOT_FINITE
        try:
            self.method.apply(self.model, entry)
            weights = dict(self.model.network.named_parameters())
            assert kinds(weights) == kinds(self.weights), "an entry changes the weights' shapes"
            for state in (weights, self.model.factors or {}):
                assert all(tensor.isfinite().all() for tensor in state.values()), _NOT_FINITE
        finally:
            self.restore()

    def restore(self) -> None:
        """The model is the base again."""
        self.model.factors, self.model.shared_state = None, {}
        with torch.no_grad():
            for name, weight in self.model.network.named_parameters():
                weight.copy_(self.weights[name])


def assert_readable(error: Exception) -> None:
    """One sentence of some length, whatever the sender has written."""
    text = str(error)
    assert text.isprintable(), f"a refusal has characters that cannot be printed: {text!r}"
    assert 0 < len(text) < 2000, f"a refusal has {len(text)} characters"


_NOT_FINITE = "what was accepted makes weights or an entry that are not finite"
