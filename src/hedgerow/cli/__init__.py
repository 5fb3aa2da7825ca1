"""The command line: each command turns what is typed into calls of the package, and prints."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hedgerow.collector import look_seldom
from hedgerow.terminal import say


def main() -> None:
    """Run the command line; whoever interrupts it while it begins sees no traceback."""
    look_seldom()
    try:
        # Here, since it takes most of a second.
        with _interruptible():
            from hedgerow.cli import entry

        entry.main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second has nothing left to end
        say("hedgerow: interrupted")
        sys.exit(130)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have an interrupt end imports, though Python and libraries make other errors of it, or none.

    Raises:
        KeyboardInterrupt: there was one.
    """
    is_interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        signal.default_int_handler(number, frame)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if not is_interrupted:
            raise
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if is_interrupted:
        raise KeyboardInterrupt
