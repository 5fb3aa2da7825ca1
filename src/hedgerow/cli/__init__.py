"""The command line: each command turns what is typed into calls of the package, and prints."""

from __future__ import annotations

import signal
import sys

from hedgerow.terminal import say


def main() -> None:
    """Run the command line; whoever interrupts it while it begins sees no traceback."""
    try:
        # Here, since it takes most of a second.
        from hedgerow.cli import entry

        entry.main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second has nothing left to end
        say("hedgerow: interrupted")
        sys.exit(130)
