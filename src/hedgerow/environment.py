"""What this process is told before it starts: no telemetry, no chatter, no hoarding of memory."""

from __future__ import annotations

import contextlib
import ctypes
import os


def quieten() -> None:
    """Set what is not set; to be called before the libraries are imported."""
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns at every start
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)


def give_memory_back() -> None:
    """Have freed blocks of a megabyte and more go back to the system at once (where it is glibc).

    Flower handles pieces of messages in threads, each with a heap of its own, where what is freed
    would stay: a gigabyte took 3.2 times its size instead of 2.1.
    """
    with contextlib.suppress(OSError, AttributeError):
        m_mmap_threshold = -3
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)
