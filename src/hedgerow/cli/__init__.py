"""The command line: each command turns what is typed into calls of the package, and prints."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from types import FrameType, ModuleType

from hedgerow.terminal import say


def main() -> None:
    """Run the command line; whoever interrupts it while it begins sees no traceback."""
    try:
        _imported("hedgerow.cli.entry").main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second has nothing left to end
        say("hedgerow: interrupted")
        sys.exit(130)


def _imported(name: str) -> ModuleType:
    """Import a module, which takes most of a second.

    Raises:
        KeyboardInterrupt: it was interrupted, whatever that has become on its way: Python and
            libraries in C make other errors of it.
    """
    is_interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        signal.default_int_handler(number, frame)

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        return importlib.import_module(name)
    signal.signal(signal.SIGINT, interrupt)
    try:
        return importlib.import_module(name)
    except Exception as error:
        if is_interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
