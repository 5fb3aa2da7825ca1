"""What runs in the process of its own: it reads requests, and bounds itself for each.

It imports neither torch nor anything else that takes long, and only what a request needs.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from hedgerow.errors import readable, reason_of

_Handler = Callable[[Mapping[str, Any], int], Any]

_MEGABYTE = 10**6
_COPIES = 50
"""Bytes of memory for each byte of a request, which is read, held, written and sent."""
_WRITTEN = 100_000
"""Characters that a template may write for each conversation, and ten times what it is given."""


def serve() -> None:
    """Handle what arrives by the standard input, until whoever sends it has ended."""
    requests = Connection(os.dup(sys.stdin.fileno()), writable=False)
    replies = Connection(os.dup(sys.stdout.fileno()), readable=False)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what anybody prints
    _limit(resource.RLIMIT_CORE, 0)
    handlers: dict[str, tuple[_Handler, int | None]] = {}
    with suppress(EOFError, BrokenPipeError):
        while True:
            message = requests.recv_bytes()
            reply = json.dumps(_replied(message, handlers), ensure_ascii=False)
            replies.send_bytes(reply.encode("utf-8", "surrogatepass"))


def _replied(message: bytes, handlers: dict[str, tuple[_Handler, int | None]]) -> Mapping[str, Any]:
    """The reply to a message, or which of its bounds it has exceeded."""
    what, bounds, request = json.loads(message.decode("utf-8", "surrogatepass"))
    if what not in handlers:
        handlers[what] = {"render": _renderer, "match": _matcher}[what](), _size()
    handle, before = handlers[what]
    seconds = bounds["seconds"] + len(message) // _MEGABYTE
    _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + seconds)
    if before is not None:
        _limit(resource.RLIMIT_AS, before + bounds["memory"] + _COPIES * len(message))
    try:
        return {"reply": handle(request, len(message))}
    except MemoryError:
        return {"exceeded": "memory"}
    except _TooLong:
        return {"exceeded": "length"}


class _TooLong(Exception):
    pass


def _size() -> int | None:
    """Bytes of this process's addresses; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return None
    return pages * resource.getpagesize()


def _limit(kind: int, wanted: int) -> None:
    most = resource.getrlimit(kind)[1]
    soft = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(kind, (soft, most))


# --- what can be asked for ------------------------------------------------------------------------


def _renderer() -> _Handler:
    # transformers looks for torch, and imports it; a template has no use for it.
    sys.modules["torch"] = cast("ModuleType", None)
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(request: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
        outcomes: list[dict[str, Any]] = []
        room = _WRITTEN * len(request["asked"]) + 10 * size
        for conversation, generation, *more in request["asked"]:
            try:
                [text], parts = render_jinja_template(
                    conversations=[conversation],
                    tools=more[0] if more else None,
                    chat_template=request["template"],
                    add_generation_prompt=bool(generation),
                    return_assistant_tokens_mask=generation is None,
                    continue_final_message=request["continued"],
                    **request["variables"],
                )
            except MemoryError:
                raise
            except Exception as error:  # a template is a program, and may fail in any way
                outcomes.append(_failure(error))
                continue
            room -= len(text)
            if room < 0:
                raise _TooLong
            outcomes.append({"done": text if generation is not None else [text, parts[0]]})
        return outcomes

    return render


def _matcher() -> _Handler:
    def match(request: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
        matching = {"match": re.match, "fullmatch": re.fullmatch}[request["how"]]
        outcomes: list[dict[str, Any]] = []
        for expression in request["expressions"]:
            try:
                found = [bool(matching(expression, text)) for text in request["texts"]]
            except (re.error, RecursionError, OverflowError) as error:
                outcomes.append(_failure(error))
            else:
                outcomes.append({"done": found})
        return outcomes

    return match


def _failure(error: Exception) -> dict[str, str]:
    return {"failure": readable(reason_of(error)) or type(error).__name__}


if __name__ == "__main__":
    serve()
