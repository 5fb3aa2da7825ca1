"""hedgerow methods, explain, demo: what there is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hedgerow.cli.frame import (
    AsJson,
    app,
)
from hedgerow.errors import UserError
from hedgerow.files import to_json
from hedgerow.terminal import show

if TYPE_CHECKING:
    from hedgerow.experiment.reference import Listed, Option, Page


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A method, by its name or as package.module:Class."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or show one with its algorithm and options.

    Example: hedgerow methods flora
    """
    from hedgerow import console
    from hedgerow.experiment import reference

    if name is None:
        known = reference.listed("method")
        if as_json:
            _print_json([{**asdict(m), "abilities": reference.abilities_of(m.name)} for m in known])
            return
        rows = [(method.name, method.summary, method.reference) for method in known]
        console.table("", ["method", "what it does", "paper"], rows, numbers=False)
        console.out.print("one of them in full: hedgerow methods NAME")
        return
    method = reference.about("method", name)
    description = reference.description("method", name)
    own, shared = reference.plugin_options("method", name)
    able = reference.abilities_of(name)
    if as_json:
        options = {"own_options": _plain(own), "shared_options": _plain(shared)}
        _print_json({**asdict(method), "abilities": able, "description": description, **options})
        return
    console.paragraphs(f"{name}: {method.summary}")
    if method.reference:
        console.paragraphs(f"paper: {method.reference}")
    console.out.print()
    console.paragraphs(description)
    for answer, words in {True: "yes", False: "no"}.items():
        if found := [title for title, given in able.items() if given is answer]:
            console.out.print()
            console.paragraphs(f"{words}, by default: {', '.join(found)}")
    for title, group in {"its own": own, "shared with other methods": shared}.items():
        if group:
            console.out.print(f"\nOptions, {title}:")
            _say_in_full(group, plugins=False)


