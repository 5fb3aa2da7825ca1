"""The command line: each command turns what is typed into calls of the package, and prints."""

from hedgerow.cli.entry import main
from hedgerow.cli.frame import app

__all__ = ["app", "main"]
