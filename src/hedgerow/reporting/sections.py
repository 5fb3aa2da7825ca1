"""The sections of a page: which numbers of the runs are drawn, and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

import pandas as pd

from hedgerow import console
from hedgerow.evaluation.metrics import Score, main_scores_of
from hedgerow.reporting import charts, models
from hedgerow.reporting.gather import Series

LOSS = "eval_loss"
"""The score that has charts of its own."""

NOISE = (
    console.AGGREGATION,
    Score("compression_error", label="compression error", direction="lower"),
    Score("dropped_error", label="dropped error", direction="lower"),
    Score("momentum_error", label="momentum error", direction="lower"),
    Score("sketch_error", label="sketch error", direction="lower"),
    Score("upload_error", label="upload error", direction="lower"),
)
"""The relative errors of an aggregate, in metrics.jsonl."""

PRIVACY = (
    Score("epsilon", label="ε spent", direction="lower"),
    Score("clipped", label="share of updates that were cut", direction="lower"),
)
"""What rows of private runs have, in metrics.jsonl."""

_MOST_CELLS = 1500
"""Of one chart of clients by rounds; beyond, they are counted by round."""
_MOST_NAMES = 60
"""Of clients or categories in one chart; beyond, it has those that score worst."""
_ROUNDING = 1e-6
"""Singular values below this share of the largest are what float32 has rounded."""


class Chart(NamedTuple):
    """A chart and its words."""

    title: str
    svg: str
    words: str
    """What the chart shows, for those who cannot see it."""


class Section(NamedTuple):
    """Charts about one thing."""

    title: str
    about: str
    charts: list[Chart]


def sections(
    series: Sequence[Series], inspection: models.Inspection, rounds: pd.DataFrame
) -> list[Section]:
    """All sections that have something to show.

    Args:
        rounds: as `rounds_of` gives them.
    """
    names = [each.label for each in series]
    found = [
        _losses(rounds, names),
        _scores(series, rounds, names),
        _by_category(series, names),
        _by_client(series, names),
        _noise(rounds, names),
        _privacy(rounds, names),
        _spectra(series, inspection, names),
        _participation(series),
    ]
    return [section for section in found if section.charts]


def measured_scores(series: Sequence[Series]) -> dict[str, Score]:
    """The scores that are drawn by round, by their keys: each metric's main one."""
    runs = [outcome.cell.experiment for each in series for outcome in each.outcomes]
    return main_scores_of(dict.fromkeys(name for run in runs for name in run.evaluation.metrics))


def drawn_scores(series: Sequence[Series]) -> dict[str, Score]:
    """All that is drawn by round, by their keys, where it was measured."""
    others = {score.key: score for score in (console.TRAINING, *NOISE, *PRIVACY)}
    return measured_scores(series) | others


def rounds_of(series: Sequence[Series]) -> pd.DataFrame:
    """A row for each series, seed and round: the metrics, with bytes and seconds up to then.

    Of the runs that count.
    """
    keys = list(drawn_scores(series))
    found = []
    for each in series:
        for outcome in each.counted:
            spent, seconds = 0, 0.0
            for row in outcome.rows:
                spent += row["bytes_up"] + row["bytes_down"]
                seconds += row["seconds"] or 0
                own = {key: row.get(key) for key in keys}
                found.append(
                    {"series": each.label, "seed": outcome.cell.seed, "round": row["round"]}
                    | {"bytes": spent, "seconds": seconds}
                    | own
                )
    numbers = pd.DataFrame(found)
    return numbers.astype(dict.fromkeys(keys, "float64"))


