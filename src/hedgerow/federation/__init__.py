"""Federation: the round loop, what arrives in a round, and a client's part in one."""

from hedgerow.federation.loop import run

__all__ = ["run"]
