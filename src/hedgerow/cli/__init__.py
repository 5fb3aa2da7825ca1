"""The command line: each command turns what is typed into calls of the package, and prints."""

from hedgerow.cli.entry import main

__all__ = ["main"]
