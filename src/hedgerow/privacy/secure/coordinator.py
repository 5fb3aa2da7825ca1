"""The server's side of a secure sum."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
    Unopened,
    digest,
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
    faults: dict[str, str] = field(default_factory=dict)
    """Why clients are at fault that have dealt, or handed on, what does not unmask the sum."""
    _keys: dict[str, Keys] = field(default_factory=dict)
    _shares: dict[str, Shares] = field(default_factory=dict)
    _unopened: dict[str, set[str]] = field(default_factory=dict)
    """Senders of shares that a client could not use, by its name."""

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
        everybody = self._keys.keys()
        if shares.sealed.keys() != everybody - {name} or shares.digests.keys() != everybody:
            raise InvalidMessage("its shares are not for all others")
        self._shares[name] = shares

    def asks_masked(self, name: str) -> AskMasked:
        """Letter with the shares for a client."""
        others = {other: shares for other, shares in self._shares.items() if other != name}
        return AskMasked(
            session=self.session,
            sealed={other: shares.sealed[name] for other, shares in others.items()},
            digests={other: shares.digests[name] for other, shares in others.items()},
            most_examples=self.most_examples,
        )

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

    def add_unopened(self, name: str, unopened: Unopened) -> None:
        """Note whose shares a client could not use.

        Raises:
            InvalidMessage: it was sent none by one of them.
        """
        senders = set(unopened.senders)
        if not senders <= self._shares.keys() - {name}:
            raise InvalidMessage("it cannot open shares that it was not sent")
        self._unopened[name] = senders

    def at_odds(self) -> dict[str, str]:
        """Who is to be left out before a sum is unmasked, and why; empty where nobody is.

        With n arrived and t to help, n - t are to spare. Of a sender and a receiver that cannot use
        its shares one is at fault, and nobody can tell which. Up to (n - t)/2 receivers are done
        without, so that as many others may be hostile when they are asked to help, their sender
        among them. Where more complain of a sender, those that are at odds with more than n - t
        others are left out, or, if there are none, those senders. So as long as no more than
        (n - t)/2 are hostile, nobody else is left out, and there is a sum.
        """
        spare = len(self.arrived) - self.threshold
        odds: dict[str, set[str]] = {}
        complaints: Counter[str] = Counter()
        for receiver in self.arrived:
            for sender in self._unopened.get(receiver, ()):
                complaints[sender] += 1
                odds.setdefault(sender, set()).add(receiver)
                odds.setdefault(receiver, set()).add(sender)
        too_many = {sender for sender, count in complaints.items() if count > spare // 2}
        if not too_many:
            return {}
        worst = {name for name, others in odds.items() if len(others) > spare}
        return {name: _at_odds(sorted(odds[name])) for name in sorted(worst or too_many)}

    @property
    def asks_unmasking(self) -> AskUnmasking:
        """The same letter for all who have arrived."""
        return AskUnmasking(session=self.session, arrived=sorted(self.arrived))

    def unmask(self, answers: Mapping[str, Unmasking]) -> None:
        """Take the masks from `total`; whose shares are wrong, or missing, is among `faults`.

        Args:
            answers: of clients that have arrived, by name.

        Raises:
            InvalidMessage: they are too few, or do not fit; `total` is as it was.
        """
        gone = sorted(self._shares.keys() - set(self.arrived))
        if len(answers) < self.threshold:
            raise InvalidMessage(
                f"{len(answers)} of the {self.threshold} clients that it takes have helped to "
                "unmask the sum"
            )
        wrong: dict[str, list[str]] = {}
        seeds = {name: self._shares_of(name, "seeds", answers, wrong) for name in self.arrived}
        keys = {name: self._shares_of(name, "keys", answers, wrong) for name in gone}
        self.faults |= {
            name: f"its shares of what masks {_named(owners)} are missing or wrong"
            for name, owners in wrong.items()
        }
        own = {name: self._restored(name, shares) for name, shares in seeds.items()}
        private = {name: self._restored(name, shares) for name, shares in keys.items()}
        fits = [
            *(_sha256(seed) == self._shares[name].commitment for name, seed in own.items()),
            *(masks.public_of(k).hex() == self._keys[n].masking for n, k in private.items()),
        ]
        for name, fit in zip([*own, *private], fits, strict=True):
            if not fit:
                # Each is what it has told the server of it, when it dealt them.
                self.faults[name] = "the shares that it has dealt do not restore what masks it"
        if not all(fits):
            raise InvalidMessage("the shares that clients have dealt do not unmask the sum")
        agreed = terms(self.about, self.threshold, self.asks_shares)
        codes = list(self.total.values())
        for seed in own.values():
            masks.add_mask(codes, seed, sign=-1)
        for name, key in private.items():
            for other in self.arrived:
                # As the client that is gone would have: with its own it is nothing.
                public = bytes.fromhex(self._keys[other].masking)
                add_pair(codes, key, public, agreed, name, other)

    def _shares_of(
        self,
        owner: str,
        kind: Literal["seeds", "keys"],
        answers: Mapping[str, Unmasking],
        wrong: dict[str, list[str]],
    ) -> dict[int, bytes]:
        """Shares of a client's secret that are what it has dealt, by number, as few as it takes.

        Args:
            owner: the client.
            kind: which of its secrets.
            answers: as in `unmask`.
            wrong: is told whose shares are others, or missing.
        """
        found: dict[int, bytes] = {}
        told = self._shares[owner].digests
        for number, name in enumerate(sorted(self._keys), start=1):
            if name not in answers or owner in self._unopened.get(name, ()):
                continue
            share = bytes.fromhex(getattr(answers[name], kind).get(owner, ""))
            if digest(share) == (told[name][:32] if kind == "seeds" else told[name][32:]):
                found[number] = share
            else:
                wrong.setdefault(name, []).append(owner)
        return dict(list(found.items())[: self.threshold])

    def _restored(self, owner: str, shares: Mapping[int, bytes]) -> bytes:
        """Secret of a client's shares.

        Raises:
            InvalidMessage: they are too few.
        """
        if len(shares) < self.threshold:
            raise InvalidMessage(
                f"{len(shares)} of the {self.threshold} shares that it takes are there of what "
                f"masks {owner}"
            )
        return combine(shares)


def _sha256(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _at_odds(others: Sequence[str]) -> str:
    return (
        f"its shares for {_named(others)}, or theirs for it, could not be opened: one of two is at "
        "fault"
    )


def _named(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {more} more" if more > 0 else "")


_FEW = 3
