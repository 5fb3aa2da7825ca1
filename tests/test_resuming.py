"""What clients and the server keep from round to round: where it is absurd, damaged or missing."""

import pytest
import torch
from conftest import ledger_bytes, rows_of

from hedgerow.training import first_order

FERRET = 'method={"name": "ferret", "compression": 64, "error_feedback": true}'


@pytest.mark.parametrize("what", ["inf gradients", "a step of 1e12"])
@pytest.mark.parametrize("method", ["method.restart=own", "method.restart=shared", FERRET])
def test_a_client_whose_update_was_absurd_begins_anew(
    hedgerow, experiment, tmp_path, monkeypatch, method, what
):
    """One bad step in round 1 costs client 1 that round alone, in a resumed run as well."""
    steps = {"backward": first_order.backward, "make_optimizer": first_order.make_optimizer}
    calls = dict.fromkeys(steps, 0)
    count = 1 if method == FERRET else 2

    def backward(*arguments):
        loss = steps["backward"](*arguments)
        calls["backward"] += 1
        if calls["backward"] == 2 * count and what == "inf gradients":  # client 1's last
            for parameter in arguments[0].parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(torch.inf)
        return loss

    def make_optimizer(trainable, settings, rate):
        calls["make_optimizer"] += 1
        bad = calls["make_optimizer"] == 2 and what == "a step of 1e12"
        return steps["make_optimizer"](trainable, settings, 1e12 if bad else rate)

    monkeypatch.setattr(first_order, "backward", backward)
    monkeypatch.setattr(first_order, "make_optimizer", make_optimizer)
    path = experiment(training={"max_grad_norm": None, "steps": count})
    for name, rounds in (("whole", 3), ("part", 1)):
        calls.update(dict.fromkeys(calls, 0))
        out = ["--out", tmp_path / name]
        result = hedgerow("run", path, method, f"federation.rounds={rounds}", *out)
        assert result.code == 0, result.err
    first, *later = rows_of(tmp_path / "whole")[1:]
    assert first["failures"].keys() == {"client-001"}
    assert [row["failures"] for row in later] == [{}, {}]
    arguments = [path, method, "federation.rounds=3", "--out", tmp_path / "part", "--resume"]
    assert hedgerow("run", *arguments).code == 0
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "part")
