"""Data in memory: rows that were handed over as Python objects instead of being read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hedgerow.data.sources import Row
from hedgerow.errors import UserError


@dataclass(frozen=True, eq=False)
class Held:
    """Rows that an experiment names `(memory)`.

    Attributes:
        clients: each client's rows, by name; only of those whose data are in memory.
        source: rows that `data.partition` divides into clients, if those are in memory.
        test: rows to evaluate on, if those are in memory.
    """

    clients: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    source: Sequence[Row] | None = None
    test: Sequence[Row] | None = None


def as_rows(data: Any, what: str) -> list[Row]:
    """Rows of what people have in memory.

    Args:
        data: a `datasets.Dataset`, a `pandas.DataFrame`, or an iterable of mappings from column
            names to values.
        what: what it is, for messages, as "the data of north".

    Returns:
        One dictionary a row, with Python's own types; a missing value (None, NaN) is None.

    Raises:
        UserError: it is something else, or has no rows.
    """
    if hasattr(data, "to_list") and hasattr(data, "column_names"):  # datasets.Dataset
        found: Iterable[Any] = data.to_list()
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas.DataFrame
        found = data.to_dict("records")
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        found = data
    else:
        hint = ": give one of its splits" if isinstance(data, Mapping) else ""
        raise UserError(
            f"{what} must be rows (a list of dictionaries, a datasets.Dataset or a "
            f"pandas.DataFrame), not {type(data).__name__}{hint}"
        )
    rows: list[Row] = []
    for number, row in enumerate(found, start=1):
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise UserError(
                f"{what}: row {number} must be a dictionary from column names to values, not "
                f"{type(row).__name__}"
            )
        rows.append({key: _plain(value) for key, value in row.items()})
    if not rows:
        raise UserError(f"{what}: holds no rows: give at least one example")
    return rows


def _plain(value: Any) -> Any:
    """A value as a file would have given it, however nested."""
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # NumPy's numbers and arrays
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    is_missing = isinstance(value, float) and math.isnan(value)
    return None if is_missing or type(value).__name__ in ("NAType", "NaTType") else value
