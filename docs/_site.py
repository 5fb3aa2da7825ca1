"""What the site has beside the pages of this folder: a reference that is made from the code.

Pages link to files of the repository as they lie beside this folder (`../examples/own_method.py`),
so that links work where the repository is browsed, too; the site has copies of those files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import typer
import typer.cli
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from hedgerow.cli import entry
from hedgerow.experiment import reference
from hedgerow.experiment.reference import Option

ROOT = Path(__file__).parents[1]
PAGES = {"bench/README.md": "measured.md"}
"""Pages of the site that are files of the repository, by their place there."""
FOLDERS = ("examples", "experiments", "bench", "src/hedgerow")
"""Folders whose files pages may link to."""
FILES = (
    *("SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "README.md"),
    "deploy/README.md",
)
CODE = (".py", ".ipynb", ".yaml")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated, and copies of the repository's files."""
    for place, make in MADE.items():
        files.append(File.generated(config, place, content=make()))
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text("utf-8")))
    linked = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    for path in [*linked, *(ROOT / name for name in FILES)]:
        if path.suffix in CODE or path.name in FILES:
            place = path.relative_to(ROOT).as_posix()
            if place not in PAGES and path.exists():
                # As they are: Markdown among them is a file to read, and no page.
                name = f"{place}.txt" if place.endswith(".md") else place
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links out of this folder lead to the site's pages and copies."""
    if "/" in page.file.src_uri:
        return markdown
    if page.file.src_uri in PAGES.values():
        # The file's own links are those of its folder.
        source = next(source for source, place in PAGES.items() if place == page.file.src_uri)
        markdown = re.sub(r"\]\((?!https?:|#|\.\./)", f"](../{Path(source).parent}/", markdown)

    def place_of(link: re.Match[str]) -> str:
        place, anchor = link["place"], link["anchor"] or ""
        if place in PAGES:
            return f"]({PAGES[place]}{anchor})"
        if place.startswith("docs/"):
            return f"]({place.removeprefix('docs/')}{anchor})"
        if place.endswith(".md"):
            return f"]({place}.txt)"
        return f"]({place}{anchor})"

    return re.sub(r"\]\(\.\./(?P<place>[^)#]+)(?P<anchor>#[^)]*)?\)", place_of, markdown)


# --- reference ------------------------------------------------------------------------------------


def settings() -> str:
    """Page of all keys of the experiment file, but for the options of plug-ins."""
    lines = [
        "# Settings",
        "",
        "Every key of an experiment file. `hedgerow explain KEY` says the same in a terminal, and",
        "a run writes all of them out into its own `experiment.yaml`.",
    ]
    options = [each for each in reference.page().options if not each.plugins]
    section = ""
    for option in options:
        top = option.key.partition(".")[0]
        if top != section:
            section = top
            lines += ["", f"## `{top}`"]
            if option.key == top:
                lines += ["", *_said(option)]
                continue
        lines += ["", f"### `{option.key}` {{ #{_anchor(option.key)} }}", "", *_said(option)]
    return "\n".join([*lines, ""])


def methods() -> str:
    """Page of all methods: what each does, its algorithm, what it allows, its own options."""
    lines = [
        "# Methods",
        "",
        "`hedgerow methods NAME` says the same of one, also of a plug-in.",
        "",
    ]
    names = [each.name for each in reference.listed("method")]
    titles = list(reference.abilities_of(names[0]))
    lines += [f"| method | {' | '.join(titles)} |", "| --- " * (len(titles) + 1) + "|"]
    words = {True: "yes", False: "no", None: "–"}
    for name in names:
        answers = reference.abilities_of(name)
        cells = [words[answers.get(title)] for title in titles]
        lines.append(f"| [`{name}`](#{name}) | {' | '.join(cells)} |")
    lines += ["", "With default options; `–` is where the question does not arise."]
    return "\n".join([*lines, *_plugins("method"), *_shared(names), ""])


