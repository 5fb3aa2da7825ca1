"""Audits: the bound from below and its maths, guesses on rows, and what left each client."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.runs import ledger_bytes, rows_of

import hedgerow as hr
from hedgerow.audit import words
from hedgerow.audit.exposure import exposure, highest
from hedgerow.audit.found import Audit, read
from hedgerow.audit.lower_bound import SHARES, guess, lower_bound, p_value
from hedgerow.audit.membership import interval, separation
from hedgerow.cli.entry import app
from hedgerow.data import Canaries
from hedgerow.errors import UserError
from hedgerow.experiment import load
from hedgerow.privacy.accounting import of_group
from hedgerow.privacy.example_level import GaussianSteps
from hedgerow.runs.preparation import prepare
from hedgerow.seeds import Seeds
from hedgerow.settings import AuditSettings

# --- the bound from below -------------------------------------------------------------------------


@st.composite
def outcomes(draw):
    """Canaries, guesses, right ones, ε and δ."""
    canaries = draw(st.integers(1, 300))
    guesses = draw(st.integers(1, canaries))
    correct = draw(st.integers(0, guesses))
    delta = draw(st.sampled_from([0.0, 1e-9, 1e-5, 1e-3, 0.1]))
    return canaries, guesses, correct, draw(st.floats(0, 20)), delta


@given(outcomes())
def test_the_p_value_is_that_of_the_papers_theorem(case):
    """Theorem 5.2 term by term, of every i from 1 to m, in SciPy's binomial distribution."""
    canaries, guesses, correct, epsilon, delta = case
    law = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = law.sf(correct - 1)
    parts = [(law.cdf(correct - 1) - law.cdf(correct - i - 1)) / i for i in range(1, canaries + 1)]
    expected = min(1.0, tail + 2 * canaries * delta * max(parts))
    assert p_value(*case) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_without_delta_it_is_the_tail_of_guesses_that_are_right_by_chance():
    assert p_value(10, 10, 10, 0.0, 0.0) == pytest.approx(2.0**-10)
    assert p_value(99, 10, 9, 0.0, 0.0) == pytest.approx(11 * 2.0**-10)
    assert p_value(5, 2, 2, math.log(3), 0.0) == pytest.approx(0.75**2)
    # All right: q^r = 1 - confidence.
    q = 0.05 ** (1 / 100)
    assert lower_bound(100, 100, 100, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-5)


@given(outcomes())
@settings(max_examples=50)
def test_the_bound_is_where_the_p_value_is_one_minus_the_confidence(case):
    canaries, guesses, correct, _, delta = case
    bound = lower_bound(canaries, guesses, correct, delta)
    if bound:
        assert p_value(canaries, guesses, correct, max(0.0, bound - 1e-6), delta) < 0.05
    assert p_value(canaries, guesses, correct, bound + 2e-6, delta) >= 0.05 - 1e-6
    if correct < guesses:
        assert lower_bound(canaries, guesses, correct + 1, delta) >= bound
    assert lower_bound(canaries, guesses, correct, min(1.0, 10 * delta)) <= bound + 2e-6


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.02])
@pytest.mark.parametrize("kind", ["each apart", "all at once"])
def test_the_bound_is_rarely_above_the_truth(epsilon, delta, kind):
    """Of randomised response, with coins that come out at δ: the worst that is (ε, δ)-private."""
    canaries = 60
    right = np.arange(canaries + 1)
    q = 1 / (1 + math.exp(-epsilon))
    if kind == "each apart":
        law = stats.binom.pmf(right, canaries, delta + (1 - delta) * q)
    else:
        law = (1 - delta) * stats.binom.pmf(right, canaries, q) + delta * (right == canaries)
    bounds = np.array([lower_bound(canaries, canaries, int(v), delta) for v in right])
    assert law[bounds > epsilon].sum() <= 0.05
    # And it is worth something: without δ it is often more than half of the truth.
    if delta == 0 and epsilon == 4:
        assert law[bounds > 2].sum() > 0.5


