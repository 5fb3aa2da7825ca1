"""Charts as SVG: drawn by Vega-Lite, coloured by the page's CSS variables.

They are drawn when the page is made, so that it needs no script and no network to show them, prints
as it looks, and follows light and dark. Vega writes what each mark stands for beside it, which the
page shows on hovering and screen readers read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from hedgerow import console

WIDTH = 330
"""Of what is drawn in, without its axes: what a phone shows unscaled."""

LEAST = 1e-9
"""What is below it is drawn there on a logarithmic axis, which has no zero."""


def lines(
    frame: pd.DataFrame,
    series: Sequence[str],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    in_bytes: bool = False,
) -> str:
    """One line for each series, with a band where its runs differ.

    Args:
        frame: columns `series`, `x`, `y`, and the band's `low` and `high`.
        series: all of the page's, which decide the colours.
        x: the title of that axis, as `y` is.
        in_bytes: `x` counts bytes.
    """
    frame = frame.copy()
    value = console.size if in_bytes else console.score
    frame["label"] = [
        f"{row.series}: {y} {console.score(row.y)}, {x} {value(row.x)}"
        for row in frame.itertuples()
    ]
    by_series = _by_series(alt.Color, series, colour)
    # A logarithmic axis may have no mark at all where it is short.
    log_x = log_x and frame["x"].max() > 3 * frame["x"].min()
    horizontal = alt.X("x:Q").title(x).scale(type="log" if log_x else "linear", nice=not log_x)
    if in_bytes:
        size = "datum.label + 'B'"
        marks = {"values": _marks(frame["x"])} if log_x else {"tickCount": 4}
        horizontal = horizontal.axis(format="~s", labelExpr=size, **marks)
    elif not log_x:
        # There is no half a round; `tickMinStep` would allow one where there are few.
        whole = int(frame["x"].max() - frame["x"].min())
        horizontal = horizontal.axis(tickCount=max(1, min(5, whole)))
    if log_y:
        drawn_in = ["y", "low", "high"]
        frame[drawn_in] = frame[drawn_in].clip(lower=LEAST)
    vertical = alt.Y("y:Q").title(y).scale(type="log" if log_y else "linear", zero=False)
    if log_y:
        vertical = vertical.axis(format=".0e", values=_marks(frame["y"]))
    drawn = alt.Chart(frame).encode(horizontal, vertical, by_series)
    band = drawn.mark_area(opacity=0.18, aria=False).encode(alt.Y("low:Q"), alt.Y2("high:Q"))
    line = drawn.mark_line(strokeWidth=2, aria=False).encode(
        strokeDash=_by_series(alt.StrokeDash, series, dash)
    )
    dots = drawn.mark_circle(size=34, opacity=1).encode(description="label:N")
    layers = band + line + dots if _few(frame, 80) else band + line
    return _svg(layers.properties(width=WIDTH, height=230))


def dots(frame: pd.DataFrame, series: Sequence[str], *, x: str) -> str:
    """A row of dots for each name, one of each series.

    Args:
        frame: columns `series`, `name` and `x`.
    """
    frame = frame.copy()
    frame["label"] = [f"{r.series}, {r.name}: {x} {console.score(r.x)}" for r in _rows(frame)]
    chart = (
        alt.Chart(frame)
        .mark_point(filled=True, size=60, opacity=0.9)
        .encode(
            alt.X("x:Q").title(x).scale(zero=False, padding=8),
            alt.Y("name:N").title(None).axis(grid=True, labelLimit=170),
            _by_series(alt.Color, series, colour),
            _by_series(alt.Shape, series, lambda index: shape(index)[0]),
            description="label:N",
        )
    )
    return _svg(chart.properties(width=WIDTH - 90, height=alt.Step(22)))


def taking_part(frame: pd.DataFrame, domain: tuple[float, float], *, legend: bool) -> str:
    """Clients by rounds: the training loss of who took part, a cross where one failed.

    Args:
        frame: columns `client`, `round`, `loss` (NaN where it is not known), `state` (`took part`,
            or why it failed), and `weighed` (how a rule has weighed it otherwise, or nothing).
        domain: of the losses of all such charts of the page.
        legend: whether to say what the colours mean.
    """
    frame = frame.copy()
    frame["label"] = [
        f"{r.client}, round {r.round}: "
        + (r.state if pd.isna(r.loss) else f"train loss {console.score(r.loss)}")
        + (f", {r.weighed}" if r.weighed else "")
        for r in _rows(frame)
    ]
    rounds = int(frame["round"].max())
    place = alt.Chart().encode(
        alt.X("round:O").title("round").axis(labelAngle=0, labelOverlap=True),
        alt.Y("client:N").title(None).axis(labelLimit=110),
        description="label:N",
    )
    losses = alt.Color("loss:Q").title("train loss").scale(scheme="viridis", domain=domain)
    losses = losses.legend(
        alt.Legend(orient="bottom", direction="horizontal", gradientLength=160) if legend else None
    )
    known, there = frame["loss"].notna(), frame["state"] == "took part"
    layers = [
        (known, place.mark_rect().encode(losses)),
        (~known & there, place.mark_rect(color="var(--rule)")),
        (~there, place.mark_text(text="✕", color="var(--bad)", fontWeight="bold")),
        (frame["weighed"] != "", place.mark_text(text="○", color="var(--bad)", fontWeight="bold")),
    ]
    chart = alt.layer(
        *(layer.properties(data=frame[which]) for which, layer in layers if which.any())
    )
    step = max(6, min(36, (WIDTH - 90) // rounds))
    return _svg(chart.properties(width=alt.Step(step), height=alt.Step(14)))


def counts(frame: pd.DataFrame) -> str:
    """How many clients took part and failed in each round.

    Args:
        frame: columns `round`, `state` (`took part` or `failed`) and `count`.
    """
    frame = frame.copy()
    frame["label"] = [f"round {r.round}: {r.count} {r.state}" for r in _rows(frame)]
    states = alt.Scale(domain=["took part", "failed"], range=["var(--good)", "var(--bad)"])
    chart = (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            alt.X("round:O").title("round").axis(labelAngle=0, labelOverlap=True),
            alt.Y("count:Q").title("clients"),
            alt.Color("state:N").title(None).scale(states).legend(orient="bottom"),
            description="label:N",
        )
    )
    return _svg(chart.properties(width=WIDTH, height=120))


def colour(index: int) -> str:
    """The CSS variable that colours a series."""
    return f"var(--series-{index})"


def dash(index: int) -> list[int]:
    """The dashes of a series' line: colours alone are not for every eye, nor for every printer."""
    return ([1, 0], [7, 3], [2, 3], [9, 3, 2, 3])[index // 5 % 4]


def shape(index: int) -> tuple[str, str]:
    """The shape of a series' dots, as Vega calls it and as a character."""
    shapes = [("circle", "●"), ("square", "■"), ("triangle-up", "▲"), ("diamond", "◆")]
    return shapes[(index + index // 10) % 4]


def _by_series(channel: Any, series: Sequence[str], look: Callable[[int], Any]) -> Any:
    """A channel in which each series looks as its place says, on all charts of the page."""
    looks = [look(index) for index in range(len(series))]
    return channel("series:N").legend(None).scale(domain=list(series), range=looks)


def _marks(values: pd.Series) -> list[float]:
    """Powers of ten around some values, for a logarithmic axis; 2 and 5 of each where few."""
    first, last = (math.floor(math.log10(end)) for end in (values.min(), values.max()))
    powers = range(first, last + 2, 1 + (last - first) // 6)
    return [m * 10.0**power for power in powers for m in ((1, 2, 5) if last - first < 2 else (1,))]


def _few(frame: pd.DataFrame, most: int) -> bool:
    return int(frame.groupby("series").size().max()) <= most


def _rows(frame: pd.DataFrame) -> Any:
    return frame.itertuples(index=False)


def _svg(chart: Any) -> str:
    text = "var(--ink)"
    styled = (
        chart.configure(background="transparent", font="inherit", padding=4)
        .configure_axis(
            labelColor=text,
            titleColor=text,
            gridColor="var(--rule)",
            domainColor="var(--rule)",
            tickColor="var(--rule)",
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
        )
        .configure_legend(labelColor=text, titleColor=text, labelFontSize=12, titleFontSize=12)
        .configure_view(stroke=None)
    )
    with alt.data_transformers.enable("default", max_rows=None):  # of many rounds of many runs
        svg: str = vl_convert.vegalite_to_svg(styled.to_dict())
    # The page scales it; and it is one thing with a name there, not a tree of nameless groups.
    return re.sub(
        r'<svg [^>]*?width="(\d+)" height="\d+" (viewBox="[^"]+")>',
        r'<svg \2 style="max-width: calc(1.5 * \1px)" role="group">',
        svg,
        count=1,
    )
