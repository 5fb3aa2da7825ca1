"""Rebuilding the house changes no byte: ledgers are what they were, and those of 0.1 are read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from support import pins
from support.configurations import METHOD_OPTIONS, MORE_OPTIONS, method_of

PINNED = json.loads(pins.HASHES.read_text())
HERE = PINNED["entries"].get(pins.arithmetic(), {}) if torch.__version__ == PINNED["torch"] else {}
"""Entries as they were made on a processor like this one, by configuration."""
OLD = pins.HASHES.parent / "0.1"
CONFIGURATION = {
    "flora": "flora own, cut",
    "flora_shared": "flora shared, cut",
    "ferret": "ferret with momentum",
    "ferret_lora": "ferret over lora",
}
"""The configurations of the runs of 0.1 that are kept, where they are not called like a method."""

same_arithmetic = pytest.mark.skipif(
    not HERE,
    reason="this processor, or this torch, adds in another order than where the bytes were pinned",
)


def test_every_configuration_is_pinned():
    pinned = set().union(*PINNED["entries"].values())
    assert (METHOD_OPTIONS | MORE_OPTIONS).keys() == pinned


@same_arithmetic
@pytest.mark.parametrize("name", METHOD_OPTIONS | MORE_OPTIONS)
def test_a_run_has_the_bytes_that_it_had(name, hedgerow, experiment, tmp_path):
    if name not in HERE:
        pytest.skip("this configuration was pinned on another processor")
    path = experiment()
    content = yaml.safe_load(path.read_text()) | {"method": method_of(name)}
    path.write_text(yaml.safe_dump(content))
    result = hedgerow("run", path, *pins.overrides(name), "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert pins.entry_hashes(tmp_path / "run") == HERE[name]


@pytest.fixture(params=sorted(path.stem for path in OLD.glob("*.zip")))
def old_run(request, experiment, tiny_model, tmp_path) -> Path:
    """A run of version 0.1, beside the data that it was made of."""
    experiment()
    run = tmp_path / request.param
    with zipfile.ZipFile(OLD / f"{request.param}.zip") as archive:
        archive.extractall(run)
    file = run / "experiment.yaml"
    content = yaml.safe_load(file.read_text())
    content["model"]["path"] = str(tiny_model)
    for key in ("test", "clients"):
        content["data"][key] = str(tmp_path / content["data"][key])
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return run


def test_a_run_of_the_version_before_is_read(old_run, hedgerow, tmp_path):
    """It verifies, evaluates to the loss that it had, is shown, exports; its adapter is one."""
    rows = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    client = []
    if old_run.stem == "standalone":
        client = ["--client", "client-001"]
    result = hedgerow("ledger", "verify", old_run)
    assert result.code == 0, result.err
    result = hedgerow("evaluate", old_run, "--json", *client)
    assert result.code == 0, result.err
    loss = rows[-1]["eval_loss"] if not client else rows[-1]["by_client"][client[1]]["eval_loss"]
    assert json.loads(result.out)["eval_loss"] == pytest.approx(loss, rel=1e-5)
    result = hedgerow("export", old_run, tmp_path / "merged", "--to", "merged", *client)
    assert result.code == 0, result.err
    merged = hedgerow(
        "evaluate",
        tmp_path / "merged",
        f"data.test={tmp_path / 'test.json'}",
        "data.prompt=plain",
        "data.max_length=64",
        "--json",
    )
    assert json.loads(merged.out)["eval_loss"] == pytest.approx(loss, rel=1e-4)
    result = hedgerow("report", old_run, "--answers", 0, "--out", tmp_path / "page.html")
    assert result.code == 0, result.err
    result = hedgerow("export", old_run, tmp_path / "adapter", "--to", "adapter", *client)
    if old_run.stem in ("fedavg", "fedkseed", "ferret"):
        assert result.code == 2
    else:
        assert result.code == 0, result.err


@same_arithmetic
def test_a_run_of_the_version_before_goes_on(old_run, hedgerow):
    """Its third round has the bytes that the version before would have given it."""
    name = CONFIGURATION.get(old_run.stem, old_run.stem)
    if pins.entry_hashes(old_run) != HERE[name][:2]:
        pytest.skip("this run was begun on another processor")
    again = old_run / "experiment.yaml"
    result = hedgerow("run", again, "federation.rounds=3", "--out", old_run, "--resume")
    assert result.code == 0, result.err
    assert pins.entry_hashes(old_run) == HERE[name]


@pytest.mark.parametrize("name", ["flora", "ferret"])
def test_a_packed_ledger_of_the_version_before_is_read(
    name, experiment, tiny_model, hedgerow, tmp_path
):
    experiment()
    here = [f"model.path={tiny_model}", f"data.test={tmp_path / 'test.json'}"]
    result = hedgerow("evaluate", OLD / f"{name}.ledger", *here, "--json")
    assert result.code == 0, result.err
    with zipfile.ZipFile(OLD / f"{name}.zip") as archive:
        last = json.loads(archive.read("metrics.jsonl").splitlines()[-1])
    assert json.loads(result.out)["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