def parts() -> str:
    """Page of what methods and local training are composed of."""
    lines = [
        "# Parts",
        "",
        "What methods and local training are composed of, by the key that names it.",
    ]
    titles = {
        "method.server": "Server optimisers",
        "method.up": "Codecs",
        "training.optimizer": "Optimisers of clients",
        "training.objective": "Objectives",
        "training.trainer": "Trainers",
    }
    for place, title in titles.items():
        key = "`method.up`, `method.down`" if place == "method.up" else f"`{place}`"
        lines += ["", f"## {title}: {key}", *_plugins(place, "###")]
    return "\n".join([*lines, ""])


def metrics() -> str:
    """Page of all metrics."""
    lines = [
        "# Metrics",
        "",
        "What `evaluation.metrics` and `hedgerow evaluate --metrics` may name.",
    ]
    return "\n".join([*lines, *_plugins("evaluation.metrics"), ""])


def commands() -> str:
    """Page of all commands, as their `--help` has it."""
    command = typer.main.get_command(entry.app)
    context = typer.Context(command, info_name="hedgerow")
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="hedgerow", title="Commands")
    # An example is a command, and a text of typer's own is not for here.
    text = re.sub(r"^Example: (.+)$", r"Example: `\1`", text, flags=re.MULTILINE)
    return re.sub(r"^\* `--(install|show)-completion`.*\n", "", text, flags=re.MULTILINE)


def _plugins(place: str, level: str = "##") -> Iterable[str]:
    for plugin in reference.listed(place):
        # Optimisers of clients and of the server, on one page, share names.
        anchor = _anchor(f"{place}.{plugin.name}" if level == "###" else plugin.name)
        yield from ("", f"{level} `{plugin.name}` {{ #{anchor} }}", "")
        summary = plugin.summary[:1].upper() + plugin.summary[1:]
        source = f" Source: {plugin.reference}." if plugin.reference else ""
        yield f"{_text(summary)}.{source}"
        description = reference.description(place, plugin.name).partition("\n\n")[2]
        if place == "method" and description:
            yield from ("", description)
        own, shared = reference.plugin_options(place, plugin.name)
        if own:
            yield from ("", "Options:", "")
            yield from (_item(option, place) for option in own)
        if place == "method" and shared:
            names = {o.key.removeprefix(f"{place}.").partition(".")[0]: None for o in shared}
            yield from ("", f"Shared with other methods: {', '.join(f'`{n}`' for n in names)}.")


def _shared(names: Iterable[str]) -> Iterable[str]:
    """Options that methods inherit, each once, with those that have it."""
    having: list[tuple[Option, list[str]]] = []
    for name in names:
        for option in reference.plugin_options("method", name)[1]:
            same = [of for known, of in having if replace(option, plugins=known.plugins) == known]
            if same:
                same[0].append(name)
            else:
                having.append((option, [name]))
    yield from ("", "## Options that several methods share")
    for option, those in sorted(having, key=lambda each: each[0].key):
        of = ", ".join(f"`{name}`" for name in those)
        yield from ("", f"{_item(option, 'method')} *Of {of}.*")


def _item(option: Option, place: str) -> str:
    """Item of a list about an option of what `place` names."""
    meaning = _text(" ".join(option.meaning.split()))
    return f"* **`{option.key.removeprefix(f'{place}.')}`** ({_form(option)}). {meaning}"


def _said(option: Option) -> Iterable[str]:
    yield from (f"*{_form(option)}*", "", _text(option.meaning))


def _form(option: Option) -> str:
    default = "required" if option.required else f"default `{_value(option.default)}`"
    return "; ".join(filter(None, [option.type, option.range, default]))


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False).strip('"')


def _text(text: str) -> str:
    """Text whose `<` and `*` Markdown leaves alone, outside code."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([*_<>|\[\]])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def _anchor(name: str) -> str:
    return name.replace(".", "-").replace(":", "-")


MADE: Mapping[str, Callable[[], str]] = {
    "reference/settings.md": settings,
    "reference/methods.md": methods,
    "reference/parts.md": parts,
    "reference/metrics.md": metrics,
    "reference/commands.md": commands,
}