def test_guesses_are_on_both_ends_and_pay_for_choosing_their_number():
    is_in = np.array([True, False] * 20)
    sure = guess(np.where(is_in, 1.0, -1.0), is_in, 0.0)
    assert (sure.guesses, sure.correct) == (40, 40)
    assert sure.epsilon == pytest.approx(lower_bound(40, 40, 40, 0.0, 1 - 0.05 / len(SHARES)))
    assert guess(np.where(is_in, -1.0, 1.0), is_in, 0.0).epsilon == 0  # all wrong
    # Where the ends alone tell, fewer guesses show more.
    scores = np.zeros(400)
    coins = np.random.default_rng(0).integers(2, size=400) == 1
    scores[:50] = np.where(coins[:50], 1, -1)
    few = guess(scores, coins, 0.0)
    assert few.guesses < 400
    assert few.epsilon > 0


def test_the_chosen_bound_is_rarely_above_the_truth():
    """Of scores that say nothing, and of randomised response, whatever number is chosen."""
    generator = np.random.default_rng(1)
    for epsilon in (0.0, 1.0):
        above = 0
        for _ in range(400):
            is_in = generator.integers(2, size=80) == 1
            lies = generator.random(80) > 1 / (1 + math.exp(-epsilon))
            scores = np.where(is_in ^ lies, 1, -1) + generator.random(80)
            above += guess(scores, is_in, 0.0).epsilon > epsilon
        assert above <= 33  # 20 are expected at most; this many has a chance below 1 in 300


@given(st.floats(0, 5), st.floats(0, 0.5), st.integers(1, 6))
def test_a_group_s_promise_is_that_of_its_members_one_after_another(epsilon, delta, size):
    """P(M(x₀)) ≤ e^ε·P(M(x₁)) + δ ≤ e^ε·(e^ε·P(M(x₂)) + δ) + δ …"""
    factor, slack = 1.0, 0.0
    for _ in range(size):
        factor, slack = factor * math.exp(epsilon), slack * math.exp(epsilon) + delta
    total, left = of_group(epsilon, delta, size)
    assert math.exp(total) == pytest.approx(factor)
    assert left == pytest.approx(min(1.0, slack))


# --- guesses on rows ------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
)
def test_the_auc_is_the_share_of_pairs_in_the_right_order(members, others):
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    found = separation(np.array(members, float), np.array(others, float))
    assert found.auc == pytest.approx(sum(pairs) / len(pairs))
    assert 0 <= found.low <= found.auc <= found.high <= 1
    assert found.true_positives == sum(m > max(others) for m in members) / len(members)


def test_one_in_a_hundred_others_may_be_taken_for_a_member():
    others = np.arange(200.0)  # two of them may be
    members = np.array([197.0, 197.5, 198.5, 300.0])
    assert separation(members, others).true_positives == 0.75


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_the_interval_has_the_truth_in_it(shift):
    """In 95 of 100 samples of two normal distributions; 92 to 99 by chance and approximation."""
    generator = np.random.default_rng(2)
    truth = stats.norm.cdf(shift / math.sqrt(2))
    hits = 0
    for _ in range(1000):
        found = separation(generator.normal(shift, 1, 30), generator.normal(0, 1, 50))
        hits += found.low <= truth <= found.high
    assert 920 <= hits <= 995


def test_an_interval_has_a_width_where_all_pairs_are_right():
    low, high = interval(1.0, 10, 10)
    assert 0.5 < low < 0.9
    assert high == 1.0
    assert interval(0.0, 10, 10) == pytest.approx((0.0, 1 - low))


def test_exposure_is_the_rank_among_those_that_were_left_out():
    left_out = np.array([1.0, 2.0, 3.0])
    found = exposure(np.array([0.5, 1.0, 2.5, 9.0]), left_out)
    assert found.tolist() == pytest.approx([2.0, 1.0, 2 - math.log2(3), 0.0])
    assert highest(3) == 2.0
    # Without memory all ranks are as likely.
    generator = np.random.default_rng(3)
    losses = generator.random((2, 2000))
    assert exposure(*losses).mean() == pytest.approx(1 / math.log(2), abs=0.1)


# --- canaries -------------------------------------------------------------------------------------


