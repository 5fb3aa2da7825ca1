"""One seed per use: everything random derives from the run's seed and what the randomness is for.

No global generator is ever seeded, so that what one client draws cannot depend on who trained
before it, on the engine, or on whether the run was resumed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from hedgerow.lazy import torch


@dataclass(frozen=True)
class Seeds:
    """The source of all randomness of a run; `seed` is `federation.seed`."""

    seed: int

    def derive(self, *purpose: str | int) -> int:
        """A seed of 63 bits for one use, as `derive("batches", round, client)`."""
        text = "\x1f".join(str(part) for part in (self.seed, *purpose))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1

    def numpy(self, *purpose: str | int) -> np.random.Generator:
        """A NumPy generator for one use."""
        return np.random.default_rng(self.derive(*purpose))

    def torch(self, *purpose: str | int) -> torch.Generator:
        """A torch generator on the CPU, whatever the model's device: the same draws everywhere."""
        return torch.Generator().manual_seed(self.derive(*purpose))
