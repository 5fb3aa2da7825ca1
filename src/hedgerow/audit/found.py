"""An audit as audit.json has it, which is written whole and read with care."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hedgerow.errors import UserError
from hedgerow.files import replacing, to_json

AUDIT = "audit.json"
"""File of a run's audit, in its directory."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Left(_Part):
    """What left one client in all rounds."""

    client: str
    rounds: Count
    """Number of entries that have an update of its."""
    failures: Count
    """Number of rounds in which it was asked, and sent nothing that could be used."""
    bytes: Count | None
    """Size of all its updates; None where the run has no record of it, as one of an earlier
    version."""
    tensors: Count | None
    """Number of tensors of its last update."""
    numbers: Count | None
    """Number of elements of these, all together."""
    kinds: dict[str, Count]
    """Number of tensors of its last update by type and name."""
    said: list[str]
    """Names of what its updates say beside the tensors."""


class Members(_Part):
    """How well one client's training rows are told from rows that nobody was trained on."""

    client: str
    rows: Count
    """Number of its training rows that were examined."""
    others: Count
    """Number of rows beside them."""
    of: Literal["its own test rows", "the test data"]
    """Where those are from."""
    auc: Share
    auc_low: Share
    auc_high: Share
    true_positives: Share
    """Share of its rows that are told where at most 1% of the others are taken for its rows."""


class Planted(_Part):
    """What was found by canaries."""

    client: str
    canaries: Count
    planted: Count
    """Number of them that were trained on."""
    repeat: Count
    auc: Share
    auc_low: Share
    auc_high: Share
    guesses: Count
    correct: Count
    epsilon: float = Field(ge=0)
    """Lower bound of ε for a canary, at `delta` and `confidence`."""
    delta: Share
    confidence: Share
    promised: float | None = Field(ge=0)
    """ε that the run promises of a canary, at `delta`; None where it promises nothing."""
    exposure_median: float | None
    """Median exposure of the canaries that were trained on, in bits; None where there is none, or
    none was left out to compare it with."""
    exposure_largest: float | None
    exposure_possible: float | None
    """Exposure of one that the model prefers to all that were left out."""


class Promise(_Part):
    """Differential privacy that the run promises."""

    level: Literal["example", "client"]
    epsilon: float = Field(ge=0)
    delta: Share
    seeded: bool
    """Whether the noise has a seed that everybody knows, so that nobody is protected."""


class Audit(_Part):
    """Audit of a run."""

    format: Literal["hedgerow.audit/1"] = "hedgerow.audit/1"
    round: Count
    """The last round."""
    head: str
    """Hash of its entry."""
    sends: Literal["updates", "nothing", "rows"]
    """What leaves clients: `nothing` where each trains by itself, `rows` where all data are put
    together."""
    masked: bool = False
    """Whether updates were masked (`federation.secure`); audits of earlier versions do not say."""
    private: Promise | None
    left: list[Left]
    members: list[Members]
    planted: Planted | None
    notes: list[str]
    """Sentences on what could not be examined, and why."""


def write(run: Path, audit: Audit) -> None:
    """Write a run's audit into its directory."""
    with replacing(run / AUDIT) as file:
        file.write(to_json(audit.model_dump(), indent=1, ensure_ascii=False).encode() + b"\n")


def read(run: Path) -> Audit | None:
    """The audit in a run's directory; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = run / AUDIT
    try:
        return Audit.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise UserError(
            f"{path} is damaged: give `hedgerow audit {run}` again, which writes it"
        ) from None
