"""What this process is told before it starts: no telemetry, no chatter."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quieten_imports() -> None:
    """Keep libraries from saying, when they are imported, what they would like to have beside them.

    That alone, since this process may be anybody's: a notebook, say, which would show it in red.
    """
    # peft imports bitsandbytes where it is installed, which names a faster kernel that it misses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers imports tqdm, whose bars would be widgets in a notebook.
    warnings.filterwarnings("ignore", message="IProgress not found")


def quieten() -> None:
    """Set what is not set; to be called before the libraries are imported."""
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns at every start
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_CONSOLE": "off",  # or it wraps what this process prints
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars
