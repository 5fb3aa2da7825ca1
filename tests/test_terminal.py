"""What a terminal is shown is text, whoever has written it."""

import ast
import json
from pathlib import Path
from unicodedata import bidirectional

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hedgerow
from hedgerow.terminal import printable

EVIL = {
    "CSI": "\x1b[2J\x1b[31m",
    "OSC": "\x1b]0;title\x07",
    "C1": "\x9b31m\x85",
    "others": "\r\b\x7f\x0b",
    "bidi": "\u202etxt.exe\u202c\u2066\u200f",
    "unseen": "\u2028\ufeff\u00ad\U000e0041",
}
EVERYTHING = "".join(EVIL.values())


def is_harmless(text):
    return not any(
        (ord(c) < 32 and c not in "\n\t")
        or 0x7F <= ord(c) < 0xA0
        or bidirectional(c) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
        or c in "\u200e\u200f\u061c\u2028\u2029"
        or 0xD800 <= ord(c) < 0xE000
        for c in text
    )


@given(st.text(st.characters(exclude_categories=[])))
def test_whatever_is_no_text_is_escaped(text):
    shown = printable(text)
    assert is_harmless(shown)
    assert printable(shown) == shown
    assert (shown == text) or not is_harmless(text) or not text.isprintable()


@given(st.recursive(st.text(st.characters(exclude_categories=[])), st.lists))
def test_json_stays_the_same_json(value):
    for style in ({"ensure_ascii": False}, {}):
        assert json.loads(printable(json.dumps(value, **style))) == value


def test_texts_in_any_script_stay_as_they_are():
    for text in ("«é»\u00a0; \u3000日本", "سلام\u200c‌ها", "👩\u200d🌾 हिन्दी क\u200d", "a\n\tb"):
        assert printable(text) == text


def shown(result):
    """What a command has printed, which must be harmless."""
    text = result.out + result.err
    assert is_harmless(text), text
    assert "Traceback" not in text
    return text


def test_names_in_a_ledger_are_shown_escaped(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    index = run / "ledger/ledger.json"
    content = json.loads(index.read_text())
    content["base"] |= {"name": EVERYTHING, "architecture": EVERYTHING, "dtype": EVERYTHING}
    index.write_text(json.dumps(content))
    assert r"base \u001b[2J\u001b[31m" in shown(hedgerow("ledger", "show", run))
    shown(hedgerow("ledger", "verify", run))
    result = hedgerow("export", run, tmp_path / "out", "--to", "merged")
    assert (result.code, r"\u001b]0;title\u0007" in shown(result)) == (2, True)
    result = hedgerow("run", experiment(), "federation.rounds=3", "--out", run, "--resume")
    assert (result.code, "\\u001b" in shown(result)) == (2, True)
    content["base"][EVERYTHING] = content[EVERYTHING] = 1
    index.write_text(json.dumps(content))
    assert hedgerow("ledger", "show", run).code == 2
    shown(hedgerow("ledger", "show", run))


@pytest.mark.parametrize("evil", EVIL)
def test_keys_and_values_of_files_are_shown_escaped(hedgerow, experiment, tmp_path, evil):
    bad = f"a{EVIL[evil]}"
    path = experiment()
    text = path.read_text()
    for line in (f"{json.dumps(bad)}: 1\n", f"about: {json.dumps([bad])}\n", f"{bad}\n"):
        path.write_text(text + line)
        result = hedgerow("run", path, "--out", tmp_path / "run")
        assert result.code == 2
        shown(result)
    path.write_text(text)
    result = hedgerow("run", path, f"method.{bad}=1", "--out", tmp_path / "run")
    assert result.code == 2
    shown(result)
    for command in ("methods", "explain"):
        result = hedgerow(command, bad)
        assert result.code == 2
        shown(result)
    for typed in ([bad], ["run", f"--{bad}"], ["ledger", "show", tmp_path / bad]):
        result = hedgerow(*typed)
        assert result.code == 2
        shown(result)


def test_values_of_columns_and_names_of_folders_are_shown_escaped(hedgerow, experiment, tmp_path):
    rows = [{"instruction": "Say b", "output": "bbb", "kind": f"k{e}"} for e in EVIL.values()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run = tmp_path / f"r{EVIL['CSI']}{EVIL['bidi']}"
    data = {"test": "rows.json"}
    path = experiment(data=data, evaluation={"by": "kind"}, federation={"rounds": 1})
    result = hedgerow("run", path, "--out", run)
    assert result.code == 0, result.err
    assert r"r\u001b[2J\u001b[31m\u202etxt.exe" in shown(result)
    for more in ([], ["--json"]):
        result = hedgerow("evaluate", run, *more)
        assert result.code == 0, result.err
        shown(result)
    assert json.loads(result.out)["eval_loss_by"].keys() == {row["kind"] for row in rows}
    result = hedgerow("report", run, "--answers", 0, "--out", tmp_path / "page\x9b.html")
    assert result.code == 0, result.err
    assert r"page\u009b.html" in shown(result)
    assert not any(c in (tmp_path / "page\x9b.html").read_text() for c in "\x1b\x07\x00")


def test_nothing_else_prints():
    """All that is printed passes the one place, but for a script that trains the demo's model."""
    folder = Path(hedgerow.__file__).parent
    printing = [
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    ]
    assert set(printing) == {"terminal.py", "bundled/pretrain.py"}
