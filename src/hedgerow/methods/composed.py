"""Composed methods: the functions of a method, written once over its parts.

A method whose updates add, be it over all parameters or over one adapter, says which parts it is
made of (`parts`); what travels, what is refused, and how the global model steps follows.

    client:    Δ_k, and what is owed of earlier ones -> through -> shrink -> up   = update
    server:    Σ p_k (update, with up undone) -> server optimiser -> down         = entry
    everybody: entry, with down and through undone -> server optimiser            -> the model

The server optimiser steps where the whole change is at hand: at the server where entries are dense,
whose memory has its state; else at everybody, where a replay of the ledger rebuilds it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.methods import weighting
from hedgerow.methods.base import (
    REVEALED,
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Holds,
    Memory,
    Method,
    Payload,
    ServerRound,
    Trained,
    float32_bytes,
)
from hedgerow.methods.parts import feedback, shrink
from hedgerow.methods.parts.codec import Codec
from hedgerow.methods.parts.mean import Mean
from hedgerow.methods.parts.message import Message, check_derived
from hedgerow.methods.parts.plain import Plain
from hedgerow.methods.parts.renamed import Renamed, below
from hedgerow.methods.parts.server_optimizers import (
    ChosenServerOptimizer,
    ServerOptimizer,
    State,
    steps_of,
)
from hedgerow.methods.parts.through import Basis, Piece, Through
from hedgerow.methods.parts.trains import AllWeights, Trains
from hedgerow.methods.parts.uplink import Uplink
from hedgerow.methods.parts.values import Shapes, Values, sizes_of
from hedgerow.sketch.layout import MAX_SIZE
from hedgerow.wire import check_kinds, kinds, seed_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.wire import Entry, Participant, Update


@dataclass(frozen=True)
class Parts:
    """What a method is composed of."""

    trains: Trains = field(default_factory=AllWeights)
    up: Uplink = field(default_factory=Uplink)
    down: Codec = field(default_factory=Plain)
    feedback_down: float | None = None
    """Decay of what the server owes; None: there is no error feedback."""
    rate: Callable[[int], float] | None = None
    """Learning rate of the server in a round; None is 1."""
    clip: Callable[[Tensor], Tensor] | None = None
    """Cuts values of the broadcast; None leaves them as they are."""
    server: ServerOptimizer | None = None

    def __post_init__(self) -> None:
        if self.feedback_down is not None and not self.through.is_dense:
            raise ValueError("error feedback of the broadcast: the server needs the sum of updates")

    @property
    def through(self) -> Through:
        """What passes through the server."""
        return self.up.through

    @property
    def everybody_steps(self) -> bool:
        """Whether the server optimiser steps at everybody, instead of at the server."""
        return self.server is not None and not self.through.is_dense


class Composed(Method):
    """A method that is made of parts."""

    server: ChosenServerOptimizer = None
    """Optimiser of the global steps, by name (`sgd`, `sign`, `momentum`, `nesterov`, `adam`,
    `yogi`, `adagrad`) or as {name: nesterov, learning_rate: 0.7, momentum: 0.9}; with null, the
    global model takes the mean update as it is."""

    weights: weighting.ByShare = "size"
    """Weights p_k of the clients' updates: `size`, each client's share of the round's examples, or
    `uniform`, 1/N for each of N clients."""

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """Parts of the method, by its options."""

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check that what is rotated is not larger than a rotation."""
        codecs = (self.parts.up.codec, self.parts.down)
        sizes = sizes_of(self.trained_shapes(model))
        if any(codec.rotates for codec in codecs) and max(sizes) > MAX_SIZE:
            raise UserError(f"{model.name} has a weight of more than {MAX_SIZE} entries")

    @property
    def keeps_weights(self) -> bool:
        """Whether an adapter beside them trains."""
        return self.parts.trains.keeps_weights

    @property
    def is_mean(self) -> bool:
        """Whether nothing is coded, cut or stepped otherwise."""
        parts = self.parts
        coded = (
            any(codec.error for codec in (parts.up.codec, parts.down)) or not parts.through.is_dense
        )
        return self.averages and not coded and parts.server is None

    @property
    def linear(self) -> bool:
        """Whether the server makes one sum of the updates."""
        return self.parts.through.is_one_sum

    @property
    def keeps_coordinates(self) -> bool:
        """Whether what updates pass through is the same map in every round."""
        return self.linear and self.parts.through.is_fixed

    @property
    def clients_remember(self) -> bool:
        """Whether there is error feedback: clients remember what their codecs have lost."""
        return self.parts.up.feedback is not None

    @property
    def server_remembers(self) -> bool:
        """Whether the server has an optimiser with a state, or owes something."""
        parts = self.parts
        has_state = parts.server is not None and bool(parts.server.slots)
        return (has_state and not parts.everybody_steps) or parts.feedback_down is not None

    def trained_shapes(self, model: Model) -> Mapping[str, Sequence[int]]:
        """Shapes of what trains."""
        return self.parts.trains.shapes(model)

    def entry_options(self) -> dict[str, Any]:
        """The options that every participant steps by."""
        parts = self.parts
        options: dict[str, Any] = {}
        if parts.everybody_steps and self.server is not None:
            options["server"] = self.server.model_dump(mode="json")
        return options

    # --- at a client ----------------------------------------------------------------------------

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Lend the client what trains."""
        return self.parts.trains.start(model, client_round)

    def load_kernels(self) -> None:
        """Load those of the codec of updates."""
        self.parts.up.codec.load_kernels()

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Encode Δ_k, and what is owed of earlier ones."""
        parts = self.parts
        change = parts.trains.change(model, trained.parameters)
        coded = parts.up.encode(change, client_round, model.device)
        return Payload(coded | parts.trains.derived(client_round.seeds), {})

    # --- at the server --------------------------------------------------------------------------

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check for the header of this client's message, and what the codec makes with it."""
        update.check_about({})
        derived = self.parts.trains.derived(expected.seeds)
        message = Message(expected.seeds, update.round, client.name)
        self.parts.up.check(update.tensors, expected.shapes, message, kinds(derived))
        check_derived(update.tensors, derived)

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Sum updates by basis, step, and encode the broadcast."""
        parts, shapes = self.parts, server_round.expected.shapes
        private, given = server_round.private, server_round.given_weights
        asked = len(server_round.clients)
        waits = private is None and self._waiting_holds(asked, server_round.expected) is not None
        mean, clients, uniform = Mean(waits=waits), list[str](), self.weights == "uniform"
        gathered: dict[str, Tensor] = {}
        for update in updates:
            if parts.through.adds:
                # Read here, since what came as a file is gone when the next is due.
                tensors = dict(update.tensors) if waits else update.tensors
                header, values = parts.up.decode(tensors, shapes)
                weight: float = 1 if uniform else update.num_examples
                if private is not None:
                    weight = private.weight(each for _, each in values)
                elif given is not None:
                    weight = given[update.client]
                mean.add(parts.through.basis(header), values, weight)
            else:
                gathered |= _prefixed(parts.through.prefix(len(clients)), update.tensors)
            clients.append(update.client)
        if private is not None:
            mean.make_private(private)
        elif given is not None:
            mean.divide_by(1)
        made = self._aggregate(mean, clients, server_round)
        revealed = mean.alone if parts.through.adds else len(clients)
        return made._replace(
            tensors=made.tensors | gathered, metrics=made.metrics | {REVEALED: revealed}
        )

    def aggregate_sum(
        self,
        sums: Mapping[str, Tensor],
        total: float,
        clients: Sequence[str],
        server_round: ServerRound,
    ) -> Aggregate:
        """Step along the mean, and encode the broadcast."""
        through, whole = self.parts.through, Mean()
        header = self._common(server_round.round, server_round.expected)
        shapes = {name: tuple(each.shape) for name, each in sums.items()}
        whole.add(through.basis(header), Values(shapes, lambda: iter(sums.items())), 1)
        whole.divide_by(total)
        return self._aggregate(whole, clients, server_round)

    def changed(self, round: int, expected: Expected) -> Mapping[str, Sequence[int]]:
        """Shapes of what is mapped."""
        header = self._common(round, expected)
        return self.parts.through.mapped_shapes(header, expected.shapes)

    def _common(self, round: int, expected: Expected) -> Mapping[str, Tensor]:
        """Header that all updates of a round share, where they are one sum."""
        return self.parts.through.common(expected.shapes, Message(expected.seeds, round))

    def _aggregate(
        self, mean: Mean, clients: Sequence[str], server_round: ServerRound
    ) -> Aggregate:
        """Step along the means by basis, and encode the broadcast."""
        parts = self.parts
        entry = parts.trains.derived(server_round.expected.seeds)
        message = Message(server_round.expected.seeds, server_round.round)
        kept = _Kept(server_round.memory, self.server_remembers)
        for index, (basis, values) in enumerate(self.means(mean, len(clients), server_round)):
            own = self._broadcast(basis, self._stepped(values, kept), message, kept)
            entry |= _prefixed(parts.through.prefix(index), own)
        if self.server_remembers:
            server_round.memory.save(kept.new)
        uniform = self.weights == "uniform"
        return Aggregate(entry, {}, server_round.weights(clients, uniform=uniform))

    def update_holds(self, client: Client, expected: Expected) -> Holds:
        """Memory of the change, while it is mapped and coded."""
        return self.parts.up.update_holds(expected.shapes, Message(expected.seeds, 1, client.name))

    def aggregate_holds(self, clients: Sequence[Client], expected: Expected) -> Holds:
        """Memory of the sums on each basis, of what is owed and of the server optimiser's state."""
        parts = self.parts
        mapped = parts.up.mapped_shapes(expected.shapes, Message(expected.seeds, 1))
        if not parts.through.adds:
            return Holds(message=len(clients) * parts.up.codec.nbytes(mapped))
        bases = 1 if parts.through.is_one_sum else len(clients)
        each, message = float32_bytes(mapped), bases * parts.down.nbytes(mapped)
        codec, waiting = parts.up.codec, self._waiting_holds(len(clients), expected)
        sums = bases * each if waiting is None else waiting
        if parts.down.error == 0 and waiting is None:
            sums -= message  # which is made in the sums' own memory
        if parts.server is not None and not parts.everybody_steps:
            sums += (1 + len(parts.server.slots)) * each
        if parts.feedback_down is not None:
            sums += 2 * each
        read = max(kind.nbytes for kind in codec.kinds(mapped, {}).values())
        folding = read + codec.decoding_holds(mapped)
        if waiting is not None:
            folding += 4 * max(sizes_of(mapped))  # the sum of a tensor
        return Holds(message, sums, max(folding, parts.down.encoding_holds(mapped)))

    def _waiting_holds(self, clients: int, expected: Expected) -> int | None:
        """Bytes of so many clients' updates that are kept encoded until all have arrived.

        None: their sum takes less, or noise is added to it, and each is folded in as it arrives.
        """
        parts = self.parts
        if expected.noisy or not parts.through.adds:
            return None
        mapped = parts.up.mapped_shapes(expected.shapes, Message(expected.seeds, 1))
        codec = parts.up.codec
        waiting = clients * (codec.nbytes(mapped) + codec.between_holds(mapped))
        return waiting if waiting < float32_bytes(mapped) else None

    def changes(self, update: Update, server_round: ServerRound) -> Values:
        """What an update is summed as, with its codec undone."""
        return self.parts.up.decode(update.tensors, server_round.expected.shapes).values

    def means(
        self, mean: Mean, count: int, server_round: ServerRound
    ) -> Iterator[tuple[Basis, Values]]:
        """Means by basis: cut where they are too long, times the server's learning rate.

        Args:
            mean: sums of the updates.
            count: number of updates.
            server_round: the round.
        """
        parts = self.parts
        rate = None if parts.rate is None else parts.rate(server_round.round)
        if parts.clip is None:
            yield from mean.means(rate)
            return
        cut = parts.clip
        for basis, values in mean.means(None):
            yield basis, values.mapped(lambda _, each: cut(each) * (rate or 1.0))

    def _stepped(self, values: Values, kept: _Kept) -> Values:
        """The step of the server's optimiser along dense values, whose state is kept."""
        server = self.parts.server
        if server is None or self.parts.everybody_steps:
            return values
        steps = dict(steps_of(server, values, kept.old, kept.new))
        return Values(values.shapes, lambda: iter(steps.items()))

    def _broadcast(
        self, basis: Basis, values: Values, message: Message, kept: _Kept
    ) -> dict[str, Tensor]:
        """One piece of an entry; what the codec loses of it is kept, where that is asked for."""
        parts = self.parts
        header = parts.through.broadcast(basis, values.shapes, message, parts.down)
        seed = self._down_seed(header)
        if parts.feedback_down is None:
            return parts.down.encode(values, seed) | header
        earlier = Renamed(
            kept.old, {n.removesuffix(_OWED): n for n in kept.old if n.endswith(_OWED)}
        )
        due = dict(feedback.owed(values, earlier, parts.feedback_down))
        whole = Values(values.shapes, lambda: iter(due.items()))
        length = shrink.contracting(parts.down.error)
        coded = parts.down.encode(whole.mapped(lambda _, each: each * length), seed)
        sent = iter(parts.down.decode(coded, whole.shapes, seed))
        kept.new |= {f"{n}{_OWED}": left for n, left in feedback.lost(whole, sent).items()}
        return coded | header

    # --- at everybody ---------------------------------------------------------------------------

    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check for the pieces that so many updates add up to, and what the codec makes of them."""
        parts, given = self.parts, kinds(entry.tensors)
        clients = len(entry.participants)
        headers = parts.through.check_entry(entry.tensors, shapes, clients, parts.down)
        derived = parts.trains.derived_kinds()
        expected = dict(derived)
        pieces = []
        for prefix, header in headers.items():
            tensors = below(entry.tensors, prefix)
            mapped = parts.through.mapped_shapes(tensors, shapes)
            own = parts.down.kinds(mapped, below(given, prefix))
            expected |= {f"{prefix}{name}": kind for name, kind in (own | header).items()}
            pieces.append((tensors, mapped))
        check_kinds(given, expected)
        seeds = [*derived, *(f"{p}{n}" for p, header in headers.items() for n in header)]
        for name in seeds:
            if expected[name] == seed_kind() and int(entry.tensors[name]) < 0:
                raise InvalidMessage(f"{name} must be non-negative")
        for tensors, mapped in pieces:
            parts.down.check(tensors, mapped)

    def check_derived(self, entry: Entry, expected: Expected) -> None:
        """Check that its seeds are those of the run, this round and its participants."""
        parts, message = self.parts, Message(expected.seeds, entry.round)
        check_derived(entry.tensors, parts.trains.derived(expected.seeds))
        names = [participant.client for participant in entry.participants]
        parts.through.check_seeds(entry.tensors, message, names, parts.down)

    def apply(self, model: Model, entry: Entry) -> None:
        """Add the rebuilt step to the global model."""
        parts, shapes = self.parts, self.trained_shapes(model)
        pieces = [self._sent(own, shapes) for own in parts.through.pieces(entry.tensors)]
        if not parts.through.adds:
            pairs = zip(pieces, entry.participants, strict=True)
            pieces = [piece.times(participant.weight) for piece, participant in pairs]
        steps = parts.through.decode(pieces, shapes, model.device)
        if parts.server is not None and parts.everybody_steps:
            steps = steps_of(parts.server, steps, model.shared_state, model.shared_state)
        parts.trains.add(model, steps, entry)

    def models(self, model: Model, clients: Sequence[str]) -> Iterator[str | None]:
        """Put the global model into `model`."""
        yield from self.parts.trains.models(model, clients)

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """Adapter, where what trains is one."""
        found = self.parts.trains.adapter(entries, load_model)
        return super().adapter(entries, client, load_model) if found is None else found

    def merge(self, model: Model, client: str | None) -> None:
        """Put the adapter into the weights, where what trains is one."""
        self.parts.trains.merge(model)

    def check_weights(self, participants: Sequence[Participant]) -> None:
        """Raise `InvalidMessage` unless the weights are the method's."""
        weighting.check(self.weights, participants)

    # --- details --------------------------------------------------------------------------------

    def _sent(self, tensors: Mapping[str, Tensor], shapes: Shapes) -> Piece:
        """Values of one piece of an entry, with the codec undone."""
        parts = self.parts
        if not parts.through.adds:
            return parts.up.decode(tensors, shapes)
        mapped = parts.through.mapped_shapes(tensors, shapes)
        return Piece(tensors, parts.down.decode(tensors, mapped, self._down_seed(tensors)))

    def _down_seed(self, header: Mapping[str, Tensor]) -> int:
        """Seed of the rotations on the way down, which are others again."""
        return self.parts.through.seed(header) ^ 3 << 62


_OWED = "/owed"
"""Ending of the key of what the server owes of a parameter."""


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensors[name] for name in tensors}


class _Kept:
    """What the server keeps: of the last round, and of this one."""

    def __init__(self, memory: Memory, is_used: bool) -> None:
        self.old: Mapping[str, Tensor] = memory.load() if is_used else {}
        self.new: State = {}
