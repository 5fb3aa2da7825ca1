"""The documentation: its links, its blocks, and the site that is made of it."""

from __future__ import annotations

import html
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hedgerow
from hedgerow import demo, tracking
from hedgerow.audit.found import AUDIT
from hedgerow.engines.flower import keys, server
from hedgerow.experiment import reference
from hedgerow.federation.secure import UNMASKED
from hedgerow.ledger import INDEX
from hedgerow.privacy.noise import PRIVACY_KEY
from hedgerow.privacy.releases import RELEASES
from hedgerow.runs import directory
from hedgerow.runs.personal import CLIENTS
from hedgerow.runs.rows import METRICS_FILE, ROWS_BY_CLIENT, SENT_BY_CLIENT, read_rows

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "bench/README.md", "experiments/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Their blocks are run by test_contributing.py and test_containers.py.
LINKING = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "deploy/README.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
TOLD_IN = {"method": "methods", "evaluation.metrics": "metrics"}
"""Page of the reference about what a key names, where it is not `parts`."""
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, kind: str) -> list[tuple[str, str]]:
    """Blocks of a kind, each with why it is not run (or nothing)."""
    found = BLOCK.finditer(page.read_text("utf-8"))
    return [(each["code"], each["why"] or "") for each in found if each["kind"] == kind]


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_lead_to_files_of_the_repository(page):
    for link in LINK.findall(page.read_text("utf-8")):
        target = (page.parent / link).resolve()
        # Not pages that the site alone has, since they are made of code.
        assert target.exists(), link


FILES = (ROOT / "docs/reference/files.md").read_text("utf-8")
PRIVATE = "{level: client, clip: 1.0, noise_multiplier: 1.0, delta: 0.001, %s}"


def test_every_file_of_a_run_directory_that_has_a_name_is_told():
    names = [AUDIT, CLIENTS, INDEX, METRICS_FILE, PRIVACY_KEY, RELEASES, UNMASKED, tracking.FILE]
    names += [directory.EXPERIMENT, directory.DATA, directory.LOCK, directory.NOISE]
    names += [keys.KEYS, server.RUN]
    assert [name for name in names if not re.search(rf"`{re.escape(name)}[/`]", FILES)] == []


