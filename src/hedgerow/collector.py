"""Python's collector of garbage, which looks at all that is in memory whenever it is asked to."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OF_PYTHON = 10_000
"""More objects than Python 3.12 has the collector pass over from the start, some hundreds."""
_MADE = 10_000
"""Objects that are made, beyond those that have gone, before a command has the collector look."""


def look_seldom() -> None:
    """Have the collector look seldom, and not at all when this process ends; for the command line.

    Importing torch and transformers makes hundreds of thousands of objects, next to none of which
    are garbage: Python 3.12 has it look after every 700, and several times at all of them at the
    end.
    """
    gc.set_threshold(_MADE, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)


@contextmanager
def passing_over() -> Iterator[None]:
    """Have the collector pass over what is there already, while the block runs.

    Libraries ask it to collect after each training; beside torch and transformers, whose million
    objects are no garbage, that took more than half the time of short ones. Where somebody has it
    pass over objects already, nothing is changed.
    """
    if is_passing_over():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def is_passing_over() -> bool:
    """Whether somebody has the collector pass over objects (`gc.freeze`)."""
    return gc.get_freeze_count() > _OF_PYTHON
