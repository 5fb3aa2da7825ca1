"""Seconds by part: what a round spends its time on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall-clock seconds by part; time in an inner part is not counted in the outer one.

    Example:
        >>> clock = Clock()
        >>> with clock("aggregate"):  # consumes updates …
        ...     with clock("train"):  # … that are being trained meanwhile
        ...         pass
        >>> sorted(clock.seconds)
        ['aggregate', 'train']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block's time to `part`."""
        self._inner.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            self.seconds[part] = self.seconds.get(part, 0.0) + elapsed - self._inner.pop()
            self._inner[-1] += elapsed
