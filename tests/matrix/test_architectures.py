import pytest

from hedgerow.testing.models import tiny_llama

from . import rows
from .architectures import ARCHITECTURES
from .plain import Reader
from .walk import Outcome, _compare, _read, walk

pytestmark = pytest.mark.filterwarnings("ignore")  # of slow kernels, which we do not choose


@pytest.fixture(scope="session")
def reader():
    with Reader() as process:
        yield process


def architectures(quick):
    return [pytest.param(each, id=each.name) for each in ARCHITECTURES if each.quick == quick]


def check(architecture, tmp_path, reader):
    outcome = walk(architecture, tmp_path, reader)
    assert not outcome.faults, "\n".join(outcome.faults)


@pytest.mark.parametrize("architecture", architectures(quick=True))
def test_quick(architecture, tmp_path, reader):
    check(architecture, tmp_path, reader)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures(quick=False))
def test_all(architecture, tmp_path, reader):
    check(architecture, tmp_path, reader)


def test_rows_show_what_padding_would_change():
    """Prompts of different lengths, beside each other in batches of four, and some of equal."""
    lengths = [len(row["instruction"]) for row in rows.TEST]
    assert len(set(lengths)) > 2


def test_a_deviation_is_a_fault(tmp_path, reader):
    """The process without hedgerow sees which weights it is given."""
    outcome = Outcome(ARCHITECTURES[0])
    found = _read(outcome, reader, "base", tiny_llama(tmp_path / "base"), None)
    loss = sum(found["nats"]) / found["tokens"]
    _compare(outcome, "base", loss + 2e-5, {}, found)
    assert len(outcome.faults) == 1
