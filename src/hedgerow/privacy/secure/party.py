"""A client's side of a secure sum."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hedgerow.errors import InvalidMessage
from hedgerow.privacy.secure import masks
from hedgerow.privacy.secure.fixed_point import Codes
from hedgerow.privacy.secure.letters import (
    AskKeys,
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
from hedgerow.privacy.secure.shares import split


@dataclass
class Party:
    """A client in one try of one sum; its secrets are in memory alone, and end with it."""

    name: str
    threshold: int
    """Number of clients t without which nothing is unmasked."""
    about: str
    """What the sum is of, which all have to be of one mind on: run, round and entry before."""
    session: str = ""
    _sealing: bytes = field(default=b"", repr=False)
    _masking: bytes = field(default=b"", repr=False)
    _own: bytes = field(default=b"", repr=False)
    _keys: Mapping[str, Keys] = field(default_factory=dict)
    _terms: bytes = b""
    _kept: dict[str, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)
    """Shares of each client's mask seed and masking key."""
    _unopened: list[str] = field(default_factory=list)
    _masked: bool = False

    @property
    def is_done(self) -> bool:
        """Whether it has helped to unmask the sum, and has nothing left to say of it."""
        return self._masked and not self._kept

    @property
    def unopened(self) -> Unopened | None:
        """Complaint about the shares that it could not use; None where there are none."""
        return Unopened(senders=self._unopened) if self._unopened else None

    def keys(self, ask: AskKeys) -> Keys:
        """Draw keys; the public ones."""
        if self.session:
            raise InvalidMessage("keys of this sum were asked for already")
        self.session = ask.session
        self._sealing, self._masking = masks.new_key(), masks.new_key()
        return Keys(
            sealing=masks.public_of(self._sealing).hex(),
            masking=masks.public_of(self._masking).hex(),
        )

    def shares(self, ask: AskShares) -> Shares:
        """Share what takes this client's masks away, between all who take part.

        Raises:
            InvalidMessage: they are too few, this client is not among them, or there are no keys.
        """
        self._check(ask.session, begun=bool(self._sealing), before=not self._keys)
        own = Keys(
            sealing=masks.public_of(self._sealing).hex(),
            masking=masks.public_of(self._masking).hex(),
        )
        if len(ask.keys) < self.threshold or ask.keys.get(self.name) != own:
            raise InvalidMessage(
                f"a sum needs {self.threshold} clients, and this one, got {len(ask.keys)}"
            )
        self._keys = dict(sorted(ask.keys.items()))
        ask = ask.model_copy(update={"keys": self._keys})
        self._terms = terms(self.about, self.threshold, ask)
        self._own = secrets.token_bytes(masks.SECRET_BYTES)
        seeds = split(self._own, self.threshold, len(self._keys))
        keys = split(self._masking, self.threshold, len(self._keys))
        found, told = {}, {}
        for name, seed, key in zip(self._keys, seeds, keys, strict=True):
            told[name] = digest(seed) + digest(key)
            if name == self.name:
                self._kept[name] = seed, key
            else:
                secret = self._secret_of_shares(self.name, name)
                found[name] = masks.sealed(secret, seed + key, self._terms).hex()
        commitment = hashlib.sha256(self._own).hexdigest()
        return Shares(sealed=found, digests=told, commitment=commitment)

    def mask(self, ask: AskMasked, codes: Sequence[Codes]) -> None:
        """Mask a client's codes, in place, once.

        Shares that cannot be used are `unopened`: masks need none, and where enough others have
        theirs, the sum can be unmasked without them.

        Raises:
            InvalidMessage: too few take part, or too few of them are of one mind with this client.
        """
        self._check(ask.session, begun=bool(self._keys), before=not self._masked)
        others = sorted(ask.sealed.keys())
        if (
            not set(others) < self._keys.keys()
            or self.name in others
            or ask.digests.keys() != (ask.sealed.keys())
        ):
            raise InvalidMessage("shares must be from the others who take part")
        if len(others) + 1 < self.threshold:
            raise InvalidMessage(
                f"a sum needs {self.threshold} clients, got {len(others) + 1} that sent shares"
            )
        opened = {name: self._opened(name, ask.sealed[name], ask.digests[name]) for name in others}
        usable = {name: shares for name, shares in opened.items() if shares is not None}
        if len(usable) + 1 < self.threshold:
            raise InvalidMessage(
                f"a sum needs {self.threshold} clients of one mind, and this one can use the "
                f"shares of {len(usable)} others"
            )
        self._kept |= usable
        self._unopened = sorted(opened.keys() - usable.keys())
        self._masked = True
        masks.add_mask(codes, self._own, sign=1)
        for name in others:
            public = bytes.fromhex(self._keys[name].masking)
            add_pair(codes, self._masking, public, self._terms, self.name, name)

    def unmasking(self, ask: AskUnmasking) -> Unmasking:
        """Shares of what takes the masks from the sum of those who have arrived; once.

        Raises:
            InvalidMessage: they are too few, or are not those who take part.
        """
        self._check(ask.session, begun=self._masked, before=bool(self._kept))
        arrived = set(ask.arrived)
        partners = {*self._kept, *self._unopened}
        if len(arrived) < self.threshold or not {self.name} <= arrived <= partners:
            raise InvalidMessage(
                f"a sum needs {self.threshold} of those who take part, and this one, got "
                f"{len(arrived)}"
            )
        kept, self._kept = self._kept, {}
        return Unmasking(
            seeds={name: seed.hex() for name, (seed, _) in kept.items() if name in arrived},
            keys={name: key.hex() for name, (_, key) in kept.items() if name not in arrived},
        )

    def _opened(self, sender: str, content: str, told: str) -> tuple[bytes, bytes] | None:
        """Another's shares for this client; None where they are not what it has told of them."""
        secret = self._secret_of_shares(sender, self.name)
        try:
            text = masks.opened(secret, bytes.fromhex(content), self._terms)
        except ValueError:
            return None
        seed, key = text[: masks.SECRET_BYTES], text[masks.SECRET_BYTES :]
        return (seed, key) if digest(seed) + digest(key) == told else None

    def _secret_of_shares(self, sender: str, receiver: str) -> bytes:
        """What shares of one client for another are encrypted with."""
        other = receiver if sender == self.name else sender
        public = bytes.fromhex(self._keys[other].sealing)
        context = f"shares {sender} {receiver}".encode()
        return _agreed(self._sealing, public, context + self._terms, other)

    def _check(self, session: str, *, begun: bool, before: bool) -> None:
        if session != self.session or not begun or not before:
            raise InvalidMessage("this client has no part in this sum, or has had it already")


def add_pair(
    codes: Iterable[Codes], private: bytes, public: bytes, terms: bytes, owner: str, other: str
) -> None:
    """Add the mask that two clients agree on, as its owner does, in place.

    Args:
        codes: arrays.
        private: the owner's masking key.
        public: the other's.
        terms: what both are of one mind on.
        owner: name of whose mask it is.
        other: name of the other, whose mask is the same with the sign turned.

    Raises:
        InvalidMessage: `public` is no key.
    """
    seed = _agreed(private, public, b"masks" + terms, other)
    masks.add_mask(codes, seed, sign=1 if owner < other else -1)


def _agreed(private: bytes, public: bytes, context: bytes, other: str) -> bytes:
    try:
        return masks.agreed(private, public, context)
    except ValueError:
        raise InvalidMessage(f"the key of {other} is none") from None
