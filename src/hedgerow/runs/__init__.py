"""Runs: their directories, and the model of any of their rounds put together again."""

from hedgerow.runs.opening import Loader, check_client, check_round, model_at, opened

__all__ = ["Loader", "check_client", "check_round", "model_at", "opened"]
