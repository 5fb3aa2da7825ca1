"""Libraries that only some features need, each of them brought by an extra of the package."""

from __future__ import annotations

import importlib.util

from hedgerow.errors import UserError

LIBRARIES = {
    "Crypto": ("pycryptodome", "privacy"),
    "altair": ("altair", "report"),
    "bitsandbytes": ("bitsandbytes", "quantized"),
    "cryptography": ("cryptography", "privacy"),
    "dp_accounting": ("dp-accounting", "privacy"),
    "flwr": ("flwr", "flower"),
    "flwr_datasets": ("flwr-datasets", "partition"),
    "lm_eval": ("lm-eval", "harness"),
    "mlflow": ("mlflow", "mlflow"),
    "openai": ("openai", "judge"),
    "rouge_score": ("rouge-score", "metrics"),
    "sacrebleu": ("sacrebleu", "metrics"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "trl": ("trl", "trl"),
    "vl_convert": ("vl-convert-python", "report"),
    "wandb": ("wandb", "wandb"),
}
"""Package that has a module, and the extra that brings it, by the module's name."""


def check_installed(use: str, *modules: str) -> None:
    """Raise a `UserError` where a feature's libraries are not installed.

    Args:
        use: what needs them, for `needs …` to follow.
        modules: names of theirs, mostly in `LIBRARIES`; those of a plug-in may be others.
    """
    for module in modules:
        # A part of a package is found by importing the package, where that is there.
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise not_installed(use, module)


def not_installed(use: str, module: str) -> UserError:
    """The mistake of asking for a feature whose library is not installed."""
    if module not in LIBRARIES:
        return UserError(f"{use} needs the module {module}, which is not installed: install it")
    package, extra = LIBRARIES[module]
    return UserError(
        f"{use} needs {package}, which is not installed: pip install 'hedgerow[{extra}]'"
    )
