"""Corpus BLEU: sacrebleu's own number, on a real run and wherever scores are shown."""

import json

import pytest
import sacrebleu
from support.runs import rows_of

from hedgerow.evaluation.metrics.bleu import Bleu
from hedgerow.evaluation.scores import answers
from hedgerow.runs.preparation import load_test
from hedgerow.runs.scoring import loaded


@pytest.fixture
def run(hedgerow, experiment, tmp_path):
    """A run that has learnt to answer in five words, asked for BLEU by kind."""
    path = experiment(
        training={"steps": 60},
        evaluation={"metrics": ["bleu", "loss"], "max_new_tokens": 20, "by": "kind"},
    )
    for client in range(3):
        rows = [
            {"instruction": f"Say {i}", "output": f"now I say {'abc'[i % 3]} twice"}
            for i in range(12)
        ]
        (tmp_path / f"client_{client}.json").write_text(json.dumps(rows))
    rows = [row | {"kind": "xyz"[i % 3]} for i, row in enumerate(rows)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    result = hedgerow("run", path, "method=fedavg", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert "BLEU" in result.out
    return tmp_path / "run"


def test_bleu_is_sacrebleu_s(hedgerow, run, tmp_path):
    last = rows_of(run)[-1]
    with loaded(run, [], None, None) as it:
        test = load_test(it.data, it.evaluation, it.model)
        said, _ = answers(it.model, test, it.evaluation, lambda count: None)

    def bleu(places):
        hypotheses = [said[place] for place in places]
        references = [test.references[place] for place in places]
        return sacrebleu.corpus_bleu(hypotheses, [references]).score

    assert 5 < last["bleu"] <= 100 + 1e-9
    assert last["bleu"] == pytest.approx(bleu(range(12)))
    by_kind = {kind: bleu(range(start, 12, 3)) for start, kind in enumerate("xyz")}
    assert last["bleu_by"] == pytest.approx(by_kind)

    scored = hedgerow("evaluate", run, "--metrics", "bleu", "--json")
    assert json.loads(scored.out)["bleu"] == pytest.approx(last["bleu"])
    assert "eval_loss" not in json.loads(scored.out)
    page = tmp_path / "page.html"
    assert hedgerow("report", run, "--answers", 0, "--out", page).code == 0
    for words in ("BLEU by round", "BLEU, points of 100", "BLEU by category"):
        assert words in page.read_text()


def test_bleu_is_of_all_rows_together():
    references = ["the cat sat on the mat", "it rains"]
    whole = Bleu().corpus(references=references, answers=["the cat sat on a mat", "it rains"])
    alone = [
        Bleu().corpus(references=[reference], answers=[answer])
        for reference, answer in zip(references, ["the cat sat on a mat", "it rains"], strict=True)
    ]
    assert whole != pytest.approx(sum(alone) / 2)
    assert Bleu().corpus(references=references, answers=references) == pytest.approx(100)
    assert Bleu().corpus(references=references, answers=["", ""]) == 0