def test_canaries_are_those_of_the_runs_seed_and_their_coins_are_fair():
    asked = AuditSettings(client="north", canaries=4000)
    one = Canaries.of(asked, Seeds(1))
    assert [row.output for row in one.rows] == [r.output for r in Canaries.of(asked, Seeds(1)).rows]
    assert one.rows[0].output != Canaries.of(asked, Seeds(2)).rows[0].output
    assert len({row.instruction for row in one.rows}) == len({r.output for r in one.rows}) == 4000
    assert abs(one.is_in.mean() - 0.5) < 5 * 0.5 / math.sqrt(4000)
    # More canaries leave the coins independent of the words and of each other.
    assert abs(np.corrcoef(one.is_in[1:], one.is_in[:-1])[0, 1]) < 5 / math.sqrt(4000)
    assert len(one.planted()) == one.is_in.sum()
    assert Canaries.of(None, Seeds(1)) is None


def test_canaries_are_rows_of_one_client_and_count(experiment):
    path = experiment(data={"client_test": 0.2})
    audit = "audit={client: client-001, canaries: 30, repeat: 3}"
    plain, planted = prepare(load(path)), prepare(load(path, [audit]))
    canaries = Canaries.of(AuditSettings(client="client-001", canaries=30, repeat=3), Seeds(0))
    for before, after in zip(plain.clients, planted.clients, strict=True):
        more = 3 * int(canaries.is_in.sum()) if after.name == "client-001" else 0
        assert after.num_examples == before.num_examples + more
        own = planted.shards[after.name]
        for index in range(before.num_examples):
            assert own[index].tokens.tolist() == plain.shards[after.name][index].tokens.tolist()
    read = planted.model.tokenizer.decode
    last = [planted.shards["client-001"][-n] for n in (1, 2, 3)]
    texts = {read(each.tokens[each.prompt_length :], skip_special_tokens=True) for each in last}
    kept = [row for row, is_in in zip(canaries.rows, canaries.is_in, strict=True) if is_in]
    assert texts == {kept[-1].output}
    assert plain.digests()["client-000"] == planted.digests()["client-000"]
    assert plain.digests()["client-001"] != planted.digests()["client-001"]


