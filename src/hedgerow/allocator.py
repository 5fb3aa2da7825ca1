"""Memory that was freed, and that the C library has kept for what is allocated next."""

from __future__ import annotations

import ctypes
from functools import cache


def give_back() -> None:
    """Give freed memory back to the system, at the end of a stage of a round.

    glibc keeps what tensors of up to 32 MiB have left, in pieces between others that live on, so
    that each stage would find memory of the last one in its way. Other allocators do so by
    themselves: where there is no `malloc_trim`, nothing is done.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    try:
        trim: ctypes._NamedFuncPointer | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # of a static interpreter, or on Windows
        return None
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
    return trim
