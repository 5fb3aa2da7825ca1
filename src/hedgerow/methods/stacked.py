"""Stacked methods: exact sums of adapters of any ranks, written once over their parts.

    client:    start -> train -> up                                                  = update
    server:    Σ p_k s_k B_k A_k, stacked (update, with up undone)
               -> server optimiser -> broadcast                                      = entry

A method says where adapters start, how updates are coded, what they weigh, how they are summed and
what of the sums is broadcast (`parts`); what everybody makes of an entry is its base class's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from hedgerow.adapters import adapter_pairs
from hedgerow.lowrank import Factors
from hedgerow.methods.base import (
    REVEALED,
    Aggregate,
    Client,
    ClientRound,
    Expected,
    Holds,
    Payload,
    ServerRound,
    Trained,
    float32_bytes,
    revealed_by_sum,
)
from hedgerow.methods.lora import LoraMethod, adapter_bytes, stack_bytes, update_scale
from hedgerow.methods.parts import low_rank_steps
from hedgerow.methods.parts.broadcast import Broadcast, Orthogonal, Whole
from hedgerow.methods.parts.factor_bits import FactorBits
from hedgerow.methods.parts.low_rank_steps import SteppedSums
from hedgerow.methods.parts.server_optimizers import ChosenServerOptimizer
from hedgerow.methods.parts.stacking import Arrived, StackedFactors, finite
from hedgerow.methods.parts.starts import Starts
from hedgerow.methods.parts.statements import check_stated
from hedgerow.methods.parts.sums import ExactSums, SketchedSums, StackedSums, Sums
from hedgerow.methods.parts.weigh import GivenWeights, Weigh
from hedgerow.methods.quantization import dequantize_update
from hedgerow.methods.residual import last_step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.model import Model
    from hedgerow.settings import TrainingSettings
    from hedgerow.training.job import Job
    from hedgerow.wire import Participant, Update

MOST_SPOOLED = 8 << 30
"""Bytes of updates that wait on disk for an exact sum; of more, where the broadcast is cut anyway,
sketches are added up."""


@dataclass(frozen=True)
class StackedParts:
    """What a method that stacks is composed of."""

    up: FactorBits = field(default_factory=FactorBits)
    weigh: Weigh = field(default_factory=Weigh)
    sums: type[StackedSums | ExactSums] = StackedSums
    broadcast: Broadcast = field(default_factory=Whole)


class StackedAdapters(LoraMethod):
    """Adapters whose updates are summed exactly, whatever their ranks."""

    renews: ClassVar[bool] = False
    """Whether each round begins with other factors, to which no moments of the last one belong."""
    bounded_by: ClassVar[str] = "take flora with `compress`"
    """How the rank of a broadcast is bounded, which momentum needs: an instruction to the user."""

    server: ChosenServerOptimizer = None
    """Optimiser of the global steps along stacked factors, by name or as {name: sgd,
    learning_rate: 0.7}: `sgd`, or, where the rank of the broadcast is bounded, `momentum` or
    `nesterov`; with null, the global model takes the sum as it is."""

    @model_validator(mode="after")
    def _server_fits(self) -> Self:
        if self.server is not None:
            low_rank_steps.check(self.server, self.parts.broadcast.bound, self.bounded_by)
        return self

    @abstractmethod
    def starts(self, training: TrainingSettings) -> Starts:
        """Where clients' adapters start, by the method's options and those of local training."""

    @property
    def parts(self) -> StackedParts:
        """Parts of the method, by its options; by default all is sent as it is."""
        return StackedParts()

    @property
    def learns_by_steps(self) -> bool:
        """Whether weights ask for nothing else of the examples."""
        return not self.parts.weigh.reads_examples

    @property
    def keeps_optimizer(self) -> bool | None:
        """No, where nobody asks for it; nothing, where factors are other ones in each round."""
        return None if self.renews else False

    @property
    def is_mean(self) -> bool:
        """Whether the server takes no other step."""
        return super().is_mean and self.server is None

    @property
    def is_exact(self) -> bool:
        """Whether the sums are broadcast whole, of factors that were sent as they are."""
        parts = self.parts
        return self.is_mean and parts.broadcast.is_whole and parts.up.is_plain

    @property
    def states_losses(self) -> bool:
        """Whether weights ask for some."""
        return self.parts.weigh.reads_examples

    @property
    def server_remembers(self) -> bool:
        """Whether it owes what it has left out, or has a momentum."""
        return self.parts.broadcast.owes or (self.server is not None and bool(self.server.slots))

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Check, as for every adapter; and that there are weights for the clients."""
        super().check(model, num_clients, training)
        self.parts.weigh.check_clients(num_clients)

    # --- at a client ----------------------------------------------------------------------------

    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach the adapter that the client starts from."""
        return self.starts(client_round.training).start(model, client_round)

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Train locally; measure before what weights ask for, and keep what the next start does."""
        said = self.parts.weigh.said(job, client_round, last_step)
        trained = super().train(job, client_round, parameters)
        client_round.remember(self.starts(client_round.training).kept(parameters))
        return replace(trained, said=said)

    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """The client's factors, coded, and what it knows of rounding and of step sizes."""
        tensors, about = super().update(model, client_round, trained)
        coded, said = self.parts.up.encode(tensors)
        return Payload(coded, about | said)

    # --- at the server --------------------------------------------------------------------------

    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Check rank and scale, what it states, and that there is a pair for each module."""
        parts, rank = self.parts, self.rank(client)
        statements = [*parts.up.statements, *parts.weigh.statements(update.round)]
        check_stated(update, self._about(rank), statements)
        parts.up.check(update.tensors, expected.shapes, rank)

    def check_weights(self, participants: Sequence[Participant]) -> None:
        """Raise `InvalidMessage` unless the weights are the method's."""
        self.parts.weigh.check(participants)

    def shown(self, update: Update, server_round: ServerRound) -> Update:
        """Client's change as one adapter, in float32."""
        return self.starts(server_round.expected.training).change(update, server_round)

    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Sum what clients have made of their adapters, step, and make the broadcast of it."""
        parts, memory = self._parts_of(server_round), server_round.memory
        arrived, sums = self._summed(map(dequantize_update, updates), server_round)
        weights = parts.weigh.weights(arrived, server_round)
        metrics = parts.weigh.metrics(arrived, server_round)
        kept = memory.load() if self.server_remembers else {}
        linear = self.server.linear if self.server is not None else None
        steps = SteppedSums(sums, linear, parts.broadcast.bound, kept)
        sent = parts.broadcast.make(steps, kept, server_round.expected.shapes)
        if self.server_remembers:
            memory.save(sent.owed | steps.kept)
        metrics |= sent.metrics | parts.up.metrics(arrived.said) | steps.metrics
        if isinstance(arrived, SketchedSums):
            metrics["sketch_error"] = arrived.relative_error
        revealed = len(weights) if sent.apart else revealed_by_sum(weights)
        return Aggregate(sent.tensors, finite(metrics) | {REVEALED: revealed}, weights)

    def update_holds(self, client: Client, expected: Expected) -> Holds:
        """Memory of the client's factors, coded."""
        return Holds(self.parts.up.nbytes(expected.shapes, self.rank(client)))

    def aggregate_holds(self, clients: Sequence[Client], expected: Expected) -> Holds:
        """Memory of what is broadcast of the sums, and of one matrix's factors of all clients."""
        parts, shapes = self.parts, expected.shapes
        rank = sum(self.rank(client) for client in clients)
        whole = {name: (min(rank, *shape), sum(shape)) for name, shape in shapes.items()}
        message = float32_bytes(whole)
        start = 0
        if parts.sums.continues and self.starts(expected.training).goes_on:
            start = adapter_bytes(shapes, self.largest_rank)
            message += start
        if parts.broadcast.bound is not None:
            message = min(message, adapter_bytes(shapes, parts.broadcast.bound))
        owed = message if self.server_remembers else 0
        message = message * parts.broadcast.bits // 32
        return Holds(message, sums=start + owed, work=stack_bytes(shapes, rank))

    @property
    def weighable(self) -> bool:
        """Yes: changes of any ranks have inner products."""
        return True

    def changes(
        self, update: Update, server_round: ServerRound
    ) -> Iterable[tuple[str, Tensor | Factors]]:
        """Change of each module, ΔW_k = s_k·B_k·A_k."""
        change = self.shown(dequantize_update(update), server_round)
        s = update_scale(change)
        for module, (A, B) in sorted(adapter_pairs(change.tensors)):
            yield module, Factors(A, B * s)

    # --- details --------------------------------------------------------------------------------

    def _parts_of(self, server_round: ServerRound) -> StackedParts:
        """Parts of the method, with the weights that it is given for a round."""
        given = server_round.given_weights
        return self.parts if given is None else replace(self.parts, weigh=GivenWeights(given))

    def _summed(self, updates: Iterable[Update], server_round: ServerRound) -> tuple[Arrived, Sums]:
        """Who has sent updates, and their sums: exact, or of sketches where these are too large."""
        parts, expected = self._parts_of(server_round), server_round.expected
        start: Mapping[str, Factors] = {}
        if parts.sums.continues or self.server is not None:
            start = self.starts(expected.training).before(server_round)
        rank = parts.broadcast.bound if parts.broadcast.sketches else None
        if rank is None or self._spooled(server_round) <= MOST_SPOOLED:
            stacked = StackedFactors(updates)
            return stacked, parts.sums(stacked, start, parts.weigh.weights(stacked, server_round))
        sketched = SketchedSums(
            updates,
            start=start,
            weigh=lambda update: parts.weigh.relative(update, server_round),
            rank=rank,
            generator=expected.seeds.torch("sketch", server_round.round),
        )
        sketched.normalise(parts.weigh.factor(sketched, server_round))
        return sketched, sketched

    def _spooled(self, server_round: ServerRound) -> int:
        """The bytes of all clients' factors."""
        rows = sum(self.rank(client) for client in server_round.clients)
        return 4 * rows * sum(sum(shape) for shape in server_round.expected.shapes.values())


class ExactlyStacked(StackedAdapters):
    """Stacked adapters whose exact sum is broadcast, unless something else is made of it."""

    broadcast: Literal["orthogonal", "stack"] = "orthogonal"
    """Factors of the exact sum that everybody gets. `orthogonal`: by its singular value
    decomposition, in which no client's own factors are left, and not larger; `stack`: all clients'
    own, one after the other, as in FLoRA's paper."""

    @classmethod
    def before_choice(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The stack, as in FLoRA's paper."""
        return {"broadcast": "stack"}

    @property
    def parts(self) -> StackedParts:
        """Exact sums as they are broadcast."""
        if self.broadcast == "stack":
            return StackedParts()
        return StackedParts(sums=ExactSums, broadcast=Orthogonal())
