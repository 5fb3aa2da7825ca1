"""Shares of a secret, any t of which restore it (Shamir, 1979, over GF(2^128)).

pycryptodome makes them. They are put together here, since it takes the square of t for each secret.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hedgerow.optional import check_installed
from hedgerow.privacy.secure.masks import SECRET_BYTES

_PART = 16
"""Number of bytes that are shared at a time."""


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares 1 … `count` of a secret of `SECRET_BYTES` bytes, each as long as it is.

    Args:
        secret: to be shared.
        threshold: number of shares that restore it, t, at least 2; fewer tell nothing of it.
        count: number of shares.
    """
    parts = [secret[first : first + _PART] for first in range(0, SECRET_BYTES, _PART)]
    shared = [dict(_shamir().split(threshold, count, part)) for part in parts]
    return [b"".join(each[number] for each in shared) for number in range(1, count + 1)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Secret of as many shares as restore it, by their numbers from 1; of others, anything.

    Raises:
        ValueError: a share is of another length.
    """
    if any(len(share) != SECRET_BYTES for share in shares.values()):
        raise ValueError(f"a share has {SECRET_BYTES} bytes")
    factors = _factors(tuple(shares))
    parts = []
    for first in range(0, SECRET_BYTES, _PART):
        total = 0
        for factor, share in zip(factors, shares.values(), strict=True):
            total ^= _product(factor, int.from_bytes(share[first : first + _PART], "big"))
        parts.append(_reduced(total).to_bytes(_PART, "big"))
    return b"".join(parts)


@lru_cache(maxsize=256)
def _factors(numbers: tuple[int, ...]) -> list[int]:
    """What each share is multiplied by, for their sum to be the secret: Π_m x_m / (x_j + x_m).

    Of all secrets that the same clients restore they are the same, and take most of the time:
    pycryptodome's `combine` finds them for each secret.

    Args:
        numbers: of the shares, x_j.
    """
    found = []
    for own in numbers:
        above = below = 1
        for other in numbers:
            if other != own:
                above = _reduced(_product(above, other))
                below = _reduced(_product(below, own ^ other))
        found.append(_reduced(_product(above, _inverse(below))))
    return found


_FIELD = 1 << 128 | 1 << 7 | 1 << 2 | 1 << 1 | 1
"""Polynomial that elements of GF(2^128) are reduced by; bits of a number are coefficients."""


def _product(one: int, other: int) -> int:
    """Product of two elements, as a polynomial that is not reduced yet."""
    found = 0
    while other:
        lowest = other & -other
        found ^= one * lowest
        other ^= lowest
    return found


def _reduced(polynomial: int) -> int:
    """Element that a polynomial of degree below 256 is."""
    while high := polynomial >> 128:
        polynomial ^= _product(_FIELD, high)
    return polynomial


def _inverse(element: int) -> int:
    """Inverse of an element that is not 0, by Euclid's algorithm."""
    one, other, factor, beside = element, _FIELD, 1, 0
    while one != 1:
        shift = one.bit_length() - other.bit_length()
        if shift < 0:
            one, other, factor, beside, shift = other, one, beside, factor, -shift
        one ^= other << shift
        factor ^= beside << shift
    return factor


def _shamir() -> Any:
    check_installed("federation.secure", "Crypto")
    return importlib.import_module("Crypto.Protocol.SecretSharing").Shamir