@pytest.mark.parametrize(
    "changes",
    [
        ["data.client_test=client_{}.json", "federation.keep_updates=true"],
        ["method=fedavg", "method.server=momentum", "federation.weights=krum"],
        ["method=fedavg", f"privacy={PRIVATE % 'quantile: 0.5'}"],
        ["method=fedavg", f"privacy={PRIVATE % 'bands: 2'}"],
        ["method=fedavg", "federation.secure=true"],
        ["method=standalone", "evaluation.metrics=[exact_match]"],
    ],
    ids=["kept", "robust", "private", "banded", "secure", "apart"],
)
def test_what_runs_leave_is_told(changes, hedgerow, experiment, tmp_path):
    out = tmp_path / "run"
    done = hedgerow("run", experiment(), *changes, "--out", out)
    assert done.code == 0, done.err
    files = {path.name + "/" * path.is_dir() for path in out.iterdir()}
    keys = set().union(*read_rows(out))
    if "data.client_test" in changes[0]:
        assert {ROWS_BY_CLIENT, SENT_BY_CLIENT, "train_loss_by_client"} <= keys
    untold = {word for word in files | keys if f"`{word}`" not in FILES}
    # Metrics, and the parts of a round that take time, are told in general.
    assert {word for word in untold if not word.endswith("_seconds")} <= {"exact_match"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page):
    fences = re.findall(r"^```(\w*)$", page.read_text("utf-8"), re.M)
    assert set(fences[::2]) <= {"sh", "yaml", "python", "text", "nginx", "toml"}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_is_python_and_runs(page, tmp_path):
    for code, why in blocks(page, "python"):
        if why:
            # An outline has headers without bodies.
            whole = re.sub(r":( +#[^\n]*)$", r": ...\1", code, flags=re.M)
            compile(whole, name_of(page), "exec")
        else:
            prelude = "import torch\ndelta = torch.randn(5000)\n"
            done = subprocess.run(
                [sys.executable, "-c", prelude + code], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, code + done.stderr


def test_pictures_have_the_numbers_of_the_tables():
    made = runpy.run_path(str(ROOT / "docs/_pictures.py"), run_name="imported")
    columns, losses = made["losses_by_epsilon"]()
    assert columns == ["without", "ε = 8", "ε = 3", "ε = 1"]
    assert {len(each) for each in losses.values()} == {len(columns)}
    assert losses["diloco"][0] == (0.751, 0.042)
    rises = made["losses_under_attack"]()
    assert {len(each) for each in rises.values()} == {len(made["RULES"])}
    assert rises["flora"] == [2.3, 0.2, 1.9, None, 0.9]
    drawn = {"epsilon": made["epsilon"](), "attacks": made["attacks"]()}
    drawn |= {"stacking": made["stacking"](), "round": made["ROUND"]}
    drawn |= {"parts": made["PARTS"], "rooms": made["ROOMS"]}
    for name, drawing in drawn.items():
        assert (ROOT / f"docs/{name}.svg").read_text("utf-8") == drawing, name


@pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="outside the repository")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    said = {
        name: html.unescape((tmp_path / f"site/reference/{name}/index.html").read_text("utf-8"))
        for name in ("settings", "methods", "parts", "metrics", "commands", "python")
    }
    pages = [reference.page(), reference.page("method.server"), reference.page("method.up")]
    options = [option for page in pages for option in page.options]
    assert len(options) > 200
    for option in options:
        assert option.meaning, option.key
        if option.plugins:
            places = [each for each in reference.REGISTRIES if option.key.startswith(f"{each}.")]
            place = max(places, key=len)
            page = TOLD_IN.get(place, "parts")
            assert f">{option.key.removeprefix(place + '.')}<" in said[page], option.key
        elif not option.key.startswith(("method.server.", "method.up.")):
            assert f">{option.key}<" in said["settings"], option.key
    for place in reference.REGISTRIES:
        page = TOLD_IN.get(place, "parts")
        # Codecs are the same both ways.
        key = "method.up" if place == "method.down" else place
        before = f"{key.replace('.', '-')}-" if page == "parts" else ""
        for plugin in reference.listed(place):
            assert f'id="{before}{plugin.name}"' in said[page], plugin.name
    for name, page in said.items():
        ids = re.findall(r'<h\d id="([^"]+)"', page)
        assert len(ids) == len(set(ids)), name
    public = set(hedgerow.__all__) - {"methods", "sketch", "testing"}  # which are modules
    for name in public:
        assert re.search(rf'id="hedgerow[a-z_.]*\.{name}"', said["python"]), name


# --- commands -------------------------------------------------------------------------------------

# docs/deploy.md is run by test_deploy.py, which starts what goes on in terminals of their own.
WITH_COMMANDS = [
    page
    for page in PAGES
    if name_of(page) != "docs/deploy.md" and any(not why for _, why in blocks(page, "sh"))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name: the demo's experiment and runs, small; the examples."""
    folder = tmp_path_factory.mktemp("docs")
    path = demo.prepare(folder / "demo-run")
    content = yaml.safe_load(path.read_text())
    content["training"]["steps"], content["data"]["test_rows"] = 1, 8
    path.write_text(yaml.safe_dump(content))
    content["federation"]["rounds"] = 1
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    shutil.copytree(folder / "demo-run/data", folder / "data")
    for name in ("examples", "experiments"):
        shutil.copytree(ROOT / name, folder / name)
    for method in ("flora", "zero_padding", "standalone"):
        out = ["federation.rounds=2", "--out", f"demo-run/{method}"]
        run(["hedgerow", "run", "demo-run/experiment.yaml", f"method.name={method}", *out], folder)
    return folder


def run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_commands_run_as_they_are_written(place, page):
    for code, why in blocks(page, "sh"):
        if not why:
            run(["bash", "-ec", code], place)
