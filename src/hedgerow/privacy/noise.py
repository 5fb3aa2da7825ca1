"""Gaussian noise from a secret key, so that nobody who sees the sum can take it away again.

A run's seed is known to everybody, so noise never derives from it. Whoever adds noise, the server
or a site, keeps a key of its own, and draws by use (round, step) and by what the noise is added to:
a run that goes on after a kill makes the same noise, and a round that is made again with other
sums, as after a rollback, makes another, so that no difference of two releases is without.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hedgerow.errors import UserError
from hedgerow.files import replacing
from hedgerow.lazy import torch
from hedgerow.optional import check_installed

if TYPE_CHECKING:
    from torch import Tensor

PRIVACY_KEY = "privacy.key"
"""File of a key, which never leaves its folder."""

KEY_BYTES = 32
"""Length of a key."""

PIECE = 1 << 14
"""Number of values that are drawn at a time, as many as caches hold; even."""


class NoiseKey:
    """Source of all noise that one participant adds.

    Args:
        key: secret, of `KEY_BYTES` bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        self._key = key

    @staticmethod
    def of_seed(seed: int) -> NoiseKey:
        """Key that derives from a number: noise for experiments, which protects nobody."""
        return NoiseKey(hashlib.sha256(f"hedgerow noise {seed}".encode()).digest())

    @staticmethod
    def kept_in(file: Path) -> NoiseKey:
        """Key in a file, which only its owner may read; it is made where there is none.

        Raises:
            UserError: the file holds something else.
        """
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as content:
                os.fchmod(content.fileno(), 0o600)
                content.write(secrets.token_bytes(KEY_BYTES))
        key = file.read_bytes()
        if len(key) != KEY_BYTES:
            raise UserError(f"{file} is damaged: restore it from a copy")
        return NoiseKey(key)

    @staticmethod
    def of(seed: int | None, file: Path, *, used: bool) -> NoiseKey:
        """Key of a seed where there is one, or else that in a file.

        Args:
            seed: known to everybody.
            file: of the secret key, which is made where there is none.
            used: whether there is noise that derives from the key.

        Raises:
            UserError: the file is damaged, or missing though the key has been used.
        """
        if seed is not None:
            return NoiseKey.of_seed(seed)
        if used and not file.exists():
            raise UserError(
                f"{file} is missing, which noise derives from: restore it from a copy, or begin "
                "anew with another --out"
            )
        return NoiseKey.kept_in(file)

    def normal(self, shape: tuple[int, ...], *use: str | int) -> Tensor:
        """Independent standard normal numbers, other ones for each use.

        Returns:
            A float64 tensor on the CPU.
        """
        drawn = torch.empty(shape, dtype=torch.float64)
        stream = _stream(hmac.digest(self._key, _text(use), "sha256"))
        for piece in torch.split(drawn.view(-1), PIECE) if drawn.numel() else ():
            _fill(piece, stream)
        return drawn

    def beside(self, sums: Mapping[str, Tensor], *use: str | int) -> Iterator[tuple[str, Tensor]]:
        """Standard normal numbers for sums by name, other ones for other sums.

        Yields:
            Name and a float64 tensor on the CPU of the shape of each.
        """
        digest = hashlib.sha256()
        for name, each in sums.items():
            digest.update(f"{name}{tuple(each.shape)}".encode())
            digest.update(each.detach().contiguous().cpu().numpy().data)
        for name, each in sums.items():
            yield name, self.normal(tuple(each.shape), *use, digest.hexdigest(), name)

    def generator(self, *use: str | int) -> np.random.Generator:
        """Generator for samples that have to be secret, another one for each use."""
        seed = hmac.digest(self._key, _text(use), "sha256")
        return np.random.default_rng(int.from_bytes(seed))


def _fill(piece: Tensor, stream: Any) -> None:
    """Standard normal numbers by Box and Muller's transform of a stream of bits."""
    pairs = (len(piece) + 1) // 2
    bits = torch.frombuffer(bytearray(stream.update(bytes(16 * pairs))), dtype=torch.int64)
    # 53 bits each, and never 0, whose logarithm is none.
    uniform = bits.bitwise_right_shift_(11).bitwise_and_(2**53 - 1).double()
    uniform.add_(0.5).mul_(2.0**-53)
    radius, angle = uniform[:pairs].log_().mul_(-2).sqrt_(), uniform[pairs:].mul_(2 * torch.pi)
    torch.mul(radius, angle.cos(), out=piece[:pairs])
    rest = len(piece) - pairs
    torch.mul(radius[:rest], angle.sin_()[:rest], out=piece[pairs:])


def _text(use: tuple[str | int, ...]) -> bytes:
    return "\x1f".join(map(str, use)).encode()


def _stream(key: bytes) -> Any:
    """ChaCha20 with a key that is used once."""
    check_installed("privacy", "cryptography")
    ciphers = importlib.import_module("cryptography.hazmat.primitives.ciphers")
    return ciphers.Cipher(ciphers.algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
