"""Draw the pictures of the explanations: python docs/_pictures.py [FOLDER], by default this one.

`sketches.svg` is computed, from an update of the demo's first client; `epsilon.svg` and
`attacks.svg` have the numbers of tables in these pages; the others are drawn.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import altair as alt
import pandas as pd
import torch

import hedgerow as hr
from hedgerow import demo
from hedgerow.sketch import project, reconstruct

SHARES = (1 / 256, 1 / 64, 1 / 16, 1 / 4)
SEEDS = 4

HERE = Path(__file__).parent
GREY = "#808080"
"""Of words and lines: it can be read on white and on black."""
COLORS = ("#2f9d5f", "#d07a2c", "#4a86cc", "#a568c0", "#cc5552", "#8a8a2e")


def svg(title: str, width: float, height: float, parts: list[str]) -> str:
    """Drawing of parts, under a title that screen readers say."""
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{title}</title>\n{inside}\n</svg>\n"
    )


def stacking() -> str:
    """Drawing of two adapters of ranks 3 and 1, averaged with padding, and stacked."""
    colors, unit, parts = ("#2f7d4f", "#c9742b"), 14, []

    def matrix(
        x: float, y: float, columns: int, rows: int, color: str, dashed: bool = False
    ) -> None:
        look = (
            'fill="none" stroke-dasharray="4 3"'
            if dashed
            else f'fill="{color}" fill-opacity="0.75"'
        )
        size = f'width="{columns * unit}" height="{rows * unit}"'
        parts.append(f'<rect x="{x}" y="{y}" {size} {look} stroke="{color}"/>')

    def text(x: float, y: float, said: str, size: int = 14, anchor: str = "start") -> None:
        parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="#808080" font-family="sans-serif">{said}</text>'
        )

    text(20, 24, "two clients, ranks 3 and 1")
    for number, rank in enumerate((3, 1)):
        y = 50 + 130 * number
        matrix(40, y, rank, 6, colors[number])
        matrix(100, y, 6, rank, colors[number])
        text(40, y + 6 * unit + 16, f"B{'₁₂'[number]}")
        text(100, y + rank * unit + 16, f"A{'₁₂'[number]}")
    text(240, 24, "zero-padding: mean of B times mean of A")
    matrix(260, 70, 3, 6, colors[0])
    matrix(260, 70, 1, 6, colors[1])
    matrix(262 + unit, 70, 2, 6, colors[1], dashed=True)
    text(320, 120, "×", 20)
    matrix(350, 70, 6, 3, colors[0])
    matrix(350, 70, 6, 1, colors[1])
    text(260, 180, "= (p₁B₁ + p₂B₂)(p₁A₁ + p₂A₂)")
    text(260, 202, "has cross terms, as p₁p₂ B₁A₂,")
    text(260, 224, "that nobody has learnt")
    text(560, 24, "stacking: side by side")
    matrix(580, 70, 3, 6, colors[0])
    matrix(580 + 3 * unit, 70, 1, 6, colors[1])
    text(650, 120, "×", 20)
    matrix(680, 70, 6, 3, colors[0])
    matrix(680, 70 + 3 * unit, 6, 1, colors[1])
    text(580, 180, "= p₁B₁A₁ + p₂B₂A₂")
    text(580, 202, "exactly, whatever the ranks;")
    text(580, 224, "of rank r₁ + r₂")
    return svg("Averaging factors, and stacking them", 820, 310, parts)


Box = tuple[float, float, str]
"""Left and upper edge of a box, in cells of the drawing, and its lines of text."""


def diagram(title: str, boxes: dict[str, Box], arrows: list[tuple[str, str, str]]) -> str:
    """Drawing of boxes, and of arrows with words between them, in rows and columns."""
    across, down, wide, high = 190, 96, 142, 54
    grey, green = "#808080", "#2f7d4f"
    parts = [
        f'<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z" fill="{grey}"/></marker>'
    ]

    def said(x: float, y: float, line: str, size: int) -> str:
        look = f'font-size="{size}" text-anchor="middle" fill="{grey}" font-family="sans-serif"'
        return f'<text x="{x}" y="{y}" {look}>{line}</text>'

    for x, y, text in boxes.values():
        left, top = 10 + x * across, 10 + y * down
        parts.append(
            f'<rect x="{left}" y="{top}" width="{wide}" height="{high}" rx="6" fill="{green}" '
            f'fill-opacity="0.12" stroke="{green}"/>'
        )
        lines = text.split("\n")
        for number, line in enumerate(lines):
            place = top + high / 2 + 5 + 17 * (number - (len(lines) - 1) / 2)
            parts.append(said(left + wide / 2, place, line, 13))
    for start, end, words in arrows:
        (x1, y1, _), (x2, y2, _) = boxes[start], boxes[end]
        right, under = (x2 > x1) - (x2 < x1), 0 if x1 != x2 else (y2 > y1) - (y2 < y1)
        from_x, to_x = (
            10 + x * across + wide / 2 + s * right * wide / 2 for x, s in ((x1, 1), (x2, -1))
        )
        from_y, to_y = (
            10 + y * down + high / 2 + s * under * high / 2 for y, s in ((y1, 1), (y2, -1))
        )
        parts.append(
            f'<path d="M{from_x} {from_y} L{to_x} {to_y}" stroke="{grey}" fill="none" '
            'marker-end="url(#tip)"/>'
        )
        if words:
            middle = (from_x + to_x) / 2 + (0 if right else 8 + 3.4 * len(words))
            parts.append(said(middle, (from_y + to_y) / 2 - (7 if right else -4), words, 11))
    width = max(x for x, _, _ in boxes.values()) * across + wide + 20
    height = max(y for _, y, _ in boxes.values()) * down + high + 20
    return svg(title, width, height, parts)


ROUND = diagram(
    "A round: clients send updates, the server appends an entry, everybody applies it",
    {
        **{f"client {k}": (0, k, "client\nown rows, base model") for k in range(3)},
        "server": (1, 1, "server\nadds up"),
        "ledger": (2, 1, "ledger\nentries 1 … t"),
        "model": (3, 1, "global model\nbase + entries"),
    },
    [
        *((f"client {k}", "server", "update" if k == 1 else "") for k in range(3)),
        ("server", "ledger", "entry"),
        ("ledger", "model", ""),
    ],
)
PARTS = diagram(
    "Parts of a method, in the order in which data flow through them",
    {
        "trains": (0, 0, "trains\nall weights, adapter"),
        "up": (1, 0, "up\ncodec, feedback"),
        "weights": (2, 0, "weights\nsize, krum …"),
        "server": (2, 1, "server optimiser\nsgd, adam …"),
        "down": (1, 1, "down\ncodec, feedback"),
        "entry": (0, 1, "entry\napplied by everybody"),
    },
    [
        ("trains", "up", ""),
        ("up", "weights", "update"),
        ("weights", "server", "sum"),
        ("server", "down", "step"),
        ("down", "entry", ""),
        ("entry", "trains", "next round"),
    ],
)
ROOMS = diagram(
    "A run on its way through the rooms of the code",
    {
        "file": (0, 0, "experiment.yaml"),
        "settings": (1, 0, "experiment/\nchecked settings"),
        "prepared": (2, 0, "runs/, data/, loading\nmodel, tokens"),
        "loop": (2, 1, "federation/loop\neach round"),
        "clients": (3, 0, "engines/\nlocal or Flower"),
        "update": (4, 0, "training/, methods/\nupdate"),
        "aggregate": (4, 1, "wire/, methods/\naggregate"),
        "ledger": (3, 1, "ledger\nentry"),
        "scores": (1, 1, "evaluation/\nmetrics.jsonl"),
        "page": (0, 1, "reporting/\ntables, page"),
    },
    [
        ("file", "settings", ""),
        ("settings", "prepared", ""),
        ("prepared", "loop", ""),
        ("loop", "clients", ""),
        ("clients", "update", ""),
        ("update", "aggregate", "bytes"),
        ("aggregate", "ledger", ""),
        ("ledger", "loop", "apply"),
        ("loop", "scores", ""),
        ("scores", "page", ""),
    ],
)


def words(x: float, y: float, said: str, *, anchor: str = "start", color: str = GREY) -> str:
    """A line of words that begins, ends or has its middle at a place."""
    look = f'font-size="13" text-anchor="{anchor}" fill="{color}" font-family="sans-serif"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{said}</text>'


def line(x1: float, y1: float, x2: float, y2: float, color: str, width: float, seen: float) -> str:
    """A straight line, of which so much is seen: from 0 to 1."""
    look = f'stroke="{color}" stroke-width="{width}" stroke-opacity="{seen}"'
    return f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" {look} fill="none"/>'


def dot(x: float, y: float, color: str) -> str:
    """A dot."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'


