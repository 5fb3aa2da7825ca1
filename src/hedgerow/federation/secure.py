"""Secure sums of a round: what clients make of their updates, and the server of their sum.

    client:  q_k = fixed-point codes of w_k · (what its update changes), masked
    server:  Σ q_k, unmasked, / Σ w_k = the mean change, which the method makes its entry of

w_k is 1, or where weights are by size the client's number of examples beside the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter

from hedgerow.errors import ClientFailed, InvalidMessage, UserError
from hedgerow.files import replacing
from hedgerow.lazy import torch
from hedgerow.methods.base import Client, Expected, Method, ServerRound
from hedgerow.privacy.secure.fixed_point import Codes, FixedPoint
from hedgerow.privacy.secure.letters import (
    Answer,
    Ask,
    AskKeys,
    AskMasked,
    AskShares,
    AskUnmasking,
    Unopened,
)
from hedgerow.privacy.secure.party import Party
from hedgerow.settings import SecureSettings
from hedgerow.wire import Kind, Update, check_kinds, kinds

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.experiment import Experiment
    from hedgerow.ledger import Ledger

LARGEST_LOSS = 1000.0
"""Largest magnitude of a training loss in a sum; a larger one counts as this."""

_LOSS = "train_loss"
_CHANGE = "change/"

UNMASKED = "secure.json"
"""File of a record of unmasked sums, in a run's directory, and in a client's folder."""


Weights = tuple[float, float]
"""Weight of a change, and of the loss beside it."""


@dataclass(frozen=True)
class SumOfRound:
    """What a round's sum is of, as server and clients know it from the experiment."""

    settings: SecureSettings
    method: Method
    asked: int
    """Number of clients that the experiment has take part in a round, D."""
    says_loss: bool
    """Whether training losses are summed, too."""

    @property
    def threshold(self) -> int:
        """Number of clients without which there is no sum, t."""
        return self.settings.needed(self.asked)

    @property
    def point(self) -> FixedPoint:
        """Codes of what updates change."""
        return FixedPoint(self.settings.bits, self.settings.largest, self.asked)

    @property
    def loss_point(self) -> FixedPoint:
        """Codes of training losses."""
        return FixedPoint(32, LARGEST_LOSS, self.asked)

    def weights(self, num_examples: int, most_examples: int) -> Weights:
        """Weights of a client's change w_k, and of its loss, which is always by size."""
        uniform = getattr(self.method, "weights", "size") == "uniform"
        share = num_examples / most_examples
        return 1.0 if uniform else share, share

    def kinds(self, round: int, expected: Expected) -> dict[str, Kind]:
        """Kinds of a masked update's tensors."""
        dtype = getattr(torch, f"int{self.settings.bits}")
        found = {
            f"{_CHANGE}{name}": Kind(dtype, tuple(shape))
            for name, shape in self.method.changed(round, expected).items()
        }
        return found | ({_LOSS: Kind(torch.int32, (1,))} if self.says_loss else {})

    def encode(
        self, update: Update, server_round: ServerRound, most_examples: int
    ) -> dict[str, Codes]:
        """Codes of an update, which are still to be masked.

        Args:
            update: as the method made it.
            server_round: the round as the client knows it.
            most_examples: as in `AskShares`.

        Raises:
            ClientFailed: a number of it is too large, or its loss is none.
        """
        codes: dict[str, Codes] = {}
        weight, share = self.weights(update.num_examples, most_examples)
        for name, each in self.method.changes(update, server_round):
            assert isinstance(each, torch.Tensor), "changes of linear methods are tensors"
            try:
                codes[f"{_CHANGE}{name}"] = self.point.encode(each.numpy(), weight)
            except ValueError:
                # How large it is would tell the server of this client alone.
                raise ClientFailed(
                    f"its update has a number above {self.settings.largest:g} in magnitude "
                    "(federation.secure.largest): a larger one, or a lower "
                    "training.learning_rate, may help",
                    kind="its update holds a number above federation.secure.largest",
                ) from None
        if self.says_loss:
            loss = float(np.clip(update.train_loss or 0.0, -LARGEST_LOSS, LARGEST_LOSS))
            if np.isnan(loss):
                raise ClientFailed("its training loss is NaN")
            codes[_LOSS] = self.loss_point.encode(np.array([loss * share]))
        return codes

    def decode(
        self, total: dict[str, Codes], weights: Weights, round: int, expected: Expected
    ) -> tuple[dict[str, Tensor], float]:
        """Mean change by name, in the method's order, and the mean training loss.

        Args:
            total: sums of codes by name, which are taken out of it one by one.
            weights: sums of the weights of changes, and of losses.
            round: from 1.
            expected: what the run's settings say of what is sent.
        """
        mean, (weight, share) = {}, weights
        for name in self.method.changed(round, expected):
            codes = total.pop(f"{_CHANGE}{name}")
            mean[name] = torch.from_numpy(self.point.decode(codes, weight, np.float32))
        loss = self.loss_point.decode(total[_LOSS], share)[0] if self.says_loss else 0.0
        return mean, float(loss)


def about(round: int, parent: str) -> str:
    """What a sum is of, which all have to be of one mind on."""
    return f"round {round} after {parent}"


def as_codes(update: Update) -> Iterator[tuple[str, Codes]]:
    """Codes of a masked update with their names, in whose order they are; read one by one."""
    for name in sorted(update.tensors):
        numbers = update.tensors[name].numpy()
        yield name, numbers.view(f"u{numbers.dtype}")


def with_codes(update: Update, codes: Mapping[str, Codes]) -> Update:
    """The update with codes for what it says of its client alone."""
    tensors = {
        name: torch.from_numpy(each.view(f"int{8 * each.itemsize}")) for name, each in codes.items()
    }
    return replace(update, tensors=tensors, about={}, train_loss=None)


