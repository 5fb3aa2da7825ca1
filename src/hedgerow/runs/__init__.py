"""Runs: their directories, and the model of any of their rounds put together again."""

from hedgerow.runs.opening import Loader, check_client, check_round, model_at, opened
from hedgerow.runs.personal import RunModels

__all__ = ["Loader", "RunModels", "check_client", "check_round", "model_at", "opened"]
