"""What a method is: four functions and its options, with nothing about transport or files."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

from pydantic import PrivateAttr

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.plugins import Plugin, dotted_name
from hedgerow.training import first_order
from hedgerow.wire import (
    LARGEST_BROADCAST,
    LARGEST_SENT,
    LONGEST_TEXT,
    SAMPLING_RATE,
    check_equal,
    check_numbers,
    check_participants,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.lowrank import Factors
    from hedgerow.model import Model
    from hedgerow.privacy.client_level import GaussianMean
    from hedgerow.seeds import Seeds
    from hedgerow.settings import TrainingSettings
    from hedgerow.training.first_order import AfterBackward
    from hedgerow.training.job import Job
    from hedgerow.wire import Entry, Participant, Update


_T = TypeVar("_T")


@dataclass(frozen=True)
class Client:
    """A client as a method sees it."""

    index: int
    """Its place in the experiment's list of clients (0, 1, …)."""
    name: str
    num_examples: int
    """|D_k| as the client says it (`federation.says`), which its weight in an aggregate is
    proportional to."""


class Memory(Protocol):
    """Tensors that a client, or the server, remembers from one of its rounds to the next."""

    def load(self) -> Mapping[str, Tensor]:
        """Tensors of the last round before this one that it took part in, by name; maybe none."""

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember tensors, by name, on the CPU, for the next round."""


@dataclass(frozen=True)
class ClientRound:
    """One client's part in one round."""

    client: Client
    round: int
    """Number of the round, from 1."""
    seeds: Seeds
    """Seeds of the run."""
    training: TrainingSettings
    memory: Memory
    past: Callable[[int], Entry]
    """Reads the entry of an earlier round."""
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors for the client's next round, beside others that it keeps already.

        They are saved when the round is done (`save`).
        """
        self._kept.update(tensors)

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """Tensors that are to be saved, by name."""
        return self._kept

    def save(self) -> None:
        """Save what is to be kept in `memory`; none of it where a number is absurd.

        What would be made of such numbers is refused, in this round and, were they saved, in every
        other: so the next round begins anew.
        """
        try:
            check_numbers(self._kept, LARGEST_SENT)
        except InvalidMessage:
            self._kept.clear()
        self.memory.save(self._kept)


@dataclass(frozen=True)
class Expected:
    """Knowledge, without the model, of what is sent in a run: updates and entries."""

    seeds: Seeds
    """Seeds of the run."""
    shapes: Mapping[str, Sequence[int]]
    """Shapes of what clients train (`Method.trained_shapes`), as the ledger has them."""
    training: TrainingSettings
    silent: bool = False
    """Whether entries may have neither a training loss nor what privacy has cost."""
    noisy: bool = False
    """Whether the server adds noise to sums of updates."""
    drawn: int | None = None
    """Number of clients that are drawn in secret for a round, on average, where there are more;
    None: entries say who took part."""

    def sampling_rate(self, clients: int) -> float | None:
        """Probability with which each of so many clients takes part; None: all that are asked."""
        return None if self.drawn is None or self.drawn >= clients else self.drawn / clients


@dataclass(frozen=True)
class ServerRound:
    """The server's part in one round."""

    round: int
    """Number of the round, from 1."""
    clients: Sequence[Client]
    """Clients that were asked, in their order."""
    previous: Entry | None
    """The entry of the round before; None in the first."""
    expected: Expected
    memory: Memory
    population: int | None = None
    """Number of clients of the run, whether they were asked or not; None: all were."""
    private: GaussianMean | None = None
    """Bounds updates and adds noise to their sum, for client-level privacy; None: nothing does."""

    given_weights: Mapping[str, float] | None = None
    """Weights w_k of the updates by client, where a rule of the experiment's has given them."""
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, name: str, make: Callable[[], _T]) -> _T:
        """What `make` makes, made once in the round, whoever asks for it by this name.

        It is not to be changed.
        """
        if name not in self._made:
            self._made[name] = make()
        return cast(_T, self._made[name])

    def weights(self, clients: Sequence[str], *, uniform: bool) -> list[float] | None:
        """Weights of these clients' updates; None: p_k = n_k / Σ n.

        Args:
            clients: their names.
            uniform: whether all weigh the same, 1/N.
        """
        if self.private is not None:
            return [1 / self.private.denominator] * len(clients)
        if self.given_weights is not None:
            return [self.given_weights[client] for client in clients]
        return [1 / len(clients)] * len(clients) if uniform else None


