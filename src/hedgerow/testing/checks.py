"""The check of a method: short runs of it on a tiny model, and what must hold of each of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hedgerow.errors import UserError
from hedgerow.methods.base import Method
from hedgerow.testing import promises
from hedgerow.testing.bench import Bench
from hedgerow.testing.damage import check_damaged, check_wrong
from hedgerow.testing.peak import check_memory

WRONG, DAMAGED = 100, 60
"""Of updates, and of entries: inputs that are wrong in one way, and that are damaged anywhere."""


def check_method(method: Method) -> None:
    """Check what hedgerow promises of every method; it takes seconds and no network.

    Three clients with 5, 9 and 14 examples train a random Llama of 16 dimensions in each layer, so
    that options must fit three clients and ranks must be 16 at most. These are the promises:

    - its options are the same after a way through an experiment file;
    - a client gives the model back as it was;
    - the global model becomes the mean of the clients' models, Σ p_k w_k, in float64: it is off by
      what the round's metric `aggregation_error` says, or exact where there is none (methods that
      do something else say so by `averages`);
    - a run's ledger has the same bytes when it is run again, whichever client is first, and when
      it is interrupted and resumed by a new object; replayed, it gives the run's model;
    - updates and entries that are wrong in any way are refused with `InvalidMessage`;
    - the server does not keep all updates, unless what it broadcasts has to grow with them;
    - the model can be evaluated and exported (as an adapter or merged), or refuses in a sentence.

    Args:
        method: with the options that are to be checked.

    Raises:
        AssertionError: a promise is broken; the sentence says which, and by what input.
    """
    with tempfile.TemporaryDirectory(prefix="hedgerow-") as folder, _said_of(method):
        with _promise("a model and clients can be prepared for it"):
            bench = Bench.of(method, Path(folder))
        with _promise("its clients train and its server aggregates"):
            trained = promises.train(bench)
        with _promise("the global model becomes what its metrics say"):
            promises.check_mean(trained)
        with _promise("it can be run and resumed"):
            promises.check_runs(bench)
        with _promise("a run of it can be replayed, evaluated and exported"):
            promises.check_models(bench)
        with _promise("whatever arrives is refused, or is of use"):
            for direction in ("up", "down"):
                check_wrong(trained.case, direction, WRONG)
                check_damaged(trained.case, direction, DAMAGED)
        with _promise("its server takes any number of updates"):
            check_memory(trained.case)


@contextmanager
def _said_of(method: Method) -> Iterator[None]:
    """Have what is said begin with the method's name."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{method.name}: {error}") from error


@contextmanager
def _promise(text: str) -> Iterator[None]:
    """Have what goes wrong say that this promise is broken."""
    try:
        yield
    except AssertionError:
        raise
    except UserError as error:
        raise AssertionError(f"it is not so that {text}: {error}") from error
    except Exception as error:
        raise AssertionError(
            f"it is not so that {text}: {type(error).__name__}: {error}"
        ) from error
