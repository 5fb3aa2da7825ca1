"""Names: what a client may be called, and what the built-in model and tasks are called."""

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""A client's name becomes a file name and a key prefix."""

DEMO = "demo"
"""`model.path`, `data.source` and `data.test` of what is built in."""

MEMORY = "(memory)"
"""`model.path`, and what stands for a file of data, where Python objects were handed over."""
