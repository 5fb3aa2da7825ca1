"""Masks: secrets that two clients agree on, and streams of numbers modulo 2^b from them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from hedgerow.optional import check_installed
from hedgerow.privacy.secure.fixed_point import PIECE, Codes

SECRET_BYTES = 32
"""Length of a key, and of the seed of a stream."""


def library(name: str) -> Any:
    """A part of pyca/cryptography.

    Raises:
        UserError: it is not installed.
    """
    check_installed("federation.secure", "cryptography")
    return importlib.import_module(f"cryptography.{name}")


def new_key() -> bytes:
    """Private X25519 key, at random."""
    key = library("hazmat.primitives.asymmetric.x25519").X25519PrivateKey.generate()
    return bytes(key.private_bytes_raw())


def public_of(private: bytes) -> bytes:
    """Public key of a private one."""
    module = library("hazmat.primitives.asymmetric.x25519")
    key = module.X25519PrivateKey.from_private_bytes(private).public_key()
    return bytes(key.public_bytes_raw())


def agreed(private: bytes, public: bytes, context: bytes) -> bytes:
    """Secret that the owners of two keys agree on, by X25519 and HKDF (RFC 5869).

    Args:
        private: one's own key.
        public: the other's.
        context: what both have to be of one mind on; else their secrets differ.

    Raises:
        ValueError: `public` is no key.
    """
    module = library("hazmat.primitives.asymmetric.x25519")
    kdf, hashes = library("hazmat.primitives.kdf.hkdf"), library("hazmat.primitives.hashes")
    other = module.X25519PublicKey.from_public_bytes(public)
    shared = module.X25519PrivateKey.from_private_bytes(private).exchange(other)
    derive = kdf.HKDF(algorithm=hashes.SHA256(), length=SECRET_BYTES, salt=None, info=context)
    return bytes(derive.derive(shared))


def is_key(public: bytes) -> bool:
    """Whether others can agree on a secret with the owner of a public key.

    Not so with points of small order, with which all that anybody agrees on is 0 (RFC 7748, 6.1).
    """
    try:
        agreed(new_key(), public, b"")
    except ValueError:
        return False
    return True


def sealed(secret: bytes, text: bytes, about: bytes) -> bytes:
    """Text that only who has the secret can read or make (ChaCha20-Poly1305).

    Args:
        secret: used for this text alone.
        text: to be sealed.
        about: what is known to both, and has to be the same when it is opened.
    """
    cipher = library("hazmat.primitives.ciphers.aead").ChaCha20Poly1305(secret)
    return bytes(cipher.encrypt(bytes(12), text, about))


def opened(secret: bytes, content: bytes, about: bytes) -> bytes:
    """Text of what `sealed` has made.

    Raises:
        ValueError: it is something else.
    """
    cipher = library("hazmat.primitives.ciphers.aead").ChaCha20Poly1305(secret)
    try:
        return bytes(cipher.decrypt(bytes(12), content, about))
    except library("exceptions").InvalidTag:
        raise ValueError("what is sealed was changed on its way") from None


def add_mask(codes: Iterable[Codes], seed: bytes, *, sign: int) -> None:
    """Add a stream to codes, in place, modulo 2^b.

    Args:
        codes: contiguous arrays, in the order in which they take from the stream.
        seed: of the stream, ChaCha20's key.
        sign: 1, or -1 to take it away.

    Raises:
        ValueError: an array is not contiguous, and so would stay as it is.
    """
    ciphers = library("hazmat.primitives.ciphers")
    cipher = ciphers.Cipher(ciphers.algorithms.ChaCha20(seed, bytes(16)), mode=None)
    stream = cipher.encryptor()
    zeros, drawn = memoryview(bytes(PIECE * 8)), memoryview(bytearray(PIECE * 8))
    for each in codes:
        if not each.flags.c_contiguous:
            raise ValueError("codes must be contiguous, or a copy of them would be masked")
        flat = each.reshape(-1)
        little = flat.dtype.newbyteorder("<")
        for first in range(0, len(flat), PIECE):
            piece = flat[first : first + PIECE]
            stream.update_into(zeros[: piece.nbytes], drawn[: piece.nbytes])
            mask = np.frombuffer(drawn[: piece.nbytes], dtype=little)
            if sign > 0:
                piece += mask
            else:
                piece -= mask
