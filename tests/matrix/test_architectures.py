import json

import pytest

from hedgerow.testing.models import tiny_llama

from . import rows
from .architectures import ARCHITECTURES, build
from .plain import Reader
from .walk import CLOSE, Outcome, _compare, _read, walk

pytestmark = pytest.mark.filterwarnings("ignore")  # of slow kernels, which we do not choose
EXPERTS = {"mixtral", "qwen3_moe", "deepseek_v3", "olmoe"}
"""Architectures whose experts are trained, whatever becomes of others'."""


@pytest.fixture(scope="session")
def reader():
    with Reader() as process:
        yield process


def architectures(quick):
    def marks(each):
        return [pytest.mark.xfail(reason=each.lacking, strict=True)] if each.lacking else []

    chosen = [each for each in ARCHITECTURES if each.quick == quick]
    return [pytest.param(each, id=each.name, marks=marks(each)) for each in chosen]


def check(architecture, tmp_path, reader):
    outcome = walk(architecture, tmp_path, reader)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert bool(outcome.refused) == bool(architecture.refused), outcome.refused
    assert architecture.name not in EXPERTS or outcome.experts


@pytest.mark.parametrize("architecture", architectures(quick=True))
def test_quick(architecture, tmp_path, reader):
    check(architecture, tmp_path, reader)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures(quick=False))
def test_all(architecture, tmp_path, reader):
    check(architecture, tmp_path, reader)


@pytest.mark.parametrize(
    "name",
    ["gpt_neox", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "mixtral"))],
)
def test_command_line(name, hedgerow, tmp_path):
    """Exports by command line, which `hedgerow evaluate` reads as models."""
    architecture = next(each for each in ARCHITECTURES if each.name == name)
    content = {
        "model": {"path": str(build(architecture, tmp_path / "base"))},
        "data": {"clients": {}, "test": "test.json", "prompt": "plain", "max_length": 96},
        "method": {"name": "flora", "ranks": [2, 3]},
        "training": {"steps": 2, "batch_size": 3, "learning_rate": 0.02},
        "federation": {"rounds": 1},
    }
    test = tmp_path / "test.json"
    test.write_text(json.dumps(rows.TEST))
    for client, examples in rows.CLIENTS.items():
        (tmp_path / f"{client}.json").write_text(json.dumps(examples))
        content["data"]["clients"][client] = f"{client}.json"
    (tmp_path / "experiment.yaml").write_text(json.dumps(content))

    run = tmp_path / "run"
    assert hedgerow("run", tmp_path / "experiment.yaml", "--out", run).code == 0
    losses = [json.loads(line)["eval_loss"] for line in (run / "metrics.jsonl").open()]
    assert abs(losses[0] - losses[-1]) > 1e-3
    for kind in ("adapter", "merged"):
        out = tmp_path / kind
        assert hedgerow("export", run, out, "--to", kind).code == 0
        options = ["data.prompt=plain", "data.max_length=96", "--data", test, "--json"]
        evaluated = hedgerow("evaluate", out, *options)
        assert evaluated.code == 0, evaluated.err
        assert abs(json.loads(evaluated.out)["eval_loss"] - losses[-1]) <= CLOSE, kind


def test_rows_show_what_padding_would_change():
    """Prompts of different lengths, beside each other in batches of four, and some of equal."""
    lengths = [len(row["instruction"]) for row in rows.TEST]
    assert len(set(lengths)) > 2


def test_a_deviation_is_a_fault(tmp_path, reader):
    outcome = Outcome(ARCHITECTURES[0])
    found = _read(outcome, reader, "base", tiny_llama(tmp_path / "base"), None)
    loss = sum(found["nats"]) / found["tokens"]
    _compare(outcome, "base", loss, {}, found)
    assert not outcome.faults
    _compare(outcome, "base", loss + 2e-5, {}, found)
    assert len(outcome.faults) == 1
