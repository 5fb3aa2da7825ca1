"""`hr.explain_memory`: what an experiment's participants will hold in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hedgerow.api.draft import PathLike, draft
from hedgerow.errors import UserError
from hedgerow.experiment import Experiment
from hedgerow.names import MEMORY

if TYPE_CHECKING:
    from hedgerow.footprint import Footprint


def explain_memory(
    experiment: PathLike | Experiment | Mapping[str, Any], *overrides: str, smoke: bool = False
) -> Footprint:
    """Work out what a client, a site and the server of an experiment will hold in memory, by part.

    Of the base model only its config.json is read, from the Hub if need be; of the data, nothing.

    Args:
        experiment: an experiment file, an `Experiment`, or a mapping of sections.
        overrides: `key.path=value`, as on the command line.
        smoke: of a file: the variant of itself that takes seconds.

    Returns:
        Bytes by role and part, at each role's peak, beside the interpreter and its libraries.

    Raises:
        UserError: naming what in the experiment does not fit; or why it cannot be worked out.
    """
    from hedgerow.footprint import footprint_of

    drafted = draft(
        experiment,
        where="hr.explain_memory",
        smoke=smoke,
        model=None,
        tokenizer=None,
        clients=None,
        test=None,
        method=None,
        sections={},
        rounds=None,
    )
    loaded = drafted.load(overrides)
    if loaded.model.path == MEMORY:
        raise UserError("hr.explain_memory: name the base model's folder, or its name on the Hub")
    return footprint_of(loaded)