def over_seeds(rounds: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """What `charts.lines` takes: means over seeds by round, from their lowest to their highest."""
    # A mean over those seeds alone that got there would flatter a method.
    complete = rounds.groupby(["series", "round"])[y].transform(lambda each: each.notna().all())
    by_round = rounds[complete].groupby(["series", "round"], sort=False)
    grouped = by_round.agg(low=(y, "min"), high=(y, "max"), value=(y, "mean"), place=(x, "mean"))
    grouped = grouped.rename(columns={"value": "y", "place": "x"})
    return grouped.reset_index(level="series").reset_index(drop=True)


def _losses(rounds: pd.DataFrame, names: list[str]) -> Section:
    y, title = LOSS, "loss on the test data"
    if LOSS not in rounds or not rounds[LOSS].notna().any():
        y, title = console.TRAINING.key, "training loss"
    drawn = []
    for x, words in (("round", "round"), ("bytes", "bytes up and down"), ("seconds", "seconds")):
        frame = over_seeds(rounds, x, y)
        if x == "bytes":
            frame = frame[frame["x"] > 0]  # a logarithmic axis has no zero
        if len(frame):
            svg = charts.lines(
                frame, names, x=words, y="loss", log_x=x == "bytes", in_bytes=x == "bytes"
            )
            drawn.append(_lines(frame, svg, title, words))
    silent = [name for name in names if not (rounds[rounds["series"] == name]["bytes"] > 0).any()]
    about = "Means over seeds; bands reach from the best seed to the worst."
    if silent:
        about += f" Nothing is sent by {_listed(silent)}."
    return Section("Loss", about, drawn)


def _scores(series: Sequence[Series], rounds: pd.DataFrame, names: list[str]) -> Section:
    scores = measured_scores(series)
    scores.pop(LOSS, None)
    drawn = []
    better: dict[str | None, list[str]] = {"higher": [], "lower": [], None: []}
    for score in (*scores.values(), console.TRAINING):
        frame = over_seeds(rounds, "round", score.key)
        if len(frame):
            svg = charts.lines(frame, names, x="round", y=score.title)
            drawn.append(_lines(frame, svg, score.label, "round"))
            better[score.direction].append(score.label)
    said = [
        f"{direction.capitalize()} is better: {_listed(labels)}."
        for direction, labels in better.items()
        if direction and labels
    ]
    about = " ".join([*said, "Training losses are of the clients' own data."])
    return Section("Scores by round", about, drawn)


def _by_category(series: Sequence[Series], names: list[str]) -> Section:
    drawn = []
    for score in measured_scores(series).values():
        found = _means(series, f"{score.key}_by")
        drawn += _dots(found, names, score.title, f"{score.label} by category", score.direction)
    return Section("Scores by category", "After the last round; means over seeds.", drawn)


def _by_client(series: Sequence[Series], names: list[str]) -> Section:
    trained = _means(series, "train_loss_by_client")
    tested = [
        {"series": each.label, "name": name, "x": fmean(s[LOSS] for s in scores)}
        for each in series
        for name, scores in _last(each, "by_client").items()
        if all(s.get(LOSS) is not None for s in scores)
    ]
    drawn = _dots(trained, names, "loss", "training loss of each client", "lower")
    drawn += _dots(
        tested, names, "loss", "loss on the test data of each client's own model", "lower"
    )
    for score in measured_scores(series).values():
        title = f"{score.label} on the client's own test rows"
        found = _means(series, f"{score.key}_by_client")
        drawn += _dots(found, names, score.title, title, score.direction)
    about = "In the last round; means over seeds."
    return Section("Scores by client", about, drawn)


def _dots(
    found: list[dict[str, Any]],
    names: list[str],
    x: str,
    title: str,
    direction: Literal["lower", "higher"] | None,
) -> list[Chart]:
    """A chart of `found`, rows of `series`, `name` and `x`; none of nothing.

    Args:
        direction: which is better, so that the worst are shown where there are too many.
    """
    if not found:
        return []
    frame = pd.DataFrame(found)
    means = frame.groupby("name")["x"].mean().sort_values(ascending=direction != "lower")
    if len(means) > _MOST_NAMES:
        title += f", the worst {_MOST_NAMES} of {len(means)}"
        frame = frame[frame["name"].isin(means.index[:_MOST_NAMES])]
    values = [
        f"{row.name} {row.series} {console.score(row.x)}" for row in frame.itertuples(index=False)
    ]
    words = f"Dots: {title}. {'; '.join(values)}."
    return [Chart(title, charts.dots(frame, names, x=x), words)]


def _noise(rounds: pd.DataFrame, names: list[str]) -> Section:
    drawn = []
    for score in NOISE:
        frame = over_seeds(rounds, "round", score.key)
        if len(frame):
            svg = charts.lines(frame, names, x="round", y=score.title, log_y=True)
            drawn.append(_lines(frame, svg, score.label, "round"))
    about = (
        "How far what was applied is from the weighted sum of the clients' updates, beside that "
        "sum, and what of it was left out on purpose, to save bytes. What is below "
        f"{charts.LEAST:.0e} is drawn there."
    )
    return Section("Noise of the aggregate", about, drawn)


def _privacy(rounds: pd.DataFrame, names: list[str]) -> Section:
    drawn = []
    for score in PRIVACY:
        frame = over_seeds(rounds, "round", score.key)
        if len(frame):
            svg = charts.lines(frame, names, x="round", y=score.title)
            drawn.append(_lines(frame, svg, score.label, "round"))
    about = (
        "Privacy loss ε so far, of the client that has spent most: the smaller, the less anybody "
        "can tell from all that was sent whether a row, or a client, took part at all. It only "
        "grows; below 1 is strong, above 10 promises little."
    )
    return Section("Privacy", about, drawn)


def _spectra(series: Sequence[Series], inspection: models.Inspection, names: list[str]) -> Section:
    frames, words = [], []
    for name, by_matrix in inspection.spectra.items():
        columns = [pd.Series(v) / v[0] for v in by_matrix.values() if v[0] > 0]
        if not columns:
            continue
        together = pd.concat(columns, axis=1)  # smaller matrices have fewer
        quantiles = together.quantile([0.25, 0.5, 0.75], axis=1).T.set_axis(
            ["low", "y", "high"], axis=1
        )
        there = quantiles[quantiles["y"] > _ROUNDING].clip(lower=_ROUNDING)
        frames.append(there.assign(series=name, x=there.index + 1))
        ranks = (together.pow(2).cumsum() < 0.9 * together.pow(2).sum()).sum() + 1
        words.append(f"{name} {ranks.median():.0f}")
    if not frames:
        return Section("", "", [])
    title = "singular values of what was added"
    svg = charts.lines(
        pd.concat(frames), names, x="component", y="beside the largest", log_x=True, log_y=True
    )
    about = (
        "Of the sum of all rounds, for each matrix beside its largest; the median over the "
        "matrices, and their quartiles (one seed). Components that hold 90% of the energy of the "
        f"leading {models.LEADING}, in the median: {_listed(words)}. {standing_in(series)}"
    ).strip()
    return Section("Singular values", about, [Chart(title, svg, f"{title}. {about}")])


def _participation(series: Sequence[Series]) -> Section:
    frames = {each.label: _attendance(each) for each in series}
    losses = pd.concat(frames.values())["loss"].dropna()
    domain = (float(losses.min()), float(losses.max())) if len(losses) else (0.0, 1.0)
    drawn: list[Chart] = []
    for name, frame in frames.items():
        if frame.empty:
            continue
        failed = int((frame["state"] != "took part").sum())
        words = (
            f"{name}: {frame['client'].nunique()} clients, {frame['round'].nunique()} rounds; "
            f"{len(frame) - failed} updates arrived, {failed} failed"
        )
        if len(frame) <= _MOST_CELLS and frame["client"].nunique() <= _MOST_NAMES:
            svg = charts.taking_part(frame, domain, legend=not drawn)
        else:
            states = frame["state"].where(frame["state"] == "took part", "failed")
            counted = frame.assign(state=states).groupby(["round", "state"]).size()
            svg = charts.counts(counted.rename("count").reset_index())
        drawn.append(Chart(name, svg, words))
    about = (
        "Who took part (coloured by training loss; ○ where a rule has weighed it otherwise) and "
        "who failed (✕), of one seed each; only how many, where clients and rounds are too many to "
        "draw."
    )
    return Section("Clients", about, drawn)


def _attendance(series: Series) -> pd.DataFrame:
    found = []
    for row in series.first.rows[1:]:
        losses = row.get("train_loss_by_client", {})
        weighed = row.get("weighed_otherwise") or {}
        states = {**dict.fromkeys(row["participants"], "took part"), **row["failures"]}
        found += [
            {
                **{"client": name, "round": row["round"], "loss": losses.get(name)},
                **{"state": state, "weighed": weighed.get(name, "")},
            }
            for name, state in states.items()
        ]
    frame = pd.DataFrame(found, columns=["client", "round", "loss", "state", "weighed"])
    return frame.astype({"loss": "float64"}).sort_values(["client", "round"])


def _means(series: Sequence[Series], key: str) -> list[dict[str, Any]]:
    """What `_dots` takes: the means over seeds of the numbers under `key`, by name."""
    return [
        {"series": each.label, "name": name, "x": fmean(values)}
        for each in series
        for name, values in _last(each, key).items()
    ]


def _last(series: Series, key: str) -> dict[str, list[Any]]:
    """The values under `key` in the last rows of a series' runs, by name."""
    found: dict[str, list[Any]] = {}
    for outcome in series.counted:
        for name, value in (outcome.rows[-1].get(key) or {}).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    # A score that a seed does not have (it diverged, say) has no mean.
    return {name: values for name, values in found.items() if len(values) == len(series.counted)}


def _lines(frame: pd.DataFrame, svg: str, what: str, x: str) -> Chart:
    """A chart of lines; in words, where each of them ends."""
    last = frame.groupby("series", sort=False).tail(1)
    value = console.size if x.startswith("bytes") else console.score
    ends = [
        f"{end.series} ends at {console.score(end.y)} ({x} {value(end.x)})"
        for end in last.itertuples()
    ]
    title = f"{what} by {x}"
    return Chart(title, svg, f"Lines: {title}. {'; '.join(ends)}.")


def standing_in(series: Sequence[Series]) -> str:
    """Whose model is looked at, where each client has one of its own."""
    own = [e.label for e in series if not e.first.cell.experiment.method.has_global_model]
    return f"Of {_listed(own)}, the first client's model." if own else ""


def _listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
