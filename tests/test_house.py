"""The house: imports go down only, wherever they stand."""

from __future__ import annotations

import ast
import re
import runpy
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hedgerow

SOURCES = Path(hedgerow.__file__).parents[1]


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in (SOURCES / "hedgerow").rglob("*.py"):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """What a module imports of the package: at its top, in functions, and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in whole}
    return found & known.keys()


def test_no_imports_go_in_a_circle():
    known = modules()
    graph = {name: imported(path, known) - {name} for name, path in known.items()}
    assert sum(map(len, graph.values())) > 300  # they were found
    TopologicalSorter(graph).prepare()  # or it names the circle


def test_every_room_is_on_the_page_about_them_in_the_order_of_imports():
    root = Path(__file__).parents[1]
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contracts["contracts"][0]["layers"]]
    order = {room: number for number, layer in enumerate(layers) for room in layer}
    page = (root / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (`.+`) \|", page, re.M)
    rooms = [room for row in rows for room in re.findall(r"`(\w+)(?:\.py|/)`", row)]
    assert sorted(rooms) == sorted(order)
    assert [order[room] for room in rooms] == sorted(order[room] for room in rooms)


BENCHMARKS = sorted((Path(__file__).parents[1] / "bench").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_import_what_is_there(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    runpy.run_path(str(path), run_name="imported")


def test_the_tensors_formats_know_no_method():
    known = modules()
    for name in known:
        if name.startswith("hedgerow.wire"):
            assert all(
                other.startswith(("hedgerow.wire", "hedgerow.errors", "hedgerow.names"))
                or other == "hedgerow.lazy"
                for other in imported(known[name], known)
            ), name
