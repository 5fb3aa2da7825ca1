"""The server's side of a secure sum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from hedgerow.errors import InvalidMessage
from hedgerow.privacy.secure import masks
from hedgerow.privacy.secure.fixed_point import Codes
from hedgerow.privacy.secure.letters import (
    AskMasked,
    AskShares,
    AskUnmasking,
    Keys,
    Shares,
    Unmasking,
    terms,
)
from hedgerow.privacy.secure.party import add_pair
from hedgerow.privacy.secure.shares import combine


@dataclass
class Coordinator:
    """Server in one try of one sum: it passes letters on, adds, and takes masks away."""

    threshold: int
    """Number of clients t without which nothing can be unmasked."""
    about: str
    """What the sum is of, as `Party.about`."""
    session: str
    most_examples: int
    """As in `AskShares`."""
    total: dict[str, Codes] = field(default_factory=dict)
    """Sum of what has arrived, masked, by name."""
    arrived: list[str] = field(default_factory=list)
    _keys: dict[str, Keys] = field(default_factory=dict)
    _shares: dict[str, Shares] = field(default_factory=dict)

    def add_keys(self, name: str, keys: Keys) -> None:
        """Note a client's public keys.

        Raises:
            InvalidMessage: they are none, so that everybody else would fail for them.
        """
        for key in (keys.sealing, keys.masking):
            if not masks.is_key(bytes.fromhex(key)):
                raise InvalidMessage("its keys are none that others could agree on masks with")
        self._keys[name] = keys

    @property
    def asks_shares(self) -> AskShares:
        """The same letter for all who have sent keys."""
        keys = dict(sorted(self._keys.items()))
        return AskShares(session=self.session, keys=keys, most_examples=self.most_examples)

    def add_shares(self, name: str, shares: Shares) -> None:
        """Note a client's shares.

        Raises:
            InvalidMessage: they are not for all others.
        """
        if shares.sealed.keys() != self._keys.keys() - {name}:
            raise InvalidMessage("its shares are not for all others")
        self._shares[name] = shares

    def asks_masked(self, name: str) -> AskMasked:
        """Letter with the shares for a client."""
        sealed = {
            other: self._shares[other].sealed[name] for other in self._shares if other != name
        }
        return AskMasked(session=self.session, sealed=sealed, most_examples=self.most_examples)

    def add(self, name: str, codes: Iterable[tuple[str, Codes]]) -> None:
        """Add a client's masked codes.

        Args:
            name: the client's.
            codes: with their names, of the same shapes and in the same order for all clients; one
                is in memory at a time.
        """
        for key, each in codes:
            if key in self.total:
                self.total[key] += each
            else:
                self.total[key] = np.array(each, order="C")
        self.arrived.append(name)

    @property
    def asks_unmasking(self) -> AskUnmasking:
        """The same letter for all who have arrived."""
        return AskUnmasking(session=self.session, arrived=sorted(self.arrived))

    def unmask(self, answers: Mapping[str, Unmasking]) -> None:
        """Take the masks from `total`.

        Args:
            answers: of clients that have arrived, by name.

        Raises:
            InvalidMessage: they are too few, or do not fit.
        """
        gone = sorted(self._shares.keys() - set(self.arrived))
        fitting = {
            name: answer
            for name, answer in answers.items()
            if answer.seeds.keys() == set(self.arrived) and answer.keys.keys() == set(gone)
        }
        if len(fitting) < self.threshold:
            raise InvalidMessage(
                f"{len(fitting)} of the {self.threshold} clients that it takes have helped to "
                "unmask the sum"
            )
        numbers = {name: number for number, name in enumerate(sorted(self._keys), start=1)}
        helpers = sorted(fitting)[: self.threshold]
        agreed = terms(self.about, self.threshold, self.asks_shares)
        codes = list(self.total.values())
        for name in self.arrived:
            shares = {numbers[h]: bytes.fromhex(fitting[h].seeds[name]) for h in helpers}
            seed = combine(shares)
            if hashlib.sha256(seed).hexdigest() != self._shares[name].commitment:
                raise InvalidMessage(f"shares of the mask of {name} do not fit")
            masks.add_mask(codes, seed, sign=-1)
        for name in gone:
            shares = {numbers[h]: bytes.fromhex(fitting[h].keys[name]) for h in helpers}
            private = combine(shares)
            if masks.public_of(private).hex() != self._keys[name].masking:
                raise InvalidMessage(f"shares of the key of {name} do not fit")
            for other in self.arrived:
                # As the client that is gone would have: with its own it is nothing.
                public = bytes.fromhex(self._keys[other].masking)
                add_pair(codes, private, public, agreed, name, other)