MISTAKES = {
    "audit={client: client-01}": "did you mean `client-001`?: name one of client-000, client-001, ",
    "audit={canaries: 10}": "`audit.client` is missing",
    "audit={client: client-001, canaries: 1}": "audit.canaries",
    "audit={client: client-001} data.max_length=20": "`data.max_length` is 20: raise it to ",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_canaries_that_cannot_be_planted_are_refused(hedgerow, experiment, tmp_path, mistake):
    changes = mistake.replace("} ", "}|").split("|")
    result = hedgerow("run", experiment(), *changes, "--out", tmp_path / "run")
    assert result.code == 2
    assert MISTAKES[mistake] in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_canaries_alone(hedgerow, experiment, tmp_path):
    path, run = experiment(), tmp_path / "run"
    audit = "audit={client: client-001, canaries: 10}"
    assert hedgerow("run", path, audit, "federation.rounds=1", "--out", run).code == 0
    assert hedgerow("run", path, audit, "--out", tmp_path / "whole").code == 0
    for other in ("audit=null", "audit={client: client-001, canaries: 12}"):
        result = hedgerow("run", path, other, "--out", run, "--resume")
        assert result.code == 2
        assert "was run with audit" in result.err
    assert hedgerow("run", path, audit, "--out", run, "--resume").code == 0
    assert ledger_bytes(run) == ledger_bytes(tmp_path / "whole")


# --- runs -----------------------------------------------------------------------------------------

PRIVACY = {"level": "example", "clip": 1.0, "epsilon": 8, "delta": 1e-5, "seed": 5}


def trained(folder: Path, **sections) -> Path:
    """A run of the built-in model on its tasks, with canaries in one of two clients' data."""
    content = {
        "model": {"path": "demo"},
        "data": {
            "source": "demo",
            "partition": {"kind": "iid", "clients": 2},
            "share": 0.15,
            "test": "demo",
            "test_share": 0.1,
            "prompt": "plain",
            "max_length": 96,
        },
        "method": {"name": "fedavg"},
        "training": {"steps": 25, "batch_size": 8, "learning_rate": 1e-3},
        "federation": {"rounds": 2},
        "evaluation": {"every": 9, "batch_size": 64},
        "audit": {"client": "client-001", "canaries": 40, "repeat": 4},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.yaml").write_text(json.dumps({**content, **sections}))
    command = ["run", str(folder / "experiment.yaml"), "--out", str(folder / "run")]
    app(command, standalone_mode=False)
    return folder / "run"


@pytest.fixture(scope="module")
def leaky(tmp_path_factory) -> Path:
    """A run without noise, audited."""
    run = trained(tmp_path_factory.mktemp("leaky"))
    app(["audit", str(run), "--rows", "30"], standalone_mode=False)
    return run


def test_a_run_without_noise_has_a_bound_above_zero(leaky):
    found = read(leaky)
    assert found.private is None
    planted = found.planted
    assert planted.epsilon > 0.5
    assert planted.promised is None
    assert planted.auc > 0.95
    assert planted.exposure_median > 3
    assert planted.exposure_possible == highest(planted.canaries - planted.planted)
    assert [each.rows for each in found.members] == [30, 30]


def test_rows_that_were_learnt_by_heart_are_told_from_others_like_them(tmp_path):
    """Rows that have nothing in common, of which half are held out."""
    made = Canaries.of(AuditSettings(client="north", canaries=40), Seeds(7)).rows
    rows = [{"instruction": row.instruction, "output": row.output} for row in made]
    (tmp_path / "north.json").write_text(json.dumps(rows))
    files = {"north": "north.json"}
    data = {"clients": files, "client_test": 0.5, "prompt": "plain", "max_length": 96}
    run = trained(tmp_path, data=data, audit=None, federation={"rounds": 1})
    (found,) = hr.open_run(run).audit()["members"]
    assert (found["rows"], found["others"]) == (20, 20)
    assert found["auc_low"] > 0.8
    assert found["true_positives"] > 0.5


def test_an_audit_says_what_left_each_client(leaky):
    left = {each.client: each for each in read(leaky).left}
    rows = rows_of(leaky)[1:]
    assert sum(each.bytes for each in left.values()) == sum(row["bytes_up"] for row in rows)
    for name, each in left.items():
        assert each.rounds == 2
        assert each.failures == 0
        assert each.tensors == sum(each.kinds.values())
        assert each.said == ["num_examples", "train_loss"]
        assert each.bytes == sum(row["sent_by_client"][name]["bytes"] for row in rows)
    model = hr.open_run(leaky).model(0)
    weights = dict(model.named_parameters())
    assert left["client-000"].tensors == len(weights)
    assert left["client-000"].numbers == sum(weight.numel() for weight in weights.values())
    assert left["client-000"].kinds["float32 self_attn.q_proj.weight"] == 3


def test_an_audit_is_the_same_again_and_from_python(leaky, tmp_path):
    before = (leaky / "audit.json").read_bytes()
    content = hr.open_run(leaky).audit(rows=30)
    assert (leaky / "audit.json").read_bytes() == before
    assert json.loads(before) == content
    assert Audit.model_validate_json(before).planted == read(leaky).planted
    with pytest.raises(UserError, match="rows=0: give 1 or more"):
        hr.open_run(leaky).audit(rows=0)


def test_an_audit_needs_no_data_for_canaries(leaky, hedgerow, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(leaky, run)
    result = hedgerow("audit", run, "data.test=null", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["members"] == []
    assert found["planted"] == read(leaky).planted.model_dump()
    assert "`data.test` is missing" in found["notes"][0]
    assert hedgerow("audit", run, "data.test=null", "--client", "client-001").code == 2


def test_the_page_has_the_audit_in_words(leaky, hedgerow, tmp_path):
    page = tmp_path / "page.html"
    assert hedgerow("report", leaky, "--out", page, "--answers", 0).code == 0
    html = page.read_text()
    assert words.TITLE in html
    assert "no row of data left a client" in html
    assert "no promise below ε = " in html
    assert "The run promises nothing" in html
    assert "Guesses on who was trained on" in html
    (leaky / "audit.json").rename(leaky / "elsewhere")
    try:
        assert hedgerow("report", leaky, "--out", page, "--answers", 0).code == 0
        assert words.TITLE not in page.read_text()
        (leaky / "audit.json").write_text("{}")
        result = hedgerow("report", leaky, "--out", page, "--answers", 0)
        assert result.code == 2
        assert "audit.json is damaged: give `hedgerow audit" in result.err
    finally:
        (leaky / "elsewhere").replace(leaky / "audit.json")


def test_what_was_run_is_not_audited_as_something_else(leaky, hedgerow, tmp_path):
    before = (leaky / "audit.json").read_bytes()
    result = hedgerow("audit", leaky, "audit.canaries=41")
    assert result.code == 2
    assert "was run with audit.canaries=40, not 41" in result.err
    result = hedgerow("audit", leaky, "data.share=0.2", "--client", "client-000")
    assert result.code == 2
    assert "the data of client-000 have changed since" in result.err
    result = hedgerow("audit", leaky, "--client", "client-00")
    assert result.code == 2
    assert "client client-00: there is none" in result.err
    assert (leaky / "audit.json").read_bytes() == before
    for mistake in (tmp_path, leaky / "experiment.yaml"):
        assert hedgerow("audit", mistake).code == 2


def test_with_noise_the_bound_is_below_the_promise(tmp_path, hedgerow):
    run = trained(
        tmp_path,
        privacy=PRIVACY,
        audit={"client": "client-001", "canaries": 40},
        training={"steps": 8, "batch_size": 16, "learning_rate": 1e-3},
    )
    result = hedgerow("audit", run)
    assert result.code == 0, result.err
    found = read(run)
    assert found.private.epsilon == rows_of(run)[-1]["epsilon"]
    assert found.planted.promised == found.private.epsilon
    assert found.planted.delta == 1e-5
    assert found.planted.epsilon < found.planted.promised
    assert "the bound is below it, as it has to be" in " ".join(result.out.split())
    assert {word for each in found.left for word in each.said} == {"num_examples", "epsilon"}


@pytest.mark.slow
def test_noise_that_is_missing_is_found(tmp_path, monkeypatch):
    """A promise that a fault makes untrue: gradients are bounded, and nothing is added to them."""
    monkeypatch.setattr(GaussianSteps, "add_noise", lambda self, sums, step: None)
    run = trained(
        tmp_path,
        privacy=PRIVACY | {"epsilon": 0.3},
        audit={"client": "client-001", "canaries": 60},
        training={"steps": 30, "batch_size": 16, "learning_rate": 3e-3},
        federation={"rounds": 1},
    )
    found = Audit.model_validate(hr.open_run(run).audit(client="client-001", rows=5))
    assert found.planted.epsilon > found.planted.promised > 0.29
    said = " ".join(sentence for part in words.told(found) for sentence in part.sentences)
    assert "by this audit the promise is broken" in said
    assert "nobody is protected" in said  # its seed is known


@pytest.mark.parametrize(
    ("level", "repeat", "size"), [("example", 1, 1), ("example", 3, 3), ("client", 3, 2)]
)
def test_a_canary_of_several_rows_is_promised_less(
    hedgerow, experiment, tmp_path, level, repeat, size
):
    privacy = {"level": level, "clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-3, "seed": 5}
    audit = {"client": "client-001", "canaries": 10, "repeat": repeat}
    path = experiment(privacy=privacy, audit=audit, method={"name": "fedavg"})
    run = tmp_path / "run"
    assert hedgerow("run", path, "method={name: fedavg}", "--out", run).code == 0
    result = hedgerow("audit", run)
    assert result.code == 0, result.err
    found = read(run)
    epsilon, delta = of_group(found.private.epsilon, 1e-3, size)
    assert found.planted.promised == pytest.approx(epsilon)
    assert found.planted.delta == pytest.approx(delta)
    said = " ".join(result.out.split())
    whose = "one row" if level == "example" else "one client"
    assert f"ε = {found.private.epsilon:.4g} at δ = 0.001 of {whose}" in said
    assert ("a client that sends nothing" in said) == (level == "client")
    assert ("since it is 3 rows" in said) == (size == 3)


# --- kinds of runs --------------------------------------------------------------------------------

METHODS = {
    "flora": {"ranks": [4, 2, 1]},
    "ferret": {"compression": 40},
    "fedit": {"ranks": 2},
    "fedkseed": {"candidates": 8},
    "ditto": {"ranks": 2},
    "fedsa_lora": {"ranks": 2},
    "standalone": {"ranks": 2},
    "centralized": {"ranks": 2},
}


@pytest.mark.parametrize("name", METHODS)
def test_runs_of_every_kind_can_be_audited(hedgerow, experiment, tmp_path, name):
    path = experiment(audit={"client": "client-001", "canaries": 6})
    method = json.dumps({"name": name, **METHODS[name]})
    run = tmp_path / "run"
    assert hedgerow("run", path, f"method={method}", "--out", run).code == 0
    result = hedgerow("audit", run)
    assert result.code == 0, result.err
    found = read(run)
    assert [each.client for each in found.members] == ["client-000", "client-001", "client-002"]
    assert [each.rows for each in found.members] == [5, 9, 14]
    assert found.planted.guesses <= 6
    if name == "centralized":
        assert "every row left its client" in result.out
    elif name == "standalone":
        assert "Nothing left the clients" in result.out
    else:
        total = sum(row["bytes_up"] for row in rows_of(run))
        assert sum(each.bytes for each in found.left) == total > 0
        assert all(each.numbers and each.kinds for each in found.left)


def test_a_run_without_canaries_compares_rows_with_the_clients_own_test_rows(
    hedgerow, experiment, tmp_path
):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(data={"client_test": 0.3}), "--out", run).code == 0
    result = hedgerow("audit", run, "--client", "client-002", "--rows", 3)
    assert result.code == 0, result.err
    found = read(run)
    assert found.planted is None
    (members,) = found.members
    assert (members.client, members.rows, members.others) == ("client-002", 3, 3)
    assert members.of == "its own test rows"
    assert "scores on its own test rows" in found.left[0].said


@pytest.mark.parametrize(("masks", "said"), [(True, True), (False, False)])
def test_an_audit_says_that_what_left_was_masked(hedgerow, experiment, tmp_path, masks, said):
    """Where it was: codes that the server adds in the open are the update itself."""
    run, page = tmp_path / "run", tmp_path / "page.html"
    changes = ["method=fedavg", "federation.secure=true", f"federation.secure.masks={masks}"]
    assert hedgerow("run", experiment(), *changes, "--out", run).code == 0
    result = hedgerow("audit", run)
    assert result.code == 0, result.err
    assert hedgerow("report", run, "--out", page, "--answers", 0).code == 0
    sentence = "All these numbers were masked before they left (federation.secure)"
    for text in (result.out, page.read_text()):
        assert (sentence in " ".join(text.split())) == said
    audited = json.loads((run / "audit.json").read_bytes())
    assert audited.pop("masked") == said
    assert Audit.model_validate(audited).left  # as an earlier version wrote it


def test_sizes_that_were_not_kept_are_not_made_up(hedgerow, experiment, tmp_path):
    """As of a run of an earlier version, or where rows were written again from the ledger."""
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    rows = rows_of(run)
    del rows[1]["sent_by_client"]
    rows[2]["failures"] = {"client-009": "it was away"}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = hedgerow("audit", run)
    assert result.code == 0, result.err
    left = {each.client: each for each in read(run).left}
    assert {left[f"client-00{n}"].bytes for n in range(3)} == {None}
    assert (left["client-009"].rounds, left["client-009"].failures) == (0, 1)
    assert "not known" in result.out
    assert "Sizes are not known of every round" in " ".join(result.out.split())


def test_the_page_says_where_a_run_has_gone_on_since(hedgerow, experiment, tmp_path):
    path, run, page = experiment(), tmp_path / "run", tmp_path / "page.html"
    assert hedgerow("run", path, "--out", run).code == 0
    assert hedgerow("audit", run).code == 0
    assert hedgerow("run", path, "federation.rounds=3", "--out", run, "--resume").code == 0
    assert hedgerow("report", run, "--out", page, "--answers", 0).code == 0
    assert "This is of round 2, and the run has gone on to round 3 since" in page.read_text()
