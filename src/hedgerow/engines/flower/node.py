"""A site's own settings: the node config of its SuperNode, which never leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from hedgerow.names import NAME

IDLE = 600.0
"""Seconds without a request after which a worker ends, where the node config does not say."""


class SiteSettings(BaseModel):
    """A site's own settings, Flower's node config; they never leave it."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_min_length=1)

    name: str = Field(pattern=rf"^{NAME.pattern}$")
    """The client's name, as the experiment has it."""
    data: str
    """Its data: a JSON, JSONL, CSV or Parquet file."""
    test: str | None = None
    """Its own test rows, a file as `data`, which are scored there and never leave it; None where
    the experiment asks for none, or for a share of `data`."""
    model: str | None = None
    """The base model's folder; None where the experiment's is a name on the Hub."""
    device: str | None = None
    """Device, as in the experiment: auto, cpu, cuda:1 …"""
    folder: str | None = None
    """Folder for what stays between rounds; None is ~/.hedgerow/NAME."""
    epsilon: float | None = Field(None, gt=0)
    """Largest privacy loss ε of one of its rows in a run: the site takes part only where
    `privacy.level` is `example`, with a secret key, and adds as much noise, or stops, as keeps to
    it; None where it takes part in any."""
    idle: float = Field(IDLE, gt=0)
    """Seconds without a message after which the model is put out of memory."""


def place_of(node: Mapping[str, object]) -> Path:
    """A site's folder, from its node config.

    Raises:
        RuntimeError: the node config does not name the client.
    """
    name = node.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RuntimeError(
            'the node config names no client: give name="…", of letters, digits, `.`, `_` and `-`'
        )
    return Path(str(node.get("folder") or Path.home() / ".hedgerow" / name)).absolute()
