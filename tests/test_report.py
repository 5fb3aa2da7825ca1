"""The page about runs: what it says, and how it behaves in a real browser."""

import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from markupsafe import escape
from playwright.sync_api import Page, sync_playwright
from support.experiments import write_experiment
from support.runs import rows_of

from hedgerow.cli.entry import app
from hedgerow.experiment import load
from hedgerow.model import Model
from hedgerow.reporting import charts
from hedgerow.reporting.gather import gather, labels
from hedgerow.reporting.sections import _dots, over_seeds, rounds_of

METHODS = "flora,flora restart=zero,fedavg,standalone"
LABELS = ["flora, restart=warm", "flora, restart=zero", "fedavg", "standalone"]
NASTY = "<script>alert(1)</script> & \"quotes\" 'and' </pre>"
NOT_OF_XML = "\x01\0\x1b\ufffe\ud800"
"""Characters that a category's name may have, and no drawing."""
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, tiny_model) -> Path:
    """Four methods and two seeds on test rows that try to be HTML; one client fails once."""
    folder = tmp_path_factory.mktemp("compared")
    metrics = {"metrics": ["loss", "rouge_l"], "by": "kind", "max_new_tokens": 4}
    experiment = write_experiment(folder, tiny_model, evaluation=metrics)
    rows = json.loads((folder / "test.json").read_text())
    rows[0] |= {"instruction": NASTY, "output": NASTY}
    kinds = ["<b>0</b>", f"<b>1</b>{NOT_OF_XML}"]
    rows = [row | {"kind": kinds[index % 2]} for index, row in enumerate(rows)]
    (folder / "test.json").write_text(json.dumps(rows))
    arguments = ["--methods", METHODS, "--seeds", "2", "--out", str(folder / "out")]
    app(["compare", str(experiment), *arguments], standalone_mode=False)
    run = folder / "out/runs/fedavg,seed=0/metrics.jsonl"
    first, second, last = map(json.loads, run.read_text().splitlines())
    second["participants"].remove("client-001")
    del second["train_loss_by_client"]["client-001"]
    second |= {"clients": 2, "failed": 1, "failures": {"client-001": NASTY}}
    run.write_text("".join(json.dumps(row) + "\n" for row in (first, second, last)))
    return folder / "out"


@pytest.fixture(scope="module")
def html(comparison) -> Path:
    """The page about the comparison."""
    path = comparison / "page.html"
    app(["report", str(comparison), "--out", str(path)], standalone_mode=False)
    return path


def test_the_page_says_what_the_runs_came_to(comparison, html):
    page = html.read_text()
    assert len(page) < 5_000_000
    assert "<script>alert(1)" not in page
    for label in LABELS:
        assert label in page
    assert "1&lt;/b&gt;" + "\N{REPLACEMENT CHARACTER}" * 5 in page
    for title in ("Loss", "Scores by category", "Noise of the aggregate", "Singular values"):
        assert f">{title}</h2>" in page
    table = json.loads((comparison / "comparison.json").read_text())
    values = set(re.findall(r'data-value="([^"]*)"', page))
    assert {str(row["eval_loss"]) for row in table} <= values
    assert {str(row["bytes_up"]) for row in table} <= values
    # Nothing is fetched.
    assert set(re.findall(r"""(?:src|href)=["'](.)""", page)) <= {"#", "d"}  # data:
    assert str(comparison.parent) not in page  # where the data lay is nobody's business


def test_the_lines_are_the_rows(comparison):
    series = gather([comparison])
    rounds = rounds_of(series)
    run = comparison / "runs/flora,seed=1"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mine = rounds[(rounds["series"] == "flora, restart=warm") & (rounds["seed"] == 1)]
    assert mine["eval_loss"].tolist() == [row["eval_loss"] for row in rows]
    assert mine["bytes"].iloc[-1] == sum(row["bytes_up"] + row["bytes_down"] for row in rows)
    losses = [min(o.rows[-1]["eval_loss"] for o in each.outcomes) for each in series]
    assert losses == sorted(losses)


