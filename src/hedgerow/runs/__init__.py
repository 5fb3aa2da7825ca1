"""Runs: their directories, and the model of any of their rounds put together again."""

from hedgerow.runs.opening import check_client, check_round, model_at, opened

__all__ = ["check_client", "check_round", "model_at", "opened"]
