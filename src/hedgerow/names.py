"""What a client may be called: its name becomes a file name and a key prefix."""

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
