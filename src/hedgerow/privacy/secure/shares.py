"""Shares of a secret, any t of which restore it (Shamir, 1979, over GF(2^128), by pycryptodome)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from hedgerow.errors import check_installed
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
    parts = range(0, SECRET_BYTES, _PART)
    return b"".join(
        bytes(_shamir().combine([(n, s[first : first + _PART]) for n, s in shares.items()]))
        for first in parts
    )


def _shamir() -> Any:
    check_installed("Crypto", "federation.secure: pycryptodome", "privacy")
    return importlib.import_module("Crypto.Protocol.SecretSharing").Shamir
