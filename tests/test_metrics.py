"""Metrics: the registry, what is refused, and somebody's own through the command line."""

import json
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
from support.runs import rows_of, tensorboard_of

from hedgerow.errors import UserError
from hedgerow.evaluation.measuring import Evidence, derived, measure
from hedgerow.evaluation.metrics import (
    METRICS,
    AnswerMetric,
    CorpusMetric,
    LikelihoodMetric,
    Score,
    Weighted,
    main_scores_of,
    metrics_of,
    scores_of,
)
from hedgerow.evaluation.metrics.base import Answer, Likelihood
from hedgerow.evaluation.metrics.loss import Loss
from hedgerow.evaluation.metrics.multiple_choice import MultipleChoice

OWN = """
from hedgerow.evaluation.metrics import AnswerMetric, CorpusMetric, Score


class Length(AnswerMetric):
    scores = (Score("length_share", label="length of answers", unit="%", direction="higher"),)

    def score(self, reference: str, answer: str) -> float:
        return 100 * len(answer) / len(reference)


class Words(CorpusMetric):
    scores = (Score("words", label="distinct words"),)

    def corpus(self, references, answers) -> float:
        return len({word for reference in references for word in reference.split()})
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module that can be imported, for this test."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    made = []

    def write(name, text=OWN):
        (folder / f"{name}.py").write_text(text)
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


# --- the registry ---------------------------------------------------------------------------------


def test_every_metric_says_what_people_are_shown():
    assert {"loss", "rouge_l", "exact_match", "final_answer", "multiple_choice"} <= set(METRICS)
    for metric in metrics_of(METRICS):  # which also checks that no two give one score
        assert METRICS[metric.name].__doc__
        assert metric.needs in ("likelihood", "answers", "choices", "preferences")
        assert metric.per in ("row", "corpus")
    assert scores_of(["loss"])["eval_loss"].title == "loss, nats per token"
    assert list(main_scores_of(["multiple_choice", "loss"])) == ["accuracy", "eval_loss"]


def test_the_registry_needs_no_heavy_library():
    heavy = ["torch", "transformers", "pandas", "datasets", "rouge_score", "sacrebleu"]
    code = (
        "import sys; from hedgerow.evaluation.metrics import METRICS, metrics_of; "
        f"metrics_of(METRICS); print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_an_installed_package_may_name_a_metric(own, tmp_path, monkeypatch, hedgerow, experiment):
    own("own_installed")
    info = tmp_path / "own" / "own_installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-installed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hedgerow.metrics]\nlength = own_installed:Length\n")
    # What is installed is looked up once.
    monkeypatch.setitem(vars(METRICS), "_installed", {})
    del vars(METRICS)["_installed"]
    assert "length" in METRICS
    assert METRICS["length"].__name__ == "Length"
    run = tmp_path / "run"
    changes = ["evaluation.metrics=[length]", "evaluation.max_new_tokens=4"]
    assert hedgerow("run", experiment(), *changes, "--out", run).code == 0
    assert rows_of(run)[-1]["length_share"] >= 0


# --- somebody's own, through the command line -----------------------------------------------------


def test_an_own_metric_is_shown_wherever_scores_are(hedgerow, experiment, own, tmp_path):
    module = own("own_shown")
    rows = [{"instruction": f"Say b{i}", "output": f"b {i}", "kind": "xy"[i % 2]} for i in range(5)]
    path = experiment()
    (tmp_path / "test.json").write_text(json.dumps(rows))
    names = [f"{module}:Length", "loss", f"{module}:Words"]
    asked = [f"evaluation.metrics={json.dumps(names)}", "evaluation.max_new_tokens=4"]
    asked += ["evaluation.by=kind", "tracking.to=tensorboard"]
    run = tmp_path / "run"
    result = hedgerow("run", path, *asked, "--out", run)
    assert result.code == 0, result.err
    line = next(line for line in result.out.splitlines() if line.startswith("round 2"))
    assert "length of answers" in line
    assert result.out.count("distinct words") == 4  # in three lines, and in the table
    last = rows_of(run)[-1]
    # "b", and five numbers; means of rows would be 2.
    assert (last["words"], last["words_by"]) == (6, {"x": 4, "y": 3})
    by_kind = last["length_share_by"]
    assert (3 * by_kind["x"] + 2 * by_kind["y"]) / 5 == pytest.approx(last["length_share"])
    told = tensorboard_of(run)
    assert [value for _, value in told["words"]] == [6, 6, 6]
    assert {"length_share", "length_share_by/x"} <= set(told)

    scored = hedgerow("evaluate", run)
    assert scored.code == 0, scored.err
    assert "distinct words" in scored.out
    text = ["data.prompt=plain", "data.max_length=64", "--data", tmp_path / "test.json"]
    assert hedgerow("export", run, tmp_path / "merged", "--to", "merged").code == 0
    for target in ([run], [tmp_path / "merged", *text]):
        alone = hedgerow("evaluate", *target, "--metrics", f"{module}:Words,rouge_l", "--json")
        assert alone.code == 0, alone.err
        assert json.loads(alone.out)["words"] == 6

    page = tmp_path / "page.html"
    assert hedgerow("report", run, "--answers", 0, "--out", page).code == 0
    for text in (
        *("length of answers by round", "length of answers by category"),
        *("length of answers, %", "distinct words by round"),
        *("Higher is better: length of answers.", "Lower is better: train loss."),
    ):
        assert text in page.read_text()


def test_an_own_metric_is_compared(hedgerow, experiment, own, tmp_path):
    module = own("own_compared")
    asked = f"evaluation.metrics=[loss, {module}:Length, {module}:Words]"
    out = tmp_path / "out"
    methods = ["--methods", "flora,fedavg", "--out", out]
    result = hedgerow("compare", experiment(), asked, "federation.rounds=1", *methods)
    assert result.code == 0, result.err
    table = json.loads((out / "comparison.json").read_text())
    assert all(row["length_share"] >= 0 for row in table)
    header = (out / "comparison.md").read_text().partition("\n")[0]
    assert "length of answers" in header
    assert "distinct words" in header
    assert "perplexity" not in header


def test_where_each_client_has_a_model_derived_scores_are_of_the_mean(
    hedgerow, experiment, tmp_path
):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "method.name=standalone", "--out", run).code == 0
    last = rows_of(run)[-1]
    assert last["eval_perplexity"] == pytest.approx(np.exp(last["eval_loss"]))


# --- mistakes -------------------------------------------------------------------------------------


def check(result, *words):
    assert result.code == 2, (result.out, result.err)
    (line,) = [line for line in result.err.splitlines() if line.startswith("hedgerow: ")]
    assert "Traceback" not in result.err
    for word in words:
        assert word in line, line


def test_unknown_metrics_are_named_on_all_ways(hedgerow, experiment, tmp_path, tiny_model):
    words = ["`evaluation.metrics.1`: there is no 'rouge'", "did you mean `rouge_l`", "exact_match"]
    asked = "evaluation.metrics=[loss, rouge]"
    out = tmp_path / "out"
    check(hedgerow("run", experiment(), asked, "--out", out), *words)
    methods = ["--methods", "flora,fedavg", "--out", out]
    check(hedgerow("compare", experiment(), asked, *methods), *words)
    written = experiment(evaluation={"metrics": ["loss", "rouge"]})
    check(hedgerow("flower", "init", written, out), *words)
    data = ["--data", tmp_path / "test.json", "--metrics", "loss,rouge"]
    check(hedgerow("evaluate", tiny_model, *data), *words)
    assert not out.exists()
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    check(hedgerow("evaluate", run, "--metrics", "loss,rouge"), *words)


BROKEN = """
from hedgerow.evaluation.metrics import AnswerMetric, Score


