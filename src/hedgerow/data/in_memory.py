"""Data in memory: rows that were handed over as Python objects instead of being read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hedgerow.data.rows import Records, check_distinct
from hedgerow.data.sources import Classes, classes_of
from hedgerow.errors import UserError


@dataclass(frozen=True, eq=False)
class Held:
    """Rows that an experiment names `(memory)`.

    Attributes:
        clients: each client's rows, by name; only of those whose data are in memory.
        source: rows that `data.partition` divides into clients, if those are in memory.
        test: rows to evaluate on, if those are in memory.
        client_tests: each client's own test rows, by name; only of those whose are in memory.
    """

    clients: Mapping[str, Records] = field(default_factory=dict)
    source: Records | None = None
    test: Records | None = None
    client_tests: Mapping[str, Records] = field(default_factory=dict)

    @property
    def has_examples(self) -> bool:
        """Whether any client's rows to learn from are in memory."""
        return bool(self.clients) or self.source is not None


def as_records(data: Any, what: str) -> Records:
    """Rows of what people have in memory.

    Args:
        data: a `datasets.Dataset`, a `pandas.DataFrame`, or an iterable of mappings from column
            names to values.
        what: what it is, for messages, as "the data of north".

    Returns:
        One record a row.

    Raises:
        UserError: it is something else, or has no rows.
    """
    classes: Classes = {}
    if hasattr(data, "to_list") and hasattr(data, "column_names"):  # datasets.Dataset
        found: Iterable[Any] = data.to_list()
        classes = classes_of(data.features)
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas.DataFrame
        check_distinct(list(data.columns), what)
        found = data.to_dict("records")
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        found = data
    else:
        hint = ": give one of its splits" if isinstance(data, Mapping) else ""
        raise UserError(
            f"{what} must be rows (a list of dictionaries, a datasets.Dataset or a "
            f"pandas.DataFrame), not {type(data).__name__}{hint}"
        )
    records = Records.of(found, what, classes=classes, typed=found is not data)
    if not len(records):
        raise UserError(f"{what}: holds no rows: give at least one example")
    return records
