"""What is known to work: every architecture, chat template and data file that somebody tried.

`python -m tests.matrix.report OUT.md` writes what `docs/compatibility.md` says of architectures.
"""
