"""Letters of a secure sum, between the server and each client."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from hedgerow.names import NAME

Name = Annotated[str, Field(pattern=rf"^{NAME.pattern}$")]
"""A client's."""
Secret = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""Key, share or digest of 32 bytes, in hexadecimal digits."""
Session = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
"""Number that tells one try of a sum from all others."""
Sealed = Annotated[str, Field(pattern="^[0-9a-f]{160}$")]
"""Two shares and what shows that they are unchanged, encrypted for one client."""


class _Letter(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Keys(_Letter):
    """Public X25519 keys of a client, for one sum."""

    sealing: Secret
    """To agree on what shares are encrypted with."""
    masking: Secret
    """To agree on masks."""


class Shares(_Letter):
    """A client's shares of its own secrets."""

    sealed: dict[Name, Sealed]
    """For each of the others."""
    digests: dict[Name, Secret]
    """Of the two shares of each, its own too, one after the other (`digest`), by which a wrong one
    is found out."""
    commitment: Secret
    """SHA-256 of the seed of its own mask, by which wrong shares of it are found out."""


class Unopened(_Letter):
    """Complaint about shares that cannot be opened, or are not what their sender's digests say."""

    senders: Annotated[list[Name], Field(min_length=1)]
    """Whose they are."""


class Unmasking(_Letter):
    """Shares of others' secrets, by whose they are."""

    seeds: dict[Name, Secret]
    """Of the seeds of the own masks of those whose numbers arrived."""
    keys: dict[Name, Secret]
    """Of the masking keys of those whose numbers did not."""


Answer = Keys | Shares | Unopened | Unmasking
"""What a client answers; `Unopened` comes beside its numbers, if at all."""


class AskKeys(_Letter):
    """Ask for public keys."""

    stage: Literal["keys"] = "keys"
    session: Session


class AskShares(_Letter):
    """Ask for shares, of those who take part from now on."""

    stage: Literal["shares"] = "shares"
    session: Session
    keys: dict[Name, Keys]
    """Of all who take part."""
    most_examples: Annotated[int, Field(ge=1, lt=2**63)]
    """Number of examples of the client that weighs 1; others weigh less, in proportion."""


class AskMasked(_Letter):
    """Ask for a client's numbers, masked."""

    stage: Literal["masked"] = "masked"
    session: Session
    sealed: dict[Name, Sealed]
    """Shares for this client, by who has sent them; none where codes are not masked."""
    digests: dict[Name, Secret]
    """Of these, as their senders have told the server."""
    most_examples: Annotated[int, Field(ge=1, lt=2**63)]
    """As in `AskShares`."""


class AskUnmasking(_Letter):
    """Ask for what takes the masks from the sum."""

    stage: Literal["unmasking"] = "unmasking"
    session: Session
    arrived: list[Name]
    """Clients whose numbers are in the sum."""


Ask = Annotated[AskKeys | AskShares | AskMasked | AskUnmasking, Field(discriminator="stage")]
"""What the server asks."""


def digest(share: bytes) -> str:
    """First half of a share's SHA-256, in hexadecimal digits.

    To whoever has fewer than t shares of a secret, another is 32 bytes at random, of which a digest
    tells nothing.
    """
    return hashlib.sha256(share).hexdigest()[:32]


def terms(about: str, threshold: int, ask: AskShares) -> bytes:
    """Digest of what all who take part have to be of one mind on; else masks do not cancel.

    Args:
        about: what the sum is of.
        threshold: number of clients that it takes.
        ask: whose keys and weights count.
    """
    return hashlib.sha256(f"{about} {threshold} {ask.model_dump_json()}".encode()).digest()
