"""Charts that notebooks show without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair
import pandas
import vl_convert


class Chart(altair.Chart):
    """An altair chart that a notebook draws by itself: as SVG, made where the notebook runs."""

    def _repr_mimebundle_(self, *_: Any, **__: Any) -> dict[str, str]:
        return {"image/svg+xml": vl_convert.vegalite_to_svg(self.to_dict())}


def by_round(rows: Sequence[dict[str, Any]], score: str, title: str) -> Chart:
    """Chart of a score by round.

    Args:
        rows: of metrics.jsonl, those that have the score.
        score: its key.
        title: what stands above the chart.
    """
    values = pandas.DataFrame([{"round": row["round"], score: row[score]} for row in rows])
    chart: Chart = (
        Chart(values, title=title)
        .mark_line(point=True)
        .encode(
            x=altair.X("round:Q", axis=altair.Axis(tickMinStep=1)),
            y=altair.Y(f"{score}:Q", scale=altair.Scale(zero=False)),
        )
    )
    return chart