def test_labels_are_as_short_as_they_can_be(experiment):
    changes = {
        "flora, rslora=False": [],
        "flora, rslora=True": ["method.rslora=true"],
        "fedit, learning_rate=0.1": ["method=fedit", "training.learning_rate=0.1"],
        "fedit, learning_rate=0.2": [
            "method=fedit",
            "training.learning_rate=0.2",
            "federation.seed=3",
        ],
        "standalone": ["method=standalone"],
        "ffa_lora": ["method=ffa_lora"],
        "ffa_lora, weights=krum": ["method=ffa_lora", "federation.weights=krum"],
        "rolora, max_grad_norm=1.0": ["method=rolora"],
        "rolora, max_grad_norm=None": ["method=rolora", "training.max_grad_norm=null"],
    }
    experiments = [load(experiment(), each) for each in changes.values()]
    assert labels(experiments) == list(changes)


def test_labels_tell_folders_apart_and_trackers_not(experiment):
    changes = {
        "flora, path=a/base": ["model.path=/of/a/base"],
        "flora, path=b/base": ["model.path=/of/b/base", "federation.seed=1"],
    }
    experiments = [load(experiment(), each) for each in changes.values()]
    assert labels(experiments) == list(changes)
    tracked = load(experiment(), ["tracking.to=tensorboard", "tracking.name=a"])
    assert labels([load(experiment()), tracked]) == ["flora", "flora"]


def test_many_clients_are_the_worst_of_them():
    found = [{"series": "flora", "name": f"client-{i:03}", "x": float(i)} for i in range(65)]
    (chart,) = _dots(found, ["flora"], "loss", "training loss of each client", "lower")
    assert chart.title == "training loss of each client, the worst 60 of 65"
    assert "client-064 flora 64" in chart.words
    assert "client-004" not in chart.words
    (chart,) = _dots(found, ["flora"], "ROUGE-L", "ROUGE-L by category", "higher")
    assert "client-064" not in chart.words


def test_many_rounds_are_drawn():
    frame = pd.DataFrame({"series": "flora", "x": range(5001), "y": 1.0, "low": 1.0, "high": 1.0})
    assert 'stroke="var(--series-0)"' in charts.lines(frame, ["flora"], x="round", y="loss")


def test_who_was_weighed_otherwise_is_marked():
    rows = [("ash", 1, 0.5, "took part", ""), ("elm", 1, 0.7, "took part", "counts for nothing")]
    frame = pd.DataFrame(rows, columns=["client", "round", "loss", "state", "weighed"])
    svg = charts.taking_part(frame, (0.5, 0.7), legend=False)
    assert svg.count("○") == 1
    assert "elm, round 1: train loss 0.7, counts for nothing" in svg
    assert "○" not in charts.taking_part(frame[:1], (0.5, 0.7), legend=False)


def test_axes_have_marks_that_can_be_read():
    frame = pd.DataFrame({"series": "flora", "x": [1.0, 2.0, 3.0], "y": [0.0, 1e-12, 1e-3]})
    frame = frame.assign(low=frame["y"], high=frame["y"])
    svg = charts.lines(frame, ["flora"], x="round", y="error", log_y=True)
    assert "1.5" not in re.findall(">([^<]+)</text>", svg)
    assert "flora: error 0, round 1" in svg  # though it is drawn at the axis' end
    for sizes in ([4.2e6, 4.3e6, 4.9e6], [4.2e6, 8.4e6, 12.6e6], [4e6, 2e7, 8e8]):
        svg = charts.lines(
            frame.assign(x=sizes), ["flora"], x="bytes", y="loss", log_x=True, in_bytes=True
        )
        assert len(re.findall(r">[\d.]+[MG]B</text>", svg)) >= 2


