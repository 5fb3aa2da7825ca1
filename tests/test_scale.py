"""Bytes of a round that are worked out before it (`footprint_of`), beside those of real rounds.

Peaks of memory are compared with measured ones by the slow tests of `test_footprint.py`.
"""

import pytest

from hedgerow.bundled import MODEL
from hedgerow.engines import local
from hedgerow.experiment import Experiment
from hedgerow.federation.fleet import Unwatched
from hedgerow.footprint import footprint_of
from hedgerow.runs.rows import read_rows

CLIENTS, ROUNDS = 3, 2


def header_bytes(file):
    """Bytes of a safetensors file before its tensors."""
    return 8 + int.from_bytes(file[:8], "little")


def an_experiment(method, model):
    """Three clients that take part in both rounds."""
    return Experiment(
        model={"path": str(model), "device": "cpu"},
        data={
            "source": "demo",
            "rows": 12,
            "partition": {"kind": "iid", "clients": CLIENTS},
            "prompt": "plain",
            "max_length": 96,
        },
        method=method,
        training={"steps": 1, "batch_size": 1},
        federation={"rounds": ROUNDS},
    )


def rounds_of(experiment, out):
    """Bytes up and down of each round of a run, by metrics.jsonl, less the files' headers."""
    headers = []

    class Fleet(local.LocalFleet):
        def train(self, *arguments):
            for result in super().train(*arguments):
                headers.append(header_bytes(result.update))
                yield result

    local.run(experiment, out, Unwatched(), fleet=Fleet)
    found = []
    for row in read_rows(out)[1:]:
        entry = (out / f"ledger/{row['round']:04d}.safetensors").read_bytes()
        sent, headers = sum(headers[:CLIENTS]), headers[CLIENTS:]
        down = row["bytes_down"] - CLIENTS * header_bytes(entry)
        found.append((row["bytes_up"] - sent, down))
    assert not headers
    return found


FEDIT, FEDAVG, FERRET = {"name": "fedit"}, {"name": "fedavg"}, {"name": "ferret"}


@pytest.mark.parametrize(
    ("method", "is_bundled"),
    [
        pytest.param({**FEDIT, "ranks": 4}, True, id="fedit, rank 4"),
        pytest.param({**FEDIT, "ranks": 8}, True, id="fedit, rank 8"),
        pytest.param(FEDAVG, True, id="fedavg"),
        pytest.param(FEDAVG, False, id="fedavg, a smaller model"),
    ],
)
def test_bytes_are_those_of_every_round(method, is_bundled, tiny_model, tmp_path):
    experiment = an_experiment(method, MODEL if is_bundled else tiny_model)
    said = footprint_of(experiment)
    assert rounds_of(experiment, tmp_path / "run") == [(said.bytes_up, said.bytes_down)] * ROUNDS


def test_how_short_a_code_gets_is_known_but_for_some_bytes(tmp_path):
    """How many bytes the numbers of a round are coded in depends on these, a little."""
    experiment = an_experiment(FERRET, MODEL)
    said = footprint_of(experiment)
    for up, down in rounds_of(experiment, tmp_path / "run"):
        assert up == pytest.approx(said.bytes_up, abs=64 * CLIENTS)
        assert down == pytest.approx(said.bytes_down, abs=64 * CLIENTS)


def test_a_stack_is_said_to_be_one_adapter_longer_at_most(tmp_path):
    """Each client sends its own rank; who goes on from an adapter adds that to the stack."""
    experiment = an_experiment({"name": "flora", "ranks": [8, 4, 2]}, MODEL)
    said = footprint_of(experiment)
    (first_up, first_down), (up, down) = rounds_of(experiment, tmp_path / "run")
    assert first_up == up == said.bytes_up < CLIENTS * said.update
    assert first_down < down <= said.bytes_down <= down + CLIENTS * said.update
