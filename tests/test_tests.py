"""The tests themselves: which module may use which."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
NOT_SHARED = {path.stem for path in FILES if path.parent == TESTS}


def imported(path):
    """The modules that a file imports anywhere, with all that they are part of."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            # `from . import x` may import a module as well.
            yield from (alias.name for alias in node.names if node.level or node.module == "tests")


def test_no_test_module_imports_another_one_or_conftest():
    """What several need is in tests/support, since tests are moved and split."""
    assert {"conftest", "test_tests", "test_untrusted"} <= NOT_SHARED
    assert len(FILES) > len(NOT_SHARED)
    found = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in FILES
        for name in imported(path)
        if NOT_SHARED & set(name.split("."))
    ]
    assert found == []


def test_an_import_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text(
        "import os, tests.conftest as c\nfrom test_run import x\n"
        "def f():\n    from . import test_model\n    from tests import test_wire\n"
    )
    assert {"tests.conftest", "test_run", "test_model", "test_wire"} <= set(imported(path))