def test_answers_and_spectra_need_the_base_and_nothing_else_does(
    hedgerow, experiment, tmp_path, tiny_model
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    run, page = tmp_path / "run", tmp_path / "page.html"
    assert hedgerow("run", experiment(model={"path": str(model)}), "--out", run).code == 0
    result = hedgerow("report", run, "--out", page, "--answers", 2)
    assert result.code == 0, result.err
    assert page.read_text().count('class="question"') == 2
    shutil.rmtree(model)
    result = hedgerow("report", run, "--out", page)
    assert result.code == 0, result.err
    assert "not shown" in result.out
    assert "does not exist" in result.out
    text = page.read_text()
    assert "Singular values" not in text
    assert 'class="question"' not in text
    assert "loss on the test data by round" in text


def test_a_run_that_was_stopped_is_shown_as_far_as_it_got(hedgerow, experiment, tmp_path):
    run, page = tmp_path / "run", tmp_path / "page.html"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert hedgerow("report", run, "--out", page, "--answers", 0).code == 0
    text = page.read_text()
    assert "stopped after round 1 of 2" in text
    assert '<td data-value="1">1</td></tr>' in text  # under "failed"


def test_a_run_that_was_stopped_before_its_first_round_is_shown(hedgerow, experiment, tmp_path):
    run, page = tmp_path / "run", tmp_path / "page.html"
    path = experiment(method={"name": "standalone"}, training={"learning_rate": 1e30})
    assert hedgerow("run", path, "--out", run).code == 1
    result = hedgerow("report", run, "--out", page)
    assert result.code == 0, result.err
    assert "stopped after round 0 of 2" in page.read_text()


def test_a_run_that_diverged_is_shown_without_what_is_no_number(hedgerow, experiment, tmp_path):
    run, page = tmp_path / "run", tmp_path / "page.html"
    path = experiment(method={"name": "standalone"})
    assert hedgerow("run", path, "--out", run).code == 0
    rows = rows_of(run)
    rows[-1] |= {"eval_loss": None, "train_loss": None, "aggregation_error": None}
    rows[-1]["train_loss_by_client"] = dict.fromkeys(rows[-1]["train_loss_by_client"])
    rows[-1]["by_client"]["client-000"]["eval_loss"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = hedgerow("report", run, "--out", page, "--answers", 0)
    assert result.code == 0, result.err
    text = page.read_text()
    assert "client-001 standalone" in text
    assert "client-000 standalone" not in text


def test_a_run_is_shown_once_and_what_is_run_again_beside_it(hedgerow, experiment, tmp_path):
    run, page = tmp_path / "run", tmp_path / "page.html"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    (tmp_path / "link").symlink_to(run)
    assert [each.label for each in gather([run, tmp_path / "link"])] == ["flora"]
    shutil.copytree(run, tmp_path / "again")
    result = hedgerow("report", run, tmp_path / "again", "--out", page, "--answers", 0)
    assert result.code == 0, result.err
    text = page.read_text()
    assert "flora in again" in text
    assert "2 settings of flora on" in text
    assert str(tmp_path) not in text


def test_spectra_need_no_questions_and_notes_name_no_folder(hedgerow, experiment, tmp_path):
    run, page = tmp_path / "run", tmp_path / "page.html"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    (tmp_path / "test.json").unlink()
    result = hedgerow("report", run, "--out", page)
    assert result.code == 0, result.err
    assert f"not shown: {tmp_path / 'test.json'}" in result.out
    text = page.read_text()
    assert ">Singular values</h2>" in text
    assert "Not shown: test.json" in text
    assert str(tmp_path) not in text


def test_scores_on_other_test_data_are_not_compared(hedgerow, experiment, tmp_path):
    page, runs = tmp_path / "page.html", [tmp_path / "one", tmp_path / "two"]
    path = experiment()
    shutil.copy(tmp_path / "test.json", tmp_path / "other.json")
    assert hedgerow("run", path, "--out", runs[0]).code == 0
    other = f"data.test={tmp_path / 'other.json'}"
    assert hedgerow("run", path, other, "federation.seed=1", "--out", runs[1]).code == 0
    assert hedgerow("report", *runs, "--out", page, "--answers", 0).code == 0
    text = page.read_text()
    assert "their scores do not compare" in text
    assert "The lowest loss" not in text


def test_spectra_of_bfloat16_are_not_those_of_its_rounding(experiment):
    model = Model.load(load(experiment(model={"dtype": "bfloat16"})).model)
    name, before = next((n, w) for n, w in model.network.named_parameters() if w.ndim == 2)
    before = before.clone()
    added = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    model.add(name, added)
    error = torch.linalg.norm(model.change(name, before) - added) / torch.linalg.norm(added)
    assert error < 0.01


def test_mistakes_are_one_sentence_and_leave_no_page(hedgerow, experiment, tmp_path):
    page = tmp_path / "page.html"
    empty = tmp_path / "empty"
    empty.mkdir()
    result = hedgerow("report", empty, "--out", page)
    assert (result.code, page.exists()) == (2, False)
    assert "has no run in it" in result.err
    result = hedgerow("report", tmp_path / "nowhere", "--out", page)
    assert (result.code, page.exists()) == (2, False)
    run = tmp_path / "run"
    hedgerow("run", experiment(), "--out", run)
    result = hedgerow("report", run, "--out", tmp_path)
    assert result.code == 2
    assert "name a file" in result.err


def test_means_are_of_all_seeds_or_there_are_none(comparison, tmp_path):
    """A seed that diverged is not left out of a line, nor one that stopped counted in it."""
    copy = tmp_path / "copy"
    shutil.copytree(comparison, copy)
    for name, change in (("fedavg,seed=1", "diverged"), ("standalone,seed=1", "stopped")):
        path = copy / "runs" / name / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if change == "diverged":
            rows[-1]["eval_loss"] = None
        else:
            rows.pop()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = gather([copy])
    lines = over_seeds(rounds_of(series), "round", "eval_loss")
    ends = lines.groupby("series")["x"].max()
    assert (ends["fedavg"], ends["standalone"]) == (1, 2)
    alone = lines[lines["series"] == "standalone"]
    assert (alone["low"] == alone["high"]).all()  # of the seed that got to its end
    whole = lines[lines["series"] == "flora, restart=warm"]
    seeds = [
        [
            json.loads(line)["eval_loss"]
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]
        for path in sorted(copy.glob("runs/flora,seed=*"))
    ]
    means = [sum(each) / 2 for each in zip(*seeds, strict=True)]
    assert whole["y"].tolist() == pytest.approx(means)
    assert whole["low"].tolist() == [min(each) for each in zip(*seeds, strict=True)]


def test_cells_that_left_no_run_are_named(hedgerow, experiment, tmp_path):
    out, page = tmp_path / "out", tmp_path / "page.html"
    methods = ["--methods", "flora,fedit", "--target", 5.4]
    result = hedgerow("compare", experiment(), *methods, "--out", out)
    assert result.code == 1  # fedit wants one rank
    assert hedgerow("report", out, "--out", page, "--answers", 0).code == 0
    assert "fedit: 1 of 1 runs failed" in page.read_text()
    assert "bytes to 5.4" in page.read_text()
    (out / "comparison.json").write_text("[")
    assert hedgerow("report", out, "--out", page).code == 2


def test_clients_that_are_many_are_counted(hedgerow, experiment, tmp_path):
    run, page = tmp_path / "run", tmp_path / "page.html"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    first, *others = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in others]
    names = [f"client-{number:03d}" for number in range(70)]
    for row in rows:
        row |= {"participants": names[:67], "failures": dict.fromkeys(names[67:], "away")}
    text = "\n".join([first, *map(json.dumps, rows)]) + "\n"
    (run / "metrics.jsonl").write_text(text)
    assert hedgerow("report", run, "--out", page, "--answers", 0).code == 0
    assert "round 1: 67 took part" in page.read_text()
    assert "round 2: 3 failed" in page.read_text()


# --- in a browser ---------------------------------------------------------------------------------

browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium."""
    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # which root cannot have
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)


@pytest.fixture
def opened(chromium, html):
    """Open the page, in a window that records what it does."""
    contexts = []

    def open_(width: int = 1280, scheme: str = "light") -> tuple[Page, list[str]]:
        context = chromium.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme
        )
        contexts.append(context)
        page, events = context.new_page(), []
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("dialog", lambda dialog: events.append(dialog.message))
        page.on("request", lambda request: events.append(request.url))
        page.goto(html.as_uri())
        assert events.pop(0) == html.as_uri()
        return page, events

    yield open_
    for context in contexts:
        context.close()


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_renders_everywhere_and_asks_for_nothing(opened, width, scheme):
    page, events = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    figures = page.locator("figure").all()
    assert len(figures) > 8
    for figure in figures:
        box = figure.locator("svg").bounding_box()
        assert box is not None
        assert 0 < box["width"] <= width
        assert figure.locator('[role="graphics-symbol"][aria-label]').count() > 2
    assert events == []


@browser
def test_no_table_is_cut_off_on_paper(opened):
    page, _ = opened(718)  # A4 within its margins
    page.emulate_media(media="print")
    for table in page.locator(".scroll").all():
        assert table.evaluate("each => each.scrollWidth <= each.clientWidth")


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(opened, scheme):
    """By axe: names, roles, contrast of text. The contrast of lines is measured here."""
    from axe_playwright_python.sync_playwright import Axe

    page, _ = opened(scheme=scheme)
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) == len(LABELS)
    assert min(ratios) >= 3


CONTRASTS = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3)
      .map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("#legend line")].map((line) => {
    const ink = light(getComputedStyle(line).stroke);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
}"""


@browser
def test_the_table_sorts_with_the_mouse_and_with_keys(opened):
    page, events = opened()
    column = "tbody td[data-value]:nth-child(2)"

    def losses() -> list[float]:
        cells = page.locator(f"table.sortable {column}").all()
        return [float(cell.get_attribute("data-value") or "nan") for cell in cells]

    heading = page.locator("table.sortable th button").nth(1)
    heading.click()
    assert losses() == sorted(losses())
    heading.press("Enter")
    assert losses() == sorted(losses(), reverse=True)
    assert page.locator('th[aria-sort="descending"]').count() == 1
    page.locator("table.sortable th button").first.click()
    names = page.locator("table.sortable tbody th").all_inner_texts()
    assert names == sorted(LABELS)
    assert events == []


@browser
def test_runs_can_be_hidden_and_marks_say_what_they_are(opened):
    page, events = opened()
    box = page.get_by_role("checkbox", name="fedavg")
    index = box.get_attribute("id").removeprefix("show-")
    mine = page.locator(f'figure [stroke="var(--series-{index})"]').first
    assert mine.is_visible()
    box.focus()
    page.keyboard.press("Space")
    assert not mine.is_visible()
    page.keyboard.press("Space")
    page.locator('figure [aria-roledescription="circle"]').last.hover()
    assert page.locator("#tip").inner_text().split(":")[0] in LABELS
    failed = page.locator("figure text", has_text="✕")
    assert failed.count() == 1
    assert NASTY in failed.get_attribute("aria-label")
    assert events == []


def test_a_page_says_what_privacy_cost_and_who_was_weighed_otherwise(
    hedgerow, experiment, tmp_path
):
    private = '{"level": "client", "clip": 0.5, "noise_multiplier": 1, "delta": 1e-3, "seed": 5}'
    runs = {
        "private": ["method=fedavg", f"privacy={private}"],
        "robust": ["method={name: fedavg}", "federation.weights=krum"],
    }
    for name, arguments in runs.items():
        assert hedgerow("run", experiment(), *arguments, "--out", tmp_path / name).code == 0
    row = rows_of(tmp_path / "robust")[-1]["weighed_otherwise"]
    client, reason = next(iter(row.items()))
    for name, told in (("private", True), ("robust", False)):
        page = tmp_path / f"{name}.html"
        assert hedgerow("report", tmp_path / name, "--out", page).code == 0
        html = page.read_text()
        assert (">Privacy</h2>" in html) == told
        assert ("Clients that were weighed otherwise" in html) != told
        assert (f"<td>{escape(reason)}</td>" in html) != told
        assert (f'<th scope="row">{client}</th>' in html) != told