class Base(AnswerMetric):
    def score(self, reference, answer):
        return 1


class Nothing(Base):
    pass


class Abstract(AnswerMetric):
    scores = (Score("x", label="x"),)


class Capital(Base):
    scores = (Score("My score", label="x"),)


class Taken(Base):
    scores = (Score("bytes_up", label="x"),)


class Ending(Base):
    scores = (Score("mine_by", label="x"),)


class Theirs(Base):
    scores = (Score("rouge_l", label="x"),)


class Twice(Base):
    scores = (Score("x", label="x"), Score("x", label="y"))


class Nameless(Base):
    scores = (Score("x", label=""),)


class Sideways(Base):
    scores = (Score("x", label="x", direction="up"),)


class Derived(Base):
    scores = (Score("x", label="x", derived=True),)


class Options(Base):
    scores = (Score("x", label="x"),)
    depth: int
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss, loss", ["evaluation.metrics", "'loss' stands twice"]),
        ("nowhere_at_all:X", ["no module nowhere_at_all"]),
        ("own_broken:Gone", ["own_broken has no Gone"]),
        ("json:JSONDecoder", ["is no subclass of", "Metric"]),
        ("own_broken:Nothing", ["declares no scores"]),
        ("own_broken:Abstract", ["lacks the function score"]),
        ("own_broken:Capital", ["'My score'", "lower-case"]),
        ("own_broken:Taken", ["'bytes_up'", "another number's"]),
        ("own_broken:Ending", ["'mine_by'", "another number's"]),
        ("rouge_l, own_broken:Theirs", ["rouge_l and own_broken:Theirs both give rouge_l"]),
        ("own_broken:Twice", ["declares a key twice"]),
        ("own_broken:Nameless", ["needs a label"]),
        ("own_broken:Sideways", ["direction of x", "'up'"]),
        ("own_broken:Derived", ["begins with a derived score"]),
        ("own_broken:Options", ["options (depth)", "default"]),
    ],
)
def test_a_metric_that_is_not_complete(hedgerow, experiment, own, tmp_path, name, words):
    own("own_broken", BROKEN)
    asked = f"evaluation.metrics=[{name}]"
    check(hedgerow("run", experiment(), asked, "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


FAILING = """
from hedgerow.evaluation.metrics import AnswerMetric, Score


class Failing(AnswerMetric):
    scores = (Score("x", label="x"),)

    def score(self, reference, answer):
        return {"b": 1}[reference]
"""


def test_what_a_metric_raises_is_a_sentence(hedgerow, experiment, own, tmp_path):
    asked = f"evaluation.metrics=[{own('own_failing', FAILING)}:Failing]"
    result = hedgerow("run", experiment(), asked, "--out", tmp_path / "run")
    check(result, "own_failing:Failing", "row 1 of the test data", "KeyError: 'bbb0'")


class Given(AnswerMetric):
    """Gives what it is told to."""

    scores = (Score("x", label="x"),)
    given: ClassVar[object] = None

    def score(self, reference, answer):
        """What it is told to."""
        return self.given


class GivenOfAll(CorpusMetric):
    """As `Given`."""

    scores = (Score("x", label="x"),)

    def corpus(self, references, answers):
        """What it is told to."""
        return Given.given


EVIDENCE = Evidence(np.array([0, 2]), [Answer("a", "b"), Answer("c", "d")])


@pytest.mark.parametrize(
    "given",
    [
        *(None, "1", [1.0], 1j, float("nan"), float("inf"), np.float32("nan")),
        *({"y": 1.0}, {}, {"x": "1"}, {"x": 1.0, "y": 1.0}),
        *(Weighted(1.0, 0.0), Weighted(1.0, float("inf")), Weighted(1.0, -1.0)),
    ],
)
@pytest.mark.parametrize("kind", [Given, GivenOfAll])
def test_what_is_no_finite_number_is_named(monkeypatch, given, kind):
    monkeypatch.setattr(Given, "given", given)
    with pytest.raises(UserError, match=rf"metric test_metrics:{kind.__name__} gives .* must be a"):
        measure(kind(), EVIDENCE, None)


@pytest.mark.parametrize("given", [1, True, 0.5, np.float32(0.5), np.int64(3), {"x": 2}])
def test_any_real_number_will_do(monkeypatch, given):
    monkeypatch.setattr(Given, "given", given)
    expected = float(given["x"] if isinstance(given, dict) else given)
    for kind in (Given, GivenOfAll):
        whole, by = measure(kind(), EVIDENCE, ["u", "-", "v"])
        assert (whole, by) == ({"x": expected}, {"x": {"u": expected, "v": expected}})


def test_a_model_that_has_diverged_is_no_mistake_of_a_metric_s():
    found = [Likelihood(float("nan"), 3), Likelihood(2.0, 1)]
    whole, _ = measure(Loss(), Evidence(np.array([0, 1]), found), None)
    assert np.isnan(whole["eval_loss"])
    assert derived(Loss(), whole) == {"eval_perplexity": np.inf}


def test_derived_scores_are_checked():
    class Wrong(LikelihoodMetric):
        scores = (Score("x", label="x"), Score("y", label="y", derived=True))

        def score(self, nats, tokens):
            return nats

        def derive(self, scores):
            return {"z": 1.0}

    class Failing(Wrong):
        def derive(self, scores):
            return {"y": scores["w"]}

    class Silent(Wrong):
        def derive(self, scores):
            return None

    for kind in (Wrong, Silent):
        with pytest.raises(UserError, match=rf"{kind.__name__} derives .*'y'"):
            derived(kind(), {"x": 1.0})
    with pytest.raises(UserError, match=r"Failing fails .*KeyError"):
        derived(Failing(), {"x": 1.0})


def test_a_weighted_mean_weighs():
    found = [Likelihood(6.0, 3), Likelihood(4.0, 1)]
    whole, by = measure(Loss(), Evidence(np.array([0, 1]), found), ["a", "b"])
    assert (whole, by) == ({"eval_loss": 2.5}, {"eval_loss": {"a": 2.0, "b": 4.0}})


def test_multiple_choice_compares_per_character_too():
    scores = MultipleChoice().score(
        candidates=["a", "bbbb"], right=1, log_likelihoods=np.array([-1.0, -2.0])
    )
    assert scores == {"accuracy": 0, "accuracy_norm": 100, "accuracy_chance": 50}


@pytest.mark.parametrize("method", ["flora", "standalone", "fedkseed"])
def test_no_metric_may_take_the_key_of_another_number(hedgerow, experiment, own, tmp_path, method):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), f"method={method}", "--out", run).code == 0
    keys = set().union(*rows_of(run)) | set(json.loads(hedgerow("evaluate", run, "--json").out))
    for key in keys - set(scores_of(["loss"])):
        module = own(f"own_{key}", OWN.replace("length_share", key))
        with pytest.raises(UserError, match=f"the key '{key}'"):
            metrics_of([f"{module}:Length"])
