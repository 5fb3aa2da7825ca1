"""Relative paths of an experiment, made absolute."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hedgerow.data.sources import may_be_on_hub
from hedgerow.errors import UserError
from hedgerow.files import check_name, expanded
from hedgerow.names import MEMORY


def make_paths_absolute(content: Any, folders: Sequence[Path]) -> None:
    """Replace each relative path in `content` (in place) by the absolute one that is meant."""
    if not isinstance(content, dict):
        return
    model, data = content.get("model"), content.get("data")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"] = _absolute_unless_hub_name(model["path"], folders, "model.path")
    if not isinstance(data, dict):
        return
    for key in ("source", "test"):
        if isinstance(data.get(key), str):
            data[key] = _absolute_unless_hub_name(data[key], folders, f"data.{key}")
    if isinstance(data.get("prompt"), str) and not data["prompt"].replace("-", "").isalpha():
        data["prompt"] = absolute(data["prompt"], folders, "data.prompt")
    for key in ("clients", "client_test"):
        if data.get(key) is not None:
            data[key] = _each_absolute(data[key], folders, f"data.{key}")


def _each_absolute(clients: Any, folders: Sequence[Path], key: str) -> Any:
    """A pattern, mapping or list of clients' files, with absolute paths; another value as it is."""
    if isinstance(clients, dict):
        return {name: _own_absolute(files, folders, key) for name, files in clients.items()}
    if isinstance(clients, list):
        return [
            client | {"file": _own_absolute(client["file"], folders, key)}
            if isinstance(client, dict) and "file" in client
            else absolute(client, folders, key)
            for client in clients
        ]
    return absolute(clients, folders, key)


def _own_absolute(files: Any, folders: Sequence[Path], key: str) -> Any:
    """One client's file, or several."""
    if isinstance(files, list):
        return [absolute(file, folders, key) for file in files]
    return absolute(files, folders, key)


def _absolute_unless_hub_name(path: str, folders: Sequence[Path], key: str) -> Any:
    check_name(path, key)
    is_here = any((folder / path).exists() for folder in folders)
    return path if not is_here and may_be_on_hub(path) else absolute(path, folders, key)


def absolute(path: Any, folders: Sequence[Path], key: str) -> Any:
    """`path` in the first folder that has it, or in the last.

    Args:
        key: key that gives the path, for messages.

    Raises:
        UserError: no file can have this name, or it is empty.
    """
    # What is no text is left as it is: validation will name its key.
    if not isinstance(path, str) or path == MEMORY:
        return path
    check_name(path, key)
    if not path.strip():
        raise UserError(f"`{key}` is empty: give a file")
    places = [os.path.abspath(folder / expanded(path)) for folder in folders]
    return next((p for p in places if Path(p.replace("{}", "0")).exists()), places[-1])