def check_masked(update: Update, sum_of: SumOfRound, expected: Expected) -> None:
    """Raise `InvalidMessage` unless an update has masked codes of what the method changes."""
    update.check_about({})
    check_kinds(kinds(update.tensors), sum_of.kinds(update.round, expected))


class UnmaskedSums:
    """Record of whose sums were to be unmasked, which only grows, whatever becomes of the ledger.

    Of two sums of one round that differ by a client, the difference is that client's update.

    Args:
        file: of the record; none is there before the first sum.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._known = _SUMS.validate_json(file.read_bytes()) if file.exists() else {}
        except ValueError:
            raise UserError(f"{file} is damaged: restore it from a copy") from None

    def of(self, round: int, parent: str) -> list[str] | None:
        """Clients of the sum of a round that was to be unmasked; None where there was none.

        Args:
            round: from 1.
            parent: hash of the entry before.
        """
        return self._known.get(f"{round} {parent}")

    def note(self, round: int, parent: str, clients: Iterable[str]) -> None:
        """Note whose sum is to be unmasked, before anybody is asked to, or hands on a share.

        Raises:
            InvalidMessage: it was that of others before.
        """
        names, before = sorted(clients), self.of(round, parent)
        if before is None:
            self._known[f"{round} {parent}"] = names
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as file:
                file.write(_SUMS.dump_json(self._known))
        elif before != names:
            raise InvalidMessage(
                "the sum of other clients of this round was unmasked before, and the difference "
                "would tell of single ones"
            )


_SUMS = TypeAdapter(dict[str, list[str]])


@dataclass
class SecureClient:
    """A client's part in the secure sums of a run."""

    name: str
    sum_of: SumOfRound
    record: Path | None = None
    """File of the sums that it has helped to unmask, where the server is somebody else
    (`UnmaskedSums`)."""
    _party: Party | None = field(default=None, repr=False)
    _of: tuple[int, str] = (0, "")
    _most_examples: int = 0

    @property
    def has_part(self) -> bool:
        """Whether it has keys of a sum that it has not helped to unmask yet."""
        return self._party is not None and not self._party.is_done

    @property
    def unopened(self) -> Unopened | None:
        """Complaint that goes with its masked update; None where there is none."""
        return None if self._party is None else self._party.unopened

    def answer(self, ask: Ask, round: int, parent: str) -> Answer:
        """What a client answers to a letter.

        Args:
            ask: the letter.
            round: from 1.
            parent: hash of the entry before.

        Raises:
            ClientFailed: it has no part in such a sum.
            UserError: its record is damaged.
        """
        try:
            if isinstance(ask, AskKeys):
                self._party = Party(self.name, self.sum_of.threshold, about(round, parent))
                self._of = round, parent
                return self._party.keys(ask)
            party = self._started(round, parent)
            if isinstance(ask, AskShares):
                self._most_examples = ask.most_examples
                return party.shares(ask)
            if isinstance(ask, AskUnmasking):
                shares = party.unmasking(ask)
                if self.record is not None:
                    UnmaskedSums(self.record).note(round, parent, ask.arrived)
                return shares
        except InvalidMessage as error:
            raise _no_part(str(error)) from None
        raise _no_part("masked codes are made of an update")

    def masked(self, update: Update, ask: AskMasked, server_round: ServerRound) -> Update:
        """An update's masked codes, in its place.

        Args:
            update: as the method made it.
            ask: the server's letter.
            server_round: the round as the client knows it.

        Raises:
            ClientFailed: a number of it is too large, or it has no part in such a sum.
        """
        most = ask.most_examples
        if update.num_examples > most:
            raise _no_part(f"it has more than {most} examples, and cannot weigh 1")
        codes = dict(sorted(self.sum_of.encode(update, server_round, most).items()))
        if self.sum_of.settings.masks:
            try:
                party = self._started(update.round, update.parent)
                if most != self._most_examples:
                    raise InvalidMessage("weights must be those that shares were asked for with")
                party.mask(ask, list(codes.values()))
            except InvalidMessage as error:
                raise _no_part(str(error)) from None
        return with_codes(update, codes)

    def _started(self, round: int, parent: str) -> Party:
        if self._party is None or self._of != (round, parent):
            raise InvalidMessage("its keys are gone, as where its process was started anew")
        return self._party


def _no_part(why: str) -> ClientFailed:
    return ClientFailed(f"secure sum: {why}", kind="it has no part in the secure sum")


def sum_of_round(experiment: Experiment, clients: Callable[[], int]) -> SumOfRound | None:
    """What the sums of an experiment's rounds are of; None where they are not secure.

    Args:
        experiment: the run's.
        clients: tells the number of its clients, whether they have joined or not.
    """
    federation = experiment.federation
    if federation.secure is None:
        return None
    count = clients()
    return SumOfRound(
        settings=federation.secure,
        method=experiment.method,
        asked=federation.drawn_of(count) or count,
        says_loss=experiment.says.losses is True,
    )


def as_known(client: Client, ledger: Ledger, expected: Expected) -> ServerRound:
    """The next round as a client knows it: with its own update alone.

    Args:
        client: itself.
        ledger: its copy.
        expected: what the run's settings say of what is sent.
    """
    round = len(ledger) + 1
    previous = ledger.read(round - 1) if round > 1 else None
    return ServerRound(round, [client], previous, expected, _Nothing())


class _Nothing:
    """Memory of a server that a client is not."""

    def load(self) -> Mapping[str, Tensor]:
        return {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        pass