def apart(places: Sequence[float], least: float) -> list[float]:
    """The places, in their order, each at least so far below the one above it."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for above, index in pairwise(order):
        moved[index] = max(moved[index], moved[above] + least)
    return moved


def losses_by_epsilon() -> tuple[list[str], dict[str, list[tuple[float, float]]]]:
    """Heads of the columns, and losses with their deviations by method, as privacy.md has them."""
    page = (HERE / "privacy.md").read_text("utf-8")
    _, _, rest = page.partition("at `level: client` (δ")
    heads, _, *rows = re.findall(r"^\|.*\|$", rest.partition("\n    python")[0], re.MULTILINE)
    columns = [cell.strip() for cell in heads.split("|")[2:-1]]
    found = {}
    for row in rows:
        name, *cells = row.split("|")[1:-1]
        numbers = [tuple(map(float, cell.split("±"))) for cell in cells]
        found[name.split("`")[1]] = numbers
    return columns, found


def epsilon() -> str:
    """Drawing of the loss against ε, at client level."""
    columns, found = losses_by_epsilon()
    left, right, top, bottom, lowest, highest = 60, 560, 40, 360, 0.7, 4.2

    def x_of(column: int) -> float:
        return left + 40 + column * (right - left - 80) / (len(columns) - 1)

    def y_of(loss: float) -> float:
        share = math.log(loss / lowest) / math.log(highest / lowest)
        return bottom - share * (bottom - top)

    parts = [words(left - 44, top - 18, "loss (logarithmic), and its standard deviation")]
    for tick in (0.7, 1, 1.5, 2, 3, 4):
        parts.append(line(left, y_of(tick), right, y_of(tick), GREY, 1, 0.25))
        parts.append(words(left - 8, y_of(tick) + 4, f"{tick:g}", anchor="end"))
    for number, head in enumerate(columns):
        said = "no noise" if head == "without" else head
        parts.append(words(x_of(number), bottom + 22, said, anchor="middle"))
    ends = apart([y_of(losses[-1][0]) for losses in found.values()], 17)
    for place, (name, losses) in enumerate(found.items()):
        color, beside = COLORS[place], 5 * (place - (len(found) - 1) / 2)
        at = [(x_of(column) + beside, y_of(loss)) for column, (loss, _) in enumerate(losses)]
        for (x, y), (loss, spread) in zip(at, losses, strict=True):
            least = max(loss - spread, lowest)
            parts.append(line(x, y_of(loss + spread), x, y_of(least), color, 1.5, 0.45))
            parts.append(dot(x, y, color))
        for (x1, y1), (x2, y2) in pairwise(at):
            parts.append(line(x1, y1, x2, y2, color, 2, 0.9))
        parts.append(line(*at[-1], right - 4, ends[place], color, 1, 0.5))
        parts.append(words(right, ends[place] + 4, name, color=color))
    title = "Loss by method against ε, at client level: more noise to the right"
    return svg(title, right + 90, bottom + 40, parts)


RULES = ("no rule", "multi_krum", "trust", "median", "geometric_median")
"""Rules of weights in the order in which bench/README.md has their numbers."""


def losses_under_attack() -> dict[str, list[float | None]]:
    """Rise of the loss in percent by each of `RULES`, by method, as bench/README.md has it.

    Two of ten clients send their update turned and ten times as long.
    """
    page = (HERE.parent / "bench/README.md").read_text("utf-8")
    found: dict[str, list[float | None]] = {}
    for begins, methods in (
        ("| Loss beside the clean run's, one seed, ten Dolly clients", ["fedit"]),
        ("| The same: `fedavg`; `flora`", ["fedavg", "flora"]),
        ("| The same for `ferret` (", ["ferret"]),
    ):
        (row,) = (each for each in page.splitlines() if each.startswith(begins))
        groups = row.split("|")[2].split(";")
        for method, group in zip(methods, range(0, len(groups), 2), strict=False):
            cells = [*groups[group].split(","), *groups[group + 1].split(",")]
            found[method] = [
                None if cell.strip() == "–" else float(cell.strip(" +%")) for cell in cells
            ]
    return found


def attacks() -> str:
    """Drawing of what hostile clients cost by each rule of weights."""
    found = losses_under_attack()
    left, right, top, high, lowest, highest = 150, 640, 70, 70, 0.1, 500
    bottom = top + high * len(RULES)

    def x_of(rise: float) -> float:
        return left + (right - left) * math.log(rise / lowest) / math.log(highest / lowest)

    parts = [words(20, 24, "rise of the loss over a run that nobody attacks (logarithmic)")]
    for tick in (0.1, 1, 10, 100):
        parts.append(line(x_of(tick), top - 6, x_of(tick), bottom, GREY, 1, 0.25))
        parts.append(words(x_of(tick), bottom + 20, f"{tick:g}%", anchor="middle"))
    for row, rule in enumerate(RULES):
        parts.append(words(left - 12, top + high * (row + 0.5) + 4, rule, anchor="end"))
        parts.append(line(left, top + high * row, right, top + high * row, GREY, 1, 0.25))
    for place, (method, rises) in enumerate(found.items()):
        parts.append(dot(left + 110 * place + 6, 48, COLORS[place]))
        parts.append(words(left + 110 * place + 16, 52, method, color=COLORS[place]))
        for row, rise in enumerate(rises):
            if rise is None:
                continue
            y = top + high * row + 12 + 15 * place
            parts.append(line(left, y, x_of(rise), y, COLORS[place], 1, 0.4))
            parts.append(dot(x_of(rise), y, COLORS[place]))
            said = f"{rise:.{1 if rise < 100 else 0}f}%"
            parts.append(words(x_of(rise) + 8, y + 4, said, color=COLORS[place]))
    title = "What two of ten clients that send turned updates cost, by rule of weights"
    return svg(title, right + 60, bottom + 36, parts)


def an_update() -> torch.Tensor:
    """What ten steps of AdamW change in the demo's model on its first client's rows."""
    with tempfile.TemporaryDirectory() as folder:
        changes = ["method=fedavg", "federation.rounds=1", "federation.clients_per_round=1"]
        changes += ["training.steps=10", "evaluation.metrics=[loss]"]
        run = hr.run(demo.prepare(Path(folder)), *changes, out=Path(folder) / "run")
        before, after = (run.model(round=number).state_dict() for number in (0, 1))
        return torch.cat([(after[name] - before[name]).flatten() for name in before])


def likeness(delta: torch.Tensor) -> pd.DataFrame:
    """Cosine between an update and its estimate, by what is sent, and bits for each parameter."""
    size, rows = delta.numel(), []
    for share in SHARES:
        k = int(share * size)
        for seed in range(SEEDS):
            some = project(delta, seed=seed, k=k)
            every = project(delta, seed=seed, k=size)  # a rotation of the update
            largest = torch.zeros(size)
            places = every.abs().topk(k).indices
            largest[places] = every[places].sign()
            entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
            for name, bits, sent in (
                ("random, 32 bits (the paper's)", 32 * share, some),
                ("random, 1 bit", share, some.sign()),
                ("largest, 1 bit, with places", share + entropy, largest),
            ):
                found = reconstruct(sent, seed=seed, size=size)
                cosine = float(torch.cosine_similarity(found, delta, dim=0))
                rows.append({"coordinates": name, "bits": bits, "cosine": cosine})
    return pd.DataFrame(rows).groupby(["coordinates", "bits"], as_index=False).mean()


def main() -> None:
    """Draw them."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    drawn = {"stacking": stacking(), "round": ROUND, "parts": PARTS, "rooms": ROOMS}
    drawn |= {"epsilon": epsilon(), "attacks": attacks()}
    for name, drawing in drawn.items():
        (folder / f"{name}.svg").write_text(drawing, encoding="utf-8")
    frame = likeness(an_update()[: 1 << 18])
    print(frame.to_string(index=False))
    chart = (
        alt.Chart(frame, width=480, height=280)
        .mark_line(point=True)
        .encode(
            x=alt.X("bits", title="bits for each parameter").scale(type="log"),
            y=alt.Y("cosine", title="cosine of update and estimate"),
            color=alt.Color("coordinates", title="coordinates"),
            shape=alt.Shape("coordinates", title="coordinates"),
        )
    )
    chart.save(folder / "sketches.svg")


if __name__ == "__main__":
    main()
