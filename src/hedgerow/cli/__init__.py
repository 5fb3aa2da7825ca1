"""The command line: each command turns what is typed into calls of the package, and prints."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; whoever interrupts it before it has begun sees no traceback."""
    try:
        # Here, since it takes most of a second.
        from hedgerow.cli import entry
    except KeyboardInterrupt:
        print("hedgerow: interrupted", file=sys.stderr)
        sys.exit(130)
    entry.main()
