"""Eight clients of two-turn conversations: what is learnt of each turn is as good."""

from __future__ import annotations

import json
import random

import pytest
import yaml
from support.runs import rows_of
from test_conversations import two_turns

from hedgerow.bundled import MODEL, tasks

pytestmark = pytest.mark.slow


def test_the_second_turn_is_learnt_as_well_as_the_first(hedgerow, tmp_path):
    """Within three points of exact match, on questions each of which is asked in both turns."""
    draw = random.Random(0)

    def paired(rows):
        """Each row first in one conversation, and second in another."""
        return two_turns(rows, draw.sample(rows, len(rows)))

    for name, rows in tasks.clients().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(paired(rows)))
    (tmp_path / "test.json").write_text(json.dumps(paired(tasks.test_rows())))
    content = {
        "model": {"path": str(MODEL)},
        "data": {
            "clients": {name: f"{name}.json" for name in tasks.CLIENTS},
            "test": "test.json",
            "prompt": "plain",
            "max_length": 192,
            "loss_on": "turns",
        },
        "method": {"name": "flora", "ranks": [32, 32, 16, 16, 8, 8, 4, 2], "alpha": "2r"},
        "training": {"steps": 25, "batch_size": 8, "learning_rate": 1.0e-3},
        "federation": {"rounds": 16},
        "evaluation": {
            "every": 16,
            "metrics": ["loss", "exact_match"],
            "max_new_tokens": 24,
            "batch_size": 64,
            "by": "turn",
        },
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    result = hedgerow("run", tmp_path / "experiment.yaml", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    before, after = rows_of(tmp_path / "run")[0], rows_of(tmp_path / "run")[-1]
    print(before["exact_match_by"], after["exact_match_by"], after["eval_loss_by"])
    assert set(after["eval_loss_by"]) == {"1", "2"}
    assert before["exact_match"] <= 5
    by_turn = after["exact_match_by"]
    assert min(by_turn.values()) >= 60
    assert abs(by_turn["1"] - by_turn["2"]) <= 3
