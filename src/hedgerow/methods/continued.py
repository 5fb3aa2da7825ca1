"""One global adapter that clients go on training, and what of it may be coded and stepped.

client:    what it made of the adapter; with `up`, the coded change of it
server:    undo `up`, average the factors, step from the last adapter by `server`
everybody: the global adapter is the entry's; the base stays as it is
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

from hedgerow.lazy import torch
from hedgerow.methods import weighting
from hedgerow.methods.base import (
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Holds,
    Payload,
    ServerRound,
    Trained,
)
from hedgerow.methods.factors import draw_adapter, factor_kinds
from hedgerow.methods.lora import LoraMethod, scale, update_scale
from hedgerow.methods.parts.codec import ChosenCodec, Codec
from hedgerow.methods.parts.feedback import Feedback
from hedgerow.methods.parts.message import Message
from hedgerow.methods.parts.one_adapter import (
    attach_global,
    held_adapter,
    merge_global,
    with_global,
)
from hedgerow.methods.parts.server_optimizers import (
    ChosenServerOptimizer,
    steps_of,
)
from hedgerow.methods.parts.stacking import average_adapters
from hedgerow.methods.parts.uplink import Uplink
from hedgerow.methods.parts.values import Shapes, Values
from hedgerow.wire import Update

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.lowrank import Factors
    from hedgerow.model import Model
    from hedgerow.wire import Entry, Kind, Participant


class AveragedAdapter(LoraMethod):
    """One global adapter that clients go on training, averaged factor by factor."""

    entries_accumulate: ClassVar[bool] = False

    @property
    def is_exact(self) -> bool:
        """No: the product of averages is not the average of products."""
        return False

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the global adapter; in round 1 one that the run's seed draws for everybody."""
        return attach_global(model, self, self.rank(client_round.client), client_round.seeds)

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Average A and B apart."""
        return average_adapters(updates)

    def apply(self, model: Model, entry: Entry) -> None:
        """Make the entry's adapter the global one."""
        model.factors = dict(entry.tensors)

    def models(self, model: Model, clients: Sequence[str]) -> Iterator[str | None]:
        """Attach the global adapter to the base."""
        yield from with_global(model)

    def merge(self, model: Model, client: str | None) -> None:
        """Add the global adapter to the weights, W + B·A."""
        merge_global(model)


class HeldAdapter(AveragedAdapter):
    """A global adapter of which entries hold a part, and the model the rest."""

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """Adapter that the model holds after the entries."""
        return held_adapter(load_model())