@dataclass(frozen=True)
class Trained:
    """Result of local training."""

    parameters: Mapping[str, nn.Parameter]
    loss: float
    """The mean training loss."""
    steps: Mapping[int, float] = field(default_factory=dict)
    """Distance along each direction, by the direction's seed (zeroth-order)."""
    said: Mapping[str, str] = field(default_factory=dict)
    """What the client states beside its update, in the update's metadata."""


class Payload(NamedTuple):
    """Content of an update: tensors by name, and metadata of the method's."""

    tensors: dict[str, Tensor]
    about: dict[str, str]


class Aggregate(NamedTuple):
    """Content of an entry: tensors by name, and what the server learnt while making them."""

    tensors: dict[str, Tensor]
    metrics: dict[str, float]
    weights: Sequence[float] | None = None
    """Weight of each update, in their order, where that is not p_k = n_k / Σ n."""


class Holds(NamedTuple):
    """Memory that a method holds while it makes a message, in bytes."""

    message: int
    """Bytes of the tensors that it makes: of an update, or of an entry."""
    sums: int = 0
    """Bytes of what it keeps meanwhile, as sums or tables of updates, and what is owed."""
    work: int = 0
    """Bytes of what is there at a time, at most, as of one tensor while it is coded."""


REVEALED = "revealed_clients"
"""Key, among an aggregate's metrics, of the number of clients of whose update there is a piece
apart from the others', as rows of a stack; it is in the round's row, and not in the entry. Without
it there is one sum alone, where the method is `linear`, else it is not known."""