@app.command()
def explain(
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY.PATH",
            help="A section, or a key in one; with --memory, KEY.PATH=VALUE as in run.",
        ),
    ] = None,
    memory: Annotated[
        Path | None,
        typer.Option(
            metavar="EXPERIMENT.yaml",
            help="Say what a client, a site and the server of this experiment will hold in memory.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain the keys of an experiment file.

    Without a key, all are listed in a line each; of one, type, range, default and meaning are told.
    Of a key that names a plug-in, as method, there are the plug-ins (explain method), an option of
    any of them (explain method.ranks) and those of one (explain method.flora).

    With --memory, what an experiment will hold is told by part, and nothing is read but the base
    model's config.json: hedgerow explain --memory experiment.yaml training.batch_size=4

    Example: hedgerow explain training.schedule
    """
    from hedgerow import console
    from hedgerow.experiment import reference

    if memory is not None:
        _explain_memory(memory, keys or [], as_json=as_json)
        return
    if keys and len(keys) > 1:
        raise UserError(f"explain tells of one key at a time: give {keys[0]} alone")
    key = keys[0] if keys else None
    page = reference.page(key or "")
    if as_json:
        plugins = [asdict(plugin) for plugin in page.plugins]
        _print_json({"key": page.key, "keys": _plain(page.options), "plugins": plugins})
    elif key is None:
        _say_all(page)
    elif key in reference.REGISTRIES:
        _say_plugins(page)
    else:
        for plugin in page.plugins:
            console.paragraphs(f"{plugin.name}: {_about(plugin)}")
        _say_in_full(page.options, plugins=not page.plugins)


def _explain_memory(experiment: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """What the participants of an experiment will hold, as a table of parts by role."""
    from hedgerow import api, console
    from hedgerow.footprint import HOST

    found = api.explain_memory(experiment, *overrides)
    roles = found.roles
    if as_json:
        peaks = {name: {**asdict(role), "peak": role.peak} for name, role in roles.items()}
        _print_json({**asdict(found), **peaks})
        return
    parts = dict.fromkeys(part for role in roles.values() for part in role.parts)
    rows = [[part, *(_in_role(role.parts.get(part)) for role in roles.values())] for part in parts]
    peak = ["peak", *(console.size(role.peak) for role in roles.values())]
    when = ["", *(role.stage for role in roles.values())]
    console.table("", ["", *roles], [when, *rows, peak])
    host = [part for part in parts if part in HOST]
    say = console.paragraphs
    say("The interpreter and its libraries come on top (some 0.6 GB).")
    if host:
        say(f"Where a GPU trains, these are in host memory: {', '.join(host)}.")
    say(
        f"A round of {found.clients} clients: each sends {console.size(found.update)} and gets "
        f"{console.size(found.entry)}, by which the ledger grows; the server gets "
        f"{console.size(found.bytes_up)} and sends {console.size(found.bytes_down)} in all; each "
        f"client keeps {console.size(found.kept)} on its disk for the next round, in two copies."
    )
    for note in found.notes:
        say(note)


def _in_role(size: int | None) -> str:
    from hedgerow import console

    return "" if size is None else console.size(size)


def _say_all(page: Page) -> None:
    """Every key in a line, below its section's."""
    from hedgerow import console

    for option in page.options:
        if "." not in option.key:
            console.out.print()
            console.entry(option.key, option.first_sentence, indent=_KEYS)
        else:
            console.entry(f"  {option.key}", _line(option), indent=_KEYS)
    console.out.print("\none of them in full: hedgerow explain KEY.PATH")


def _say_plugins(page: Page) -> None:
    """What may stand at a key, and the options of each in a line."""
    from hedgerow import console

    places = [option for option in page.options if option.key == page.options[0].key]
    options = page.options[len(places) :]
    _say_in_full(places, plugins=len(places) > 1)
    console.out.print()
    for plugin in page.plugins:
        console.entry(f"  {plugin.name}", _about(plugin), indent=_KEYS)
    if options:
        console.out.print("\nTheir options:\n")
    for option in options:
        console.entry(f"  {option.key}", _line(option), indent=_KEYS)
    console.out.print(f"\none of them in full: hedgerow explain {places[0].key}.NAME")


_KEYS = 34
"""Columns of a key beside its line."""


def _about(plugin: Listed) -> str:
    return f"{plugin.summary} ({plugin.reference})" if plugin.reference else plugin.summary


def _line(option: Option) -> str:
    having = f" [{_having(option.plugins)}]" if option.plugins else ""
    return f"{option.first_sentence} ({option.type}; {_default(option)}){having}"


def _having(plugins: Sequence[str]) -> str:
    return ", ".join(plugins) if len(plugins) <= 3 else f"{len(plugins)} have it"


def _say_in_full(options: Sequence[Option], *, plugins: bool = True) -> None:
    """Everything about each key."""
    from hedgerow import console

    for number, option in enumerate(options):
        if number or not plugins:
            console.out.print()
        console.out.print(option.key, style="bold")
        bounds = f"; {option.range}" if option.range else ""
        console.paragraphs(f"{option.type}{bounds}; {_default(option)}", indent=4)
        if option.plugins and plugins:
            console.paragraphs(f"of {', '.join(option.plugins)}", indent=4)
        console.paragraphs(option.meaning, indent=4)


def _default(option: Option) -> str:
    if option.required:
        return "required"
    plain = option.default if isinstance(option.default, str) else json.dumps(option.default)
    return f"default {plain}"


def _plain(options: Sequence[Option]) -> list[dict[str, Any]]:
    return [asdict(option) for option in options]


def _print_json(content: Any) -> None:
    show(to_json(content, ensure_ascii=False, indent=2))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the runs and their data.")] = Path(
        "demo-run"
    ),
) -> None:
    """Train the built-in model on eight clients, by three methods.

    It takes a minute or two on two cores, and no network.

    Example: hedgerow demo --out demo-run
    """
    from hedgerow import demo

    demo.run(out)
