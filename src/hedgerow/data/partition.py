"""Dividing one source into clients: uneven divisions by the partitioners of flwr-datasets.

The partitioners see one column and nothing else of the data. Neither `FederatedDataset` nor the
visualisations of flwr-datasets are used: those are the parts of it that send telemetry.
"""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hedgerow.data.rows import Row, is_empty, value_of
from hedgerow.errors import UserError
from hedgerow.optional import check_installed

if TYPE_CHECKING:
    from hedgerow.settings import Partition


def check_library(settings: Partition) -> None:
    """Raise a `UserError` where the library that divides so is missing."""
    if settings.kind in ("dirichlet", "shard"):
        check_installed(f"data.partition.kind: {settings.kind}", "flwr_datasets")


def partition(rows: Sequence[Row], settings: Partition, seed: int) -> dict[str, list[int]]:
    """Give each row to exactly one client.

    Args:
        rows: the whole source.
        settings: how to divide it.
        seed: decides all that is random; the division by `column` has nothing random.

    Returns:
        The clients' names, and the indices of their rows in ascending order. By `dirichlet` some
        may have none, where the draw is very uneven.

    Raises:
        UserError: there are too few rows, a row has no value to divide by, or flwr-datasets is not
            installed.
    """
    check_library(settings)
    if settings.kind == "column":
        labels, codes = _labels(rows, settings.column)
        return dict(zip(_slugs(labels), _by_column(codes), strict=True))

    clients = settings.clients
    assert clients is not None, "`Partition` demands it for all other kinds"
    if clients > len(rows):
        raise UserError(
            f"`data.partition.clients`: {len(rows)} rows are too few for {clients} clients: "
            f"give at most {len(rows)}"
        )
    if settings.kind == "iid":
        parts = _iid(len(rows), clients, seed)
    else:
        _, codes = _labels(rows, settings.column)
        if settings.kind == "dirichlet":
            parts = _dirichlet(codes, clients, settings.alpha, seed)
        else:
            parts = _shards(codes, clients, settings.shards, seed)
    return {f"client-{number:03d}": part for number, part in enumerate(parts)}


def _iid(rows: int, clients: int, seed: int) -> list[list[int]]:
    order = np.random.default_rng(seed).permutation(rows)
    return [sorted(part.tolist()) for part in np.array_split(order, clients)]


def _dirichlet(codes: Sequence[int], clients: int, alpha: float, seed: int) -> list[list[int]]:
    from flwr_datasets.partitioner import DirichletPartitioner

    def drawn(smallest: int) -> list[list[int]]:
        partitioner = DirichletPartitioner(
            clients, "value", alpha, min_partition_size=smallest, shuffle=False, seed=seed
        )
        return [sorted(part) for part in _divide(partitioner, codes)]

    try:
        # A larger minimum would be met by drawing again and again, which skews the distribution.
        return drawn(1)
    except ValueError:  # after ten draws; very many clients, or a very small alpha, leave some out
        return drawn(0)


def _shards(codes: Sequence[int], clients: int, shards: int, seed: int) -> list[list[int]]:
    from flwr_datasets.partitioner import ShardPartitioner

    if clients * shards > len(codes):
        raise UserError(
            f"`data.partition.shards`: {len(codes)} rows are too few for {shards} shards for each "
            f"of {clients} clients: lower `shards` or `clients`"
        )
    # The partitioner leaves out the rows that do not fill a shard, so what it deals is not rows
    # but whole shards, whose sizes then differ by one row at most.
    pieces = np.array_split(np.argsort(codes, kind="stable"), clients * shards)
    partitioner = ShardPartitioner(
        clients, "value", num_shards_per_partition=shards, shuffle=False, seed=seed
    )
    dealt = _divide(partitioner, range(len(pieces)))
    return [sorted(np.concatenate([pieces[i] for i in part]).tolist()) for part in dealt]


def _by_column(codes: Sequence[int]) -> list[list[int]]:
    # Stable, so that each client's rows stay in their order.
    order, sizes = np.argsort(codes, kind="stable"), np.bincount(codes)
    return [part.tolist() for part in np.split(order, np.cumsum(sizes)[:-1])]


def _divide(partitioner: Any, codes: Iterable[int]) -> list[list[int]]:
    """The row numbers that `partitioner` gives to each client, by the rows' codes."""
    from datasets import Dataset

    values = list(codes)
    # It draws a progress bar, and warns of draws that it repeats.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        partitioner.dataset = Dataset.from_dict({"row": range(len(values)), "value": values})
        return [
            partitioner.load_partition(number)["row"][:]
            for number in range(partitioner.num_partitions)
        ]


def _labels(rows: Sequence[Row], column: str | None) -> tuple[list[Any], list[int]]:
    """The distinct values of a column in order, and for each row the index of its value."""
    assert column is not None, "`Partition` demands it for all kinds but iid"
    values = []
    for row in rows:
        value = value_of(row.columns, column)
        if is_empty(value) or not isinstance(value, str | int | float):
            problem = "no value" if is_empty(value) else f"a {type(value).__name__}"
            raise UserError(
                f"`data.partition.column`: {row.place(row.where)} has {problem} in {column!r}, "
                f"where text or a number must be (columns there: {', '.join(sorted(row.columns))})"
            )
        values.append(value)
    if any(isinstance(value, str) for value in values):
        values = [str(value) for value in values]
    labels = sorted(set(values))
    code = {label: number for number, label in enumerate(labels)}
    return labels, [code[value] for value in values]


def _slugs(labels: Iterable[Any]) -> list[str]:
    """Names for clients that are valid, distinct, and still tell which value they stand for."""
    taken: dict[str, None] = {}
    for label in labels:
        ascii_text = unicodedata.normalize("NFKD", str(label)).encode("ascii", "ignore").decode()
        # In lower case, since names become files, and some file systems ignore case.
        slug = re.sub(r"[^a-z0-9._-]+", "-", ascii_text.lower()).strip("._-")[:60] or "client"
        name, number = slug, 1
        while name in taken:
            number += 1
            name = f"{slug}-{number}"
        taken[name] = None
    return list(taken)