class ContinuedAdapter(AveragedAdapter):
    """One global adapter whose factors keep their meaning from round to round."""

    up: ChosenCodec = None
    """Codec of what a client changed: `bits`, `top_k`, or one with options, as {name: top_k, k:
    64}; with null, it sends its factors as they are."""
    error_feedback: Feedback = False
    """Whether clients add to their updates what their codec has lost of earlier ones: `true`, or a
    factor for what is owed, above 0, with which it is forgotten."""
    server: ChosenServerOptimizer = None
    """Optimiser of the global steps of the factors, by name (`sgd`, `momentum`, `nesterov`,
    `adam`, `yogi`, `adagrad`) or as {name: adam, learning_rate: 0.001}; with null, the averages are
    the global adapter."""
    weights: weighting.ByShare = "size"
    """Weights p_k of the clients' updates: `size`, each client's share of the round's examples, or
    `uniform`, 1/N for each of N clients."""

    refactors: ClassVar[bool] = False
    """Whether the server makes other factors of what it averages, along which nothing can step."""

    @model_validator(mode="after")
    def _parts_fit(self) -> ContinuedAdapter:
        if self.error_feedback and not (self.up and self.up.error):
            raise ValueError("`error_feedback`: `up` loses nothing: give another codec")
        idle = [key for key in ("server", "error_feedback") if getattr(self, key)]
        if idle and self.refactors:
            raise ValueError(
                f"`{idle[0]}`: {self.name} makes new factors in each round, to which what was kept "
                "of the last ones does not belong: leave it out"
            )
        if self.server is not None and not isinstance(self.ranks, int):
            raise ValueError("`server` steps adapters of one rank: give one number for `ranks`")
        return self

    @property
    def linear(self) -> bool:
        """Yes: the server averages what clients have changed of the factors."""
        return True

    @property
    def keeps_coordinates(self) -> bool:
        """Whether the server leaves the factors that clients train as they are averaged."""
        return not self.refactors

    @property
    def takes_different_ranks(self) -> bool | None:
        """Whether they may be, and no server optimiser steps along factors of one shape."""
        return super().takes_different_ranks and self.server is None

    @property
    def is_mean(self) -> bool:
        """Whether nothing is coded or stepped otherwise."""
        return super().is_mean and self.up is None and self.server is None

    @property
    def clients_remember(self) -> bool:
        """Whether there is error feedback: clients remember what their codec has lost."""
        return bool(self.error_feedback)

    @property
    def server_remembers(self) -> bool:
        """Whether the server's optimiser has a state."""
        return self.server is not None and bool(self.server.slots)

    def sent(self, shapes: Shapes, rank: int, round: int) -> dict[str, Kind]:
        """Kinds of what a client of this rank trains in a round.

        Args:
            shapes: (m, n) of the adapted matrices, by module.
            rank: the client's.
            round: number of the round, from 1.
        """
        return factor_kinds(shapes, rank)

    def fold(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Average what clients sent, as factors; here A and B apart."""
        return super().aggregate(updates, server_round)

    def before(self, server_round: ServerRound) -> dict[str, Tensor]:
        """The adapter of the largest rank that clients went on from, with its scale in B."""
        expected = server_round.expected
        drawn = draw_adapter(expected.shapes, expected.seeds.torch("adapter"), self.largest_rank)
        last = server_round.previous.tensors if server_round.previous is not None else {}
        for name in drawn.keys() & last.keys():
            whole = last[name]
            drawn[name][tuple(slice(size) for size in whole.shape)] = whole
        return drawn

    # --- at a client ----------------------------------------------------------------------------

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the global adapter, with a snapshot where its change is sent."""
        return self.with_snapshot(model, super().start(model, client_round))

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """The client's factors; or the coded change of them."""
        if self.up is None:
            return super().update(model, client_round, trained)
        shapes = {name: tuple(p.shape) for name, p in sorted(trained.parameters.items())}
        change = Values(shapes, model.trained_delta)
        tensors = self._uplink(self.up).encode(change, client_round, model.device)
        return Payload(tensors, self._about(self.rank(client_round.client)))

    def update_holds(self, client: Client, expected: Expected) -> Holds:
        """Memory of the client's factors; or of their change, while it is coded."""
        sent = self.sent(expected.shapes, self.rank(client), 1)
        if self.up is None:
            return Holds(sum(kind.nbytes for kind in sent.values()))
        shapes = {name: kind.shape for name, kind in sent.items()}
        message = Message(expected.seeds, 1, client.name)
        return self._uplink(self.up).update_holds(shapes, message)

    def with_snapshot(
        self, model: Model, parameters: Mapping[str, nn.Parameter]
    ) -> Mapping[str, nn.Parameter]:
        """What trains, once a snapshot of it is taken, where its change is sent."""
        if self.up is not None:
            # In an order that the server knows, too.
            model.take_snapshot(dict(sorted(parameters.items())))
        return parameters

    # --- at the server --------------------------------------------------------------------------

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check rank and scale, and for what a client of this rank sends."""
        if self.up is None:
            self.check_factors(client, update, expected)
            return
        rank = self.rank(client)
        update.check_about(self._about(rank))
        shapes = self._shapes(expected.shapes, rank, update.round)
        message = Message(expected.seeds, update.round, client.name)
        self._uplink(self.up).check(update.tensors, shapes, message, {})

    def check_factors(self, client: Client, update: Update, expected: Expected) -> None:
        """Check an update without a codec."""
        super().check_update(client, update, expected)

    def check_weights(self, participants: Sequence[Participant]) -> None:
        """Raise `InvalidMessage` unless the weights are the method's."""
        weighting.check(self.weights, participants)

    def shown(self, update: Update, server_round: ServerRound) -> Update:
        """The client's factors, whatever codec they came in."""
        if self.up is None:
            return update
        return self._decoded(self.up, update, self.before(server_round), server_round)

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Undo the codec, fold, and step from the last adapter."""
        clients, uniform = list[str](), self.weights == "uniform"
        private, given = server_round.private, server_round.given_weights
        bounded = private is not None or given is not None
        before = self.before(server_round) if self.up or self.server or bounded else {}

        def arriving() -> Iterator[Update]:
            for update in updates:
                clients.append(update.client)
                if self.up is not None:
                    update = self._decoded(self.up, update, before, server_round)
                yield replace(update, num_examples=1) if uniform else update

        arrived: Iterable[Update] = arriving()
        if bounded:
            arrived = [self._bounded_mean(arrived, before, server_round)]
        whole = self._stepped(self.fold(arrived, server_round), before, server_round)
        return whole._replace(weights=server_round.weights(clients, uniform=uniform))

    def changed(self, round: int, expected: Expected) -> Mapping[str, Sequence[int]]:
        """Shapes of the factors that train, of the largest rank."""
        return self._shapes(expected.shapes, self.largest_rank, round)

    def aggregate_sum(
        self,
        sums: Mapping[str, Tensor],
        total: float,
        clients: Sequence[str],
        server_round: ServerRound,
    ) -> Aggregate:
        """Go on from the last adapter by the mean change of its factors."""
        before = self.before(server_round)
        mean = {name: each.div_(total) for name, each in sums.items()}
        whole = self.fold([self._as_update(mean, before, server_round)], server_round)
        whole = self._stepped(whole, before, server_round)
        uniform = self.weights == "uniform"
        return whole._replace(weights=server_round.weights(clients, uniform=uniform))

    # --- details --------------------------------------------------------------------------------

    def _stepped(
        self, whole: Aggregate, before: Mapping[str, Tensor], server_round: ServerRound
    ) -> Aggregate:
        """The averages; or the step of the server's optimiser towards them."""
        if self.server is not None:
            trained = self.sent(server_round.expected.shapes, self.largest_rank, server_round.round)
            changes = [(name, whole.tensors[name] - before[name]) for name in trained]
            # What rests in this round keeps its state.
            state = dict(server_round.memory.load()) if self.server_remembers else {}
            steps = dict(steps_of(self.server, changes, state, state))
            stepped = {name: before[name] + step for name, step in steps.items()}
            whole = whole._replace(tensors=whole.tensors | stepped)
            if self.server_remembers:
                server_round.memory.save(state)
        return whole

    def _bounded_mean(
        self, updates: Iterable[Update], before: Mapping[str, Tensor], server_round: ServerRound
    ) -> Update:
        """The weighted mean of clients' changes, each bounded: as if one client had made it.

        With client-level privacy there is noise on it.
        """
        private, given = server_round.private, server_round.given_weights
        sums: dict[str, Tensor] = {}
        for update in updates:
            changes = dict(self._changes(update, before, server_round))
            if private is not None:
                weight = private.weight(changes.values())
            else:
                weight = (given or {})[update.client]
            for name, change in changes.items():
                sums.setdefault(name, torch.zeros_like(change)).add_(change, alpha=weight)
        if private is not None:
            private.add_noise(sums)
        total = 1 if private is None else private.denominator
        mean = {name: each.div_(total) for name, each in sums.items()}
        return self._as_update(mean, before, server_round)

    def _as_update(
        self, mean: Mapping[str, Tensor], before: Mapping[str, Tensor], server_round: ServerRound
    ) -> Update:
        """A mean change as if one client had made it, of the largest rank."""
        rank = self.largest_rank
        about = self._about(rank)
        s = scale(rank, float(about["lora_alpha"]), self.rslora)
        whole = {name: before[name] + each for name, each in mean.items()}
        return Update(
            method=self.name,
            round=server_round.round,
            client="",
            parent="",
            num_examples=1,
            train_loss=None,
            tensors={n: each if ".lora_A." in n else each / s for n, each in whole.items()},
            about=about,
        )

    def changes(
        self, update: Update, server_round: ServerRound
    ) -> Iterable[tuple[str, Tensor | Factors]]:
        """Changes of the factors, made one by one: those of all clients are compared at once."""
        before = server_round.once("before", lambda: self.before(server_round))
        return self._changes(update, before, server_round, self.up)

    def _changes(
        self,
        update: Update,
        before: Mapping[str, Tensor],
        server_round: ServerRound,
        up: Codec | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Changes of the factors, with their scale in B; `up` is what is still to be undone.

        Where a client's rank is lower than the largest, the rest of its factors is zeros.
        """
        trained = self.sent(server_round.expected.shapes, self.largest_rank, server_round.round)
        s = update_scale(update)
        plain = ((name, update.tensors[name]) for name in sorted(trained))
        sent = plain if up is None else self._factors(up, update, before, server_round)
        for (name, kind), (_, own) in zip(sorted(trained.items()), sent, strict=True):
            whole = torch.zeros(kind.shape)
            whole[tuple(slice(size) for size in own.shape)] = own
            yield name, (whole if ".lora_A." in name else whole * s) - before[name]

    def _shapes(self, shapes: Shapes, rank: int, round: int) -> Shapes:
        """Shapes of what a client of this rank sends in a round, by name, in its order."""
        kinds = self.sent(shapes, rank, round)
        return {name: kind.shape for name, kind in sorted(kinds.items())}

    def _uplink(self, codec: Codec) -> Uplink:
        return Uplink(codec=codec, feedback=float(self.error_feedback) or None)

    def _decoded(
        self, codec: Codec, update: Update, before: Mapping[str, Tensor], server_round: ServerRound
    ) -> Update:
        """A coded update as one with the client's factors."""
        return replace(update, tensors=dict(self._factors(codec, update, before, server_round)))

    def _factors(
        self, codec: Codec, update: Update, before: Mapping[str, Tensor], server_round: ServerRound
    ) -> Iterator[tuple[str, Tensor]]:
        """The client's factors in a coded update, in the order of their names."""
        rank, s = int(update.about["r"]), update_scale(update)
        shapes = self._shapes(server_round.expected.shapes, rank, update.round)
        piece = self._uplink(codec).decode(update.tensors, shapes)
        for name, change in piece.values:
            start = before[name][tuple(slice(size) for size in change.shape)]
            yield name, change + (start if ".lora_A." in name else start / s)