class Method(Plugin, ABC):
    """A federated method: its fields are the options under `method:` in the experiment file.

    The functions are pure but for the model that they are handed: a method has no state, so that
    the ledger is all that a participant needs.
    """

    _private: bool = PrivateAttr(False)
    _weighed: bool = PrivateAttr(False)

    section = ("method",)
    summary: ClassVar[str]
    """One line for `hedgerow methods`."""
    reference: ClassVar[str]
    """The paper that describes the method."""
    pools_data: ClassVar[bool] = False
    """One participant holds the data of all clients (the centralized baseline)."""
    communicates: ClassVar[bool] = True
    """Whether updates and entries travel; where they don't, no bytes are counted."""
    has_global_model: ClassVar[bool] = True
    """Whether there is one model for everybody; else there is one for each client, and `--client`
    names it."""
    personal: ClassVar[bool] = False
    """Whether each client has a model of its own, of which it keeps in its memory what the global
    model has not; see `personalized`."""
    averages: ClassVar[bool] = True
    """Whether the global model becomes the mean Σ p_k w_k of the clients' models, but for the
    `aggregation_error` that a round's metrics state; `hedgerow.testing.check_method` checks it."""
    trainings: ClassVar[int] = 1
    """Number of times that a client trains in a round, which example-level privacy pays for."""
    compresses_broadcast: ClassVar[bool] = False
    """Whether the broadcast is smaller than what is trained, or an option makes it so."""
    own_steps: ClassVar[bool] = False
    """Whether clients take local steps of the method's own, or change the gradients of others
    otherwise than by `after_backward`."""
    merges: ClassVar[bool] = False
    """Whether entries are merged into the base's weights; beside quantized ones, their sum grows
    from round to round."""
    tells_steps: ClassVar[bool] = False
    """Whether an update tells how many local steps it is of."""
    entries_accumulate: ClassVar[bool] = True
    """Whether a client that was away needs every entry that it missed, or only the last."""

    @property
    def is_private(self) -> bool:
        """Whether the run has client-level privacy: all clients that are asked weigh 1/D."""
        return self._private

    @property
    def is_weighed(self) -> bool:
        """Whether a rule of the experiment's gives updates their weights."""
        return self._weighed

    def made_weighed(self) -> Method:
        """The method with weights that a rule of the experiment's gives."""
        method = self.model_copy()
        method._weighed = True
        return method

    def made_private(self) -> Method:
        """The method with client-level privacy.

        Raises:
            UserError: its weights are said to be others.
        """
        weights = getattr(self, "weights", "uniform")
        if "weights" in self.model_fields_set and weights != "uniform":
            raise UserError(
                f"method.weights {weights}: under privacy.level client all clients weigh the same: "
                "leave it out"
            )
        uniform = {"weights": "uniform"} if hasattr(self, "weights") else {}
        method = self.model_copy(update=uniform)
        method._private = True
        return method

    @classmethod
    def see(cls) -> str:
        """Command that shows the options."""
        return f"hedgerow methods {cls.own_name() or dotted_name(cls)}"

    @classmethod
    def counting(cls, options: Mapping[str, Any]) -> set[str]:
        """Names of the options that count, where `options` are those that are given."""
        return set(cls.model_fields)

    @property
    def clients_remember(self) -> bool:
        """Whether a client whose update is accepted remembers something for its next round.

        Beside its optimiser's moments, for which see `keeps_optimizer`.
        """
        return False

    @property
    def clients_may_forget(self) -> bool:
        """Whether a client may begin a round without what it remembered, as in its first.

        No where others count on what it remembers, as on a sum that its part is in.
        """
        return True

    @property
    def is_mean(self) -> bool:
        """Whether it `averages` with these options, too: a codec, say, may prevent it."""
        return self.averages

    @property
    def is_exact(self) -> bool:
        """Whether it `is_mean` without any `aggregation_error`, but for rounding."""
        return self.is_mean

    @property
    def keeps_weights(self) -> bool:
        """Whether the base's weights are changed by `Model.merge` alone, or not at all.

        What would be merged into quantized weights is kept beside them.
        """
        return False

    @property
    def takes_different_ranks(self) -> bool | None:
        """Whether clients' adapters may have different ranks; None: there are no adapters."""
        return None

    @property
    def states_losses(self) -> bool:
        """Whether updates state losses of the client's examples, beside its training loss."""
        return False

    @property
    def linear(self) -> bool:
        """Whether an entry is made from nothing of the updates but their sum.

        Then `aggregate` bounds them and adds noise where `ServerRound.private` says so, which
        client-level privacy needs, and `aggregate_sum` makes the entry of their sum alone, for
        sums that nobody can look into. How many updates there are, it may depend on only where
        clients may not forget (`clients_may_forget`), since such are not drawn in secret.
        """
        return False

    @classmethod
    def before_choice(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Values of options for a run of a version that did not have them yet.

        What was done before there was a choice, where the default is something else.

        Args:
            options: those of the run, as its experiment.yaml has them.
        """
        return {}

    def changed(self, round: int, expected: Expected) -> Mapping[str, Sequence[int]]:
        """Shapes of what `changes` yields, in its order, the same for all clients (`linear`)."""
        raise NotImplementedError(f"method {self.name}: linear methods define `changed`")

    def aggregate_sum(
        self,
        sums: Mapping[str, Tensor],
        total: float,
        clients: Sequence[str],
        server_round: ServerRound,
    ) -> Aggregate:
        """Entry of the mean of weighted `changes`, bit for bit as `aggregate`'s (`linear`).

        Args:
            sums: of the weighted changes, all tensors by name, float32; they may be changed.
            total: sum of the weights, by which the mean is theirs.
            clients: names of those whose changes they are of, in their order.
            server_round: the round.
        """
        raise NotImplementedError(f"method {self.name}: linear methods define `aggregate_sum`")

    @property
    def keeps_coordinates(self) -> bool:
        """Whether all rounds sum `changes` of the same coordinates, in one sum each (`linear`).

        Not where they are on other bases in each round, say, or of parameters that train in turns.
        Then noise of one round can make up for that of another, as `privacy.bands` has it.
        """
        return False

    @property
    def weighable(self) -> bool:
        """Whether updates can be compared, and `aggregate` takes `ServerRound.given_weights`."""
        return self.linear

    def changes(
        self, update: Update, server_round: ServerRound
    ) -> Iterable[tuple[str, Tensor | Factors]]:
        """What an update changes, tensor by tensor in one order for all (`weighable`).

        Low-rank changes of matrices are pairs, ΔW = B·A with its scale in it.
        """
        raise NotImplementedError(f"method {self.name}: weighable methods define `changes`")

    @property
    def learns_by_steps(self) -> bool:
        """Whether all that leaves a client is made of its examples by `train_along` alone.

        Example-level privacy needs that, since its noise is in the gradients of those steps. By
        default yes, but for methods that train in their own way, which have to say so themselves.
        """
        return type(self).train is Method.train

    @property
    def keeps_optimizer(self) -> bool | None:
        """Whether clients keep their optimiser's moments where `training.keep_optimizer` is null.

        None: the method has none to keep, or none that would fit the next round's parameters.
        """
        return False

    @property
    def server_remembers(self) -> bool:
        """Whether the server remembers something in each round for the next."""
        return False

    def check(self, model: Model, num_clients: int, training: TrainingSettings) -> None:
        """Raise a `UserError` where the options do not fit the model, the clients or training."""

    def left_out(self, model: Model) -> list[str]:
        """Sentences for people on what of the model stays untrained though options ask for it."""
        return []

    def load_kernels(self) -> None:
        """Load compiled kernels that clients need, before each of them has a process of its own.

        By default there are none.
        """

    @abstractmethod
    def start(self, model: Model, client_round: ClientRound) -> Mapping[str, nn.Parameter]:
        """Attach what this client trains to the model; returns the trainable parameters."""

    def train(
        self, job: Job, client_round: ClientRound, parameters: Mapping[str, nn.Parameter]
    ) -> Trained:
        """Train locally: by first-order steps, where a method has none of its own.

        Where `training.keep_optimizer` says so, the optimiser goes on from the client's last round.

        Raises:
            Diverged: the loss is no longer a number.
        """
        hook = self.after_backward(job, client_round)
        return self.train_along(job, client_round, parameters, hook)

    def train_along(
        self,
        job: Job,
        client_round: ClientRound,
        parameters: Mapping[str, nn.Parameter],
        hook: AfterBackward | None,
    ) -> Trained:
        """Train by first-order steps along gradients that a hook changes, as `train` does.

        Raises:
            Diverged: the loss is no longer a number.
        """
        if not client_round.training.keep_optimizer:
            return Trained(parameters, first_order.train(job, parameters, after_backward=hook))
        kept = client_round.memory.load()
        loss, state = first_order.continue_training(job, parameters, kept, after_backward=hook)
        # What is trained in turns keeps its moments while it rests.
        resting = {key: kept[key] for key in kept if "/" in key and key not in state}
        client_round.remember(resting | state)
        return Trained(parameters, loss)

    def after_backward(self, job: Job, client_round: ClientRound) -> AfterBackward | None:
        """What changes the gradients of each local step, as a regulariser does; None: nothing."""
        return None

    @abstractmethod
    def update(self, model: Model, client_round: ClientRound, trained: Trained) -> Payload:
        """Make what travels up, after local training."""

    def trained_shapes(self, model: Model) -> Mapping[str, Sequence[int]]:
        """The shapes of what clients train, where updates and entries depend on them; else empty.

        Of all weights by name, or of the adapted matrices (m, n) by module, say.
        """
        return {}

    def entry_options(self) -> dict[str, Any]:
        """Options without which an entry's tensors mean something else."""
        return {}

    @abstractmethod
    def check_update(self, client: Client, update: Update, expected: Expected) -> None:
        """Raise `InvalidMessage`, on the server, unless an update is what the client should send.

        `Update.check` has been called. Of the numbers only those that are asked for have been
        looked at, and are not absurd: kinds are to be compared first (`check_kinds`, `kinds`).
        """

    @abstractmethod
    def check_entry(self, entry: Entry, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise `InvalidMessage`, at every participant, unless `aggregate` makes such tensors.

        A part of `check_entry` in this room, which has checked what the entry says of itself.

        Args:
            shapes: `trained_shapes` of the participant's model.
        """

    def check_derived(self, entry: Entry, expected: Expected) -> None:
        """Raise `InvalidMessage` unless what of an entry follows from the run's settings does.

        From its seeds, and from what training is like, as the number of steps. `check_entry` has
        passed it. With the default nothing follows from them.
        """

    def shown(self, update: Update, server_round: ServerRound) -> Update:
        """The update as `federation.keep_updates` keeps it for people: its own change alone."""
        return update

    @abstractmethod
    def aggregate(self, updates: Iterable[Update], server_round: ServerRound) -> Aggregate:
        """Aggregate updates on the server, without the model: each is folded in as it arrives."""

    def update_holds(self, client: Client, expected: Expected) -> Holds:
        """Memory of `update`, beside the model and what trains, for a client.

        By default, for methods that do not say: a float32 number for each that trains.
        """
        return Holds(message=float32_bytes(expected.shapes))

    def aggregate_holds(self, clients: Sequence[Client], expected: Expected) -> Holds:
        """Memory of `aggregate`, for updates of these clients that are read when they are due.

        By default, for methods that do not say: a float32 number for each that trains, and as much
        for their sum.
        """
        message = float32_bytes(expected.shapes)
        return Holds(message, sums=message)

    def check_weights(self, participants: Sequence[Participant]) -> None:
        """Raise `InvalidMessage` unless an entry's weights are the method's: p_k = n_k / Σ n."""
        total = sum(p.num_examples for p in participants)
        for p in participants:
            share = p.num_examples / total
            if not math.isclose(p.weight, share, rel_tol=1e-9):
                raise InvalidMessage(f"weight of {p.client} must be {share}, got {p.weight}")

    @abstractmethod
    def apply(self, model: Model, entry: Entry) -> None:
        """Advance the global model by one entry, at every participant."""

    def models(self, model: Model, clients: Sequence[str]) -> Iterator[str | None]:
        """Put the model that the method has made into `model` while the caller evaluates it.

        Yields None for the global model. A method without one yields each of `clients` in turn.
        Before the first entry all of these are the base.
        """
        yield None

    def personalized(
        self, model: Model, kept: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Make the global model in `model` a client's own, until the block ends (`personal`).

        Within it, `models`, `merge` and `adapter`, given no client, are about that model.

        Args:
            model: the global model after a round.
            kept: what the client saved in the last round that it took part in; nothing where there
                is none, and then the model stays as it is.
        """
        raise NotImplementedError(f"method {self.name}: personal methods define `personalized`")

    def adapter(
        self, entries: Iterable[Entry], client: str | None, load_model: Callable[[], Model]
    ) -> dict[str, Tensor]:
        """Adapter of all that `entries` add to the base, with its scale in its factors.

        Args:
            entries: the ledger from its first entry on.
            client: whose adapter, for methods without a global model; else None.
            load_model: the model after these entries, for methods whose entries do not suffice.

        Raises:
            UserError: the method does not make adapters, or needs a client's name.
        """
        raise UserError(
            f"{self.name} trains all parameters, not an adapter: "
            "export --to merged or --to ledger instead"
        )

    def merge(self, model: Model, client: str | None) -> None:
        """Put what the model still holds beside its weights into them, for export."""


def float32_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of float32 tensors of these shapes."""
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def revealed_by_sum(weights: Iterable[float]) -> int:
    """Number of clients whose update a weighted sum is alone: 1 where only one counts, else 0."""
    return int(sum(weight != 0 for weight in weights) == 1)


def check_entry(
    entry: Entry,
    method: Method,
    shapes: Mapping[str, Sequence[int]],
    round: int,
    parent: str,
    expected: Expected | None = None,
) -> None:
    """Check an entry from elsewhere, as every participant does before it applies it.

    For arguments and errors, see `check_fits`; the entry's tensors are read one by one.
    """
    check_fits(entry, method, shapes, round, parent, expected)
    check_numbers(entry.tensors, LARGEST_BROADCAST)


def check_fits(
    entry: Entry,
    method: Method,
    shapes: Mapping[str, Sequence[int]],
    round: int,
    parent: str,
    expected: Expected | None = None,
) -> None:
    """Check an entry, but for the numbers in its tensors.

    Args:
        entry: as it was read, or before it is written.
        method: the experiment's.
        shapes: `method.trained_shapes` of the participant's own model.
        round: the one that comes next.
        parent: hash of the entry before, or the base model's fingerprint.
        expected: what the run's settings say of it; None does not ask.

    Raises:
        InvalidMessage: it is not what `method` makes in this round; the text says why.
    """
    if entry.method != method.name:
        raise InvalidMessage(
            f"round {round} is an entry of {entry.method[:LONGEST_TEXT]}, but the experiment's "
            f"method is {method.name}"
        )
    if dict(entry.options) != method.entry_options():
        raise InvalidMessage(
            f"round {round} was made with {str(dict(entry.options))[:LONGEST_TEXT]}, but the "
            f"experiment's method has {method.entry_options()}"
        )
    check_equal({"round": entry.round, "parent": entry.parent}, {"round": round, "parent": parent})
    check_participants(entry.participants)
    if method.is_private:
        check_fixed_weights(entry.participants)
    elif method.is_weighed:
        check_given_weights(entry.participants)
    else:
        method.check_weights(entry.participants)
    method.check_entry(entry, shapes)
    if expected is None:
        return
    check_equal(
        {SAMPLING_RATE: entry.metrics.get(SAMPLING_RATE)},
        {SAMPLING_RATE: expected.sampling_rate(len(entry.participants))},
    )
    if not expected.silent and not entry.metrics.keys() & _REQUIRED:
        raise InvalidMessage("metrics must have train_loss, or epsilon in a private run")
    method.check_derived(entry, expected)


_REQUIRED = {"train_loss", "epsilon"}
"""Metrics of which every entry has one, unless losses are withheld: where they are private it has
what privacy has cost."""


def check_fixed_weights(participants: Sequence[Participant]) -> None:
    """Raise `InvalidMessage` unless all weigh 1/D, of the D clients that were or may be asked.

    Where groups take turns, D is their mean size, and a group may be larger by less than one.
    """
    first = participants[0].weight
    if not (0 < first <= 1 and first * (len(participants) - 1) < 1):
        raise InvalidMessage(
            "weights must be above 0, and those of all but one sum to less than 1, got "
            f"{first} each"
        )
    for p in participants:
        if p.weight != first:
            raise InvalidMessage(f"weight of {p.client} must be {first}, got {p.weight}")


def check_given_weights(participants: Sequence[Participant]) -> None:
    """Raise `InvalidMessage` unless none is negative, and all sum to at most 1, and above 0."""
    total = sum(p.weight for p in participants)
    if not (min(p.weight for p in participants) >= 0 and 0 < total <= 1 + 1e-9):
        raise InvalidMessage(f"weights must sum to more than 0 and at most 1, got {total}")
